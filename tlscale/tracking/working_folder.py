"""Files that libraries look for in the folder one stands in, which may be somebody else's data.

Promise: of W&B's settings there nothing is taken but a wish to stay offline; what is left aside is named. What other
trackers would take from there is named, and such a tracker is not started where it names a server.
"""

from __future__ import annotations

import configparser
import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

_SETTINGS = (Path("wandb", "settings"), Path(".wandb", "settings"))
_OTHERS = (Path("config-defaults.yaml"),)  # W&B takes its values for those of the run
_MOST_BYTES = 1 << 20
# Trackers of Accelerate that read settings there, from documentation and code of theirs.
_OF_TRACKERS = {
    "clearml": (Path("clearml.conf"), Path("trains.conf")),
    "comet_ml": (Path(".comet.config"),),
    "dvclive": (Path(".dvc", "config"), Path(".dvc", "config.local")),
    "mlflow": (Path(".mlflow", "credentials"),),
    "swanlab": (Path(".swanlab", ".netrc"),),
}
_SERVER = re.compile(r"^\s*[\w.\"'-]*(url|uri|host|server|machine|proxy)", re.IGNORECASE | re.MULTILINE)
# Variables of the user's own that hold places, which may be relative to the working folder.
_PLACES = (
    *("WANDB_CONFIG_DIR", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"),
    *("WANDB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE", "NETRC"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)


def wandb_files() -> tuple[Path, ...]:
    """Return the files in the working folder that W&B would read."""
    return tuple(path for path in (*_SETTINGS, *_OTHERS) if os.path.lexists(path))


def wandb_settings() -> dict[str, str]:
    """Return what W&B's settings in the working folder ask for; nothing where they cannot be read."""
    found: dict[str, str] = {}
    for path in _SETTINGS:
        with contextlib.suppress(OSError, ValueError, configparser.Error):
            if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                parser = configparser.RawConfigParser()
                parser.read_string(path.read_text())
                found |= parser.items("default") if parser.has_section("default") else {}
    return found


def tracker_settings(name: str) -> tuple[tuple[Path, ...], bool]:
    """Return the files in the working folder that a tracker would take settings from, and whether any names a server.

    One that cannot be read may name one.
    """
    found = tuple(path for path in _OF_TRACKERS.get(name, ()) if os.path.lexists(path))
    return found, any(_names_server(path) for path in found)


def _names_server(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return True
        return _SERVER.search(path.read_text()) is not None
    except (OSError, ValueError):
        return True


@contextlib.contextmanager
def outside_working_folder() -> Iterator[None]:
    """Make the working folder one of this package, so that what a library looks for there is not found."""
    was = {key: os.environ[key] for key in _PLACES if os.environ.get(key)}
    os.environ.update({key: os.path.abspath(os.path.expanduser(place)) for key, place in was.items()})
    try:
        with contextlib.chdir(Path(__file__).resolve().parents[1] / "weights"):
            yield
    finally:
        os.environ.update(was)


def import_torch() -> None:
    """Import torch while the working folder is elsewhere.

    Of its wheels for CUDA one library (cuSPARSELt) names an empty folder among those in which its own libraries are
    looked for, which the system takes for the working folder: a `libcuda.so.1` there would be run.
    """
    with contextlib.suppress(ImportError), outside_working_folder():
        importlib.import_module("torch")
