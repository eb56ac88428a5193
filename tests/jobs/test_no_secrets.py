"""Keys and passwords of the environment and the command line are in no file; but a recipe is kept as it was written."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.small_runs import put_small_folder, small_recipe, start
from tlscale.cli import main
from tlscale.recipe.load import load_recipe
from tlscale.recipe.shipped import shipped_recipes
from tlscale.tracking.redact import about_secrets

CANARY = "canary0123456789abcdef0123456789abcdef00"  # 40 characters, as an API key has
VARIABLES = {
    name: CANARY
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MY_PASSWORD")
}
PLACE = f"https://user:{CANARY}@host.example/photos?token={CANARY}"
IN_RECIPE = f"wandb.tags=['{PLACE}', 'api_key={CANARY}']"
"""A value that holds what looks like a secret; tags are sent to W&B."""


def holding(folder: Path) -> set[str]:
    """The files, or names of files, that hold the secret, as paths below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() or path.is_symlink()]
    assert files
    return {
        str(path.relative_to(folder)) for path in files if CANARY in path.name or CANARY.encode() in path.read_bytes()
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a run by a process of its own, whose environment and command line hold the secret."""
    place = tmp_path_factory.mktemp("run")
    data = put_small_folder(place / "data")
    changes = {"duration": "3 steps", "track": ["wandb", "tensorboard"]}
    small_recipe(place / "recipe.yaml", data, data={"source": "folder"}, **changes)
    words = ("run", str(place / "recipe.yaml"), IN_RECIPE, "--out", str(place / "runs" / "small"))
    run = start(*words, log=place / "log", **VARIABLES, WANDB_MODE="offline", TLSCALE_CACHE=str(place / "cache"))
    assert run.wait(90) == 0, (place / "log").read_text()
    return place


@pytest.mark.slow
def test_only_the_recipe_of_a_run_has_it_and_the_run_says_so(place):
    assert any("wandb" in path.parts for path in (place / "runs").rglob("*"))
    assert holding(place) == {"runs/small/recipe.yaml"}
    log = " ".join((place / "log").read_text().split())
    assert "WARNING: wandb.tags holds what looks like a password or key" in log
    assert "recipe.yaml keeps it" in log


@pytest.mark.slow
def test_no_other_command_writes_it(place, monkeypatch):
    """The secret is in each command line as far as one takes such words, and in the environment."""
    monkeypatch.chdir(place)
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    picture = next((place / "data" / "test").rglob("*.png"))
    Image.open(picture).save(place / "a.png")
    other = f"seed=1 {IN_RECIPE}".split(" ", 1)
    for code, *words in (
        (0, "predict", "runs/small", "a.png", "--out", "predictions/labels.csv"),
        (0, "predict", "runs/small", "a.png", "--out", "predictions/labels.parquet"),
        (0, "evaluate", "runs/small", "--out", "evaluation"),
        (2, "evaluate", "runs/small", "--data", PLACE, "--out", "evaluated_elsewhere"),
        (0, "export", "runs/small", "--to", "timm", "--out", "timm"),
        (0, "export", "runs/small", "--to", "hub", "--out", "hub"),
        (0, "compare", "runs/small", "--out", "table"),
        (0, "compare", "recipe.yaml", *other, "--strategies", "scratch", "--print-jobs", "--out", "jobs"),
        (0, "plan", "recipe.yaml", *other),
    ):
        monkeypatch.setattr(sys, "argv", ["tlscale", *words])
        (place / "predictions").mkdir(exist_ok=True)
        done = CliRunner().invoke(main, words, catch_exceptions=False)
        assert done.exit_code == code, done.output
        if code == 0 and "plan" not in words:
            assert CANARY not in done.output, words
    # What runs again needs the recipe: a line of a comparison names the copy that was written for it.
    assert holding(place) == {
        "runs/small/recipe.yaml",
        *(f"jobs/recipes/{path.name}" for path in (place / "jobs" / "recipes").iterdir()),
    }
    assert json.loads((place / "table" / "compare.json").read_text())["runs"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_recipe_that_ships_seems_to_hold_one(name):
    assert about_secrets(load_recipe(shipped_recipes()[name])) is None


def test_names_of_tokens_are_none(idx, tmp_path):
    rules = {"optim": {"lr_rules": [{".*cls_token.*": 0.1}]}, "freeze": ["cls_token", "pos_embed"]}
    assert about_secrets(small_recipe(tmp_path / "r.yaml", idx, **rules, loss={"class_weights": {"key": 1.0}})) is None
    for tag in (f"s3://u:{CANARY}@h", "https://h/x?sig=1", "password=1"):
        found = about_secrets(small_recipe(tmp_path / "r.yaml", idx, track=["wandb"], wandb={"tags": [tag]}))
        assert found.startswith("WARNING: wandb.tags holds")
