"""Images that are found to be damaged when they are used, and complete runs that are damaged: nothing is lost."""

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import (
    as_after,
    assert_same_bits,
    assert_same_runs,
    exported,
    put_small_folder,
    result,
    small_recipe,
)
from tlscale.cli import main
from tlscale.data.sampler import micro_batches
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, DataError, ResumeError, RunFolderError
from tlscale.models.export import load
from tlscale.training.checkpoint.files import list_checkpoints
from tlscale.training.setup import set_up

LAZY = {"source": "folder", "cache_mib": 0}
CHANGES = {"evaluate": {"every": "2 steps"}, "checkpoint": {"every": "100 steps"}}
LATE = {"evaluate": {"every": "6 steps"}, "checkpoint": {"every": "100 steps"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("images"))


def recipe_of(path, folder, **data):
    return small_recipe(path / "recipe.yaml", folder, data={**LAZY, **data}, **CHANGES)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    tlscale.run(recipe_of(place, folder), place / "run")
    return place / "run"


def record_of(out):
    return json.loads((out / "run.json").read_text())["data"]


def cut_short(path):
    """Damage an image; return what repairs it."""
    content = path.read_bytes()
    path.write_bytes(content[:100])
    return lambda: path.write_bytes(content)


def in_step(folder, tmp_path, step):
    """An image that no step before this one (counted from 1) is trained on."""
    setup = set_up(recipe_of(tmp_path, folder), world_size=1)
    (batch,) = micro_batches(setup.order, step - 1, setup.split, 0)
    return setup.data.train.file_of(int(batch.rows_B[3]))


def test_a_test_image_is_found_before_the_first_step_where_all_are_decoded_anyway(folder, tmp_path):
    repair = cut_short(path := sorted((folder / "test").glob("*/*.png"))[7])
    try:
        with pytest.raises(DataError, match=r"data.on_bad_image: .*check_images=True") as caught:
            tlscale.run(recipe_of(tmp_path, folder, cache_mib=100), tmp_path / "run")
    finally:
        repair()  # other tests have the folder, too
    assert str(path) in str(caught.value)
    assert not (tmp_path / "run" / "run.json").exists(), "nothing has begun"


@pytest.mark.parametrize("way", ["repaired", "taken out", "evaluate"])
def test_a_test_image_that_is_found_at_the_end_costs_no_model(folder, whole, tmp_path, capsys, way):
    path, recipe, out = sorted((folder / "test").glob("*/*.png"))[7], recipe_of(tmp_path, folder), tmp_path / "run"
    content, repair = path.read_bytes(), cut_short(path)
    try:
        with pytest.raises(DataError, match="data.on_bad_image: .*Repair the image, or take it out") as caught:
            tlscale.run(recipe, out)
        assert caught.value.exit_code == EXIT_BAD_INPUT
        assert all(str(word) in str(caught.value) for word in (path, out / "model"))
        assert not (out / "result.json").exists()
        assert not (out / "predictions.parquet").exists()
        load(out)
        began_with = record_of(out)["scored_sha256"]
        path.unlink() if way == "taken out" else repair()
        if way == "evaluate":
            assert CliRunner().invoke(main, ["evaluate", str(out)]).exit_code == 0
            figures = json.loads((out / "evaluations" / "test" / "figures.json").read_text())
            assert figures["confusion"] == result(whole)["confusion"]
            return
        tlscale.run(recipe, out, resume=True)
    finally:
        path.write_bytes(content)
    if way == "repaired":
        assert_same_runs(whole, out)
    else:
        assert result(out)["num_images"] == 19
        assert "WARNING: the test split is not the one" in " ".join(capsys.readouterr().out.split())
        assert record_of(out)["earlier_scored_sha256"] == [began_with]


def test_training_images_cost_no_step(folder, whole, tmp_path, capsys):
    """Two of them, of which the second is used after the first; they are repaired together."""
    recipe, out = recipe_of(tmp_path, folder), tmp_path / "run"
    path, second = in_step(folder, tmp_path, 3), set_up(recipe, world_size=1).data.validation.file_of(2)
    repair, repair_second = cut_short(path), cut_short(second)
    try:
        with pytest.raises(DataError, match=r"data.on_bad_image: .*1 more, .*Up to step 2 all is saved") as caught:
            tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=LAZY, **LATE), out)
        assert str(path) in str(caught.value)
        assert [folder.name for folder in list_checkpoints(out / "checkpoints")] == ["step_00000002"]
    finally:
        repair()
        repair_second()
    other = sorted(set((folder / "train").glob("*/*.png")) - {path, second})[0]
    repair = cut_short(other)
    try:
        with pytest.raises(ResumeError, match="its data are not those"):
            tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=LAZY, **LATE), out, resume=True)
    finally:
        repair()
    capsys.readouterr()
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=LAZY, **LATE), out, resume=True)
    said = capsys.readouterr().out.replace("\n", "")
    assert all(f"{image}, which could not be read, is another file now" in said for image in (path, second))
    assert_same_bits(exported(whole), exported(out))
    assert [split for split, _ in record_of(out)["repaired"]] == ["train", "validation"]
    assert record_of(out)["used_sha256"] == record_of(whole)["used_sha256"]


def test_a_validation_image_costs_no_step_and_no_evaluation(folder, whole, tmp_path):
    recipe, out = recipe_of(tmp_path, folder), tmp_path / "run"
    path = set_up(recipe, world_size=1).data.validation.file_of(5)
    repair = cut_short(path)
    try:
        with pytest.raises(DataError, match="data.on_bad_image: .*Up to step 2 all is saved") as caught:
            tlscale.run(recipe, out)
        assert str(path) in str(caught.value)
    finally:
        repair()
    tlscale.run(recipe, out, resume=True)
    assert_same_runs(whole, out)


# -- what of a complete run is lost -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chose_early(idx, tmp_path_factory):
    """A run whose chosen step is not its last: its rate grows until it is too high."""
    place = tmp_path_factory.mktemp("early")
    small_recipe(
        place / "recipe.yaml",
        idx,
        optim={"lr": 0.3},
        schedule={"warmup": "100%", "decay": "constant"},
        duration="10 steps",
        evaluate={"every": "1 steps", "select": "loss", "choose": "best"},
    )
    tlscale.run(tlscale.load_recipe(place / "recipe.yaml"), place / "run")
    assert result(place / "run")["best"]["step"] < 9
    return place


def test_a_chosen_checkpoint_that_is_lost_is_replaced_by_what_is_there(chose_early, tmp_path, capsys):
    recipe, whole = tlscale.load_recipe(chose_early / "recipe.yaml"), chose_early / "run"
    step = result(whole)["best"]["step"]
    out = as_after(10, whole, tmp_path / "run")
    weights = out / "checkpoints" / f"step_{step:08}" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    tlscale.run(recipe, out, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert f"WARNING: step {step} was chosen, and is lost: step 10 is exported in its place" in said
    (lost,) = result(out)["lost_weights"]
    assert lost["step"] == step
    assert "model.safetensors has" in lost["why"]
    assert result(out)["weights"] == "last"
    assert result(out)["best"] == result(out)["last"]
    # Figures that take all images at once are computed of the exported weights alone.
    assert result(whole)["last"].items() <= result(out)["last"].items()
    assert "lost_weights" not in result(whole)


@pytest.mark.parametrize("damage", ["cut", "empty", "no tensors", "no model", "no result"])
def test_a_complete_run_that_is_damaged_is_finished_again(chose_early, tmp_path, capsys, damage):
    recipe, whole = tlscale.load_recipe(chose_early / "recipe.yaml"), chose_early / "run"
    out = tmp_path / "run"
    as_after(10, whole, out)
    for name in ("config.json", "model.safetensors"):
        (out / "model").mkdir(exist_ok=True)
        (out / "model" / name).write_bytes((whole / "model" / name).read_bytes())
    (out / "result.json").write_bytes((whole / "result.json").read_bytes())
    match damage:
        case "cut":
            (out / "model" / "model.safetensors").write_bytes((whole / "model" / "model.safetensors").read_bytes()[:-9])
        case "empty":
            (out / "model" / "config.json").write_bytes(b"")
        case "no tensors":
            (out / "model" / "model.safetensors").unlink()
        case "no model":
            for file in (out / "model").iterdir():
                file.unlink()
            (out / "model").rmdir()
    if damage == "no result":
        (out / "result.json").unlink()
    tlscale.run(recipe, out, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert ("was complete, and is finished again" in said) == (damage != "no result")
    assert_same_runs(whole, out)
    before = (out / "result.json").read_bytes()
    tlscale.run(recipe, out, resume=True)
    assert "is complete already" in " ".join(capsys.readouterr().out.split())
    assert (out / "result.json").read_bytes() == before


def test_a_damaged_model_that_nothing_is_left_of_is_an_error(chose_early, tmp_path):
    recipe, whole = tlscale.load_recipe(chose_early / "recipe.yaml"), chose_early / "run"
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    (out / "model" / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"there is no checkpoint to finish it from.*overwrite=True"):
        tlscale.run(recipe, out, resume=True)
    assert result(out) == result(whole)
    assert exported(whole)


# -- plan --check-images ----------------------------------------------------------------------------------------------


def plan(recipe, *words):
    return CliRunner().invoke(main, ["plan", str(recipe), "--check-images", *words])


def test_plan_checks_every_image_where_it_is_asked_to(tmp_path, monkeypatch, forks):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    folder = put_small_folder(tmp_path / "images")
    bad = [sorted((folder / split).glob("*/*.png"))[row] for split, row in (("train", 0), ("train", 50), ("test", 3))]
    repairs = [cut_short(path) for path in bad]
    recipe_of(tmp_path, folder)
    checked = plan(tmp_path / "recipe.yaml")
    output = checked.output.replace("\n", "")
    assert checked.exit_code == EXIT_BAD_INPUT
    assert all(f"{path}: the image is damaged or cut short" in output for path in bad)
    assert "data.on_bad_image: 3 of 80 images cannot be read" in output
    assert "backbone" not in output, "the plan itself would take the first images"
    skipped = plan(tmp_path / "recipe.yaml", "data.on_bad_image=skip")
    assert skipped.exit_code == 0
    assert "3 of 80 images cannot be read" in skipped.output.replace("\n", " ")
    for repair in repairs[1:]:
        repair()
    stopped = forks.run(
        *("plan", tmp_path / "recipe.yaml", "--check-images"),
        log=tmp_path / "log",
        signals=((str(bad[1]), "SIGTERM"),),
        TLSCALE_CACHE=str(tmp_path / "cache"),
    )
    assert stopped == EXIT_STOPPED, (tmp_path / "log").read_text()
    repairs[0]()
    sound = plan(tmp_path / "recipe.yaml")
    assert sound.exit_code == 0
    assert "all 80 images can be read" in sound.output
    # The same findings as those of `skip`, by content.
    digests = b"".join(path.read_bytes() for path in (tmp_path / "cache" / "checked").glob("*/*.sha256"))
    contents = {hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*.png")}
    assert {digests[at : at + 32] for at in range(0, len(digests), 32)} == contents
