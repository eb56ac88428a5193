"""`tlscale predict`, `tlscale.predict` and `model.predict`: the answers of a finished run for any images."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import REPO, environment, put_small_folder, runs_once, sample_images, small_recipe, wait_until
from tests.unit.data.test_given import put_odd_images
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED

RESNET = {"name": "test_resnet", "weights": "none", "in_chans": 1}
STRATEGIES = {
    "finetune": {},
    "averages": {"optim": {"ema_decay": 0.9}, "compute": {"precision": "fp64"}},
    "head": {"freeze": ".*", "backbone": RESNET},
    "mlp": {"freeze": ".*", "head": [{"linear": 16}, "layernorm", "relu", {"dropout": 0.3}, "linear"]},
    "half a resnet": {
        "freeze": r"(conv1|bn1|layer[12])\..*",
        "backbone": RESNET,
        "codes": {"keep": "always", "dtype": "float16"},
        "compute": {"precision": "bf16"},
        "evaluate": {"batch_size": 11},
    },
    "stages": {
        "stages": [
            {"freeze": ".*", "duration": "1 epochs", "lr": 1e-2},
            {"freeze": r"(cls_token|pos_embed|patch_embed\..*|blocks\.0\..*)", "duration": "1 epochs", "lr": 1e-3},
        ],
        "codes": {"keep": "always"},
    },
    "lora": {
        "adapters": {"lora": {"layers": r"blocks\..*", "rank": 2}},
        "freeze": [{r"blocks\.3\.norm.*": False}, r"blocks\.[012]\..*"],
        "codes": {"keep": "always"},
        "optim": {"ema_decay": 0.5},
    },
    "lora, and then the head": {
        "adapters": {"lora": {"layers": r"blocks\.[45]\..*", "rank": 2}},
        "stages": [
            {"freeze": r"blocks\.4\..*", "duration": "1 epochs", "lr": 1e-2},
            {"freeze": ".*", "duration": "1 epochs", "lr": 1e-2},
        ],
        "codes": {"keep": "always"},
    },
    "lora of convolutions": {"adapters": {"lora": {"layers": r"layer3\..*conv.*", "rank": 3}}, "backbone": RESNET},
    "codes": {"probe": {"kind": "logistic"}, "backbone": RESNET},
    "early codes": {"probe": {"kind": "ridge"}, "backbone": RESNET, "codes": {"layer": "layer2", "pool": "max"}},
    "knn": {"probe": {"kind": "knn"}, "backbone": RESNET},
    "classic": {"backbone": {"name": "lenet5", "weights": "none", "in_chans": 1}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("data"), train=60, test=37)


trained = runs_once(STRATEGIES)


def invoke(*words, **options):
    return CliRunner().invoke(main, ["predict", *map(str, words)], **options)


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def given_by(table):
    """The column that has what predict gives as the probability."""
    return table["calibrated_probability" if "calibrated_probability" in table.column_names else "probability"]


def softmax_of(table):
    logits_NC = np.array(table["logits"].to_pylist(), dtype=np.float64)
    logits_NC /= json.loads(table.schema.metadata[b"tlscale"]).get("calibration", {}).get("temperature", 1.0)
    return np.exp(logits_NC) / np.exp(logits_NC).sum(1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_runs_own_test_images_get_its_very_bits(name, trained, data):
    run = trained(name)
    table = pq.read_table(run / "predictions.parquet")
    done = invoke(run, data / "test")
    assert done.exit_code == 0, done.output
    rows = rows_of(done.stdout)
    assert [row["path"] for row in rows] == [str(data / path) for path in table["path"].to_pylist()]
    assert [row["label"] for row in rows] == table["label"].to_pylist()
    assert [float(row["probability"]) for row in rows] == given_by(table).to_pylist()
    model = tlscale.load(run)
    made = model.predict(data / "test")
    assert made.labels == table["label"].to_pylist()
    assert made.probabilities.dtype == np.float32
    np.testing.assert_array_equal(made.probabilities.max(1), given_by(table).to_numpy().astype(np.float32))
    # In other batches, and from memory, up to rounding.
    backwards = [np.asarray(Image.open(path)) for path in reversed(made.paths)]
    other = model.predict(backwards, batch_size=3)
    if "compute" not in STRATEGIES[name]:
        np.testing.assert_allclose(other.probabilities[::-1], softmax_of(table), atol=1e-5)


def test_odd_images_are_read_as_the_run_reads_its_own(trained, tmp_path):
    put_odd_images(tmp_path)
    (tmp_path / "oak.png").write_bytes((tmp_path / "clear.png").read_bytes()[:200])
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "plain.png")
    model = tlscale.load(trained("finetune"))
    by_path = model.predict(tmp_path)
    assert [why is None for why in by_path.errors] == [not path.endswith("oak.png") for path in by_path.paths]
    assert np.isnan(by_path.probabilities[by_path.labels.index(None)]).all()
    assert repr(by_path).startswith("Predictions(9 images, 1 without an answer; '")
    sound = [path for path, why in zip(by_path.paths, by_path.errors, strict=True) if why is None]
    opened = [Image.open(path) for path in sound]
    by_image = model.predict(opened)
    for image in opened:
        image.close()
    kept = ~np.isnan(by_path.probabilities[:, 0])
    np.testing.assert_array_equal(by_image.probabilities, by_path.probabilities[kept])
    assert by_image.paths == sound
    # Pillow's own conversion shows other pixels where there is something to see through.
    wrong = [Image.open(path).convert("RGB") for path in sound]
    assert not np.array_equal(model.predict(wrong).probabilities, by_image.probabilities)


def test_python_takes_one_or_many_and_gives_a_frame(trained, data, tmp_path):
    model = tlscale.load(trained("finetune"))
    images_NHW, _ = sample_images("test", 5)
    assert repr(model).endswith("test_vit, 10 classes, images of 32 x 32 x 1)")
    many = model.predict(images_NHW[..., None])
    assert len(many) == len(model.predict(list(images_NHW))) == 5
    assert model.predict(images_NHW[0]).labels == many.labels[:1] or len(set(many.labels)) > 1
    made = tlscale.predict(trained("finetune"), [data / "test" / "Bag", tmp_path / "gone.png"])
    frame = made.to_pandas(top_k=2)
    assert list(frame) == ["path", "label", "probability", "label_2", "probability_2", "set", "error"]
    made.to_csv(tmp_path / "own.csv", top_k=2)
    told = invoke(trained("finetune"), data / "test" / "Bag", tmp_path / "gone.png", "--top-k", 2)
    assert (tmp_path / "own.csv").read_text() == told.stdout
    out = tlscale.predict(trained("finetune"), data / "test" / "Bag", tmp_path / "file.csv")
    assert rows_of(out.read_text()) == rows_of(invoke(trained("finetune"), data / "test" / "Bag").stdout)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "no image was given"),
        ("nothing/*.png", "nothing matches 'nothing/\\*.png'"),
        (["gone.png"], "the image cannot be read: gone.png: cannot be read: No such file"),
        (3, "images: a int is no image"),
        (torch.zeros(3, 8, 8), "images: a Tensor is no image. Give paths, bytes, images of Pillow's, or arrays"),
        (np.zeros((4, 4)), "float64"),
        (b"nothing", "the image cannot be read: not an image of the formats"),
    ],
)
def test_errors_in_python_speak_python(images, problem, trained):
    with pytest.raises(tlscale.TlscaleError, match=problem) as raised:
        tlscale.load(trained("finetune")).predict(images)
    assert "--" not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["gone.png"], "the image cannot be read: gone.png: cannot be read: No such file"),
        (["gone.png", "lost.png"], "none of the 2 images can be read; the first: gone.png"),
        (["no*thing"], "nothing matches 'no*thing'"),
        ([], "no image was named"),
        (["a.png", "--top-k", 11], "--top-k: 11 labels of a model that has 10 classes"),
        (["a.png", "--out", "a.txt"], "--out: 'a.txt' has no ending"),
        (["a.png", "--resume"], "--resume: only a file can be resumed"),
        (["--images-from", "gone.txt"], "--images-from: 'gone.txt' cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(words, problem, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = invoke(trained("finetune"), *words)
    assert done.exit_code == EXIT_BAD_INPUT
    assert problem in done.stderr
    assert len(rows_of(done.stdout)) == sum(str(word) in ("gone.png", "lost.png") for word in words)


def test_paths_come_from_stdin_and_lists_too(trained, data, tmp_path):
    paths = [str(path) for path in sorted((data / "test" / "Bag").iterdir())]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    expected = invoke(trained("finetune"), data / "test" / "Bag").stdout
    assert invoke(trained("finetune"), "-", input="\n".join(paths)).stdout == expected
    assert invoke(trained("finetune"), "--images-from", tmp_path / "list.txt").stdout == expected
    assert len(expected.splitlines()) == 1 + len(paths)


NASTY = ("=cmd|' /C calc'!A0", "an \x1b[31mescape")


def test_nasty_class_names_do_no_harm(tmp_path):
    images_NHW, labels_N = sample_images("train", 60)
    data = tmp_path / "data"
    for row, image in enumerate(images_NHW):
        place = data / ("test" if row % 3 == 0 else "train")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{row}.png")
    with (data / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for role in ("train", "test"):
            writer.writerows([f"{role}/{p.name}", NASTY[int(p.stem) % 2], role] for p in (data / role).iterdir())
    recipe = small_recipe(tmp_path / "r.yaml", data / "all.csv", data={"source": "manifest"}, duration="1 epochs")
    tlscale.run(recipe, tmp_path / "run")
    done = invoke(tmp_path / "run", data / "test", "--all-probabilities")
    assert done.exit_code == 0, done.output
    cells = [cell for row in csv.reader(io.StringIO(done.stdout, newline="")) for cell in row]
    assert not [cell for cell in cells if cell[:1] in tuple("=+-@")]
    assert {row["label"] for row in rows_of(done.stdout)} <= {f"'{NASTY[0]}", NASTY[1]}
    assert "\x1b" not in done.stderr
    assert "\x1b" not in repr(tlscale.load(tmp_path / "run").predict(data / "test"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", pytest.param("parquet", marks=pytest.mark.long)])
def test_a_stopped_file_is_resumed_to_the_same_bytes(kind, trained, data, tmp_path):
    paths = [str(path) for path in sorted((data / "test").rglob("*.png"))] * 20
    (tmp_path / "list").write_text("\n".join(paths))
    run, out = trained("finetune"), tmp_path / f"out.{kind}"
    assert invoke(run, "--images-from", tmp_path / "list", "--out", tmp_path / f"whole.{kind}").exit_code == 0
    command = [sys.executable, "-m", "tlscale", "predict", str(run), "-", "--out", str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as stopped:
        stopped.stdin.write("\n".join(paths[:300]).encode() + b"\n")
        stopped.stdin.flush()
        begun = tmp_path / (f"out.{kind}.unfinished" if kind != "parquet" else "out.parquet.parts/about.json")
        wait_until(begun.exists, stopped)
        stopped.send_signal(signal.SIGTERM)
        _, said = stopped.communicate("\n".join(paths[300:]).encode())
    assert stopped.returncode == EXIT_STOPPED, said
    assert f"The same line with --resume completes '{out}'".encode() in said
    assert begun.exists()
    done = invoke(run, "--images-from", tmp_path / "list", "--out", out)
    assert done.exit_code == EXIT_BAD_INPUT, "unfinished, and --resume was not said"
    done = invoke(run, "--images-from", tmp_path / "list", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == (tmp_path / f"whole.{kind}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["list", f"out.{kind}", f"whole.{kind}"]
    done = invoke(run, "--images-from", tmp_path / "list", "--out", out, "--resume")
    assert (done.exit_code, done.stderr) == (0, f"'{out}' is complete already\n")


def test_weights_that_were_changed_since_are_used(trained, data):
    """The way to logits is kept from call to call."""
    model = tlscale.load(trained("head"))
    first, again = (model.predict(data / "test" / "Bag").probabilities for _ in range(2))
    np.testing.assert_array_equal(first, again)
    with torch.no_grad():
        for param in model.model.parameters():
            param.zero_()
    np.testing.assert_allclose(model.predict(data / "test" / "Bag").probabilities, 0.1, rtol=1e-5)
    assert not model.model.training


def test_a_folder_without_its_run_is_enough(trained, data, tmp_path):
    """What a colleague was given: the model alone."""
    (tmp_path / "model").symlink_to(trained("finetune") / "model")
    alone = tlscale.load(tmp_path / "model").predict(data / "test")
    own = tlscale.load(trained("finetune")).predict(data / "test")
    assert alone.labels == own.labels
    np.testing.assert_allclose(alone.probabilities, own.probabilities, atol=1e-5)


@pytest.mark.slow
def test_the_commands_of_the_guide_run_and_are_those_of_the_help(trained, data, tmp_path, monkeypatch):
    section = (REPO / "docs" / "guide.md").read_text().split("\n## Predictions\n")[1].split("\n## ")[0]
    blocks = dict(re.findall(r"^```(bash|python)\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL))
    shown = [line.strip() for line in invoke("--help").output.split("Examples:")[1].splitlines()[1:3]]
    assert blocks["bash"].splitlines() == shown
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "photos").symlink_to(trained("finetune"))
    (tmp_path / "new_photos").mkdir()
    for name, path in zip("abc", sorted((data / "test").rglob("*.png")), strict=False):
        Image.open(path).convert("RGB").save(tmp_path / "new_photos" / f"{name}.jpg")
    (tmp_path / "tlscale").write_text(f'#!/bin/sh\nexec {sys.executable} -m tlscale "$@"\n')
    (tmp_path / "tlscale").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-ec", blocks["bash"]], cwd=tmp_path, env=environment(PATH=path), check=True)
    assert len(rows_of((tmp_path / "labels.csv").read_text())) == 3
    assert {"label_3", "probability_3"} <= set(rows_of((tmp_path / "labels_3.csv").read_text())[0])
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks["python"], "guide.md", "exec"), {})
    assert len(rows_of((tmp_path / "labels.csv").read_text())) == 4
    assert pq.read_table("labels.parquet").num_rows == 3
