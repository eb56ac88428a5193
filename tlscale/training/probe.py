"""Fit a probe: get codes of one or several layers, fit a classifier to them at once, evaluate and export it.

Chapters: codes; fit; evaluate; export. The held-out images choose the layer, the pooling and the regularisation; the
test images are used once, in the end. Without test images the score is that of the classifier that was fitted to the
training images alone: one that is fitted again, to the held-out images as well, has no score of its own. A probe that
is stopped keeps the codes that are ready, and what is fitted to each of them, and goes on from there.

Shapes: B images of a block, N images, M held-out images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.codes.parts import layer_name, wanted_layers
from tlscale.codes.probes.kept import KeptFits
from tlscale.codes.probes.kinds import kind_of
from tlscale.codes.probes.select import (
    Choice,
    PathRow,
    Weigh,
    best_of,
    choose,
    given_values,
    refuse_wrong_probe,
)
from tlscale.codes.reader import Codes
from tlscale.data.identity import result_identity
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.tables import Ints
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import check_stop
from tlscale.models.calibration import Calibration
from tlscale.models.classifier import CodesClassifier
from tlscale.models.export import DecisionRules, export_model
from tlscale.models.features import LayerCodes
from tlscale.models.views import over_views
from tlscale.recipe.schema import ProbeSection
from tlscale.storage.files import naming_disk_errors
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console, number
from tlscale.tracking.progress import each
from tlscale.training.evaluate import SeveralLabels, figures_of, scalars
from tlscale.training.label_set_calibration import label_calibration_by
from tlscale.training.label_set_figures import add_label_figures
from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import LabelScores
from tlscale.training.label_set_predictions import collect
from tlscale.training.logger import RunLogger
from tlscale.training.loop_state import LoopState
from tlscale.training.loss import cross_entropy, weigher
from tlscale.training.metrics import Tally, majority
from tlscale.training.prediction_figures import add_prediction_figures, calibration_by
from tlscale.training.predictions import Predictions, gather_predictions, write_predictions
from tlscale.training.result import (
    about_calibration,
    about_score,
    calibration_given,
    fitted,
    make_result,
    no_figures,
    thresholds_unchosen,
    why_not_calibrated,
    write_result,
)
from tlscale.training.run_info import begin_folder
from tlscale.training.setup import RunSetup
from tlscale.training.specs import open_codes_cache
from tlscale.training.unknown import about_unknown, images_to_judge, unknown_by
from tlscale.training.unread_images import telling_of_unread_images

HEAD_BATCH = 4096
"""Images whose logits are computed at once."""


def probe(
    setup: RunSetup,
    folder: RunFolder,
    processes: Processes,
    run_info: dict[str, Any] | None,
    console: Console,
) -> tuple[dict[str, Any], str]:
    """Fit the recipe's probe, evaluate it and export its model; return what `training.loop.train` does.

    `run_info` is of a probe that was stopped and begins again, else None; it is written anew.
    """
    data, recipe = setup.data, setup.recipe
    section, weigh, select = recipe.probe, weigher(recipe.loss, data.classes), recipe.evaluate.select
    if data.has_several_labels and select == "mean_average_precision":
        select = "top1"  # in whose place it stands
    assert section is not None
    codes_cache = open_codes_cache(setup, processes, console)
    refuse_wrong_probe(section, codes_cache.spec.section, len(data.train), len(data.validation or ()))

    # -- codes: of all layers and poolings in one pass, before anything is written -----------------------------------
    wanted, backbone = wanted_layers(codes_cache.spec.section), setup.classifier.backbone
    split = data.test or data.validation  # none for the model of a cross-validation, which is not scored
    with telling_of_unread_images(setup, LoopState(), folder, processes):
        codes = codes_cache.layer_codes(backbone, wanted, [data.train, *([data.validation] if data.validation else [])])
        codes |= {} if split is None or split.name in codes else codes_cache.layer_codes(backbone, wanted, [split])
        for one in filter(None, (data.validation, data.test) if len(setup.views) > 1 else ()):
            others = [codes_cache.layer_codes(backbone, wanted, [one], view)[one.name] for view in setup.views[1:]]
            codes[one.name] = codes[one.name].joined_with(others)
    device = processes.device
    run_info = processes.run_on_main(begin_folder, folder, setup, processes.world_size, str(device), run_info)
    with RunLogger(setup, folder, processes, LoopState(), run_info, console) as logger:
        # The other processes wait for what the main one finds.
        job = _Probe(setup, section, wanted, codes, split, device, codes_cache.stats(), weigh, select)
        result, how_to_load = processes.run_on_main(job.run, folder, logger, console)
        logger.write_summary(result)
    return result, how_to_load


@dataclass(frozen=True)
class _Probe:
    """Fit, score and export, now that there are codes."""

    setup: RunSetup
    section: ProbeSection
    wanted: list[tuple[str, str]]
    codes: dict[str, Codes]
    """By split."""
    split: ImageSplit | None
    """That the score is of."""
    device: torch.device
    cache_stats: dict[str, Any]
    weigh: Weigh | None
    select: str
    """The held-out figure that chooses."""

    def run(self, folder: RunFolder, logger: RunLogger, console: Console) -> tuple[dict[str, Any], str]:
        """Fit, evaluate and export; return the result, and how to load the model."""
        setup, data = self.setup, self.setup.data
        # -- fit ------------------------------------------------------------------------------------------------------
        with setup.watch("train"):
            choice = self._choose(KeptFits(folder.fits))
        for name, rows in choice.table.items():
            for row in rows:
                logger.write_probe(name, row.setting, row.held_top1, row.held_loss)
        self._show(choice, console)
        if kind_of(self.section.kind).follows_precision:
            for head in (choice.probe.head, choice.probe.before_refit):
                head.to(setup.dtype)

        # -- evaluate: by images that the classifier was not fitted to, once ------------------------------------------
        number_of_layer = [layer_name(pair) for pair in self.wanted].index(choice.name)
        scored = choice.probe.head if data.test is not None else choice.probe.before_refit
        thresholds = self._thresholds(choice.probe.before_refit, number_of_layer)
        figures = no_figures(setup)
        if self.split is not None:
            predictions = collect(self.split, data.classes, thresholds)
            with setup.watch("test"):
                views = self._views(self.split.name, number_of_layer)
                figures = _figures(setup, scored, views, self.split, predictions, SeveralLabels(thresholds))
            logger.write_evaluation(self.split.name, figures, is_best=False)

        calibration = self._calibration(choice, number_of_layer, thresholds)
        chosen = self.wanted[number_of_layer]
        with setup.watch("test"):
            codes = partial(self._some, number_of_layer)
            unknown = unknown_by(codes, data.train.labels_N, data.validation, layer=chosen[0])
        rules = DecisionRules(calibration, unknown, thresholds)

        # -- export ---------------------------------------------------------------------------------------------------
        with setup.watch("export"):
            how_to_load = _export(setup, choice, chosen, folder, rules)
            if self.split is not None:
                predictions.calibration = calibration
                write_predictions(folder.predictions, predictions)
                add = add_label_figures if data.has_several_labels else add_prediction_figures
                figures = add(figures, folder.predictions, have_chosen=data.test is None)
        result = self._result(choice, chosen, figures, calibration) | result_identity(data)
        judging = None if data.test is None else self._some(number_of_layer, "test", images_to_judge(len(data.test)))
        result["unknown"] = about_unknown(unknown, judging)
        logger.sync()
        return write_result(result, folder, setup), how_to_load

    def _calibration(
        self, choice: Choice, number_of_layer: int, thresholds: Sequence[float] | None
    ) -> Calibration | None:
        """Choose a temperature by the held-out images, where the classifier was not fitted to them."""
        setup = self.setup
        if setup.data.validation is None or why_not_calibrated(setup.data, refitted=choice.probe.refitted) is not None:
            return calibration_given(setup)
        validation = setup.data.validation
        held = collect(validation, setup.data.classes, thresholds)
        with setup.watch("test"):
            _figures(setup, choice.probe.head, self._views("validation", number_of_layer), validation, held)
            by = calibration_by if thresholds is None else label_calibration_by
            return by(gather_predictions(held))

    def _choose(self, kept: KeptFits) -> Choice:
        data = self.setup.data
        return choose(
            self.section.kind,
            self._candidates(),
            data.train.labels_N,
            data.validation.labels_N if data.validation is not None else data.train.labels_N[:0],
            num_classes=len(data.classes),
            grid=given_values(self.section),
            refit=self.section.refit,
            kept=kept,
            weigh=self.weigh,
            select=self.select,
        )

    def _thresholds(self, head: nn.Module, number_of_layer: int) -> Sequence[float] | None:
        """Choose those of several labels by images that the classifier was not fitted to; None of one label an image.

        A classifier that is fitted again, to these images as well, takes them over.
        """
        data = self.setup.data
        if not data.has_several_labels:
            return None
        if data.validation is None:
            return thresholds_unchosen(self.setup)
        views = self._views("validation", number_of_layer)
        figures = _figures(self.setup, head, views, data.validation, None, SeveralLabels("best"))
        return [row["threshold"] for row in figures["per_class"].values()]

    def _candidates(self) -> Iterator[tuple[str, tuple[Tensor, list[Tensor]]]]:
        """Yield one layer and pooling after the other, so that one at a time is in memory."""
        kind = self.section.kind
        for at, pair in each(list(enumerate(self.wanted)), lambda item: f"probe: {kind} on {layer_name(item[1])}"):
            train_ND = self._values("train", at)
            held = [train_ND[:0]] if self.setup.data.validation is None else self._views("validation", at)
            yield layer_name(pair), (train_ND, held)

    def _values(self, split: str, at: int) -> Tensor:
        """Read one value of all images of a split, (N, D), to the device that the fit runs on."""
        return self.codes[split].whole(at).to(self.device)

    def _views(self, split: str, at: int) -> list[Tensor]:
        """Read one value of all images of a split, (N, D) of each view; they lie one after the other."""
        num_views = len(self.codes[split].values) // len(self.wanted)
        return [self._values(split, at + number * len(self.wanted)) for number in range(num_views)]

    def _some(self, at: int, split: str, rows_N: Ints) -> Tensor:
        """Read one value of some images of a split."""
        return self.codes[split].whole(at)[torch.from_numpy(rows_N)]

    def _show(self, choice: Choice, console: Console) -> None:
        """Show the best setting of each set of codes, by the held-out images, and mark the best of all."""
        rows, select = [], self.select
        by = [] if select in ("top1", "loss") else [select]
        for name, path in choice.table.items():
            best = best_of(path, select)
            more = ["-" if best.held_figure is None else number(best.held_figure)] * len(by)
            figures = ["-" if figure is None else number(figure) for figure in (best.held_top1, best.held_loss)]
            rows.append((name, f"{best.setting:g}", *figures, *more, "chosen" if name == choice.name else ""))
        data = self.setup.data
        if data.validation is not None and not data.has_several_labels:
            often = majority(data.train.labels_N, data.validation.labels_N, data.classes)
            rows.append((f"always {often['label']!r}", "-", number(often["top1"]), "-", *(["-"] * len(by)), ""))
        kind = self.section.kind
        titles = ("codes", kind_of(kind).setting.name, "mAP" if data.has_several_labels else "top1", "loss", *by, "")
        console.table(f"Probe {kind}, by held-out images", titles, rows)

    def _result(
        self, choice: Choice, chosen: tuple[str, str], figures: dict[str, Any], calibration: Calibration | None
    ) -> dict[str, Any]:
        setup, fit = self.setup, choice.probe
        num_params = sum(param.numel() for param in fit.head.parameters())
        backbone_params = sum(param.numel() for param in setup.classifier.backbone.parameters())
        brief = {"step": 0, **scalars(figures)}
        has_chosen, select = sum(map(len, choice.table.values())) > 1 or setup.data.has_several_labels, self.select
        score = about_score(setup, self.split, has_chosen=has_chosen, refitted=fit.refitted)
        own = {
            "weights": "last",
            "best": brief,
            "last": brief,
            "probe": {
                "kind": fit.kind,
                "layer": chosen[0],
                "pool": chosen[1],
                **_plain(fit.chosen, select, score),
                **({} if select == "top1" else {"select": select}),
                "converged": fit.converged,
                "num_images": fit.num_images,
                "refitted": fit.refitted,
                "tried": {name: [_plain(row, select, score) for row in rows] for name, rows in choice.table.items()},
            },
            "epochs": 0,
            "steps": 0,
            "images_seen": fit.num_images,
            "codes": self.cache_stats,
            "trainable_params": num_params,
            "total_params": backbone_params + num_params,
        }
        own["calibration"] = about_calibration(
            setup, calibration, figures, has_chosen=has_chosen, refitted=fit.refitted
        )
        return make_result(setup, self.split, figures, score, own)


def _plain(row: PathRow, select: str, score: dict[str, Any]) -> dict[str, Any]:
    if score.get("task") == "multi_label":
        figures = {"held_out_top1": None, "held_out_mean_average_precision": row.held_top1}
        return {"setting": row.setting, **figures, "held_out_loss": row.held_loss}
    more = {} if select in ("top1", "loss") else {f"held_out_{select}": row.held_figure}
    return {"setting": row.setting, "held_out_top1": row.held_top1, "held_out_loss": row.held_loss, **more}


def _export(
    setup: RunSetup, choice: Choice, layer_and_pool: tuple[str, str], folder: RunFolder, rules: DecisionRules
) -> str:
    """Write the model, and return how to load it."""
    model = CodesClassifier(LayerCodes(setup.classifier.backbone, [layer_and_pool]), choice.probe.head)
    with naming_disk_errors(folder.model):
        about = fitted(setup, refitted=choice.probe.refitted)
        return export_model(
            model,
            folder.model,
            classes=setup.data.classes,
            spec=setup.spec,
            fitted=about,
            rules=rules,
            views=setup.view_names,
        )


@torch.no_grad()
def _figures(
    setup: RunSetup,
    head: nn.Module,
    views: Sequence[Tensor],
    split: ImageSplit,
    predictions: Predictions | None,
    several: SeveralLabels | None = None,
) -> dict[str, Any]:
    """Compute all figures of the classifier on a split by the codes of its views, and collect its predictions."""
    has_several, classes, device = setup.data.has_several_labels, setup.data.classes, views[0].device
    tally = LabelScores(len(classes)) if has_several else Tally(len(classes), device)
    plain_loss = binary_cross_entropy if has_several else cross_entropy
    labels_N = torch.from_numpy(split.labels_N).to(device)
    network = over_views(head.to(device), len(views), len(classes), several=has_several)
    parts = (torch.split(part, HEAD_BATCH) for part in (torch.arange(len(labels_N)), labels_N, *views))
    for positions_B, labels_B, *codes in zip(*parts, strict=True):
        check_stop("evaluating")
        logits_BC = network(*(codes_BD.to(setup.dtype) for codes_BD in codes))
        tally.update(logits_BC, labels_B, plain_loss(logits_BC, labels_B))
        if predictions is not None:
            predictions.add(positions_B, logits_BC)
    if several is not None:
        several = replace(several, groups_N=split.groups_N)
    figures = figures_of(tally, classes, several)[0]
    return figures if predictions is None else predictions.over_groups(figures)
