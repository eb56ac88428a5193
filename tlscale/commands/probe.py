"""A probe: codes of one or several layers, a classifier fitted to them at once, and a model that classifies images.

Chapters: codes; fit; evaluate; export. The held-out images choose the layer, the pooling and the regularisation; the
test images are looked at once, in the end. Without test images the score is that of the classifier that was fitted to
the training images alone: one that is fitted again, to the held-out images as well, has no score of its own. A probe
that is stopped keeps the codes that are ready, and begins again with them.

Shapes: B images of a block, N images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tlscale import faults
from tlscale.codes.cache import CodesCache, Images, layers_parts, name_of
from tlscale.codes.probes.select import Choice, PathRow, cannot_compare, checked_grid, choose
from tlscale.codes.reader import Codes
from tlscale.commands.tables import show_probe, show_result
from tlscale.data.identity import result_identity
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import StopRequest
from tlscale.models.classifier import CodesClassifier
from tlscale.models.export import export_model
from tlscale.models.features import PENULTIMATE, LayerCodes
from tlscale.models.folding import fold_norms
from tlscale.models.knn import KnnHead
from tlscale.recipe.schema import ProbeSection, Recipe
from tlscale.storage.run_folder import RunFolder, naming_disk_errors, write_json
from tlscale.tracking.console import Console
from tlscale.training.evaluate import scalars
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState
from tlscale.training.metrics import Tally, majority, summary
from tlscale.training.predictions import Predictions, write_predictions
from tlscale.training.run_info import begin_folder
from tlscale.training.scores import fitted, score_of_probe
from tlscale.training.setup import RunSetup, make_objective, strategy_of

_BLOCK = 4096  # images whose logits are computed at once


def probe(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    stop: StopRequest,
    record: dict[str, Any] | None,
    console: Console,
) -> dict[str, Any]:
    """Fit the recipe's probe, evaluate it and export its model; what `result.json` holds."""
    recipe, data = setup.recipe, setup.data
    refuse_wrong_probe(setup)

    # -- codes: of all layers and poolings in one pass, before anything is written -----------------------------------
    codes_cache = CodesCache(setup, processes, Images(setup), console, stop)
    wanted = wanted_codes(recipe)
    codes = layer_codes(codes_cache, wanted, [data.train, *([data.validation] if data.validation else [])])
    split = data.test or data.validation
    assert split is not None, "prepare refuses data that nothing can be evaluated on"
    codes |= {} if split.name in codes else layer_codes(codes_cache, wanted, [split])
    record = processes.run_on_main(
        begin_folder, folder, setup, world_size=processes.world_size, device=str(processes.device)
    )
    with RunLogger(setup, folder, processes, LoopState(), record, console) as book:
        # -- fit: on the main process; the others wait for what it finds -------------------------------------------
        result = processes.run_on_main(_fit, setup, codes_cache, codes, split, folder, book, console)
        book.write_summary(result)
    return result


def refuse_wrong_probe(setup: RunSetup) -> None:
    """
    Raises:
        RecipeError: there are no held-out images to choose by, or values that cannot be tried.
    """
    section, data = setup.recipe.probe, setup.data
    assert section is not None
    num_held = len(data.validation) if data.validation is not None else 0
    checked_grid(section.kind, _grid(section), len(data.train), num_held)
    names = [name_of(pair) for pair in wanted_codes(setup.recipe)]
    if len(names) > 1 and not num_held:
        raise cannot_compare(*names[:2])


def wanted_codes(recipe: Recipe) -> list[tuple[str, str]]:
    """Each layer with each pooling; the penultimate codes have one, the network's own."""
    pairs = [(layer, pool) for layer in recipe.codes.layer or [PENULTIMATE] for pool in recipe.codes.pool]
    return list(dict.fromkeys((layer, "avg") if layer == PENULTIMATE else (layer, pool) for layer, pool in pairs))


def layer_codes(codes_cache: CodesCache, wanted: list[tuple[str, str]], splits: list[ImageSplit]) -> dict[str, Codes]:
    """The codes of each split, by its name; those that the store lacks are computed.

    Raises:
        ModelError: a layer or a pooling that the backbone does not have.
    """
    backbone = codes_cache.setup.classifier.backbone.to(codes_cache.processes.device)
    LayerCodes(backbone, wanted)  # names that are wrong are wrong before anything is folded
    computing, folded = backbone, tuple[str, ...]()
    if codes_cache.setup.recipe.codes.fold_norm:
        layers = [layer for layer, _ in wanted if layer != PENULTIMATE]
        computing, folded = fold_norms(backbone.eval(), keep=layers)
        codes_cache.console.say(
            f"codes.fold_norm: {len(folded)} norm layers are folded into the convolutions before them"
        )
    module = LayerCodes(computing, wanted)
    parts = layers_parts(backbone, wanted, folded)
    return {split.name: codes_cache.codes(module, parts, split) for split in splits}


def _fit(
    setup: RunSetup,
    codes_cache: CodesCache,
    codes: dict[str, Codes],
    split: ImageSplit,
    folder: RunFolder,
    book: RunLogger,
    progress: Console,
) -> dict[str, Any]:
    recipe, data, device = setup.recipe, setup.data, codes_cache.processes.device
    assert recipe.probe is not None
    wanted = wanted_codes(recipe)
    held = data.validation
    with setup.watch("train"):
        choice = choose(
            recipe.probe.kind,
            _candidates(wanted, codes, device, has_held_out=held is not None),
            data.train.labels_N,
            held.labels_N if held is not None else data.train.labels_N[:0],
            num_classes=len(data.classes),
            grid=_grid(recipe.probe),
            refit=recipe.probe.refit,
        )
    for name, rows in choice.table.items():
        for row in rows:
            book.write_probe(name, row.setting, row.held_top1, row.held_loss)
    show_probe(recipe.probe.kind, choice, progress, majority=_held_majority(data))
    for head in (choice.probe.head, choice.probe.before_refit):
        if not isinstance(head, KnnHead):  # neighbours are compared as they were found
            head.to(setup.dtype)

    # -- evaluate: by images that the classifier was not fitted to, once ----------------------------------------------
    number = [name_of(pair) for pair in wanted].index(choice.name)
    scored = choice.probe.head if data.test is not None else choice.probe.before_refit
    predictions = Predictions(split, data.classes)
    with setup.watch("test"):
        figures = _figures(setup, scored, _values(codes[split.name], number, device), predictions)
    book.write_evaluation(split.name, figures, is_best=False)

    # -- export -------------------------------------------------------------------------------------------------------
    with setup.watch("export"):
        how = _export(setup, choice, wanted[number], folder)
        write_predictions(folder.predictions, predictions)
    result = _result(setup, codes_cache, choice, wanted[number], figures, split)
    result |= result_identity(setup.data)
    faults.at("result")
    with naming_disk_errors(folder.result):
        write_json(folder.result, result)
    show_result(result, progress, folder=folder.path, how_to_load=how)
    return result


def _export(setup: RunSetup, choice: Choice, layer_and_pool: tuple[str, str], folder: RunFolder) -> str:
    """Write the model; how it is to be loaded."""
    probe = choice.probe
    head = probe.head if isinstance(probe.head, KnnHead) else nn.Sequential(probe.head)
    model = CodesClassifier(LayerCodes(setup.classifier.backbone, [layer_and_pool]), head)
    with naming_disk_errors(folder.model):
        about = fitted(setup, refitted=probe.refitted)
        return export_model(model, folder.model, classes=setup.data.classes, spec=setup.spec, fitted=about)


def _held_majority(data: ImageData) -> dict[str, Any] | None:
    held = data.validation
    return None if held is None else majority(data.train.labels_N, held.labels_N, data.classes)


def _values(codes: Codes, number: int, device: torch.device) -> Tensor:
    """One value of all images, (N, D), on the device that the fit runs on."""
    return codes.whole(number).to(device)


def _candidates(
    wanted: list[tuple[str, str]], codes: dict[str, Codes], device: torch.device, *, has_held_out: bool
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """One layer and pooling after the other, so that one at a time is in memory."""
    for number, pair in enumerate(wanted):
        train_ND = _values(codes["train"], number, device)
        yield name_of(pair), (train_ND, _values(codes["validation"], number, device) if has_held_out else train_ND[:0])


def _grid(section: ProbeSection) -> list[float] | None:
    """What the recipe says is tried; None: the kind's own."""
    if section.kind == "knn":
        return None if section.neighbours is None else [float(k) for k in section.neighbours]
    return section.strengths


@torch.no_grad()
def _figures(setup: RunSetup, head: nn.Module, codes_ND: Tensor, predictions: Predictions) -> dict[str, Any]:
    """All figures of the classifier on a split, whose predictions are collected."""
    objective = make_objective(setup, codes_ND.device)
    tally = Tally(len(setup.data.classes), codes_ND.device)
    labels_N = torch.from_numpy(predictions.split.labels_N).to(codes_ND.device)
    head = head.to(codes_ND.device)
    parts = (torch.split(part, _BLOCK) for part in (torch.arange(len(labels_N)), codes_ND, labels_N))
    for positions_B, codes_BD, labels_B in zip(*parts, strict=True):
        logits_BC = head(codes_BD.to(setup.dtype))
        tally.update(logits_BC, labels_B, objective.losses(logits_BC, labels_B))
        predictions.add(positions_B, logits_BC)
    return summary(tally, setup.data.classes)


def _plain(row: PathRow) -> dict[str, Any]:
    return {"setting": row.setting, "held_out_top1": row.held_top1, "held_out_loss": row.held_loss}


def _result(
    setup: RunSetup,
    codes_cache: CodesCache,
    choice: Choice,
    chosen: tuple[str, str],
    figures: dict[str, Any],
    split: ImageSplit,
) -> dict[str, Any]:
    num_params = sum(param.numel() for param in choice.probe.head.parameters())
    backbone_params = sum(param.numel() for param in setup.classifier.backbone.parameters())
    brief = {"step": 0, **scalars(figures)}
    whole = {key: value for key, value in figures.items() if key not in ("confusion", "per_class")}
    return {
        "name": setup.recipe.name,
        "strategy": strategy_of(setup),
        "split": split.name,
        **score_of_probe(setup, choice, split),
        "num_classes": len(setup.data.classes),
        **whole,
        "weights": "last",
        "best": brief,
        "last": brief,
        "probe": {
            "kind": choice.probe.kind,
            "layer": chosen[0],
            "pool": chosen[1],
            **_plain(choice.probe.chosen),
            "converged": choice.probe.converged,
            "num_images": choice.probe.num_images,
            "refitted": choice.probe.refitted,
            "tried": {name: [_plain(row) for row in rows] for name, rows in choice.table.items()},
        },
        "epochs": 0,
        "steps": 0,
        "images_seen": choice.probe.num_images,
        **setup.watch.figures(choice.probe.num_images),
        "codes": codes_cache.facts(),
        "trainable_params": num_params,
        "total_params": backbone_params + num_params,
        "is_sample": setup.data.is_sample,
        "notes": list(setup.data.notes),
        "num_bad_images": len(setup.bad_images),
        "skipped_images": setup.bad_images.counts,
        "per_class": figures["per_class"],
        "confusion": figures["confusion"],
    }
