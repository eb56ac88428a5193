"""The score of images that are unlike those of training: its distance, its threshold, its file."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from tlscale.data.sources.tables import ImageSplit, LabelledTable
from tlscale.errors import ModelError
from tlscale.models.unknown import UnknownScore, pooled_codes
from tlscale.training.unknown import about_unknown, fit_unknown, images_to_fit, images_to_judge, unknown_by


def drawn(count, seed=0, at=0.0, num_features=6):
    """Codes of three classes, features of unequal sizes and tied to each other, and labels."""
    draws = np.random.default_rng(seed)
    labels_N = draws.integers(0, 3, count)
    mix_DD = np.eye(num_features) + np.random.default_rng(9).normal(0, 0.2, (num_features, num_features))
    mix_DD *= np.logspace(-2, 2, num_features)
    centres_CD = np.random.default_rng(8).normal(0, 4, (3, num_features))
    return torch.from_numpy((centres_CD[labels_N] + draws.normal(size=(count, num_features)) + at) @ mix_DD), labels_N


def test_it_is_the_mahalanobis_distance_to_the_nearest_class():
    codes_ND, labels_N = drawn(5000)
    found = fit_unknown(codes_ND, labels_N, drawn(1000, seed=1)[0])
    new_BD = drawn(50, seed=2)[0].numpy()
    codes = codes_ND.numpy()
    means_CD = np.stack([codes[labels_N == number].mean(0) for number in range(3)])
    inverse_DD = np.linalg.inv(np.cov((codes - means_CD[labels_N]).T, bias=True))
    off_BCD = new_BD[:, None] - means_CD
    expected_B = np.einsum("bcd,de,bce->bc", off_BCD, inverse_DD, off_BCD).min(1) / 6
    # But for the little by which the covariance is shrunk, whatever the sizes of the features.
    np.testing.assert_allclose(found.scores(torch.from_numpy(new_BD)), expected_B, rtol=0.05)
    plain = UnknownScore(found.settings, torch.from_numpy(means_CD), torch.from_numpy(np.linalg.cholesky(inverse_DD)))
    np.testing.assert_allclose(plain.scores(torch.from_numpy(new_BD)), expected_B, rtol=1e-6)


def test_one_image_in_twenty_of_known_classes_is_taken_for_unknown_and_others_are():
    codes_ND, labels_N = drawn(2000)
    found = fit_unknown(codes_ND, labels_N, drawn(1000, seed=1)[0])
    threshold = found.settings.threshold
    known = (found.scores(drawn(4000, seed=2)[0]) <= threshold).mean()
    assert known == pytest.approx(0.95, abs=0.02)
    assert about_unknown(found, drawn(4000, seed=2)[0])["known"] == known
    assert (found.scores(drawn(200, seed=3, at=20.0)[0]) > threshold).mean() > 0.95


@pytest.mark.parametrize(("count", "is_there"), [(18, False), (19, True)])
def test_too_few_validation_images_choose_no_threshold(count, is_there):
    codes_ND, labels_N = drawn(300)
    assert (fit_unknown(codes_ND, labels_N, drawn(count, seed=1)[0]) is not None) == is_there


def test_known_images_of_new_groups_are_known_as_often_as_those_of_single_images():
    """Of 300 draws of 25 groups of like images, or as many images: one new group in twenty, at most, is unknown."""
    draws = np.random.default_rng(4)
    codes_ND, labels_N = drawn(1000)
    groups_N = np.repeat(np.arange(25), 8)
    known = {True: [], False: []}

    def of_groups():
        codes_GD, _ = drawn(25, seed=int(draws.integers(1 << 30)))
        return codes_GD[groups_N] + 0.02 * codes_ND.std(0) * torch.from_numpy(draws.normal(size=(200, 6)))

    for _ in range(300):
        held_MD, new_MD = of_groups(), of_groups()
        for has_groups, shares in known.items():
            found = fit_unknown(codes_ND, labels_N, held_MD, groups_N if has_groups else None)
            shares.append((found.scores(new_MD) <= found.settings.threshold).mean())
    error = np.std(known[True]) / np.sqrt(300)
    assert 0.95 - 3 * error < np.mean(known[True]) < 0.98
    assert np.mean(known[False]) < 0.95 - 3 * error


@pytest.mark.parametrize(("count", "is_there"), [(18, False), (19, True)])
def test_too_few_groups_of_validation_images_choose_no_threshold(count, is_there):
    codes_ND, labels_N = drawn(300)
    groups_M = np.repeat(np.arange(count), 5)
    assert (fit_unknown(codes_ND, labels_N, drawn(5 * count, seed=1)[0], groups_M) is not None) == is_there


def test_features_that_never_vary_and_more_of_them_than_images_are_no_matter():
    codes_ND, labels_N = drawn(30, num_features=40)
    codes_ND[:, 3], codes_ND[:, 4] = 7.0, 0.0
    found = fit_unknown(codes_ND, labels_N, codes_ND)
    assert np.isfinite(found.scores(codes_ND)).all()
    assert fit_unknown(torch.ones(30, 4), labels_N, codes_ND) is None


def test_a_class_of_few_images_has_its_mean_whatever_is_left_out():
    labels_N = np.repeat([0, 1, 2], [30_000, 3, 500])
    rows = images_to_fit(labels_N, 512)
    assert len(rows) <= 4000
    assert (np.bincount(labels_N[rows])[1:] == [3, 500]).all()
    assert len(images_to_fit(np.arange(9000) % 3, 2048)) == 4095
    judging = images_to_judge(20_000)
    assert len(np.unique(judging)) == len(judging) == 2000
    assert np.bincount(judging % 10).min() > 150, "a split whose classes take turns is judged by all of them"
    np.testing.assert_array_equal(images_to_judge(2000), np.arange(2000))
    np.testing.assert_array_equal(images_to_fit(labels_N[:100], 512), np.arange(100))


def test_why_there_is_none():
    def codes(split, rows_N):
        return torch.zeros(len(rows_N), 3000 if split == "validation" else 3)

    def held(count, groups=None):
        table = LabelledTable(None, np.arange(count) % 3, None if groups is None else pa.array(groups))
        return ImageSplit("validation", table, np.arange(count))

    labels_N = np.arange(30) % 3
    assert unknown_by(codes, labels_N, None) == "there is no validation split"
    assert "3,000 numbers, more than 2,048" in unknown_by(codes, labels_N, held(30))
    small = unknown_by(lambda split, rows_N: codes(split, rows_N)[:, :3], labels_N, held(30))
    assert about_unknown(small, None) == {"threshold": None, "why": small}
    assert small == "validation images are too few (19), or their codes all the same"
    varied = drawn(200)[0]
    two = held(30, groups=["a", "b"] * 15)
    assert unknown_by(lambda _, rows_N: varied[rows_N], labels_N, two).startswith("groups of validation images are too")
    alone = held(30, groups=[None] * 30)
    assert not isinstance(unknown_by(lambda _, rows_N: varied[rows_N], labels_N, alone), str)


def test_codes_are_pooled_over_their_positions():
    maps, last, tokens = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 4, 8), torch.randn(2, 9, 8)
    vectors = torch.ones(2, 3)
    pooled = pooled_codes([maps, tokens, vectors, vectors.long()], (48, 80))
    torch.testing.assert_close(pooled, torch.cat([maps.mean((2, 3)), tokens.mean(1), vectors], 1))
    torch.testing.assert_close(pooled_codes([last], (64, 64)), last.mean((1, 2)))
    # As many channels as rows, and channels last of images that are not square.
    like_rows, wide = torch.randn(2, 8, 8, 16), torch.randn(2, 2, 4, 24)
    torch.testing.assert_close(pooled_codes([like_rows], (64, 128)), like_rows.mean((2, 3)))
    torch.testing.assert_close(pooled_codes([wide], (64, 128)), wide.mean((1, 2)))


def test_a_file_that_is_another_is_refused():
    codes_ND, labels_N = drawn(300)
    found = fit_unknown(codes_ND, labels_N, codes_ND)
    again = UnknownScore.of_state(found.settings, found.state())
    np.testing.assert_array_equal(again.scores(codes_ND), found.scores(codes_ND))
    assert found.num_bytes == 4 * (3 * 6 + 6 * 6)
    for state in ({}, {**found.state(), "means_CD": torch.zeros(3, 5)}, {"means_CD": torch.zeros(0, 6)}):
        with pytest.raises(ModelError, match=r"unknown\.safetensors"):
            UnknownScore.of_state(found.settings, state)
