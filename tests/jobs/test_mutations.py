"""Damaged folders of a model, a checkpoint, codes and a run: an error of ours, or what was written, and no other."""

import json
import random
import re
import shutil
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.mutations import mutate
from tests.small_models import classifier
from tests.unit.codes.test_store import KEY, opened, put
from tests.unit.codes.test_store import values_of as codes_of
from tlscale.codes.store import CodesStore
from tlscale.data.input_spec import InputSpec
from tlscale.errors import TlscaleError
from tlscale.models.export import export_model, load
from tlscale.training.checkpoint.files import (
    Checkpoint,
    corruption_of,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)

SPEC = InputSpec(32, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9)
MOST_S, MOST_MIB = 10, 1000
FEW, MANY = range(25), range(500)


def damaged(sound, folder, seed):
    """A copy of the folder, changed at random; what was done."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    return mutate(folder, random.Random(seed))


def memory_mib(name):
    """VmRSS, what this process has, or VmHWM, the most that it had since somebody wrote 5 to clear_refs."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def outcomes(sound, folder, seeds, use, same):
    """How often each mutation ended as it should; fails on the first others.

    Args:
        use: opens the damaged folder; may raise an error of ours.
        same: whether what was opened is what was written.
    """
    counts, wrong = Counter(), []
    Path("/proc/self/clear_refs").write_text("5")
    before_mib = memory_mib("VmRSS")
    for seed in seeds:
        done, start = damaged(sound, folder, seed), time.process_time()
        try:
            outcome = "harmless" if same(use(folder)) else "silent"
        except TlscaleError as error:
            outcome = "refused" if str(error) else "without a word"
        except Exception as error:
            outcome = f"escaped as {type(error).__name__}: {error!s:.100}"
        if time.process_time() - start > MOST_S:
            outcome = "took too long"
        counts[outcome.split(":")[0]] += 1
        if outcome not in ("harmless", "refused"):
            wrong.append(f"{seed}, {done}: {outcome}")
    assert memory_mib("VmHWM") - before_mib < MOST_MIB
    print(dict(counts))
    assert wrong == [], f"{len(wrong)} of {len(seeds)} ({dict(counts)})"
    assert counts["refused"] >= len(seeds) / 3
    return counts


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- a model ----------------------------------------------------------------------------------------------------------

HEADS = {"linear": ("linear",), "longer": ({"linear": 8}, "relu", "linear")}


@pytest.fixture(scope="module", params=HEADS)
def model(request, tmp_path_factory):
    head = HEADS[request.param]
    folder = tmp_path_factory.mktemp("model") / "model"
    export_model(classifier(head=head, num_classes=3), folder, head=head, classes=["a", "b", "c"], spec=SPEC)
    return folder


def check_model(model, folder, seeds):
    sound = load(model)
    state = sound.model.state_dict()

    def same(found):
        facts = (found.classes, found.input_spec) == (sound.classes, sound.input_spec)
        return facts and str(found.model) == str(sound.model) and equal(found.model.state_dict(), state)

    return outcomes(model, folder, seeds, load, same)


def test_a_damaged_model(model, tmp_path):
    check_model(model, tmp_path / "model", FEW)


@pytest.mark.long
def test_many_damaged_models(model, tmp_path):
    check_model(model, tmp_path / "model", MANY)


@pytest.mark.long
def test_hostile_settings_of_a_model(model, tmp_path):
    """Without checksums, which whoever writes the folder can leave out: of 525 changes none escapes."""
    sound = tmp_path / "sound"
    shutil.copytree(model, sound)
    config = json.loads((sound / "config.json").read_text())
    for key in ("sha256", "config_sha256"):
        config["tlscale"].pop(key, None)
    (sound / "config.json").write_text(json.dumps(config))
    for path in sound.glob("*.safetensors"):
        shutil.move(path, tmp_path / path.name)

    def use(folder):
        for path in tmp_path.glob("*.safetensors"):
            shutil.copy(path, folder)
        return load(folder)

    outcomes(sound, tmp_path / "model", range(525), use, lambda _: True)


# -- a checkpoint -----------------------------------------------------------------------------------------------------


def checkpoint_of(step):
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{i}.weight": torch.randn(6, 5, generator=generator) for i in range(4)}
    moments = {f"layer{i}.weight.exp_avg": torch.randn(6, 5, generator=generator) for i in range(4)}
    state = {"clock": {"step": step, "best": [[1, 0.5]]}, "optimizer": {"state": {}, "groups": [], "others": {}}}
    return Checkpoint(step, {"model": weights, "optimizer": moments}, {**state, "scaler": None}, "run")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        save_checkpoint(root, checkpoint_of(step))
    return root


def check_checkpoint(checkpoints, folder, seeds):
    last = list_checkpoints(checkpoints)[-1]
    return outcomes(last, folder / last.name, seeds, partial(load_checkpoint, run_id="run"), is_sound)


def is_sound(checkpoint):
    sound = checkpoint_of(checkpoint.step)
    groups = checkpoint.tensors.keys() == sound.tensors.keys()
    return (
        groups
        and checkpoint.state == sound.state
        and all(equal(checkpoint.tensors[name], sound.tensors[name]) for name in sound.tensors)
    )


def test_a_damaged_checkpoint(checkpoints, tmp_path):
    check_checkpoint(checkpoints, tmp_path, FEW)


@pytest.mark.long
def test_many_damaged_checkpoints(checkpoints, tmp_path):
    check_checkpoint(checkpoints, tmp_path, MANY)


def test_of_damaged_checkpoints_the_one_before_is_used_and_what_is_wrong_is_said(checkpoints, tmp_path):
    for seed in FEW:
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(checkpoints, tmp_path)
        last = list_checkpoints(tmp_path)[-1]
        mutate(last, random.Random(seed))
        checkpoint, wrong = load_newest(list_checkpoints(tmp_path), partial(load_checkpoint, run_id="run"))
        assert is_sound(checkpoint)
        assert [str(last) in line for line in wrong] == [True] * (2 - checkpoint.step)
        assert (corruption_of(last, "run") is None) == (checkpoint.step == 2)


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    store = CodesStore(tmp_path_factory.mktemp("codes"))
    put(store, range(25))
    return store.folder(KEY)


def check_codes(entry, root, seeds):
    """What is damaged is not used, but computed again; the rest, and what was computed, is right."""
    wrong, used = [], Counter()
    for seed in seeds:
        store = CodesStore(root)
        done, start = damaged(entry, store.folder(KEY), seed), time.process_time()
        try:
            lost = put(store, range(25))
            codes = opened(store, range(25))
            found = () if codes is None else codes.load().take(np.arange(25))
            right = len(found) == 2 and all(map(torch.equal, found, codes_of(np.arange(25))))
            used["recomputed" if lost else "found"] += 1
            outcome = "right" if right else "silent"
            store.verify(), store.entries(), store.prune(0)
        except Exception as error:
            outcome = f"escaped as {type(error).__name__}: {error!s:.100}"
        if outcome != "right" or time.process_time() - start > MOST_S:
            wrong.append(f"{seed}, {done}: {outcome}")
    assert wrong == [], f"{len(wrong)} of {len(seeds)}"
    assert used["recomputed"] >= len(seeds) / 2
    print(dict(used))


def test_a_folder_in_place_of_any_file_of_the_codes_is_removed(entry, tmp_path):
    names = [path.name for path in sorted(entry.iterdir())]
    assert len(names) >= 4
    for name in names:
        store = CodesStore(tmp_path / name)
        shutil.copytree(entry, store.folder(KEY))
        (store.folder(KEY) / name).unlink()
        (store.folder(KEY) / name / "within").mkdir(parents=True)
        put(store, range(25))
        found = opened(store, range(25)).load().take(np.arange(25))
        assert all(map(torch.equal, found, codes_of(np.arange(25)))), name
        store.verify(), store.prune(0)
        assert not (store.folder(KEY) / name).exists()


def test_damaged_codes(entry, tmp_path):
    check_codes(entry, tmp_path, FEW)


@pytest.mark.long
def test_many_damaged_codes(entry, tmp_path):
    check_codes(entry, tmp_path, MANY)
