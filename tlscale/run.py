"""The target of `accelerate launch tlscale/run.py RECIPE [key.path=value ...]`; the same as `tlscale run`."""

from __future__ import annotations

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    # Python puts this file's own folder first on sys.path, where our modules would hide others of the same name; its
    # parent stands in for it, so that a checkout runs without being installed.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _HERE]
    sys.path.insert(0, str(_HERE.parent))
    from tlscale.cli import main

    main(["run", *sys.argv[1:]], prog_name="tlscale")
