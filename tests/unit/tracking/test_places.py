"""What leaves the machine names no folder of it."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tlscale
from tests.small_runs import put_small_folder, put_teacher, small_recipe
from tests.wandb_records import offline_runs
from tlscale.recipe.load import load_recipe
from tlscale.tracking.redact import without_places

PLACES = ("/home/jane doe/photos", "/home/jane doe", "/data/w.safetensors")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/jane doe/photos", "photos"),
        ("/home/jane doe/photos/", "photos"),
        ("/home/jane doe/photos/train/a b.png: cut off", "train/a b.png: cut off"),
        ("/home/jane doe/photos: not used: 'x', /home/jane doe/photos/x", "photos: not used: 'x', x"),
        ("/home/jane doe/photos2/a.png", "photos2/a.png"),
        ("/data/w.safetensors", "w.safetensors"),
        ("('/srv/jane/x.png' is gone)", "('x.png' is gone)"),
        ("https://host/a/b and s3://bucket/a/b", "https://host/a/b and s3://bucket/a/b"),
        ("user/dataset at a/b/c", "user/dataset at a/b/c"),
        ("layer[12]/x/y and 3 / 4", "layer[12]/x/y and 3 / 4"),
    ],
)
def test_texts(text, shown):
    assert without_places(text, PLACES) == shown
    assert without_places({"a": [text, {"b": text}], "classes": [text]}, PLACES) == {
        "a": [shown, {"b": shown}],
        "classes": [text],
    }


@given(st.recursive(st.none() | st.integers() | st.text("abc .*:'"), lambda inner: st.lists(inner)))
def test_values_without_places_are_unchanged(value):
    assert without_places(value, PLACES) == value


@pytest.mark.slow
def test_a_run_names_no_folder_but_in_its_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    home = tmp_path / "jane doe"
    data = put_small_folder(home / "photos")
    (data / "later").mkdir()  # a note names the folder
    next((data / "train" / "Coat").iterdir()).write_bytes(b"no image")
    put_teacher(home / "weights.safetensors", in_chans=1)
    recipe = small_recipe(
        tmp_path / "recipe.yaml",
        data,
        data={"source": "folder", "on_bad_image": "skip"},
        backbone={"name": "test_resnet", "weights": str(home / "weights.safetensors")},
        duration="1 steps",
        track=["wandb", "tensorboard"],
        wandb={"entity": "jane-doe-team"},
    )
    out = tmp_path / "run"
    tlscale.run(recipe, out)
    record = json.loads((out / "run.json").read_text())
    assert record["data"]["place"] == "photos"
    assert any("later" in note for note in record["data"]["notes"])
    assert record["bad_images"]["train"][0][1].startswith("train/Coat/")
    assert "weights.safetensors" in record["weights"]["origin"]
    (run,) = offline_runs(out)
    assert run.config["data"]["path"] == "photos"
    assert run.config["backbone"]["weights"] == "weights.safetensors"
    assert run.config["run"]["data"]["place"] == "photos"
    hparams = next((out / "tensorboard").rglob("hparams.yml")).read_text()
    sent = [run.path.read_bytes(), hparams.encode(), (out / "run.json").read_bytes()]
    for secret in ("jane doe", str(tmp_path)):
        assert [secret.encode() in content for content in sent] == [False] * 3
    assert "jane-doe-team" not in hparams + (out / "run.json").read_text()
    assert load_recipe(out / "recipe.yaml") == recipe
    assert os.path.isabs(load_recipe(out / "recipe.yaml").data.path)
