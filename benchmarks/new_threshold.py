"""Where `tlscale new` changes its strategy for the bundled network: its probe against its fine-tuning, by labels.

    python benchmarks/new_threshold.py [--only digits] [--sizes 250 500] [--seeds 5]

Both recipes are those that `tlscale new` writes for so many images of the data, image size, validation share and batch
size included; the same labelled images for both, chosen by the seed. Fashion-MNIST is scored on its 10,000 test images,
the digits of scikit-learn and the icons of Debian's oxygen-icon-theme (see bundled_transfer.py) on the half that is not
labelled.
Prints Markdown: accuracy of both, and the difference over the seeds with its 95 % interval by Student's t.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

from bundled_transfer import DATASETS, put
from scipy import stats

import tlscale
from tlscale.commands import new_recipe
from tlscale.recipe.schema import Recipe

SIZES = {
    "fashion_mnist": (60, 125, 250, 350, 500, 1000),
    "digits": (60, 125, 250, 350, 500, 850),
    "icons": (125, 250),
}


def recipes_of(data: str) -> dict[str, Recipe]:
    """Return what `tlscale new` writes for few and for many images."""
    made, chosen = {}, new_recipe.MOST_PROBED
    for name, most in (("probe", 10**9), ("fine-tuning", 0)):
        new_recipe.MOST_PROBED = {**chosen, "bundled": most}
        try:
            made[name] = tlscale.new(data)
        finally:
            new_recipe.MOST_PROBED = chosen
    assert made["probe"].probe is not None
    assert made["fine-tuning"].probe is None
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(SIZES), action="append")
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print("| data | labels | probe | fine-tuning | fine-tuning - probe | 95 % interval | better in |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.only or SIZES:
            make, _ = DATASETS[name]
            recipes = recipes_of(name if make is None else str(put(name, make)))
            for size in options.sizes or SIZES[name]:
                top1s: dict[str, list[float]] = {strategy: [] for strategy in recipes}
                for seed in range(options.seeds):
                    for strategy, recipe in recipes.items():
                        by_number = new_recipe.keys_by_number(size)
                        if strategy == "probe":
                            del by_number["batch_size"]
                        wanted = recipe.with_(seed=seed, **{"data.train_limit": size}, **by_number)
                        out = Path(folder) / f"{name}_{size}_{seed}_{strategy}"
                        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                            top1s[strategy].append(tlscale.run(wanted, out)["top1"])
                print(_row(name, size, top1s["probe"], top1s["fine-tuning"]), flush=True)


def _row(name: str, size: int, probe: list[float], tuned: list[float]) -> str:
    each = [one - other for one, other in zip(tuned, probe, strict=True)]
    mean, count = statistics.fmean(each), len(each)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(each) / count**0.5
    wins = sum(difference > 0 for difference in each)
    shown = " | ".join(f"{statistics.fmean(some):.4f}" for some in (probe, tuned))
    gain = f"**{mean:+.4f}** | {mean - half:+.4f} to {mean + half:+.4f} | {wins} of {count}"
    return f"| {name} | {size:,} | {shown} | {gain} |"


if __name__ == "__main__":
    main()
