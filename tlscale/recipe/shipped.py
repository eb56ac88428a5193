"""The recipes that come with tlscale.

Promise: they are found both in a checkout (`recipes/` next to the package) and in an installed wheel
(`tlscale/_recipes`), and copying one never overwrites a file.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tlscale.errors import RecipeError, sentences, suggestion

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_recipes(package: Path = _PACKAGE) -> dict[str, Path]:
    """Return name (without `.yaml`) -> file, sorted by name; empty where no recipes came with the package."""
    inside = package / "_recipes"
    # Not the other way round: next to an installed package, `recipes/` would be somebody else's.
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """Return the first comment line at the head of a recipe; empty when it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and text.strip("# "):
            return text.strip("# ")
        if text and not text.startswith("#"):
            break
    return ""


def copy_recipe(name: str, target: str | Path, package: Path = _PACKAGE) -> Path:
    """Copy a shipped recipe.

    Args:
        name: with or without `.yaml`.
        target: the new file, which is returned, or a folder that is there, which then gets `<name>.yaml`.

    Raises:
        RecipeError: there is no such recipe, the target exists, or it cannot be written.
    """
    known = shipped_recipes(package)
    name = name.removesuffix(".yaml")
    if name not in known:
        listed = ", ".join(known) or "none"
        remedy = sentences(suggestion(name, known), f"There are: {listed}.")
        raise RecipeError(f"no shipped recipe is called '{name}'", remedy=remedy)
    target = Path(target).expanduser()
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # x: a file that is there is left alone, also one that appears just now
            file.write(known[name].read_bytes())
    except FileExistsError:
        remedy = "Name another file, or remove it first."
        raise RecipeError(f"'{target}' exists and is left as it is", remedy=remedy) from None
    except OSError as error:
        with suppress(OSError):
            target.unlink()  # half of it
        raise RecipeError(f"'{target}' cannot be written: {error.strerror}", remedy="Name another file.") from None
    return target
