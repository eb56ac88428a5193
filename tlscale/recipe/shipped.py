"""The recipes that come with tlscale.

Promise: they are found both in a checkout (`recipes/` beside the package) and in an installed wheel
(`tlscale/_recipes`), and copying one never overwrites a file.
"""

from __future__ import annotations

from pathlib import Path

from tlscale.errors import RecipeError, did_you_mean

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_recipes(package: Path = _PACKAGE) -> dict[str, Path]:
    """Name (without `.yaml`) -> file, sorted by name; empty where no recipes came with the package.

    Args:
        package: the folder of the tlscale package.
    """
    inside = package / "_recipes"
    # Not the other way round: beside an installed package, `recipes/` would be somebody else's.
    folder = inside if inside.is_dir() else package.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_summary(path: Path) -> str:
    """The first comment line at the head of a recipe; empty when it has none."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#") and text.strip("# "):
            return text.strip("# ")
        if text and not text.startswith("#"):
            break
    return ""


def copy_recipe(name: str, target: str | Path, package: Path = _PACKAGE) -> Path:
    """Copies a shipped recipe.

    Args:
        name: with or without `.yaml`.
        target: the new file, or a folder that is there, which then gets `<name>.yaml`.
        package: the folder of the tlscale package.

    Returns:
        The new file.

    Raises:
        RecipeError: there is no such recipe, the target exists, or it cannot be written.
    """
    known = shipped_recipes(package)
    name = name.removesuffix(".yaml")
    if name not in known:
        listed = ", ".join(known) or "none"
        raise RecipeError(f"no shipped recipe is called '{name}'.{did_you_mean(name, known)} There are: {listed}.")
    target = Path(target).expanduser()
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:  # x: a file that is there is left alone, also one that appears just now
            file.write(known[name].read_bytes())
    except FileExistsError:
        raise RecipeError(f"'{target}' exists and is left as it is; name another file, or remove it first") from None
    except OSError as error:
        raise RecipeError(f"'{target}' cannot be written: {error.strerror}; name another file") from None
    return target
