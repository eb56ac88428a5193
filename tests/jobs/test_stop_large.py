"""Ctrl-C in each phase of each verb on 20,000 images: it ends soon, in one line, and the same line goes on."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tests.small_runs import result
from tlscale.errors import EXIT_STOPPED
from tlscale.recipe.yaml_text import write_yaml

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

NUM_IMAGES = 20_000
# On a quiet machine the last part of each is under 2 s; others may use this one.
MOST_S = 15.0
SHOWN = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "120", "WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the images, and recipes of a probe, of training with frozen layers, and without."""
    folder, generator = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for label in range(4):
        (folder / "photos" / f"class{label}").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels[..., number % 3] //= 1 + number % 4
        image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
        image.save(folder / "photos" / f"class{number % 4}" / f"{number:05}.jpg")
    data = {"source": "folder", "path": str(folder / "photos"), "image_size": 32, "validation_fraction": 0.1}
    base = {"data": data, "backbone": {"name": "resnet10t", "weights": "bundled"}}
    trains = base | {"duration": "30 steps", "batch_size": 64}
    recipes = {
        "probe": base | {"probe": {"kind": "logistic"}, "codes": {"layer": ["layer4", "penultimate"]}},
        "frozen": trains | {"freeze": r"(conv1|bn1|layer[123])\..*"},
        "whole": trains | {"data": data | {"on_bad_image": "skip"}},
    }
    for name, keys in recipes.items():
        (folder / f"{name}.yaml").write_text(write_yaml({"name": name, **keys}))
    return folder


def start(place, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "tlscale", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **SHOWN, "TLSCALE_CACHE": str(place / "cache")},
        cwd=place,
        start_new_session=True,
    )


def interrupted(place, shown, *words):
    """Send Ctrl-C to all processes of a command once it shows something; return what it said, and the seconds after."""
    process = start(place, *words)
    said, at_s = b"", None
    watchdog = threading.Timer(600, process.kill)
    watchdog.start()
    while piece := os.read(process.stdout.fileno(), 65536):
        said += piece
        if at_s is None and re.search(shown, said):
            at_s = time.monotonic()
            os.killpg(process.pid, signal.SIGINT)
    code = process.wait()
    process.stdout.close()
    watchdog.cancel()
    assert at_s is not None, f"it never showed {shown}: {said[-2000:]!r}"
    text = said.decode()
    assert code == EXIT_STOPPED, text[-2000:]
    assert text.count("tlscale: stopped") == 1
    assert "Traceback" not in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is back"
    return time.monotonic() - at_s


def finished(place, *words):
    process = start(place, *words)
    said = process.communicate(timeout=1200)[0].decode()
    assert process.returncode == 0, said[-2000:]


PHASES = {
    "new": [(rb"looking at images .*images/s", "new", "photos")],
    "a probe": [
        (rb"loading PyTorch", "run", "probe.yaml", "--resume"),
        (rb"scanning .*images/s", "run", "probe.yaml", "--resume"),
        (rb"codes of train .*[1-9]%", "run", "probe.yaml", "--resume"),
        (rb"probe: logistic", "run", "probe.yaml", "--resume"),
    ],
    "frozen layers": [(rb"first step after", "run", "frozen.yaml", "--resume")],
    "all images": [
        (rb"checking .*[1-9]%", "run", "whole.yaml", "--resume"),
        (rb"decoding .*[1-9]%", "run", "whole.yaml", "--resume"),
        (rb"step .*[1-9]/30", "run", "whole.yaml", "--resume"),
    ],
    "codes": [(rb"codes of train .*[1-9]%", "codes", "whole.yaml", "codes.layer=layer3", "--out", "codes.parquet")],
    "compare": [
        (rb"first step after", "compare", "probe.yaml", "--strategies", "head,codes", "--sizes", "1000", "--resume")
    ],
}


@pytest.mark.parametrize("name", PHASES)
def test_ctrl_c_ends_each_phase_soon_and_the_same_line_goes_on(name, place):
    for shown, *words in PHASES[name]:
        took_s = interrupted(place, shown, *words)
        assert took_s < MOST_S, words
    finished(place, *words)
    if words[0] == "run":
        assert result(place / "runs" / words[1].removesuffix(".yaml"))["top1"] > 0.3


def test_ctrl_c_ends_what_is_done_with_a_run(place):
    if not (place / "runs" / "probe" / "result.json").exists():
        finished(place, "run", "probe.yaml", "--resume")
    predict = ("predict", "runs/probe", "photos", "--out", "labels.csv", "--resume")
    assert interrupted(place, rb"predicting: [1-9]", *predict) < MOST_S
    finished(place, *predict)
    assert len((place / "labels.csv").read_text().splitlines()) == 1 + NUM_IMAGES
    evaluate = ("evaluate", "runs/probe", "--data", "photos")
    assert interrupted(place, rb"evaluating .*[1-9]%", *evaluate) < MOST_S
    export = ("export", "runs/probe", "--to", "onnx", "--out", "onnx")
    process = start(place, *export)
    while not any(place.glob(".onnx.export.*")):  # it shows nothing
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # an exporter is at work, which takes any error for its own
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=MOST_S)[0].decode()
    assert process.returncode == EXIT_STOPPED, said
    assert "tlscale: stopped by SIGINT while exporting" in said
    assert [path.name for path in place.iterdir() if "onnx" in path.name] == []
    finished(place, *export)
