"""`backbone.weights: run:PATH`: a run that starts from the model of a finished one."""

import json

import pytest
import torch

import tlscale
from tests.small_runs import small_recipe
from tlscale.errors import ModelError, RecipeError
from tlscale.training.earlier_images import compare_with_earlier
from tlscale.training.setup import set_up

HEADS = {"one layer": ["linear"], "several": [{"linear": 8}, "relu", "linear"]}


@pytest.fixture(scope="module", params=HEADS)
def earlier(request, idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    tlscale.run(small_recipe(folder / "r.yaml", idx, duration="2 steps", head=HEADS[request.param]), folder / "run")
    return folder / "run", HEADS[request.param]


def test_it_starts_where_the_other_ended(earlier, idx, tmp_path):
    run, head = earlier
    theirs = tlscale.load(run)
    started = set_up(
        small_recipe(tmp_path / "r.yaml", idx, head=head).with_(**{"backbone.weights": f"run:{run}"}), world_size=1
    )
    images = torch.rand(3, theirs.input_spec.in_chans, *2 * [theirs.input_spec.image_size])
    with torch.inference_mode():
        assert torch.allclose(started.classifier.eval()(images), theirs.model(images), atol=1e-6)
    assert started.spec.mean == theirs.input_spec.mean
    assert "of that run, too" in str(started.weights)


def test_the_head_is_new_where_it_is_another(earlier, idx, tmp_path):
    run, head = earlier
    other = [{"linear": 5}, "linear"]
    base = small_recipe(tmp_path / "r.yaml", idx, head=other).with_(**{"backbone.weights": f"run:{run}"})
    started = set_up(base, world_size=1)
    assert "head new, as that run's is another one" in str(started.weights)
    assert started.classifier.head[0].out_features == 5
    theirs = tlscale.load(run).classes
    fewer = base.with_(head=head, **{"data.classes": [*theirs, "nothing"]})
    assert "the classes are others" in str(set_up(fewer, world_size=1).weights)


def test_a_whole_run_can_be_resumed_and_named(earlier, idx, tmp_path):
    run, head = earlier
    recipe = small_recipe(
        tmp_path / "r.yaml", idx, head=head, duration="2 steps", **{"backbone": {"weights": f"run:{run}"}}
    )
    tlscale.run(recipe, tmp_path / "next")
    info = json.loads((tmp_path / "next" / "run.json").read_text())
    assert "the run" in json.dumps(info["weights"])
    assert tlscale.run(recipe, tmp_path / "next", resume=True)["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone.name": "resnet18"}, "not a resnet18"),
        ({"backbone.in_chans": 3}, "backbone.in_chans"),
        ({}, "no model"),
    ],
)
def test_what_does_not_fit_is_named(changes, words, earlier, idx, tmp_path):
    run = earlier[0] if changes else tmp_path
    recipe = small_recipe(tmp_path / "r.yaml", idx).with_(**{"backbone.weights": f"run:{run}"}, **changes)
    with pytest.raises(ModelError, match=words) as caught:
        set_up(recipe, world_size=1)
    assert caught.value.key == "backbone.weights"
    assert caught.value.remedy


def test_a_run_is_not_replaced_by_one_that_starts_from_it(earlier, idx, tmp_path):
    run, head = earlier
    model = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    recipe = small_recipe(tmp_path / "r.yaml", idx, head=head, duration="2 steps")
    for weights in (f"run:{run}", str(next(path for path in model if path.parent.name == "model"))):
        with pytest.raises(RecipeError, match="is the run that would be replaced. Write this run elsewhere"):
            tlscale.run(recipe.with_(**{"backbone.weights": weights}), run, overwrite=True)
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == model


def test_runs_that_start_from_each_other_are_noted(idx, tmp_path):
    """One was replaced after the other had started from it: what it was fitted to then cannot be told."""
    base = small_recipe(tmp_path / "r.yaml", idx, duration="1 steps")
    one, two = tmp_path / "one", tmp_path / "two"
    tlscale.run(base, one)
    tlscale.run(base.with_(**{"backbone.weights": f"run:{one}"}), two)
    from_two = base.with_(**{"backbone.weights": f"run:{two}"})
    tlscale.run(from_two, one, overwrite=True)
    setup = set_up(from_two, world_size=1)
    compare_with_earlier(setup)
    (note,) = [note for note in setup.data.notes if "backbone.weights" in note]
    assert "cannot be told" in note
    assert "starts from itself" in note
