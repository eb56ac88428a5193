"""Probes with weights of classes on two processes: the classifier, the choice and the answers of one."""

import json

import pytest

from tests.chaos.killing import Place, assert_same_answers, start_all
from tests.small_runs import assert_same_bits, exported, largest_difference, result

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
PLAIN = {
    "probe": {"kind": "logistic", "strengths": [1.0, 0.1, 0.01], "refit": False},
    "evaluate": {"select": "balanced_accuracy"},
}
WEIGHTED = {**PLAIN, "loss": {"class_weights": {str(number): float(number + 1) ** 2 for number in range(10)}}}


def test_two_processes_fit_and_choose_with_weights_what_one_does(forks, idx, tmp_path):
    plain, one, two = (
        Place(tmp_path / name, keys, idx) for name, keys in (("plain", PLAIN), ("one", WEIGHTED), ("two", WEIGHTED))
    )
    for place in (plain, one):
        assert forks.wait(place.start(forks)) == 0, place.output()
    assert [forks.wait(pid) for pid in start_all(forks, two, 2)] == [0, 0], two.output()
    assert json.loads((two.out / "run.json").read_text())["world_size"] == 2
    assert_same_bits(exported(two.out), exported(one.out))
    assert_same_answers(one.out, two.out)
    tried = result(two.out)["probe"]["tried"]
    assert tried == result(one.out)["probe"]["tried"]
    assert len({row["held_out_balanced_accuracy"] for row in tried["penultimate"]}) > 1
    assert largest_difference(exported(plain.out), exported(two.out)) > 1e-3
