"""`evaluate.views`: the same mean over views wherever images are evaluated, and codes of each view once."""

import json
import shutil

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

import tlscale
from tests.small_runs import as_after, put_small_folder, result, run_once, small_recipe
from tests.unit.data.test_views import batch_of
from tlscale.cli import main
from tlscale.codes.store import CodesStore
from tlscale.data.decode import decode_image
from tlscale.data.loader import stacked
from tlscale.data.transforms import InputPath, eval_transform
from tlscale.data.views import crop_places, views_of
from tlscale.errors import RecipeError, RunFolderError
from tlscale.models import model_folder
from tlscale.models.views import mean_of_views

RESNET = {"name": "test_resnet", "weights": "none", "in_chans": 1}
CROPPED = {"data": {"crop_pct": 0.8}}
FLIP = {"evaluate": {"views": ["flip"]}}
TEN = {"evaluate": {"views": ["flip", "five_crop"]}, **CROPPED}
PROBE = {"backbone": {"name": "test_resnet"}, "probe": {"kind": "ridge", "refit": False}}
KINDS = {
    "finetune": TEN,
    "finetune, uncached": {**TEN, "data": {"crop_pct": 0.8, "cache_mib": 0}, "compute": {"channels_last": True}},
    "averages": {**FLIP, "optim": {"ema_decay": 0.9}, "compute": {"precision": "fp64"}},
    "head": {**TEN, "freeze": ".*", "backbone": RESNET, "codes": {"keep": "always"}},
    "half a resnet": {
        **CROPPED,
        "freeze": r"(conv1|bn1|layer[12])\..*",
        "backbone": RESNET,
        "codes": {"keep": "always", "dtype": "float16"},
        "compute": {"precision": "bf16"},
        "evaluate": {"batch_size": 11, "views": ["five_crop"]},
    },
    "ridge": {**PROBE, **TEN},
    "early": {**PROBE, **FLIP, "codes": {"layer": ["layer2", "penultimate"], "pool": ["max", "avg"]}},
    "knn": {"backbone": RESNET, "probe": {"kind": "knn"}, **FLIP},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("data"), train=60, test=37)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Runs a kind once: its folder."""
    folder = tmp_path_factory.mktemp("runs")
    return lambda name: run_once(folder, data, name, KINDS[name])


def logits_by_hand(run, data, *, several=False):
    """The mean over views of the exported network, image by image, in double precision."""
    model = tlscale.load(run)
    spec, views = model.input_spec, views_of(model.views)
    network, path = model.model.double(), InputPath(spec, torch.float64, torch.device("cpu"), channels_last=False)
    places = [data / name for name in pq.read_table(run / "predictions.parquet")["path"].to_pylist()]
    images = [decode_image(place.read_bytes(), in_chans=spec.in_chans, max_pixels=10**6, where="") for place in places]
    joined = torch.from_numpy(stacked([eval_transform(image, spec, crop_places(model.views)) for image in images]))
    with torch.no_grad():
        outputs = [network(inputs) for inputs in path.of_views(batch_of(joined), views)]
    return mean_of_views(outputs, several=several), outputs


def softmax_of(table):
    return torch.tensor(table["logits"].to_pylist(), dtype=torch.float64).softmax(1)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "head" else pytest.mark.slow) for name in KINDS]
)
def test_everything_is_of_the_mean_over_views(name, trained, data):
    run = trained(name)
    table, figures = pq.read_table(run / "predictions.parquet"), result(run)
    expected, views = logits_by_hand(run, data)
    tolerance = {"half a resnet": 0.05}.get(name, 1e-4)
    torch.testing.assert_close(softmax_of(table), expected.softmax(1), rtol=tolerance, atol=tolerance)
    assert float((views[0].softmax(1) - expected.softmax(1)).abs().max()) > 4 * tolerance or name == "half a resnet"
    assert figures["views"] == KINDS[name]["evaluate"]["views"]
    # What predict gives has its bits, one by one or many at once; what evaluate gives is the same up to rounding.
    made = tlscale.load(run).predict(data / "test")
    column = "calibrated_probability" if "calibrated_probability" in table.column_names else "probability"
    assert made.labels == table["label"].to_pylist()
    np.testing.assert_array_equal(made.probabilities.max(1), table[column].to_numpy().astype(np.float32))
    scored = tlscale.evaluate(run)
    assert scored["views"] == figures["views"]
    assert scored["loss"] == pytest.approx(figures["loss"], rel=0.02 if name == "half a resnet" else 1e-4)


def test_what_chooses_is_of_the_same_views(trained, data, tmp_path):
    """The probe of a layer, strength and temperature by validation images, all of which have their views."""
    figures = result(trained("early"))
    plain = tlscale.run(
        small_recipe(tmp_path / "r.yaml", data, **{**KINDS["early"], "evaluate": {}, "data": {"source": "folder"}}),
        tmp_path / "plain",
    )
    losses = [
        [row["held_out_loss"] for rows in one["probe"]["tried"].values() for row in rows] for one in (figures, plain)
    ]
    assert len(losses[0]) == len(losses[1])
    assert not set(losses[0]) & set(losses[1])
    # A probe without a test split scores the validation images: by the very figure that chose it.
    data_without = put_small_folder(tmp_path / "without")
    shutil.rmtree(data_without / "test")
    recipe = small_recipe(tmp_path / "w.yaml", data_without, **{**KINDS["early"], "data": {"source": "folder"}})
    scored = tlscale.run(recipe, tmp_path / "scored")
    assert scored["split"] == "validation"
    assert scored["probe"]["held_out_loss"] == pytest.approx(scored["loss"], rel=1e-5)


def test_codes_of_a_view_are_computed_once_and_the_plain_ones_shared(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    counts = {}
    for name, views in (("plain", []), ("flip", ["flip"]), ("ten", ["flip", "five_crop"]), ("again", ["flip"])):
        keys = {**KINDS["head"], "evaluate": {"views": views}, "data": {"source": "folder", "crop_pct": 0.8}}
        done = tlscale.run(small_recipe(tmp_path / f"{name}.yaml", data, **keys), tmp_path / name)
        counts[name] = done["codes"]["num_computed"]
    held = 37 + 12  # of test and validation
    assert counts == {"plain": 48 + held, "flip": held, "ten": 8 * held, "again": 0}
    assert len(list(CodesStore().root.iterdir())) >= 10


def test_without_views_nothing_is_new(data, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", data, data={"source": "folder"}, duration="1 steps")
    figures = tlscale.run(recipe, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["tlscale"]
    assert "views" not in figures
    assert "views" not in config
    assert config["format"] < 4


def test_an_older_version_refuses_a_folder_with_views(trained, monkeypatch):
    run = trained("head")
    config = json.loads((run / "model" / "config.json").read_text())["tlscale"]
    assert (config["format"], config["views"]) == (4, ["flip", "five_crop"])
    monkeypatch.setattr(model_folder, "FORMAT", 3)
    with pytest.raises(RunFolderError, match="has format 4, this tlscale reads up to 3"):
        tlscale.load(run)


@pytest.mark.slow
def test_a_resumed_run_gives_the_same_and_other_views_are_another_run(trained, data, tmp_path):
    whole = trained("finetune")
    out = as_after(4, whole, tmp_path / "run")
    keys = {**TEN, "data": {"source": "folder", "crop_pct": 0.8}}
    tlscale.run(small_recipe(tmp_path / "r.yaml", data, **keys), out, resume=True)
    assert pq.read_table(out / "predictions.parquet").equals(pq.read_table(whole / "predictions.parquet"))
    other = small_recipe(tmp_path / "o.yaml", data, **{**keys, "evaluate": {"views": ["flip"]}})
    with pytest.raises(tlscale.TlscaleError, match="cannot be resumed with another recipe"):
        tlscale.run(other, out, resume=True)


def test_several_labels_are_the_mean_of_their_probabilities(tmp_path):
    data = put_small_folder(tmp_path / "data", train=60, test=20)
    rows = ["path,label,split"]
    for split in ("train", "test"):
        for path in sorted((data / split).rglob("*.png")):
            label = path.parent.name
            both = f"{label};{'even' if int(path.stem) % 2 else 'long'}"
            rows.append(f"{path.relative_to(data)},{both},{split}")
    (data / "list.csv").write_text("\n".join(rows) + "\n")
    keys = {"source": "manifest", "task": "multi_label", "label_separator": ";"}
    for name, more in (("trained", {"duration": "2 steps"}), ("probed", {"probe": {"kind": "logistic"}})):
        backbone = {"backbone": {"name": "test_resnet"}} if name == "probed" else {}
        recipe = small_recipe(tmp_path / f"{name}.yaml", data / "list.csv", data=keys, **FLIP, **backbone, **more)
        run = tlscale.run(recipe, tmp_path / name).folder
        expected, views = logits_by_hand(run, data, several=True)
        found = torch.tensor(pq.read_table(run / "predictions.parquet")["logits"].to_pylist(), dtype=torch.float64)
        torch.testing.assert_close(found.sigmoid(), expected.sigmoid(), rtol=1e-4, atol=1e-5)
        assert float((views[0].sigmoid() - expected.sigmoid()).abs().max()) > 1e-4
        trained = tlscale.load(run)
        # A temperature divides the logit of the mean; probes are fitted again, and have none.
        assert (trained.calibration is None) == (name == "probed")
        temperature = 1.0 if trained.calibration is None else trained.calibration.temperature
        made = trained.predict(data / "test")
        np.testing.assert_array_equal(made.probabilities, (found / temperature).sigmoid().numpy().astype(np.float32))


@pytest.mark.slow
def test_folds_and_their_model_have_the_views(tmp_path):
    data = put_small_folder(tmp_path / "data", train=100)
    keys = {**PROBE, "evaluate": {"views": ["flip"], "folds": 2}, "data": {"source": "folder"}}
    figures = tlscale.run(small_recipe(tmp_path / "r.yaml", data, **keys), tmp_path / "run")
    assert figures["views"] == result(tmp_path / "run" / "folds" / "1")["views"] == ["flip"]
    assert tlscale.load(tmp_path / "run").views == ("flip",)


@pytest.mark.slow
def test_exports_have_one_view_and_say_so(trained, tmp_path, capsys):
    run = trained("finetune")
    told = "the exported network scores one view of an image"
    made = tlscale.export(run, to="onnx", out=tmp_path / "onnx")
    assert told in capsys.readouterr().err
    assert any(told in note for note in json.loads((made / "export.json").read_text())["notes"])
    metadata = {one.key: one.value for one in onnx.load(made / "model.onnx").metadata_props}
    assert json.loads(metadata["views"]) == ["flip", "five_crop"]
    folder = tlscale.export(run, to="hub", out=tmp_path / "hub")
    assert tlscale.load(folder).views == ("flip", "five_crop")
    assert "The network scores one view of an image" in " ".join((folder / "README.md").read_text().split())


def test_the_plan_shows_the_cost(data, tmp_path):
    place = tmp_path / "r.yaml"
    small_recipe(place, data, **{**TEN, "data": {"source": "folder", "crop_pct": 0.8}})
    done = CliRunner().invoke(main, ["plan", str(place)])
    assert "10 of each evaluated image (flip x five_crop)" in " ".join(done.stdout.split())
    assert "test 370" in " ".join(done.stdout.split())
    plain = json.loads(CliRunner().invoke(main, ["plan", str(place), "--json"]).stdout)
    assert len(plain["views"]) == 10
    assert plain["views"][:2] == ["center", "center+flip"]


def test_crops_need_something_that_is_cropped(data, tmp_path):
    keys = {"data": {"source": "folder"}, "evaluate": {"views": ["five_crop"]}}
    with pytest.raises(RecipeError, match="all crops of it are the same"):
        tlscale.run(small_recipe(tmp_path / "r.yaml", data, **keys), tmp_path / "run")
