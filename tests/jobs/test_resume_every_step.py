"""Resumed after any step of two epochs, the network is fed with what it would have been fed with: read where it enters.

What is compared is what the first module gets, and not what the sampler says that it should get.
"""

import hashlib
import shutil

import pytest

import tlscale
from tests.small_runs import as_after, assert_same_bits, exported, last_checkpoint, put_small_idx, small_recipe, tensors
from tlscale.training import loop as finetune

# 21 images in batches of 4: six steps an epoch, the last of one image.
STEPS, NUM_IMAGES, BATCH = 12, 21, 4
SOME = (2, 6, 7, 11)  # in the middle of an epoch, at its end, after it, and before the last
VARIANTS = {
    "images": {},
    "micro-batches": {"compute": {"micro_batch_size": 2}},  # two forward passes a step, and one in the last of an epoch
    "codes": {"freeze": ".*", "optim": {"ema_decay": 0.9}},
    "augmented, mixed": {"data": {"augment": ["flip", "crop", {"mixup": 0.4}], "workers": 0}},
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("few"), train=26, test=10)


@pytest.fixture
def fed(monkeypatch):
    """Grows by a list for each step of training: a digest of each image, or code, that enters the network in it."""
    steps, watched = [], set()

    def note(module, inputs):
        if module.training:
            (values,) = inputs
            steps[-1] += [hashlib.sha256(value.numpy().tobytes()).hexdigest() for value in values]

    def spy(model, *args, **options):
        if model not in watched:
            watched.add(model)
            model.register_forward_pre_hook(note)
        steps.append([])
        return train_step(model, *args, **options)

    train_step = finetune.train_step
    monkeypatch.setattr(finetune, "train_step", spy)
    return steps


@pytest.mark.parametrize(
    "resumed_after",
    [pytest.param(SOME, id="some steps"), pytest.param(range(1, STEPS + 1), id="any step", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_after_any_step_the_network_gets_what_was_left(name, resumed_after, few, tmp_path, fed):
    changes = {"batch_size": BATCH, "evaluate": {"every": "2 epochs"}, **VARIANTS[name]}
    recipe = small_recipe(tmp_path / "recipe.yaml", few, checkpoint={"every": "1 steps", "keep": 100}, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    whole = list(fed)
    assert len(whole) == STEPS
    if name != "augmented, mixed":
        for epoch in (whole[:6], whole[6:]):
            images = [image for step in epoch for image in step]
            assert len(images) == len(set(images)) == NUM_IMAGES
        assert set(sum(whole[:6], [])) == set(sum(whole[6:], []))
        assert whole[:6] != whole[6:]
    for step in resumed_after:
        out = tmp_path / f"from{step}"
        as_after(step, tmp_path / "whole", out)
        fed.clear()
        tlscale.run(recipe, out, resume=True)
        assert fed == whole[step:], step
        assert_same_bits(exported(out), exported(tmp_path / "whole"))
        for file in ("model", "optimizer"):
            ends = [last_checkpoint(run) / f"{file}.safetensors" for run in (tmp_path / "whole", out)]
            assert_same_bits(*map(tensors, ends))
        shutil.rmtree(out)
