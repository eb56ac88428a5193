"""tlscale: transfer learning for images that computes only what is trainable.

`tlscale.load_recipe(path, overrides)`, `tlscale.run(recipe, out)` and `tlscale.load(run)` are the whole Python
interface. They are imported on first use, so that `tlscale --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_recipe", "run"]

if TYPE_CHECKING:
    from tlscale.commands.run import run
    from tlscale.models.export import load
    from tlscale.recipe.load import load_recipe

_HOMES = {"load": "tlscale.models.export", "load_recipe": "tlscale.recipe.load", "run": "tlscale.commands.run"}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tlscale' has no attribute {name!r}")
    import importlib

    if name != "load_recipe":
        from tlscale.tracking.working_folder import import_torch

        import_torch()
    return getattr(importlib.import_module(_HOMES[name]), name)
