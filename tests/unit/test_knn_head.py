"""Nearest neighbours as a head: scikit-learn's votes, in blocks, on standardised codes."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from tlscale.errors import ModelError
from tlscale.model import heads
from tlscale.model.heads import KnnHead


def codes(count, width, seed, scale=1.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


def head_on(known, labels, k, num_classes, dtype=torch.float32):
    known = known.to(dtype)
    return KnnHead(known, labels, known.mean(0), known.std(0), k, num_classes)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(2, 60),
    width=st.integers(1, 8),
    k=st.integers(1, 12),
    num_classes=st.integers(2, 6),
    seed=st.integers(0, 2**31),
    blocks=st.sampled_from([(1024, 16384), (3, 7), (1, 1)]),
)
def test_votes_are_those_of_scikit_learn(count, width, k, num_classes, seed, blocks):
    k = min(k, count)
    known, asked = codes(count, width, seed, 5.0) + 3, codes(9, width, seed + 1, 5.0) + 3
    labels = torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "_KNN_QUERIES", blocks[0])
        patch.setattr(heads, "_KNN_CODES", blocks[1])
        logits = head_on(known, labels, k, num_classes, torch.float64)(asked)
    mean, std = known.double().mean(0), known.double().std(0)
    std = torch.where(std == 0, 1.0, std)
    plain = KNeighborsClassifier(k, algorithm="brute").fit((known.double() - mean) / std, labels)
    shares = torch.zeros(9, num_classes, dtype=torch.float64)
    shares[:, plain.classes_] = torch.from_numpy(plain.predict_proba((asked.double() - mean) / std))
    torch.testing.assert_close(logits, ((shares * k + 1 / num_classes) / (k + 1)).log())
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(9, dtype=torch.float64))


def test_a_large_block_more_than_one_of_them():
    """More codes than one block holds, with the nearest ones in the last."""
    known = torch.cat([torch.full((40000, 2), 50.0), torch.tensor([[0.0, 0.0], [0.1, 0.0]])])
    labels = torch.cat([torch.zeros(40000), torch.ones(2)]).long()
    logits = KnnHead(known, labels, torch.zeros(2), torch.ones(2), 2, 2)(torch.zeros(1030, 2))
    assert logits.shape == (1030, 2)
    assert (logits.argmax(1) == 1).all()


def test_a_feature_that_never_changes_is_only_centred():
    known = torch.tensor([[1.0, 7.0], [2.0, 7.0]])
    logits = head_on(known, torch.tensor([0, 1]), 1, 2)(torch.tensor([[1.1, 7.0], [1.9, 7.0]]))
    assert logits.argmax(1).tolist() == [0, 1]
    assert logits.isfinite().all()


def test_full_precision_under_autocast():
    """In bfloat16 these two would be equally near."""
    known = torch.tensor([[1.0], [1.001]])
    head = KnnHead(known, torch.tensor([0, 1]), torch.zeros(1), torch.ones(1), 1, 2)
    asked = torch.tensor([[1.002], [0.999]])
    with torch.autocast("cpu", torch.bfloat16):
        assert head(asked).argmax(1).tolist() == [1, 0]


def test_it_is_a_module_like_any_other():
    head = head_on(codes(20, 4, 0), torch.arange(20) % 3, 5, 3)
    expected = head(codes(6, 4, 1))
    for other in (
        copy.deepcopy(head),
        pickle.loads(pickle.dumps(head)),
        head_on(codes(20, 4, 2), torch.zeros(20), 5, 3),
    ):
        other.load_state_dict(head.state_dict())
        assert torch.equal(other(codes(6, 4, 1)), expected)
    assert list(head.parameters()) == []
    assert head.double()(codes(6, 4, 1)).dtype == torch.float64


@pytest.mark.parametrize("k", [0, 21])
def test_as_many_neighbours_as_there_are_codes_at_most(k):
    with pytest.raises(ModelError, match=f"k = {k} nearest neighbours cannot be found among 20 codes"):
        head_on(codes(20, 4, 0), torch.zeros(20), k, 3)
