"""`python -m tlscale.cli`: the same as `python -m tlscale`, for the lines that people have."""

from tlscale.cli import main

if __name__ == "__main__":
    main(prog_name="tlscale")
