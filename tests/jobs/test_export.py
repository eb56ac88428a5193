"""`tlscale export` and `tlscale.export`: files for elsewhere that give what the run's model gives, or no file."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import tlscale
from tests.small_models import noise
from tests.small_runs import REPO, environment, put_small_folder, runs_once, sample_images, small_recipe
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFolderError
from tlscale.models.exports import onnx_file, torch_program
from tlscale.models.exports.check import WrongExportError

pytestmark = pytest.mark.slow  # exporters take seconds
RESNET = {"name": "test_resnet", "weights": "none", "in_chans": 1}
KINDS = {
    "finetune": {"backbone": RESNET, "duration": "1 epochs"},
    "wide": {"backbone": {"name": "test_resnet", "weights": "none"}, "duration": "1 epochs", "data": {"crop_pct": 0.8}},
    "mlp": {"freeze": ".*", "head": [{"linear": 16}, "layernorm", "relu", {"dropout": 0.3}, "linear"]},
    "logistic": {"probe": {"kind": "logistic"}, "backbone": RESNET},
    "early": {"probe": {"kind": "ridge"}, "backbone": RESNET, "codes": {"layer": "layer2", "pool": "max"}},
    "tokens": {"probe": {"kind": "ridge"}, "codes": {"layer": "blocks.1", "pool": "token"}},
    "positions": {"probe": {"kind": "ridge"}, "codes": {"layer": "blocks.1", "pool": "avgmax"}},
    "knn": {"probe": {"kind": "knn"}, "backbone": RESNET},
    "classic": {"backbone": {"name": "lenet5", "weights": "none", "in_chans": 1}, "duration": "1 epochs"},
}
WITH_CODES = {"knn": {"with_training_codes": True}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("data"), train=60, test=37)


trained = runs_once(KINDS)


def invoke(*words):
    return CliRunner().invoke(main, ["export", *map(str, words)])


def notes_of(folder):
    return json.loads((folder / "export.json").read_text())


def by_onnx(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert [one.name for one in session.get_outputs()] == ["logits"]
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def by_torch(folder):
    return torch.export.load(folder / "model.pt2").module()


def assert_like(network, model, in_chans=1, sizes=(1, 7, 64)):
    for size in sizes:
        images = noise(size, count=size, in_chans=in_chans)
        with torch.no_grad():
            expected = model(images)
            found = network(images)
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


SAMPLE = ("early", "knn")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.long) for name in KINDS]
)
def test_every_kind_of_model_goes_to_onnx_and_torch(name, trained, tmp_path):
    run = trained(name)
    keys = WITH_CODES.get(name, {})
    model = tlscale.load(run).model
    for to, loader in (("onnx", by_onnx), ("torch-export", by_torch)):
        out = tlscale.export(run, to=to, out=tmp_path / to, **keys)
        assert_like(loader(out), model)
        checked = notes_of(out)["checked"]
        assert checked["num_images"] == 37
        assert checked["images"] == "test images of the run's data"
        assert checked["batch_sizes"] == [7, 1]
        assert checked["top1"] == checked["top1_of_run"]
        assert checked["largest_difference"] <= 1e-4


def test_onnx_says_its_classes_and_input(trained, tmp_path):
    done = invoke(trained("finetune"), "--to", "onnx", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "compared on 37 test images of the run's data, in batches of 7 and 1" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["export.json", "model.onnx"]
    model = tlscale.load(trained("finetune"))
    found = {prop.key: json.loads(prop.value) for prop in onnx.load(tmp_path / "out" / "model.onnx").metadata_props}
    assert found["classes"] == list(model.classes)
    spec = model.input_spec
    assert found["input"] == {
        "size": 32,
        "channels": 1,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    run_id = json.loads((trained("finetune") / "run.json").read_text())["id"]
    assert found["tlscale"] == {"version": tlscale.__version__, "run": run_id}
    assert found["calibration"] == model.calibration.model_dump()


def test_a_program_of_torch_says_them_too(trained, tmp_path):
    out = tlscale.export(trained("finetune"), to="torch-export", out=tmp_path / "out")
    extra = dict.fromkeys(("classes", "input", "tlscale"), "")
    torch.export.load(out / "model.pt2", extra_files=extra)
    assert json.loads(extra["classes"]) == list(tlscale.load(trained("finetune")).classes)
    assert json.loads(extra["input"])["size"] == 32


def test_neighbours_go_nowhere_unasked(trained, tmp_path):
    for to in ("onnx", "torch-export", "timm", "hub"):
        done = invoke(trained("knn"), "--to", to, "--out", tmp_path / "out")
        assert done.exit_code == EXIT_BAD_INPUT
        assert "--with-training-codes: nearest neighbours are found among the training images" in done.stderr
        assert not (tmp_path / "out").exists()
    done = invoke(trained("knn"), "--to", "timm", "--out", tmp_path / "out", "--with-training-codes")
    assert done.exit_code == 0, done.output


# -- a wrong file is no file ------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Another network of the same form."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).flip(1)


def of_another(exporter):
    return lambda network, example, path: exporter(Shifted(network), example, path)


def test_a_wrong_file_is_refused(trained, tmp_path, monkeypatch):
    """Both exporters give a network that is not the run's: it is told, and nothing is left."""
    wrong = {name: of_another(exporter) for name, exporter in onnx_file.EXPORTERS.items()}
    monkeypatch.setattr(onnx_file, "EXPORTERS", wrong)
    done = invoke(trained("finetune"), "--to", "onnx", "--out", tmp_path / "out")
    assert done.exit_code == EXIT_FAILED
    assert re.search(r"torchscript: its logits differ from the run's by .* \(accuracy 0\.\d+ in place of", done.stderr)
    assert "dynamo: its logits differ" in done.stderr
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch_program, "exportable", lambda *words: Shifted(onnx_file.exportable(*words)))
    with pytest.raises(WrongExportError, match="its logits differ from the run's"):
        tlscale.export(trained("finetune"), to="torch-export", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "failing", ["fixes the batch", *(pytest.param(how, marks=pytest.mark.long) for how in ("raises", "is wrong"))]
)
def test_the_other_exporter_is_tried(failing, trained, tmp_path, monkeypatch):
    real = onnx_file.EXPORTERS["torchscript"]

    def raises(network, example, path):
        path.write_bytes(b"half")
        raise RuntimeError("no operator for this")

    def fixed(network, example, path):
        onnx_file._export(network, example, path, dynamo=False)

    first = {"raises": raises, "is wrong": of_another(real), "fixes the batch": fixed}[failing]
    monkeypatch.setitem(onnx_file.EXPORTERS, "torchscript", first)
    out = tlscale.export(trained("classic"), to="onnx", out=tmp_path / "out")
    assert notes_of(out)["checked"]["exporter"] == "dynamo"
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.onnx"]
    assert_like(by_onnx(out), tlscale.load(trained("classic")).model)


def test_large_files_have_their_tensors_beside_them(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 1000)
    out = tlscale.export(trained("finetune"), to="onnx", out=tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["export.json", "model.onnx", "model.onnx.data"]
    assert_like(by_onnx(out), tlscale.load(trained("finetune")).model)


def test_without_the_extra_the_error_names_it(trained, tmp_path, monkeypatch):
    real = onnx_file.require.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == "onnx" else real(name, *more))
    done = invoke(trained("finetune"), "--to", "onnx", "--out", tmp_path / "out")
    assert done.exit_code == EXIT_FAILED
    assert "onnx is not installed" in done.stderr
    assert "pip install 'tlscale[export]'" in done.stderr


# -- images to compare on ---------------------------------------------------------------------------------------------


def test_images_that_are_named_and_none_at_all(trained, data, tmp_path):
    run = trained("finetune")
    out = tlscale.export(run, to="timm", out=tmp_path / "named", images=[data / "test" / "Bag"])
    assert notes_of(out)["checked"]["images"] == "images that were named"
    done = invoke(run / "model", "--to", "timm", "--out", tmp_path / "random")
    assert done.exit_code == 0
    assert "compared on random images, as the run's own are not at hand" in done.stderr
    assert notes_of(tmp_path / "random")["checked"]["images"] == "random images"
    done = invoke(run, "--to", "timm", "--out", tmp_path / "none", "--images", tmp_path / "gone.png")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "--images: none of them can be read" in done.stderr


# -- folders ----------------------------------------------------------------------------------------------------------


def test_only_an_export_of_ours_is_replaced(trained, tmp_path):
    run, out = trained("mlp"), tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    for problem, prepare in (
        ("is not empty and no export of tlscale", lambda: None),
        ("holds an export to timm", lambda: tlscale.export(run, to="timm", out=out)),
        ("holds 'mine' as well", lambda: (out / "mine").mkdir()),
    ):
        if problem.startswith("holds an"):
            (out / "mine").rmdir()
        prepare()
        to = "hub" if problem.startswith("holds an") else "timm"
        before = sorted(path.name for path in out.iterdir())
        with pytest.raises(RunFolderError, match=problem):
            tlscale.export(run, to=to, out=out)
        assert sorted(path.name for path in out.iterdir()) == before
    with pytest.raises(RunFolderError, match="is not empty and no export"):
        tlscale.export(run, to="timm", out=run)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is there, and no folder"):
        tlscale.export(run, to="timm", out=tmp_path / "file")


def test_an_export_of_ours_is_replaced(trained, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".export.7").mkdir()  # of one that was killed
    monkeypatch.chdir(out)
    tlscale.export(trained("mlp"), to="timm", out=".")
    assert (out / "head.safetensors").is_file()
    tlscale.export(trained("finetune"), to="timm", out=".")
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "export.json", "model.safetensors"]
    assert notes_of(out)["files"].keys() == {"config.json", "model.safetensors"}


# -- timm and the hub -------------------------------------------------------------------------------------------------


def test_timm_loads_all_of_it_or_says_that_it_does_not(trained, tmp_path):
    whole = tlscale.export(trained("finetune"), to="timm", out=tmp_path / "whole")
    network = timm.create_model(f"local-dir:{whole}", pretrained=True).eval()
    assert_like(network, tlscale.load(trained("finetune")).model, sizes=(1, 7))
    assert notes_of(whole)["checked"]["loads_with"] == "timm"
    part = tlscale.export(trained("mlp"), to="timm", out=tmp_path / "part")
    config = json.loads((part / "config.json").read_text())
    assert "backbone of this model alone" in config["note"]
    assert "tlscale.load" in config["note"]
    assert notes_of(part)["checked"]["loads_with"] == "tlscale"
    assert_like(tlscale.load(part).model, tlscale.load(trained("mlp")).model, sizes=(1, 7))


NASTY = ("<img src=x onerror=alert(1)>", "[a](javascript:alert) `b` | c", "=cmd()", "an \x1b[31mescape\n# head")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A run whose classes have such names, with weights of a file, in a folder whose name is a secret place."""
    folder = tmp_path_factory.mktemp("canary-place")
    images_NHW, _ = sample_images("train", 48)
    rows = []
    for row, image in enumerate(images_NHW):
        Image.fromarray(image).save(folder / f"{row}.png")
        rows.append({"path": f"{row}.png", "label": NASTY[row % 4], "split": "test" if row % 3 == 0 else "train"})
    import pyarrow as pa
    import pyarrow.parquet as pq
    import safetensors.torch

    pq.write_table(pa.Table.from_pylist(rows), folder / "images.parquet")
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet", in_chans=1).state_dict(), weights)
    recipe = small_recipe(
        folder / "recipe.yaml",
        folder / "images.parquet",
        data={"source": "manifest"},
        backbone={"name": "test_resnet", "weights": str(weights), "in_chans": 1},
        duration="1 epochs",
    )
    tlscale.run(recipe, folder / "run")
    return folder / "run"


def test_the_card_of_nasty_names_is_harmless(nasty, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-secret")
    done = invoke(nasty, "--to", "hub", "--out", tmp_path / "out", "--licence", "cc-by-4.0")
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "config.json", "export.json", "model.safetensors")
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    prose = re.sub(r"^(`{3,}).*?^\1$", "", card, flags=re.MULTILINE | re.DOTALL)
    assert "<" not in prose
    assert "](" not in prose
    assert "\x1b" not in card
    assert "\n# head" not in card
    assert "&#60;img src&#61;x onerror" in prose
    assert "license: cc-by-4.0" in card
    assert re.search(r"Accuracy \(top 1\) 0\.\d{4}, 95 % interval 0\.\d{4} to", card)
    assert card.count("|---|---|---|") == 1
    assert len(re.findall(r"^\| .* \|$", card, flags=re.MULTILINE)) == 1 + len(NASTY)
    # Without its data, too, of which then a note tells.
    shutil.copytree(nasty, tmp_path / "canary-run")
    recipe = (nasty / "recipe.yaml").read_text()
    (tmp_path / "canary-run" / "recipe.yaml").write_text(recipe.replace("images.parquet", "gone.parquet"))
    again = tlscale.export(tmp_path / "canary-run", to="hub", out=tmp_path / "again")
    assert "compared on random images" in notes_of(again)["notes"][0]
    assert "gone.parquet" in notes_of(again)["notes"][0]
    for path in (*(tmp_path / "out").iterdir(), *again.iterdir()):
        content = path.read_bytes()
        for canary in (b"canary", str(tmp_path).encode(), b"/tmp/", b"/home/"):
            assert canary not in content, (path.name, canary)


def test_a_card_without_a_licence_says_so_and_a_wrong_one_is_refused(trained, tmp_path):
    out = tlscale.export(trained("mlp"), to="hub", out=tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "license: unknown" in card
    assert "Licence: not given" in card
    assert "timm loads the backbone alone" in card
    assert 'tlscale.load("FOLDER")' in card
    done = invoke(trained("mlp"), "--to", "hub", "--out", tmp_path / "other", "--licence", "mit\nevil: true")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "--licence: 'mit\\nevil: true' is not the name of a licence" in done.stderr
    assert not (tmp_path / "other").exists()


def test_logits_that_are_off_by_a_little_are_found(trained, tmp_path, monkeypatch):
    """A thousandth of the largest changes no label, and is refused all the same."""

    class Off(Shifted):
        def forward(self, images):
            return self.network(images) * 1.001

    monkeypatch.setattr(torch_program, "exportable", lambda *words: Off(onnx_file.exportable(*words)))
    with pytest.raises(WrongExportError, match=r"differ from the run's by 0\.001 of the largest"):
        tlscale.export(trained("finetune"), to="torch-export", out=tmp_path / "out")


def test_an_unknown_format_lists_those_there_are(trained, tmp_path):
    done = invoke(trained("finetune"), "--to", "tflite", "--out", tmp_path / "out")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "--to: there is no 'tflite'. There are: onnx, torch-export, timm, hub" in done.stderr


@pytest.mark.parametrize("to", ["onnx", "torch-export", "timm", "hub"])
def test_a_disk_that_is_full_is_no_fault_of_an_exporter(to, trained, small_disk):
    subprocess.run(["mount", "-o", "remount,size=300k", small_disk], check=True)
    done = invoke(trained("finetune"), "--to", to, "--out", small_disk / "out")
    assert done.exit_code == EXIT_FAILED, done.output
    assert "No space left on device" in done.stderr
    assert "exporter" not in done.stderr
    assert list(small_disk.rglob("*")) == []


# -- docs/serve.md ----------------------------------------------------------------------------------------------------


def test_the_page_on_serving_runs_word_for_word(trained, data, tmp_path):
    page = (REPO / "docs" / "serve.md").read_text()
    (tmp_path / "classify.py").write_text(re.search(r"```python\n(import json.*?)```", page, flags=re.DOTALL)[1])
    shell, classify = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    shown = [line.strip() for line in invoke("--help").output.split("Examples:")[1].splitlines()[1:3]]
    assert shell.splitlines() == shown
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(trained("wide"))
    (tmp_path / "new_photos").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, path in zip("ab", sorted((data / "test").rglob("*.png"))[::20], strict=False):
        picture = Image.open(path).convert("RGB").resize((61, 45))
        picture.save(tmp_path / "new_photos" / f"{name}.jpg", exif=turned)
    (tmp_path / "tlscale").write_text(f'#!/bin/sh\nexec {sys.executable} -m tlscale "$@"\n')
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("tlscale", "python"):
        (tmp_path / name).chmod(0o755)
    env = environment(PATH=f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run(["bash", "-ec", shell], cwd=tmp_path, env=env, check=True)
    done = subprocess.run(["bash", "-ec", classify], cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    made = tlscale.load(trained("wide")).predict([tmp_path / path for path, _, _ in rows])
    assert [path for path, _, _ in rows] == ["new_photos/a.jpg", "new_photos/b.jpg"]
    assert [label for _, label, _ in rows] == made.labels
    np.testing.assert_allclose([float(chance) for *_, chance in rows], made.probabilities.max(1), atol=1e-4)
