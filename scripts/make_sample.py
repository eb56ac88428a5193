"""Makes tlscale/data/sample/fashion_mnist.parquet, the sample of Fashion-MNIST that ships with tlscale.

    python scripts/make_sample.py FOLDER_WITH_THE_FOUR_IDX_FILES [OUT.parquet]

600 training and 100 test images of each class, as PNG, in the order of the originals. The choice is
`stratified_subset` with seed 0. The same libraries write the same bytes.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tlscale.data.sources.fashion_mnist import CHECKSUMS, SAMPLE
from tlscale.data.sources.idx import read_split
from tlscale.data.sources.stratified_draws import stratified_subset
from tlscale.errors import DataError

PARTS = (("train", "train", 6000), ("test", "t10k", 1000))
SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("label", pa.int8()),
        ("split", pa.string()),
    ]
)
MOST_BYTES = 4_000_000


def make_sample(folder: Path, out: Path) -> int:
    """Write the sample and return its size in bytes."""
    rows = [row for split, prefix, count in PARTS for row in chosen_rows(folder, split, prefix, count)]
    table = pa.Table.from_pylist(rows, SCHEMA)
    # PNG does not compress further; without statistics and compression the file is the smallest.
    pq.write_table(table, out, compression="none", use_dictionary=["split"], write_statistics=False)
    return out.stat().st_size


def chosen_rows(folder: Path, split: str, prefix: str, count: int) -> list[dict[str, object]]:
    """Return the rows of one split; a path such as `train/00012` keeps the number of the original."""
    source, checksums = read_split(folder, split, prefix)
    wrong = [name for name, sha256 in checksums.items() if CHECKSUMS.get(name) != sha256]
    if wrong:
        raise DataError(f"{folder}: not Fashion-MNIST: {', '.join(wrong)}")
    numbers = np.arange(len(source.label_ids_N), dtype=np.int64)
    chosen = stratified_subset(source.label_ids_N, numbers, count, 0, keep_all_classes=True)
    return [
        {
            "image": {"bytes": _png(source.store.read(int(i))), "path": f"{split}/{i:05d}"},
            "label": int(source.label_names[source.label_ids_N[i]]),
            "split": split,
        }
        for i in chosen
    ]


def _png(pixels: object) -> bytes:
    assert isinstance(pixels, np.ndarray)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True, compress_level=9)
    return file.getvalue()


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    out = Path(sys.argv[2]) if len(sys.argv) == 3 else SAMPLE
    out.parent.mkdir(parents=True, exist_ok=True)
    size = make_sample(Path(sys.argv[1]), out)
    print(f"{out}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES:,} bytes")


if __name__ == "__main__":
    main()
