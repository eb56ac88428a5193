"""tlscale's loop ends in the weights of a plain PyTorch loop, bit for bit: benchmarks/loop_overhead.py, made short."""

from __future__ import annotations

import pytest

from benchmarks.loop_overhead import largest_difference, make_recipe, plain_loop, tlscale_loop


# 24 steps of 64 are one epoch of 1,500 images, its last batch short; 26 continue into the next.
@pytest.mark.parametrize(
    ("backbone", "steps", "image_size"), [("test_resnet", 26, 28), ("test_convnext", 26, 32), ("resnet10t", 6, 28)]
)
def test_final_weights_equal_those_of_a_plain_loop(tmp_path, backbone, steps, image_size):
    recipe = make_recipe(backbone=backbone, steps=steps, batch_size=64, image_size=image_size, train_limit=1500)
    plain, _ = plain_loop(recipe)
    ours, _ = tlscale_loop(recipe, tmp_path / "run")
    assert largest_difference(plain, ours) == 0.0
