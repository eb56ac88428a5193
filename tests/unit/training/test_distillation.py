"""The loss of a distillation by its formula, the student's network, and what is standardised."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.small_models import section
from tlscale.errors import ModelError
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import Classifier
from tlscale.models.heads import build_head
from tlscale.recipe.schema import DistillSection, LossSection
from tlscale.training.distillation.loss import DistillationLoss
from tlscale.training.distillation.student import Student
from tlscale.training.distillation.targets import _mean_and_deviation
from tlscale.training.loss import CrossEntropyLoss

C, D, B = 5, 7, 6


def batch(seed=0, logits=True):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (B,), generator=generator)
    targets = torch.randn(B, D + C * logits, generator=generator, dtype=torch.float64)
    return SimpleNamespace(labels_B=labels, partner_labels_B=None, lam_B=None, targets_BT=targets)


def outputs(seed=1):
    return torch.randn(B, C + D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective(**keys):
    whose = {"run": "r"} if keys.get("logits") else {"teacher": {"name": "t"}}
    match = {"match": {"a": ["b"]}} if keys.get("codes", 1.0) else {}
    return DistillationLoss(
        CrossEntropyLoss(LossSection(), None), DistillSection.model_validate({**whose, **match, **keys}), C
    )


@given(
    st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 3.0), st.floats(0.5, 8.0), st.integers(0, 99)
)  # fmt: skip
def test_the_loss_is_the_formula(codes, logits, labels, temperature, seed):
    found = objective(codes=codes, logits=logits, labels=labels, temperature=temperature)
    taught, given_BO = batch(seed), outputs(seed + 100)
    losses = found(given_BO, taught)
    for row in range(B):
        own, teacher = given_BO[row, :C], taught.targets_BT[row, D:]
        p, q = (teacher / temperature).softmax(0), (own / temperature).softmax(0)
        divergence = sum(float(a * math.log(a / b)) for a, b in zip(p.tolist(), q.tolist(), strict=True))
        error = float(((given_BO[row, C:] - taught.targets_BT[row, :D]) ** 2).mean())
        label = float(F.cross_entropy(own[None], taught.labels_B[row, None]))
        expected = codes * error + logits * temperature**2 * divergence + labels * label
        assert float(losses[row]) == pytest.approx(expected, rel=1e-9)


def test_the_size_of_the_gradient_does_not_depend_on_the_temperature():
    """Hinton et al. 2015, section 2.1: at high temperatures it is that of half the squared error of logits over C."""
    taught = batch()
    taught.targets_BT = taught.targets_BT - taught.targets_BT.mean(1, keepdim=True)
    sizes = []
    for temperature in (100.0, 200.0):
        given_BO = outputs().requires_grad_()
        objective(codes=0.0, logits=1.0, temperature=temperature).aux_losses(given_BO[:, :C], _logits_of(taught))[
            "logits_loss"
        ].sum().backward()
        sizes.append(given_BO.grad[:, :C].norm())
    assert float(sizes[0]) == pytest.approx(float(sizes[1]), rel=0.02)


def _logits_of(taught):
    return SimpleNamespace(**{**vars(taught), "targets_BT": taught.targets_BT[:, D:]})


def test_figures_are_of_the_logits_alone():
    given_BO = outputs()
    assert torch.equal(objective().logits(given_BO), given_BO[:, :C])
    assert set(objective().aux_losses(given_BO, batch(logits=False))) == {"codes_loss", "distill_loss"}
    assert CrossEntropyLoss(LossSection(), None).aux_losses(given_BO, batch()) == {}


def test_half_precision_is_compared_in_float32():
    given_BO = outputs().to(torch.bfloat16)
    losses = objective(logits=1.0).aux_losses(given_BO, SimpleNamespace(targets_BT=batch().targets_BT.float()))
    assert {name: loss.dtype for name, loss in losses.items()} == dict.fromkeys(losses, torch.float32)


def student(labels_teach=True, matches=((["layer2"], 4), (["layer2", "penultimate"], 3)), seed=0):
    backbone, _ = build_backbone(section(), image_size=32, seed=0)
    head = build_head(["linear"], in_features=backbone.num_features, num_classes=C, seed=0)
    return Student(backbone, head, matches, image_size=32, in_chans=3, labels_teach=labels_teach, seed=seed)


def test_logits_and_codes_side_by_side():
    network = student().eval()
    images = torch.randn(4, 3, 32, 32)
    plain = Classifier(network.backbone, network.head).eval()
    found = network(images)
    assert found.shape == (4, C + 7)
    assert torch.equal(found[:, :C], plain(images))
    maps = {}
    hook = network.backbone.layer2.register_forward_hook(lambda module, args, output: maps.update(layer2=output))
    features = network.backbone(images)
    hook.remove()
    layer2 = maps["layer2"].mean((2, 3))
    expected = torch.cat([network.projections[0](layer2), network.projections[1](torch.cat([layer2, features], 1))], 1)
    assert torch.allclose(found[:, C:], expected, atol=1e-6)


@pytest.mark.parametrize("labels_teach", [True, False])
def test_where_the_gradient_of_labels_ends(labels_teach):
    network = student(labels_teach).train()
    network(torch.randn(4, 3, 32, 32))[:, :C].square().sum().backward()
    reached = any(param.grad is not None and param.grad.any() for param in network.backbone.parameters())
    assert reached == labels_teach
    assert all(param.grad is not None for param in network.head.parameters())


@pytest.mark.parametrize("labels_teach", [True, False])
def test_the_gradient_of_codes_goes_down_from_the_layer_that_gives_them(labels_teach):
    network = student(labels_teach, matches=((["layer2"], 4),)).train()
    network(torch.randn(4, 3, 32, 32))[:, C:].square().sum().backward()
    params = dict(network.backbone.named_parameters())
    reached = {name.split(".")[0] for name, param in params.items() if param.grad is not None and param.grad.any()}
    assert reached == {"conv1", "bn1", "layer1", "layer2"}


def test_projections_follow_from_the_seed_alone():
    state = torch.get_rng_state()
    first, second, third = student(seed=3), student(seed=3), student(seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.projections[0].weight, second.projections[0].weight)
    assert not torch.equal(first.projections[0].weight, third.projections[0].weight)


def test_without_codes_it_is_a_plain_classifier():
    network = student(matches=())
    assert list(network.projections.parameters()) == []
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, C)


def test_an_unknown_layer_names_the_key():
    with pytest.raises(ModelError, match=r"distill\.match: student: .* has no layer 'layer9'"):
        student(matches=((["layer9"], 4),))


@given(st.integers(2, 40), st.integers(1, 7), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_mean_and_deviation_of_chunks(count, chunk, shift, scale):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, 3, generator=generator, dtype=torch.float64) * scale + shift
    values[:, 1] = shift  # never changes
    mean, std = _mean_and_deviation(values.split(chunk))
    assert torch.allclose(mean, values.mean(0))
    expected = values.std(0, correction=0)
    changes = [0, 2] if scale > 1e-4 * abs(shift) else []
    assert torch.allclose(std[changes], expected[changes], rtol=1e-3)
    assert std[1] == 1.0
