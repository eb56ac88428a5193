"""tlscale: transfer learning for images that computes only what is trainable.

The whole Python interface, with the names of the commands: `tlscale.new(data)`, `tlscale.load_recipe(path, overrides)`,
`tlscale.plan(recipe)`, `tlscale.run(recipe, out)`, `tlscale.load(run)`, `tlscale.predict(run, images)`,
`tlscale.evaluate(run, data=...)`, `tlscale.compare(recipe, sizes=[...])`, `tlscale.export(run, to=, out=)`, and
`tlscale.TlscaleError`, of which all errors are that tlscale raises on purpose. They are imported on first use, so that
`tlscale --help` does not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "TlscaleError",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "load",
    "load_recipe",
    "new",
    "plan",
    "predict",
    "run",
]

if TYPE_CHECKING:
    from tlscale.commands.export import export
    from tlscale.commands.in_python import compare, evaluate, load, plan, run
    from tlscale.commands.new import new
    from tlscale.commands.predict import predict
    from tlscale.errors import TlscaleError
    from tlscale.recipe.load import load_recipe

_HOMES = {
    "TlscaleError": "tlscale.errors",
    "export": "tlscale.commands.export",
    "load_recipe": "tlscale.recipe.load",
    "new": "tlscale.commands.new",
    "predict": "tlscale.commands.predict",
    **dict.fromkeys(("compare", "evaluate", "load", "plan", "run"), "tlscale.commands.in_python"),
}
_WITHOUT_TORCH = ("TlscaleError", "load_recipe")


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tlscale' has no attribute {name!r}")
    import importlib

    if name not in _WITHOUT_TORCH:
        from tlscale.tracking.working_folder import import_torch

        import_torch()
    return getattr(importlib.import_module(_HOMES[name]), name)
