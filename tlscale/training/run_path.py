"""Take images to logits in the way in which a finished run took those that it scored.

Promise: the way hangs on the run alone: its frozen part in the blocks in which codes are computed, what it trained in
its batches (of a run on several processes those of each one's share), in its precision. So the images of its scored
split, in their order, get the very bits of its `predictions.parquet`; and no image's bits hang on the processes that
share the work now.

Shapes: B images, C classes, S image size.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlscale.codes.blocks import fixed_threads, spec_of
from tlscale.codes.shards import BLOCK
from tlscale.data.transforms import ImageBatch, InputPath
from tlscale.data.views import CENTER, PLAIN, View, crop_places, views_of
from tlscale.distributed.device import choose_algorithms, naming_memory
from tlscale.distributed.host import num_cores
from tlscale.distributed.processes import Processes, start_processes
from tlscale.models.adapters import add_adapters, freezing_beside
from tlscale.models.classifier import Classifier, CodesClassifier
from tlscale.models.features import PENULTIMATE, LayerCodes
from tlscale.models.freeze import freeze_parameters
from tlscale.models.knn import KnnHead
from tlscale.models.model_folder import TrainedModel, load
from tlscale.models.partition.partition import NoPartition, find_partition
from tlscale.models.unknown import Floats, pooled_codes
from tlscale.models.views import over_views
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import ComputeSection, DataSection, LoraSection, Recipe
from tlscale.storage.run_folder import RunFolder
from tlscale.training.batching import Batching
from tlscale.training.cache_decision import sample_images
from tlscale.training.probe import HEAD_BATCH
from tlscale.training.run_files import read_result, read_run_info

_NO_CODES = (
    "the model's score of unknown images is not computed (no column unknown): it takes the features of the part that "
    "the run froze, which this folder does not tell. Name the run's folder"
)
Values = tuple[Tensor, ...]


@dataclass(frozen=True)
class RunFacts:
    """Hold what a run folder tells of the way; of a model without its run the defaults."""

    folder: Path
    compute: ComputeSection
    codes_dtype: str = "auto"
    max_pixels: int = round(DataSection.model_fields["max_megapixels"].default * 1e6)
    is_probe: bool = False
    frozen_by: tuple[tuple[Any, ...], ...] | None = None
    """Rules of each stage, the last of which was scored; None where the scored images went through the whole network at
    once."""
    adapters: LoraSection | None = None
    """Of the run, whose model has them in its weights."""
    batching: Batching = Batching()

    @classmethod
    def of(cls, run: Path) -> RunFacts:
        """Read them.

        Raises:
            TlscaleError: a file of the run is damaged.
        """
        folder = RunFolder(run)
        if not folder.recipe.is_file() and run.resolve().name == "model":  # that of a run, which knows its own way
            above = RunFolder(run.resolve().parent)
            folder = above if above.recipe.is_file() and above.run_json.is_file() else folder
        if not folder.recipe.is_file():
            return cls(run, ComputeSection())
        run = folder.path
        recipe = load_stored_recipe(folder.recipe).recipe
        # The processes that predict are as many as there are.
        info = read_run_info(folder) or {}
        own = {"num_processes": None, "threads": _threads(recipe, info)}
        compute = recipe.compute.without_engine().model_copy(update=own)
        max_pixels = round(recipe.data.max_megapixels * 1e6)
        if recipe.probe is not None:
            return cls(run, compute, recipe.codes.dtype, max_pixels, is_probe=True, batching=Batching(HEAD_BATCH))
        result = read_result(folder) or {}
        scores = result.get("computed_scores") or _scores_of_older(recipe, info)
        batching = Batching(scores["batch_size"], result.get("num_images", 0), scores["num_processes"])
        frozen_by = tuple(map(tuple, recipe.freezing)) if scores["on_codes"] else None
        lora = None if recipe.adapters is None else recipe.adapters.lora
        return cls(run, compute, recipe.codes.dtype, max_pixels, frozen_by=frozen_by, adapters=lora, batching=batching)


def _threads(recipe: Recipe, info: dict[str, Any]) -> int | None:
    """Return the CPU threads that the run computed with, as sums hang on them; None where there are fewer cores."""
    then = info.get("threads")
    if recipe.compute.threads is not None or not isinstance(then, int) or info.get("device") != "cpu":
        return recipe.compute.threads
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return then if 1 <= then * local <= num_cores() else None


def _scores_of_older(recipe: Recipe, info: dict[str, Any]) -> dict[str, Any]:
    """Return what a run of an older version would have noted, as far as it can be told."""
    started = (info.get("computed") or [{}])[-1]
    return {
        "on_codes": recipe.stages is None and bool(info.get("keeps_codes", {}).get("0")),
        "batch_size": recipe.evaluate.batch_size or started.get("micro_batch_size") or recipe.batch_size,
        "num_processes": started.get("num_processes", 1),
    }


_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def computing(facts: RunFacts) -> Iterator[Processes]:
    """Join the processes that were launched, with the settings that the run computed with, within the context.

    Of the threads of a process, such as those of a server, one at a time: settings are the process's, and the hooks
    that read a layer are the network's.
    """
    with _ONE_AT_A_TIME, closing(start_processes(facts.compute)) as processes:
        choose_algorithms(processes.device, deterministic=facts.compute.deterministic)
        with naming_memory():
            yield processes


class RunPath:
    """Compute logits as the run did."""

    def __init__(
        self, trained: TrainedModel, facts: RunFacts, processes: Processes, *, batch_size: int | None = None
    ) -> None:
        """Copy the network to this process's device.

        `batch_size`: of what was trained, in place of the run's; then the last bits may be others.
        """
        self.facts, self.spec, self.num_classes = facts, trained.input_spec, len(trained.classes)
        self.calibration, self.unknown = trained.calibration, trained.unknown
        self.thresholds, self.places = trained.thresholds, crop_places(trained.views)
        self._num_views = len(views_of(trained.views))
        self.batching = facts.batching if batch_size is None else Batching(batch_size)
        self._way = _way(trained, facts, processes)
        self.note: str | None = None
        """For people: why there is no score of unknown images, though the model came with one."""
        if self.unknown is not None and not isinstance(self._way[0], _Frozen):  # there are no codes to tell by
            self.unknown, self.note = None, _NO_CODES

    def outputs(
        self, blocks: Iterable[Tensor], sizes: Sequence[int], processes: Processes
    ) -> tuple[Tensor, Floats | None]:
        """Compute logits (B, C), on the device, of images (uint8, C x S x S) that come in blocks of `BLOCK` at most.

        With them how unlike the training images each is (B,), where the model tells that. `sizes` are those of a
        chunk's batches, which take the images in order, as far as there are any.
        """
        first, then = self._way
        scores: list[Floats] = []
        made = (self._scored(first(block, processes), scores) for block in blocks)
        parts = []
        for values in _batches(made, sizes):
            parts.append(then(values, processes))
            processes.local.mark_step()
        logits_BC = torch.cat(parts) if parts else torch.zeros(0, self.num_classes)
        return logits_BC, None if self.unknown is None else np.concatenate([np.zeros(0), *scores])

    def _scored(self, values: Values, scores: list[Floats]) -> Values:
        if self.unknown is not None:
            plain = values[: len(values) // self._num_views]
            scores.append(self.unknown.scores(pooled_codes(plain, self.spec.image_hw)))
        return values


class FeaturesPath:
    """Compute the features of a layer, as codes are computed: in blocks of one size, and rounded as the run's codes.

    Args:
        wanted: a layer and a pool, as `LayerCodes` takes them.
        block: images that go through the network at once; with `BLOCK` they have the very bits of the run's codes.

    Raises:
        ModelError: no such layer or pool.
    """

    def __init__(
        self, trained: TrainedModel, facts: RunFacts, processes: Processes, wanted: tuple[str, str], block: int = BLOCK
    ) -> None:
        network, inputs = _ready(trained, facts, processes)
        if isinstance(network, Classifier | CodesClassifier):
            network = network.backbone
        else:  # timm's own model, whose classifier is no feature
            network.reset_classifier(0)  # type: ignore[operator]
        self.facts, self.spec, self.block, self._processes = facts, trained.input_spec, block, processes
        self.places = (CENTER,)
        self._codes = _Frozen(LayerCodes(network, [wanted]), inputs, facts, block=block)

    def __call__(self, images_BCSS: Tensor) -> Tensor:
        """Compute features (B, D), on the device, of images (uint8), which are `block` at most."""
        (values_BD,) = self._codes(images_BCSS, self._processes)
        self._processes.local.mark_step()
        return values_BD


def _batches(blocks: Iterable[Values], sizes: Sequence[int]) -> Iterator[Values]:
    """Put values of blocks together to batches of these sizes; the last one has the rest."""
    held: list[Values] = []
    num_held, left = 0, list(sizes)
    for block in blocks:
        held.append(block)
        num_held += len(block[0])
        while left and num_held >= left[0]:
            size, joined = left.pop(0), _joined(held)
            yield tuple(value[:size] for value in joined)
            held, num_held = [tuple(value[size:] for value in joined)], num_held - size
    if num_held:
        yield _joined(held)


def _joined(blocks: Sequence[Values]) -> Values:
    return blocks[0] if len(blocks) == 1 else tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


# -- the three ways ---------------------------------------------------------------------------------------------------


def _way(trained: TrainedModel, facts: RunFacts, processes: Processes) -> tuple[_First, _Then]:
    """Return what is done with each block, and then with each batch."""
    network, inputs = _ready(trained, facts, processes)
    dtype, views = inputs.dtype, views_of(trained.views)
    # Without its run a model tells by itself whether it is a probe, where that matters.
    is_probe = facts.is_probe or (trained.unknown is not None and trained.unknown.settings.layer == PENULTIMATE)

    def rest(module: nn.Module, dtypes: tuple[torch.dtype, ...], *, autocasts: bool) -> _Rest:
        return _Rest(_over_views(module, trained), inputs, dtypes * len(views), autocasts)

    if isinstance(network, CodesClassifier):
        return _Frozen(network.codes, inputs, facts, views), rest(network.head, (dtype,), autocasts=False)
    parted = None if facts.frozen_by is None and not is_probe else _parted(network, sample_images(inputs))
    whole = _Whole(_over_views(network, trained), inputs, views)
    if parted is None:
        return _as_they_are, whole
    if is_probe:
        codes = LayerCodes(parted.backbone, [(PENULTIMATE, "avg")])
        return _Frozen(codes, inputs, facts, views), rest(parted.head, (dtype,), autocasts=False)
    freezing = facts.frozen_by or ((),)
    if facts.adapters is not None:  # new ones change nothing, and part the network where the run's did
        add_adapters(parted.backbone, facts.adapters, freezing, seed=0)
    freeze_parameters(parted.backbone, freezing_beside(parted.backbone, freezing[-1]))
    try:
        with processes.accelerator.autocast():
            partition = find_partition(parted.train(), sample_images(inputs))
    except NoPartition:  # an equal network all the same, up to rounding
        return _as_they_are, whole
    partition.suffix.eval()
    dtypes = tuple(value.dtype for value in partition.values)
    return _Frozen(partition.prefix, inputs, facts, views), rest(partition.suffix, dtypes, autocasts=True)


def _over_views(module: nn.Module, trained: TrainedModel) -> nn.Module:
    several, num_views = trained.thresholds is not None, len(views_of(trained.views))
    return over_views(module, num_views, len(trained.classes), several=several)


def _ready(trained: TrainedModel, facts: RunFacts, processes: Processes) -> tuple[nn.Module, InputPath]:
    """Copy the network to the device, in the run's type, and return it with the way of images to its input."""
    dtype = torch.float64 if facts.compute.precision == "fp64" else torch.float32
    model = trained.model
    if dtype == torch.float64:  # which `load` would have rounded
        model = load(facts.folder, as_stored=True).model
    network = copy.deepcopy(model).to(processes.device)
    for part in network.children() if isinstance(network, CodesClassifier) else [network]:
        if not isinstance(part, KnnHead):  # which works in float32, whatever the run's precision is
            part.to(dtype)
    if facts.compute.channels_last:
        network.to(memory_format=torch.channels_last)
    return network.eval(), InputPath(trained.input_spec, dtype, processes.device, facts.compute.channels_last)


def _parted(network: nn.Module, images_BCHW: Tensor) -> Classifier | None:
    """Part timm's own model into backbone and head, as the run had it; None where the two give other logits."""
    if isinstance(network, Classifier):
        return network
    name = (getattr(network, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(name, str):
        return None
    layer = network.get_submodule(name)
    if not isinstance(layer.weight, Tensor) or not isinstance(layer.bias, Tensor):
        return None
    weight_CD = layer.weight.detach().flatten(1)
    head = nn.Linear(weight_CD.shape[1], len(weight_CD), device=weight_CD.device, dtype=weight_CD.dtype)
    with torch.no_grad():
        head.weight.copy_(weight_CD)
        head.bias.copy_(layer.bias)
        backbone = copy.deepcopy(network)
        backbone.reset_classifier(0)  # type: ignore[operator]
        parted = Classifier(backbone, nn.Sequential(head)).eval()
        same = torch.allclose(parted(images_BCHW), network(images_BCHW), rtol=1e-4, atol=1e-5)
    return parted if same else None


_First = Callable[[Tensor, Processes], Values]
_Then = Callable[[Values, Processes], Tensor]


def _as_they_are(images_BCSS: Tensor, processes: Processes) -> Values:
    return (images_BCSS,)


def _batch(images_BCSS: Tensor) -> ImageBatch:
    rows_B = torch.arange(len(images_BCSS))
    return ImageBatch(images_BCSS, rows_B, rows_B, len(images_BCSS))


@dataclass(frozen=True)
class _Whole:
    """Take images through the whole network, as `training.evaluate` does."""

    network: nn.Module
    inputs: InputPath
    views: tuple[View, ...]

    def __call__(self, values: Values, processes: Processes) -> Tensor:
        with processes.local.without_gradients(), processes.accelerator.autocast():
            logits_BC: Tensor = self.network(*self.inputs.of_views(_batch(values[0]), self.views))
            return logits_BC


@dataclass(frozen=True)
class _Frozen:
    """Compute a block of codes, as `codes.blocks` does, and give them as they come back from the store."""

    module: nn.Module
    inputs: InputPath
    facts: RunFacts
    views: tuple[View, ...] = (PLAIN,)
    block: int = BLOCK

    def __call__(self, images_BCSS: Tensor, processes: Processes) -> Values:
        count = len(images_BCSS)
        filled = torch.cat([images_BCSS, images_BCSS[-1:].expand(self.block - count, -1, -1, -1)])
        half = self.facts.compute.precision in ("bf16", "fp16")
        autocast = processes.accelerator.autocast() if half else nullcontext()
        with torch.no_grad(), fixed_threads(), autocast:
            inputs = self.inputs.of_views(_batch(filled), self.views)
            values: Values = tuple(value for one in inputs for value in self.module(one))
        return tuple(_stored(value, self.facts.codes_dtype, self.block)[:count] for value in values)


def _stored(value_B: Tensor, dtype: str, num_images: int) -> Tensor:
    spec = spec_of("code", value_B, dtype, num_images)
    order = torch.channels_last if spec.channels_last else torch.contiguous_format
    return value_B.to(spec.torch_dtype).contiguous(memory_format=order)


@dataclass(frozen=True)
class _Rest:
    """Take codes through what was trained or fitted on them, in the types that it takes."""

    module: nn.Module
    inputs: InputPath
    dtypes: tuple[torch.dtype, ...]
    autocasts: bool

    def __call__(self, values: Values, processes: Processes) -> Tensor:
        # Copies: what was trained may overwrite its input.
        codes = [value.to(dtype, copy=True) for value, dtype in zip(values, self.dtypes, strict=True)]
        autocast = processes.accelerator.autocast() if self.autocasts else nullcontext()
        with processes.local.without_gradients(), autocast:
            logits_BC: Tensor = self.module(*codes)
            return logits_BC
