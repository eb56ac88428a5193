"""Wrong data: how to make them, and what the message must say.

Used against `open_data` (tests/unit/data/test_sources_wrong.py) and against the command line (exit 2, no traceback).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


class WrongData(NamedTuple):
    id: str
    build: Callable[[Path], dict[str, Any]]
    """Makes the data below a folder; returns the keys of the recipe's section `data`."""
    fragments: tuple[str, ...]
    """Texts that the message must hold."""
    at_decode: bool = False
    """Found when the image is decoded, not when the data are opened."""


def put_image(path: Path, grey: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), grey).save(path)
    return path


def put_folder(root: Path, **classes: int) -> Path:
    """`put_folder(p, cat=2)` makes p/cat/0.png and p/cat/1.png; `train__cat` makes p/train/cat."""
    for name, count in classes.items():
        for i in range(count):
            put_image(root / name.replace("__", "/") / f"{i}.png", grey=(len(name) * 40 + i) % 256)
    return root


def put_idx(folder: Path, name: str, numbers: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, numbers.ndim)) + struct.pack(f">{numbers.ndim}I", *numbers.shape)
    content = header + numbers.astype(np.uint8).tobytes()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def put_idx_split(folder: Path, prefix: str, labels: list[int], end: str = ".gz") -> None:
    images = np.arange(len(labels) * 16).reshape(len(labels), 4, 4) % 256
    put_idx(folder, f"{prefix}-images-idx3-ubyte{end}", images)
    put_idx(folder, f"{prefix}-labels-idx1-ubyte{end}", np.array(labels))


def no_folder(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(tmp / "nowhere")}


def empty_class(tmp: Path) -> dict[str, Any]:
    (put_folder(tmp, cat=2, dog=2) / "cow").mkdir()
    return {"source": "folder", "path": str(tmp)}


def one_class(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat=3))}


def class_only_in_test(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, train__cat=3, train__dog=3, test__cat=1, test__dogs=1))}


def other_files(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, cat=2, dog=2)
    (tmp / "dog" / "list.csv").write_text("x")
    return {"source": "folder", "path": str(tmp)}


def split_misspelt(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, Train__cat=2, Train__dog=2, test__cat=1))}


def nested_class(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat__old=2, dog=2))}


def _csv(tmp: Path, text: str) -> dict[str, Any]:
    put_folder(tmp, cat=2, dog=2)
    (tmp / "list.csv").write_text(text)
    return {"source": "manifest", "path": str(tmp / "list.csv")}


def missing_files(tmp: Path) -> dict[str, Any]:
    rows = [f"gone/{i}.png,cat" for i in range(7)]
    return _csv(tmp, "\n".join(["path,label", "cat/0.png,cat", "dog/0.png,dog", *rows]) + "\n")


def path_outside(tmp: Path) -> dict[str, Any]:
    return _csv(tmp, "path,label\ncat/0.png,cat\ndog/../../x.png,dog\n")


def unknown_split(tmp: Path) -> dict[str, Any]:
    return _csv(tmp, "path,label,split\ncat/0.png,cat,train\ndog/0.png,dog,train\ndog/1.png,dog,tset\n")


def no_label_column(tmp: Path) -> dict[str, Any]:
    return _csv(tmp, "path,kind\ncat/0.png,cat\ndog/0.png,dog\n")


def empty_label(tmp: Path) -> dict[str, Any]:
    return _csv(tmp, "path,label\ncat/0.png,cat\ndog/0.png,\n")


def ragged_csv(tmp: Path) -> dict[str, Any]:
    return _csv(tmp, "path,label\ncat/0.png,cat,7\n")


def float_labels(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, cat=2)
    pq.write_table(pa.table({"path": ["cat/0.png", "cat/1.png"], "label": [0.5, 1.5]}), tmp / "list.parquet")
    return {"source": "manifest", "path": str(tmp / "list.parquet")}


def swapped_idx(tmp: Path) -> dict[str, Any]:
    put_idx(tmp, "train-images-idx3-ubyte", np.zeros(3))
    put_idx(tmp, "train-labels-idx1-ubyte", np.zeros(3))
    return {"source": "idx", "path": str(tmp)}


def short_idx(tmp: Path) -> dict[str, Any]:
    put_idx_split(tmp, "train", [0, 1, 0, 1], end="")
    images = tmp / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    return {"source": "idx", "path": str(tmp)}


def uneven_idx(tmp: Path) -> dict[str, Any]:
    put_idx_split(tmp, "train", [0, 1, 0, 1])
    put_idx(tmp, "train-labels-idx1-ubyte.gz", np.array([0, 1, 0]))
    return {"source": "idx", "path": str(tmp)}


def not_on_disk(tmp: Path) -> dict[str, Any]:
    return {"source": "disk", "path": str(put_folder(tmp, cat=1))}


def not_on_hub(_tmp: Path) -> dict[str, Any]:
    return {"source": "hub", "path": "nobody-at-all/no-such-images"}


def limit_too_large(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat=3, dog=3)), "train_limit": 7}


def label_outside_classes(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat=3, dog=3)), "classes": ["cat", "dgo"]}


def cut_short(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, cat=3, dog=3)
    for image in (tmp / "cat").iterdir():
        image.write_bytes(image.read_bytes()[:50])
    return {"source": "folder", "path": str(tmp)}


def postscript(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, cat=3, dog=3)
    for i in range(3):
        (tmp / "dog" / f"{i}.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    return {"source": "folder", "path": str(tmp)}


def bomb(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, cat=3, dog=3)
    for i in range(3):
        (tmp / "dog" / f"{i}.png").write_bytes(bomb_png(9000, 9000))
    return {"source": "folder", "path": str(tmp)}


def bomb_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header announces so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def _table(tmp: Path, head: str, *rows: str) -> str:
    put_folder(tmp, cat=3, dog=3)
    (tmp / "list.csv").write_text("\n".join([f"path,label,{head}", *rows]) + "\n")
    return str(tmp / "list.csv")


def group_in_two_splits(tmp: Path) -> dict[str, Any]:
    rows = ("cat/0.png,cat,p1,train", "dog/0.png,dog,p2,train", "cat/1.png,cat,p3,test", "dog/1.png,dog,p2,test")
    return {"source": "manifest", "path": _table(tmp, "patient,split", *rows), "group_column": "patient"}


def no_group_column(tmp: Path) -> dict[str, Any]:
    path = _table(tmp, "patient", "cat/0.png,cat,1", "dog/0.png,dog,2")
    return {"source": "manifest", "path": path, "group_column": "patients"}


def empty_group_column(tmp: Path) -> dict[str, Any]:
    path = _table(tmp, "patient", "cat/0.png,cat,", "dog/0.png,dog, ")
    return {"source": "manifest", "path": path, "group_column": "patient"}


def groups_are_labels(tmp: Path) -> dict[str, Any]:
    path = _table(tmp, "patient", "cat/0.png,cat,1", "dog/0.png,dog,2")
    return {"source": "manifest", "path": path, "group_column": "label"}


def one_group_a_class(tmp: Path) -> dict[str, Any]:
    rows = ("cat/0.png,cat,1", "cat/1.png,cat,1", "dog/0.png,dog,2", "dog/1.png,dog,2")
    return {"source": "manifest", "path": _table(tmp, "patient", *rows), "group_column": "patient"}


def image_in_two_splits(tmp: Path) -> dict[str, Any]:
    put_folder(tmp, train__cat=3, train__dog=3, test__dog=1)
    put_image(tmp / "test" / "cat" / "copy.png", grey=(len("train__cat") * 40 + 1) % 256)
    return {"source": "folder", "path": str(tmp), "duplicates": "error"}


def regex_of_some(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat=2, dog=4)), "group_regex": r"(dog/\d)"}


def regex_of_none(tmp: Path) -> dict[str, Any]:
    return {"source": "folder", "path": str(put_folder(tmp, cat=2, dog=4)), "group_regex": r"patient(\d+)"}


WRONG_DATA: list[WrongData] = [
    WrongData("no folder", no_folder, ("nowhere", "does not exist")),
    WrongData("empty class", empty_class, ("cow", "is empty")),
    WrongData("one class", one_class, ("one class only", "'cat'")),
    WrongData("class only in test", class_only_in_test, ("test split", "'dogs'", "Did you mean 'dog'")),
    WrongData("files that are no images", other_files, ("list.csv", "no ending of an image")),
    WrongData("split misspelt", split_misspelt, ("no folder 'train'", "Did you mean 'Train'")),
    WrongData("nested class", nested_class, ("old", "folder inside a class folder", "data.class_folder")),
    WrongData("missing files", missing_files, ("7 of 9 files are not there", "'gone/4.png'", "and 2 more")),
    WrongData("path outside", path_outside, ("row 1", "leaves the manifest's folder")),
    WrongData("unknown split", unknown_split, ("unknown split 'tset'", "Did you mean 'test'")),
    WrongData("no label column", no_label_column, ("data.label_column", "'kind'")),
    WrongData("empty label", empty_label, ("1 of 2 rows have no label",)),
    WrongData("ragged csv", ragged_csv, ("list.csv", "Expected 2 columns, got 3")),
    WrongData("labels of floats", float_labels, ("type double", "expected text or whole numbers")),
    WrongData("idx swapped", swapped_idx, ("train-images-idx3-ubyte", "swapped")),
    WrongData("idx cut short", short_idx, ("train-images-idx3-ubyte", "64 bytes")),
    WrongData("idx uneven", uneven_idx, ("4 images", "3 labels")),
    WrongData("not saved by datasets", not_on_disk, ("save_to_disk",)),
    WrongData("hub not reachable", not_on_hub, ("nobody-at-all/no-such-images", "cache", "Ways out")),
    WrongData("limit too large", limit_too_large, ("data.train_limit: 7", "6 training images")),
    WrongData("label outside classes", label_outside_classes, ("'dog'", "Did you mean 'dgo'")),
    WrongData("group in two splits", group_in_two_splits, ("data.groups_across_splits", "'p2'", "dog/1.png", "allow")),
    WrongData("no group column", no_group_column, ("data.group_column", "'patients'", "Did you mean 'patient'")),
    WrongData("no groups in the column", empty_group_column, ("data.group_column", "all 2 rows are empty")),
    WrongData("groups are the labels", groups_are_labels, ("data.group_column", "'label' holds the labels")),
    WrongData("one group a class", one_group_a_class, ("none can be held out", "each class has one training group")),
    WrongData("image in two splits", image_in_two_splits, ("data.duplicates", "of 2 images of test", "copy.png")),
    WrongData("regex of some", regex_of_some, ("data.group_regex", "matches only 4 of the 6 paths", "'cat/0.png'")),
    WrongData("regex of none", regex_of_none, ("data.group_regex", "matches none of the 6 paths", "'cat/0.png'")),
    WrongData("images cut short", cut_short, ("cat", ".png", "damaged or cut short"), at_decode=True),
    WrongData("PostScript in a .png", postscript, ("dog", ".png", "PostScript"), at_decode=True),
    WrongData("bomb", bomb, ("dog", ".png", "81.0 megapixels", "data.max_megapixels"), at_decode=True),
]
