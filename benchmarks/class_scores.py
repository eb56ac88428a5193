"""Choosing by AUROC or average precision with many classes: seconds and memory, beside scikit-learn's figure alone.

    python benchmarks/class_scores.py [--images 50000] [--classes 1000]

Logits are normal numbers, the own class's 3 higher; float32, as a run collects them in batches of 256. For each figure:
what `evaluate.select` computes in a validation, the figure and its standard error by a bootstrap; the figure alone, as
a probe computes it for each candidate; and scikit-learn's function for the figure, class by class, on probabilities
that are there already. CPU seconds are those of the process, with one thread: on a machine that others use as well,
wall time measures them too. MiB are those that the process needed beyond what it held before, with the logits of all
batches. Prints Markdown.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from tlscale.codes.probes.class_figures import figure_by
from tlscale.training.class_scores import ClassScores

BY_SCIKIT_LEARN = {"auroc": roc_auc_score, "mean_average_precision": average_precision_score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--classes", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(options.classes, (options.images,), generator=generator)
    logits_NC = torch.randn(options.images, options.classes, generator=generator)
    logits_NC[torch.arange(options.images), labels_N] += 3
    print(
        "| figure | with its error, s | more MiB | alone, s | scikit-learn's, s | with its error, of scikit-learn's |"
    )
    print("|---|---|---|---|---|---|")
    for figure, score in BY_SCIKIT_LEARN.items():
        scores = ClassScores(figure, options.images)
        for rows_B in torch.arange(options.images).split(256):
            scores.add(rows_B, labels_N[rows_B], logits_NC[rows_B])
        before_mib = start_of_peak_mib()
        chosen, chosen_s = timed(lambda scores=scores: scores.over_all(lambda own: [own]))
        more_mib = peak_mib() - before_mib
        alone, alone_s = timed(lambda figure=figure: figure_by(figure, logits_NC, labels_N))
        assert alone == chosen[figure]
        theirs_s = by_scikit_learn(score, logits_NC, labels_N, alone)
        print(
            f"| {figure} | {chosen_s:.1f} | {more_mib} | {alone_s:.1f} | {theirs_s:.1f} | {chosen_s / theirs_s:.2f} |"
        )


def by_scikit_learn(score: Callable[..., float], logits_NC: torch.Tensor, labels_N: torch.Tensor, ours: float) -> float:
    """Return the seconds that the mean takes; it has to be ours."""
    figures, seconds = [], 0.0
    largest_N1, total_N1 = logits_NC.max(1, keepdim=True).values.double(), logits_NC.double().logsumexp(1, keepdim=True)
    for number in range(logits_NC.shape[1]):
        column_N1 = logits_NC[:, number : number + 1].double()
        shares_N = ((column_N1 - largest_N1).exp() * (largest_N1 - total_N1).exp()).numpy().ravel()
        is_class_N = (labels_N == number).numpy()
        if is_class_N.any():
            figure, took_s = timed(lambda has=is_class_N, shares=shares_N: score(has, shares))
            figures.append(figure)
            seconds += took_s
    assert abs(float(np.mean(figures)) - ours) < 1e-9
    return seconds


def timed(job: Callable[[], object]) -> tuple[object, float]:
    """Return what it gives, and its CPU seconds."""
    began_s = time.process_time()
    return job(), time.process_time() - began_s


def start_of_peak_mib() -> int:
    """Forget the peak of memory so far (Linux); return what is in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


if __name__ == "__main__":
    main()
