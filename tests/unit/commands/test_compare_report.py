"""The table and the picture of some outcomes: what is the best, what cannot be told from it, and what is refused."""

import json
import math
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tlscale.commands.compare_outcomes import Outcome, finished
from tlscale.commands.compare_report import (
    COLUMNS,
    against_best,
    draw,
    markdown,
    notes,
    refuse_other_images,
    same_images,
    table,
    to_rows,
    write_comparison,
)
from tlscale.commands.paired_tests import Pair
from tlscale.errors import DataError, TlscaleError
from tlscale.storage.run_folder import RunFolder


def outcome(variant="head", top1=0.8, size=1000, seed=0, half=0.01, **figures):
    values = {
        "interval95": (top1 - half, top1 + half),
        "held_out_top1": top1 + 0.02,
        "wall_s": 12.34,
        "trainable_params": 12810,
        "steps": 200,
        "images_seen": 12800,
        "split": "test",
        "num_images": 10000,
        "fingerprint": "f" * 64,
    } | figures
    return Outcome(variant, size, seed, f"runs/{variant}_{size}_s{seed}", "0" * 64, top1=top1, **values)


def column(cells, name):
    return [row[COLUMNS.index(name)] for row in cells]


def pair(first, second, size, p):
    return Pair(size, first, second, 10000, 30, 20, p, p)


def test_the_best_of_each_size_and_what_is_not_distinguishable_from_it():
    outcomes = [
        *(outcome("codes", 0.800, 100), outcome("head", 0.785, 100), outcome("scratch", 0.500, 100)),
        *(outcome("codes", 0.850, 1000), outcome("head", 0.860, 1000), outcome("scratch", 0.900, 1000)),
    ]
    tests = [
        *(pair("codes", "head", 100, 0.05), pair("scratch", "codes", 100, 1e-9), pair("head", "scratch", 100, 1e-9)),
        pair("head", "scratch", 1000, 0.012),
    ]
    cells = table(outcomes, tests)
    assert column(cells, "strategy") == ["codes", "head", "scratch", "scratch", "head", "codes"]
    assert column(cells, "images") == ["100"] * 3 + ["1,000"] * 3
    assert column(cells, "against the best") == [
        *("best", "-1.5 points, not distinguishable (p 0.05)", "-30.0 points (p < 0.0001)"),
        *("best", "-4.0 points (p 0.012)", "-5.0 points, no paired test"),
    ]


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({}, True),
        ({"seed": 1, "size": 5}, True),
        ({"scored_sha256": "b"}, False),
        ({"task": "multi_label"}, False),
        ({"split": "validation"}, False),
        ({"scored_sha256": None}, True),
        ({"scored_sha256": None, "fingerprint": "other"}, False),
        ({"scored_sha256": None, "num_images": 7}, False),
    ],
    ids=str,
)
def test_test_images_are_the_same_by_content(changes, is_same):
    one = replace(outcome(), split="test", scored_sha256="a", fingerprint="f", num_images=9)
    assert same_images(one, replace(one, **changes)) == is_same
    assert same_images(replace(one, **changes), one) == is_same


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"seed": 1, "scored_sha256": "b"}, True),
        ({"size": 5, "scored_sha256": "b"}, True),
        ({"scored_sha256": "b"}, False),
        ({"fingerprint": "a copy elsewhere"}, True),
        ({"seed": 1, "scored_sha256": "b", "fingerprint": "other data"}, False),
    ],
    ids=str,
)
def test_held_out_images_of_other_seeds_and_sizes_are_of_the_same_data(changes, is_same):
    one = replace(outcome(), split="validation", scored_sha256="a", fingerprint="f", num_images=9)
    assert same_images(one, replace(one, **changes)) == is_same


def test_no_interval_is_not_one_without_a_width():
    """Of several labels an image, with all scored images in one group."""
    of_one_group = replace(outcome("early"), interval95=None, num_groups=1)
    assert column(table([of_one_group, outcome("late", 0.7)]), "95% interval") == ["-", "0.6900 to 0.7100"]


@given(
    tops=st.lists(st.floats(0.1, 0.9), min_size=1, max_size=6, unique=True), half=st.floats(0, 0.1), p=st.floats(0, 1)
)
def test_exactly_one_is_best_and_a_paired_test_is_what_is_said(tops, half, p):
    """Overlap of intervals says nothing of the same images."""
    rows = to_rows([outcome(f"v{i}", top1, half=half) for i, top1 in enumerate(tops)])
    tests = [pair(rows[0].variant, row.variant, 1000, p) for row in rows[1:]]
    verdicts = [against_best(row, rows, tests) for row in rows]
    assert verdicts.count("best") == 1
    assert verdicts[0] == "best"
    assert rows[0].score == max(tops)
    for row, verdict in zip(rows[1:], verdicts[1:], strict=True):
        assert verdict.startswith(f"{100 * (row.score - max(tops)):+.1f} points")
        assert ("not distinguishable" in verdict) == (p >= 0.05)


def test_the_most_frequent_class_has_a_row_of_each_size():
    ash = {"label": "ash", "top1": 0.48}
    outcomes = [
        *(outcome("codes", 0.8, 100, majority=ash), outcome("head", 0.4, 100, majority=ash)),
        *(outcome("codes", 0.9, 1000, majority={"label": "oak", "top1": 0.5}),),
    ]
    cells = table(outcomes)
    assert column(cells, "strategy") == ["codes", "head", "always 'ash'", "codes", "always 'oak'"]
    assert column(cells, "top1") == ["0.8000", "0.4000", "0.4800", "0.9000", "0.5000"]
    assert cells[2][1:5] == ("100", "0.4800", "-", "-32.0 points")
    assert {len(row) for row in cells} == {len(COLUMNS)}
    seeds = [outcome(seed=0, majority=ash), outcome(seed=1, majority={"label": "oak", "top1": 0.5})]
    assert table(seeds)[1][:3] == ("always the most frequent class", "1,000", "0.4900")


def test_the_picture_has_a_line_at_the_most_frequent_class(tmp_path):
    for sizes in ((1000,), (100, 1000)):
        plain, lined = (
            [outcome("codes", 0.8, size, majority=known) for size in sizes]
            for known in (None, {"label": "ash", "top1": 0.48})
        )
        pages = []
        for name, outcomes in (("plain", plain), ("lined", lined)):
            draw(to_rows(outcomes), [tmp_path / f"{name}.svg"])
            pages.append((tmp_path / f"{name}.svg").read_text())
        assert "stroke-dasharray" in pages[1]
        assert "stroke-dasharray" not in pages[0]


def test_over_seeds_the_mean_and_the_interval_spans_them():
    rows = to_rows([outcome(top1=0.70, seed=0), outcome(top1=0.80, seed=1)])
    assert len(rows) == 1
    assert (rows[0].score, min(rows[0].scores), max(rows[0].scores)) == (pytest.approx(0.75), 0.70, 0.80)
    assert (rows[0].low, rows[0].high) == (0.70, 0.80)  # wider than the mean's 0.74 to 0.76
    cells = table([outcome(top1=0.70, seed=0), outcome(top1=0.80, seed=1)])
    assert column(cells, "top1") == ["0.7500 (0.7000 to 0.8000)"]
    assert any("Over several seeds" in line for line in notes([outcome(seed=0), outcome(seed=1)]))


def test_what_failed_is_the_last_row_with_its_message():
    broken = Outcome("scratch", 1000, 2, "runs/x", "0" * 64, error="the loss became NaN\nsecond line")
    cells = table([broken, outcome()])
    assert column(cells, "strategy") == ["head", "scratch"]
    assert cells[-1][4] == "failed, see below"
    assert "runs/x failed: the loss became NaN\nsecond line" in notes([broken, outcome()])
    assert {len(row) for row in cells} == {len(COLUMNS)}
    assert notes([broken])[0] == "No run came to its end."


def test_found_codes_are_marked():
    cells = table([outcome(found_codes=True), outcome("mlp", 0.7, layer="layer3 avg")])
    assert column(cells, "seconds") == ["12.3*", "12.3"]
    assert column(cells, "layer") == ["-", "layer3 avg"]
    assert any(line.startswith("* ") for line in notes([outcome(found_codes=True)]))
    assert not any(line.startswith("* ") for line in notes([outcome()]))


@pytest.mark.parametrize("other", [{"fingerprint": "e" * 64}, {"num_images": 9000}, {"split": "validation"}], ids=str)
def test_runs_on_other_images_are_refused(other):
    with pytest.raises(DataError, match=r"not evaluated on the same images[\s\S]*runs/mlp_1000_s0"):
        refuse_other_images([outcome(), outcome("mlp", **other)])
    refuse_other_images([outcome(), outcome("mlp"), Outcome("x", 1, 0, "runs/x", "0", error="failed")])


def test_images_are_compared_by_content_where_all_runs_noted_it():
    copied = [outcome(scored_sha256="a"), outcome("mlp", fingerprint="e" * 64, scored_sha256="a")]
    refuse_other_images(copied)
    others = [outcome(scored_sha256="a"), outcome("mlp", scored_sha256="b")]
    with pytest.raises(DataError, match=r"images of data a: runs/head_1000_s0\n  .*images of data b: runs/mlp_1000_s0"):
        refuse_other_images(others)
    refuse_other_images([outcome(), outcome("mlp", scored_sha256="b")])  # an older run: by the older identity
    held = {"split": "validation", "num_images": 100}
    refuse_other_images([outcome(scored_sha256="a", **held), outcome(seed=1, scored_sha256="b", **held)])
    with pytest.raises(DataError, match="not evaluated on the same images"):
        refuse_other_images([outcome(scored_sha256="a", **held), outcome("mlp", scored_sha256="b", **held)])


def test_held_out_images_may_differ_in_number_and_the_reader_is_told():
    outcomes = [outcome(split="validation", num_images=count, size=10 * count) for count in (10, 100)]
    refuse_other_images(outcomes)
    assert any("no test split" in line for line in notes(outcomes))


# -- from run folders -------------------------------------------------------------------------------------------------


def put_run(path, strategy, result, metrics=()):
    path.mkdir()
    data = {"num_images": {"train": 90, "validation": 10, "test": 50}, "fingerprint": "f"}
    (path / "run.json").write_text(json.dumps({"tlscale": "0.1.0", "data": data, "recipe_sha256": "abc"}))
    (path / "recipe.yaml").write_text("name: run\n")
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    base = {"top1": 0.5, "top1_interval95": [0.4, 0.6], "wall_s": 3.0, "trainable_params": 7, "steps": 20}
    return RunFolder(path), {**base, "split": "test", "num_images": 50, "strategy": strategy, **result}


def test_a_trained_run_is_read(tmp_path):
    metrics = [
        {"kind": "train", "step": 10, "loss": 1.0},
        {"kind": "evaluate", "step": 10, "split": "test", "top1": 0.5},
        {"kind": "evaluate", "step": 10, "split": "validation", "top1": 0.7},
        {"kind": "evaluate", "step": 20, "split": "validation", "top1": 0.6},
    ]
    result = {"images_seen": 640, "best": {"step": 10}, "codes": None}
    found = finished("finetune", None, 0, *put_run(tmp_path / "run", "finetune", result, metrics))
    assert (found.held_out_top1, found.size, found.images_seen, found.found_codes) == (0.7, 100, 640, False)
    assert (found.recipe_sha256, found.fingerprint, found.interval95) == ("abc", "f", (0.4, 0.6))


@pytest.mark.parametrize(("computed", "found_codes"), [(150, False), (0, True)])
def test_of_a_frozen_backbone_the_computed_images_count(tmp_path, computed, found_codes):
    result = {"images_seen": 640, "best": {"step": 20}, "codes": {"num_computed": computed}}
    found = finished("head", 100, 0, *put_run(tmp_path / "run", "head", result))
    assert (found.images_seen, found.found_codes, found.held_out_top1) == (computed, found_codes, None)
    half_frozen = finished("finetune", 100, 0, *put_run(tmp_path / "other", "finetune", result))
    assert half_frozen.images_seen == 640


@pytest.mark.parametrize(("layer", "shown"), [("layer3", "layer3, max"), ("penultimate", "penultimate")])
def test_a_probe_is_read(tmp_path, layer, shown):
    probe = {"layer": layer, "pool": "max", "held_out_top1": 0.6}
    result = {"images_seen": 100, "best": {"step": 0}, "probe": probe, "codes": {"num_computed": 120}}
    found = finished("codes", 100, 0, *put_run(tmp_path / "run", "codes", result))
    assert (found.layer, found.held_out_top1, found.images_seen, found.found_codes) == (shown, 0.6, 120, True)


@pytest.mark.parametrize(("num_fitted", "shown"), [(100, 0.6), (90, 0.95)], ids=["refitted", "not refitted"])
def test_a_probe_that_an_older_version_scored_on_what_it_was_fitted_to_has_the_score_before_that(
    tmp_path, num_fitted, shown
):
    """90 training and 10 validation images; of the latter, 0.6 were right before the refit."""
    probe = {
        "layer": "penultimate",
        "pool": "avg",
        "held_out_top1": 0.6,
        "num_images": num_fitted,
        "tried": {"x": [1, 2]},
    }
    result = {"images_seen": 100, "best": {"step": 0}, "probe": probe, "codes": {"num_computed": 120}}
    result |= {"split": "validation", "num_images": 10, "top1": 0.95, "top1_interval95": [0.9, 1.0]}
    found = finished("codes", 100, 0, *put_run(tmp_path / "run", "codes", result))
    assert found.top1 == shown
    if num_fitted == 100:
        assert found.interval95 == pytest.approx((0.3127, 0.8318), abs=1e-4)
        assert (found.scored_model, found.selected_on) == ("before_refit", "validation")


def test_runs_whose_scored_images_chose_their_start_are_named_whatever_split_is_scored(tmp_path):
    for split in ("test", "folds", "validation"):
        runs = [outcome(split=split), outcome("codes", split=split, selected_on="earlier_run")]
        write_comparison(tmp_path, "Some runs", runs)
        page = (tmp_path / "compare.md").read_text()
        assert "Of codes some of these images have chosen a run that it starts or learns from" in page
        assert "the layer, the strength or the step" not in page


# -- files ------------------------------------------------------------------------------------------------------------


def many(sizes=(100, 1000)):
    return [
        outcome(variant, 0.5 + 0.05 * place + 0.1 * math.log10(size / 100), size, wall_s=10.0 * (place + 1))
        for place, variant in enumerate(("codes", "early_codes", "mlp", "head", "finetune", "scratch"))
        for size in sizes
    ]


def test_the_files_hold_all_of_it(tmp_path):
    outcomes = [*many(), Outcome("scratch", 10, 0, "runs/x", "0", error="a | b")]
    figures = write_comparison(tmp_path, "Some runs", outcomes, ["A remark."])
    assert json.loads((tmp_path / "compare.json").read_text()) == figures
    assert len(figures["runs"]) == 13
    page = (tmp_path / "compare.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 12 + 1
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(COLUMNS) + 1}
    assert "A remark." in page
    assert "![" in page
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.width == 1800  # 900 px wide on a screen of twice the density
    assert ElementTree.parse(tmp_path / "compare.svg").getroot().tag.endswith("svg")


def test_the_same_figures_give_the_same_picture(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_comparison(tmp_path / folder, "Some runs", many())
    for name in ("compare.png", "compare.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_without_a_run_there_is_a_table_and_no_picture(tmp_path):
    write_comparison(tmp_path, "None", [Outcome("head", 0, 0, "runs/x", "0", error="broken")])
    assert not (tmp_path / "compare.png").exists()
    assert "![" not in (tmp_path / "compare.md").read_text()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TlscaleError, match="nowhere"):
        write_comparison(tmp_path / "nowhere", "x", many())


@pytest.mark.parametrize(
    "outcomes",
    [
        many((1000,)),
        [outcome(wall_s=0.0)],
        [outcome(f"recipe_{i}", 0.5 + i / 100, size, found_codes=True) for i in range(9) for size in (10, 100)],
        [outcome("a", 0.5, 100), outcome("b", 0.6, 1000)],
    ],
    ids=["one size", "one run", "many recipes", "a size each"],
)
def test_anything_can_be_drawn(tmp_path, outcomes):
    draw(to_rows(outcomes), [tmp_path / "picture.png"])
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_what_a_matplotlibrc_in_the_working_folder_sets_does_not_reach_the_picture(tmp_path, monkeypatch):
    """It is read when matplotlib is imported, and can have it run LaTeX on a preamble of its own."""
    import matplotlib

    latex = tmp_path / "latex"
    latex.write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\nexit 1\n")
    latex.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    rows = to_rows([replace(outcome(), size=5)])
    draw(rows, [tmp_path / "plain.svg"])
    with matplotlib.rc_context({"text.usetex": True, "text.latex.preamble": "x", "axes.facecolor": "black"}):
        draw(rows, [tmp_path / "planted.svg"])
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "planted.svg").read_bytes() == (tmp_path / "plain.svg").read_bytes()


def test_the_picture_of_one_run_does_not_change_matplotlib(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    draw(to_rows([replace(outcome(), size=5)]), [tmp_path / "picture.svg"])
    assert dict(matplotlib.rcParams) == before


def test_cells_cannot_break_the_page():
    assert "| a \\| b |" in markdown("x", [outcome("a | b")])


def test_runs_of_other_numbers_of_folds_are_told():
    five, ten = (outcome(str(number), split="folds", folds=(number, 1)) for number in (5, 10))
    assert any("other numbers of folds" in note for note in notes([five, ten], []))
    assert not any("other numbers" in note for note in notes([five, replace(ten, folds=(5, 2))], []))
