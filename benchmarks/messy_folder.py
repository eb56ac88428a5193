"""The messy folder of examples/messy_photos.py with tlscale, fastai and Ultralytics: what a person types, and waits.

    python benchmarks/messy_folder.py --weights tf_efficientnet_lite0.safetensors [--only NAME] [--logs FOLDER]

From the folder to a model, to predictions for new images, to an ONNX file: each tool in the shortest way that its own
pages show, and with what this folder needs on top. Every command is a process of its own, and all its seconds count,
also those of the processors (CPU), which other work on the machine changes little, with OMP_NUM_THREADS=1 least. New
images are 300 other crops of the same three photos, written in the same ten ways, and two files that are no images.
Accuracy is of the 300; no answer is a wrong one. 224 px for all but tlscale's default way.

`--weights` are those of `python scripts/imagenet_weights.py lite0`. Ultralytics' lie on a host of its own: here its
network begins at random values, so that its accuracy says nothing about what it gives with them.

fastai and Ultralytics live in an environment of their own (see frozen_epochs.py); a tool that is not installed is
skipped, and the output reports it:

    pip install -c constraints.txt -r benchmarks/requirements-peers.txt
    pip install --no-deps ultralytics==8.4.190 ultralytics-thop opencv-python-headless polars polars-runtime-32
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples.messy_photos import COUNTS, PHOTOS, crop_of, make_messy_folder, save_as

NEW_EACH = 100
FASTAI = """\
from fastai.vision.all import *

path = Path("photos")

def top_folder(file):
    return file.relative_to(path).parts[0]

files = get_image_files(path)
broken = verify_images(files)
files = [file for file in files if file not in broken and file.parent != path]
block = DataBlock(
    blocks=(ImageBlock, CategoryBlock),
    get_y=top_folder,
    splitter=RandomSplitter(valid_pct=0.2, seed=42),
    item_tfms=Resize(224),
    batch_tfms=aug_transforms(),
)
dls = block.dataloaders(files)
weights = {"file": "WEIGHTS"}
learn = vision_learner(dls, "tf_efficientnet_lite0", metrics=error_rate, pretrained_cfg_overlay=weights)
learn.fine_tune(4)
learn.export("model.pkl")
"""
FASTAI_PREDICT = """\
import pandas as pd
from fastai.vision.all import *

def top_folder(file): ...

learn = load_learner("model.pkl")
files = get_image_files("new")
broken = verify_images(files)
files = [file for file in files if file not in broken]
chances, _ = learn.get_preds(dl=learn.dls.test_dl(files))
labels = [learn.dls.vocab[number] for number in chances.argmax(1)]
pd.DataFrame({"path": files, "label": labels, "probability": chances.amax(1)}).to_csv("labels.csv", index=False)
"""
FASTAI_EXPORT = """\
from fastai.vision.all import *

def top_folder(file): ...

model = load_learner("model.pkl").model.eval()
free = {"images": {0: "N"}}
example = torch.rand(2, 3, 224, 224)
torch.onnx.export(model, example, "model.onnx", input_names=["images"], dynamic_axes=free, dynamo=False)
"""


@dataclass(frozen=True)
class Tool:
    """What a person writes and types: files of Python by name, and commands for the model, predictions and ONNX."""

    package: str
    weights: str
    model: list[str]
    predictions: list[str]
    export: list[str]
    onnx: str
    files: dict[str, str] = field(default_factory=dict)


TOOLS = {
    "tlscale": Tool(
        "tlscale",
        "its bundled ResNet-10-T",
        ["tlscale new photos", "tlscale run photos.yaml"],
        ["tlscale predict runs/photos new --out labels.csv"],
        ["tlscale export runs/photos --to onnx --out onnx"],
        "onnx/model.onnx",
    ),
    "tlscale, the same network": Tool(
        "tlscale",
        "EfficientNet-Lite0, ImageNet",
        [
            "tlscale new photos --backbone tf_efficientnet_lite0",
            "tlscale run photos.yaml backbone.weights=WEIGHTS data.image_size=224",
        ],
        ["tlscale predict runs/photos new --out labels.csv"],
        ["tlscale export runs/photos --to onnx --out onnx"],
        "onnx/model.onnx",
    ),
    "fastai": Tool(
        "fastai",
        "EfficientNet-Lite0, ImageNet",
        ["python train.py"],
        ["python predict.py"],
        ["python export.py"],
        "model.onnx",
        {"train.py": FASTAI, "predict.py": FASTAI_PREDICT, "export.py": FASTAI_EXPORT},
    ),
    "Ultralytics": Tool(
        "ultralytics",
        "none: random (its own cannot be fetched here)",
        ["yolo classify train data=photos model=yolo26n-cls.yaml"],
        ["yolo classify predict model=runs/classify/train/weights/best.pt source=new save_txt"],
        ["yolo export model=runs/classify/train/weights/best.pt format=onnx dynamic=True"],
        "runs/classify/train/weights/best.onnx",
    ),
}


def put_new_images(folder: Path) -> dict[str, str]:
    """Write what is to be labelled; return the label of each image by the name of its file without the suffix."""
    folder.mkdir()
    truth = {}
    for kind, label in enumerate(COUNTS):
        picture = Image.open(PHOTOS[label]).convert("RGB")
        for number in range(NEW_EACH):
            name = f"IMG_{kind + 1}{number:03}"
            save_as(crop_of(picture, np.random.default_rng([1, kind, number])), folder / name, number)
            truth[name] = label
    (folder / "IMG_9000.jpg").write_bytes((folder / "IMG_1003.jpeg").read_bytes()[:9000])
    (folder / "IMG_9001.png").write_text("<html>404</html>")
    return truth


def run(line: str, folder: Path, log: Path, weights: Path) -> tuple[float, float]:
    """Run a command as a person would type it; return its seconds, and those of the CPU.

    Raises:
        SystemExit: it failed.
    """
    beside = Path(sys.executable).parent
    programs = {
        "tlscale": [sys.executable, "-m", "tlscale"],
        "python": [sys.executable],
        "yolo": [sys.executable, str(beside / "yolo")],
    }
    name, *words = shlex.split(line.replace("WEIGHTS", str(weights)))
    offline = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    with log.open("a") as file:
        file.write(f"$ {line}\n")
        file.flush()
        began, before_s = time.perf_counter(), children_cpu_s()
        environment = {**os.environ, **offline, "TLSCALE_CACHE": str(folder / "cache")}
        done = subprocess.run([*programs[name], *words], cwd=folder, stdout=file, stderr=file, env=environment)
        seconds, cpu_s = time.perf_counter() - began, children_cpu_s() - before_s
        file.write(f"\nexit code {done.returncode} after {seconds:.1f} s, {cpu_s:.1f} s of CPU\n\n")
    if done.returncode:
        sys.exit(f"{line} failed:\n{log.read_text()[-3000:]}")
    return seconds, cpu_s


def children_cpu_s() -> float:
    """Return the CPU's seconds of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def answers(folder: Path) -> dict[str, str]:
    """Return the label of each image that has one, by the name of its file without the suffix."""
    if (table := folder / "labels.csv").exists():
        with table.open(newline="") as file:
            return {Path(row["path"]).stem: row["label"] for row in csv.DictReader(file)}
    texts = folder.glob("runs/classify/predict/labels/*.txt")  # the first line is the likeliest class
    return {path.stem: path.read_text().splitlines()[0].partition(" ")[2] for path in texts}


def about_onnx(path: Path) -> str:
    """Return what a colleague finds in the file: is the batch free, and do the classes travel along?"""
    model = onnx.load(path)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    keys = [prop.key for prop in model.metadata_props]
    classes = "classes in it" if {"classes", "names"} & set(keys) else "no classes"
    prepared = "how to prepare images" if "input" in keys else "not how to prepare images"
    return f"{'any batch' if batch.dim_param else f'batch {batch.dim_value}'}, {classes}, {prepared}"


def measure(tool: Tool, weights: Path, log: Path) -> list[str]:
    """Go the whole way in a new folder; return the cells of the table."""
    log.write_text("")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_messy_folder(folder / "photos")
        before = {path: path.stat().st_size for path in (folder / "photos").rglob("*")}
        truth = put_new_images(folder / "new")
        for file, text in tool.files.items():
            (folder / file).write_text(text.replace("WEIGHTS", str(weights)))
        steps = [
            [run(line, folder, log, weights) for line in lines] for lines in (tool.model, tool.predictions, tool.export)
        ]
        after = {path: path.stat().st_size for path in (folder / "photos").rglob("*")}
        given = answers(folder)
        right = sum(given.get(image) == label for image, label in truth.items())
        cells = [
            str(sum(map(len, (tool.model, tool.predictions, tool.export)))),
            str(sum(bool(line.strip()) for text in tool.files.values() for line in text.splitlines())),
            *("{:.0f} ({:.0f})".format(*map(sum, zip(*seconds, strict=True))) for seconds in steps),
            f"{right} of {len(truth)}",
            f"{sum(image not in given or not given[image] for image in truth)}",
            "unchanged"
            if before == after
            else f"{len(before.keys() ^ after.keys())} files fewer or more, others changed",
            about_onnx(folder / tool.onnx),
        ]
        shutil.copy(folder / tool.onnx, log.with_suffix(".onnx"))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--only", choices=list(TOOLS), action="append")
    parser.add_argument("--logs", type=Path, default=Path("messy_folder_logs"))
    args = parser.parse_args()
    args.logs.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, tool in TOOLS.items():
        if args.only and name not in args.only:
            continue
        if importlib.util.find_spec(tool.package) is None:
            print(f"{name}: not installed, skipped")
            continue
        cells = measure(tool, args.weights.resolve(), args.logs / f"{name.replace(', ', '_').replace(' ', '_')}.log")
        shown = name if tool.package == "tlscale" else f"{name} {version(tool.package)}"
        rows.append(f"| {shown} | {tool.weights} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    head = ["tool", "weights", "commands", "lines", "s (CPU s) to a model", "for predictions", "for ONNX"]
    head += ["right", "no answer", "the folder", "the ONNX file"]
    print("\n".join([f"\n| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]))


if __name__ == "__main__":
    main()
