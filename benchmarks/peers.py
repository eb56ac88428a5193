"""The peers of frozen_epochs.py: the same frozen job by a plain PyTorch loop, fastai and Lightning.

Promise: each peer does the least work it can do the job with: the frozen backbone in eval mode and without gradients,
images that were decoded and resized before, in memory; no validation, no checkpoints, no logger, no progress bar; one
evaluation at the end. All have the same initial weights, optimizer, learning rates and layout in memory.

Shape letters: N images, B images of a batch, C channels, H height, W width, D features.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tlscale.data.sampler import DataOrder

BY_HAND = "plain PyTorch, features kept by hand"


@dataclass(frozen=True)
class Task:
    """The job: a frozen backbone, a linear head, images as the backbone's evaluation transform leaves them (uint8)."""

    backbone: nn.Module
    head: nn.Module
    images_NCHW: Tensor
    labels_N: Tensor
    test_images_NCHW: Tensor
    test_labels_N: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    channels_last: bool

    @property
    def order(self) -> DataOrder:
        return DataOrder(len(self.labels_N), self.batch_size, self.seed, drop_last=False)

    @property
    def total_steps(self) -> int:
        return self.epochs * self.order.steps_per_epoch

    def inputs(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images as the backbone wants them."""
        mean_std = (255 * torch.tensor([self.mean, self.std], dtype=torch.float64)).float()
        inputs_BCHW = images_BCHW.float().sub_(mean_std[0][:, None, None]).div_(mean_std[1][:, None, None])
        return inputs_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs_BCHW

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Copy the backbone (frozen, in eval mode) and the head."""
        backbone, head = copy.deepcopy(self.backbone).eval().requires_grad_(False), copy.deepcopy(self.head).train()
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return backbone.to(memory_format=layout), head

    def lr_at(self, step: int) -> float:
        """Cosine without a warm-up."""
        return self.lr * (1 + math.cos(math.pi * step / self.total_steps)) / 2


@dataclass
class Measured:
    """What a peer took: seconds before the first epoch (features kept by hand), of each epoch and of the evaluation at
    the end, and the test accuracy (0..1)."""

    name: str
    before_s: float = 0.0
    epochs_s: list[float] = field(default_factory=list)
    evaluation_s: float = 0.0
    top1: float = 0.0

    def train_s(self, epochs: int) -> float:
        """Seconds of so many epochs: measured, or where fewer were run, the rest at their median."""
        return self.before_s + sum(self.epochs_s) + (epochs - len(self.epochs_s)) * statistics.median(self.epochs_s)


def forward_s(task: Task) -> list[float]:
    """Seconds of one forward pass of the backbone over the training and over the test images: what cannot be saved."""
    backbone, _ = task.networks()
    seconds = []
    for images_NCHW in (task.images_NCHW, task.test_images_NCHW):
        began = time.perf_counter()
        with torch.inference_mode():
            for images_BCHW in images_NCHW.split(task.batch_size):
                backbone(task.inputs(images_BCHW))
        seconds.append(time.perf_counter() - began)
    return seconds


def plain(task: Task) -> Measured:
    """Run the plain PyTorch loop; nothing of the backbone is recorded for a backward pass."""
    return _loop(task, "plain PyTorch loop", keeps=False)


def plain_with_features(task: Task) -> Measured:
    """Run the same with the features of the frozen network cached by hand."""
    return _loop(task, BY_HAND, keeps=True)


def _loop(task: Task, name: str, *, keeps: bool) -> Measured:
    backbone, head = task.networks()
    optimizer = torch.optim.AdamW(head.parameters(), lr=task.lr, weight_decay=task.weight_decay, fused=True)
    order, measured, step = task.order, Measured(name), 0
    began = time.perf_counter()
    kept_ND = _features(task, backbone, task.images_NCHW) if keeps else None
    measured.before_s = time.perf_counter() - began
    for _ in range(task.epochs):
        began = time.perf_counter()
        for _ in range(order.steps_per_epoch):
            rows_B = torch.from_numpy(order.rows(step))
            if kept_ND is None:
                with torch.no_grad():
                    features_BD = backbone(task.inputs(task.images_NCHW[rows_B]))
            else:
                features_BD = kept_ND[rows_B]
            for group in optimizer.param_groups:
                group["lr"] = task.lr_at(step)
            F.cross_entropy(head(features_BD), task.labels_N[rows_B]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        measured.epochs_s.append(time.perf_counter() - began)
    began = time.perf_counter()
    with torch.inference_mode():
        logits_NC = head(_features(task, backbone, task.test_images_NCHW))
    return _finished(task, measured, began, logits_NC)


@torch.no_grad()
def _features(task: Task, backbone: nn.Module, images_NCHW: Tensor) -> Tensor:
    return torch.cat([backbone(task.inputs(images)) for images in images_NCHW.split(task.batch_size)])


def _finished(task: Task, measured: Measured, began: float, logits_NC: Tensor) -> Measured:
    measured.top1 = float((logits_NC.argmax(1) == task.test_labels_N).double().mean())
    measured.evaluation_s = time.perf_counter() - began
    return measured


def fastai(task: Task) -> Measured:
    """fastai's Learner: body frozen, its batch norms too, loaders over tensors in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fastai's import uses what torch means to take away
        from fastai.callback.schedule import ParamScheduler, SchedCos
        from fastai.callback.training import BnFreeze
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader as FastaiLoader
        from fastai.learner import Callback, CancelValidException, Learner
        from fastai.optimizer import OptimWrapper
        from fastai.torch_core import params

    measured = Measured("fastai")

    class NoValidation(Callback):  # type: ignore[misc]
        def before_validate(self) -> None:
            raise CancelValidException

    class Watch(Callback):  # type: ignore[misc]
        def before_train(self) -> None:
            self.began = time.perf_counter()

        def after_train(self) -> None:
            measured.epochs_s.append(time.perf_counter() - self.began)

    def loader(images_NCHW: Tensor, labels_N: Tensor, *, shuffle: bool) -> Any:
        dataset, to_inputs = TensorDataset(images_NCHW, labels_N), lambda batch: (task.inputs(batch[0]), batch[1])
        loader = FastaiLoader(dataset, bs=task.batch_size, shuffle=shuffle, num_workers=0)
        loader.after_batch = to_inputs
        return loader

    torch.manual_seed(task.seed)
    train = loader(task.images_NCHW, task.labels_N, shuffle=True)
    test = loader(task.test_images_NCHW, task.test_labels_N, shuffle=False)
    backbone, head = task.networks()
    learner = Learner(
        DataLoaders(train, test),
        nn.Sequential(backbone, head),
        loss_func=nn.CrossEntropyLoss(),
        opt_func=lambda groups, **options: OptimWrapper(groups, torch.optim.AdamW, fused=True, **options),
        lr=task.lr,
        wd=task.weight_decay,
        train_bn=False,
        splitter=lambda model: [params(model[0]), params(model[1])],
        cbs=[BnFreeze(), NoValidation(), Watch(), ParamScheduler({"lr": SchedCos(task.lr, 0.0)})],
    )
    learner.freeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit(task.epochs)
        learner.remove_cb(NoValidation)  # it would end the evaluation as well
        began = time.perf_counter()
        logits_NC, _ = learner.get_preds(dl=test, act=nn.Identity(), reorder=False)
    return _finished(task, measured, began, logits_NC)


def lightning(task: Task) -> Measured:
    """Lightning's Trainer over a module that keeps its backbone in eval mode and out of autograd."""
    import lightning as pl

    measured = Measured("Lightning")

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = task.networks()
            self.logits: list[Tensor] = []

        def forward(self, images_BCHW: Tensor) -> Tensor:
            with torch.no_grad():
                features_BD = self.backbone(task.inputs(images_BCHW))
            logits_BC: Tensor = self.head(features_BD)
            return logits_BC

        def on_train_epoch_start(self) -> None:
            self.backbone.eval()
            self.began = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            measured.epochs_s.append(time.perf_counter() - self.began)

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def test_step(self, batch: tuple[Tensor, Tensor], number: int) -> None:
            self.logits.append(self(batch[0]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(
                self.head.parameters(), lr=task.lr, weight_decay=task.weight_decay, fused=True
            )
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.total_steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    torch.manual_seed(task.seed)
    train = DataLoader(TensorDataset(task.images_NCHW, task.labels_N), task.batch_size, shuffle=True)
    test = DataLoader(TensorDataset(task.test_images_NCHW, task.test_labels_N), task.batch_size)
    module = Module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that loaders have no worker processes: on the cores that compute, they cost
        trainer = pl.Trainer(
            max_epochs=task.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, train)
        began = time.perf_counter()
        trainer.test(module, test, verbose=False)
    return _finished(task, measured, began, torch.cat(module.logits))


PEERS: dict[str, tuple[str | None, Callable[[Task], Measured]]] = {
    "plain": (None, plain),
    "features": (None, plain_with_features),
    "fastai": ("fastai", fastai),
    "lightning": ("lightning", lightning),
}
"""By name: the package that it needs, and what measures it."""


def missing(name: str) -> str | None:
    """Return the package that a peer needs and that is not installed."""
    package = PEERS[name][0]
    return package if package is not None and importlib.util.find_spec(package) is None else None
