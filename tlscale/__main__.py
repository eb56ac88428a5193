"""`python -m tlscale`: the same as the command `tlscale`."""

from tlscale.cli import main

if __name__ == "__main__":
    main(prog_name="tlscale")
