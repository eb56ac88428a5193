"""Which weights of a run are exported: the latest within one standard error of the best, and how sure that is."""

import json

import pytest

import tlscale
from tests.small_runs import as_after, assert_same_bits, exported, lines, result, small_recipe, tensors
from tlscale.recipe.load import load_recipe

# A rate that grows until it is too high: figures rise and fall again.
CHANGES = {
    "optim": {"lr": 0.3},
    "schedule": {"warmup": "100%", "decay": "constant"},
    "duration": "16 steps",
    "checkpoint": {"every": "1 steps", "keep": 100},
}


def recipe_of(path, idx, select, choose=None, **changes):
    evaluate = {"every": "1 steps", "select": select, **({"choose": choose} if choose else {})}
    return small_recipe(path, idx, **{**CHANGES, "evaluate": evaluate, **changes})


@pytest.fixture(scope="module")
def whole(idx, tmp_path_factory):
    """A run for each figure that can choose, and one that takes the best."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("top1", "loss", "macro_f1", "balanced_accuracy", "auroc", "mean_average_precision", "best"):
        select, choose = ("top1", "best") if name == "best" else (name, None)
        tlscale.run(recipe_of(folder / f"{name}.yaml", idx, select, choose), folder / name)
    return folder


def by_hand(out, select):
    """The chosen and the best step, from the log."""
    sign = -1 if select == "loss" else 1
    figures = {line["step"]: (sign * line[select], line[f"{select}_se"]) for line in lines(out, "evaluate")}
    best = max(figures, key=lambda step: (figures[step][0], -step))
    least = figures[best][0] - figures[best][1]
    return max(step for step, (figure, _) in figures.items() if figure >= least), best


@pytest.mark.parametrize("select", ["top1", "loss", "macro_f1", "balanced_accuracy", "auroc", "mean_average_precision"])
def test_the_latest_within_one_standard_error_is_exported(whole, select, capsys):
    out = whole / select
    chosen, best = by_hand(out, select)
    choice, figures = result(out)["choice"], {line["step"]: line for line in lines(out, "evaluate")}
    assert (choice["select"], choice["choose"], choice["step"]) == (select, "latest_within_se", chosen)
    assert choice["figure"] == figures[chosen][select]
    assert choice["standard_error"] == figures[chosen][f"{select}_se"]
    of_best = {"step": best, "figure": figures[best][select], "standard_error": figures[best][f"{select}_se"]}
    assert choice["best"] == of_best
    assert result(out)["best"]["step"] == chosen
    assert (out / "checkpoints" / "BEST").read_text().strip() == f"step_{chosen:08}"
    saved = tensors(out / "checkpoints" / f"step_{chosen:08}" / "model.safetensors")
    ours = {name.removeprefix("backbone."): tensor for name, tensor in saved.items() if name.startswith("backbone.")}
    assert_same_bits({name: tensor for name, tensor in exported(out).items() if name in ours}, ours)


def test_some_choice_is_not_the_best_and_some_not_the_last(whole):
    pairs = [(*by_hand(whole / select, select), 16) for select in ("top1", "loss", "macro_f1")]
    assert any(chosen != best for chosen, best, _ in pairs), pairs
    assert any(chosen != last for chosen, _, last in pairs), pairs


@pytest.mark.parametrize(("select", "step"), [("top1", 3), ("macro_f1", 8), ("loss", 13), ("auroc", 1)])
def test_resumed_it_chooses_and_keeps_the_same(idx, whole, tmp_path, select, step):
    """From any checkpoint, and with few of them kept."""
    few = {"checkpoint": {"every": "3 steps", "keep": 1, "keep_best": 2}}
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx, select, **few), tmp_path / "few")
    out = as_after(step, whole / select, tmp_path / "run")
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx, select, **few), out, resume=True)
    assert result(out)["choice"] == result(whole / select)["choice"] == result(tmp_path / "few")["choice"]
    assert_same_bits(exported(out), exported(whole / select))
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (out, tmp_path / "few")]
    assert kept[0] == kept[1]
    best = [(folder / "checkpoints" / "BEST").read_text() for folder in (out, tmp_path / "few")]
    assert best[0] == best[1]


def test_a_run_that_began_before_the_key_keeps_the_best(idx, whole, tmp_path):
    out = as_after(6, whole / "best", tmp_path / "run")
    text = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text("".join(line for line in text.splitlines(True) if "choose:" not in line))
    assert load_recipe(out / "recipe.yaml").evaluate.choose == "latest_within_se", "the key is gone"
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx, "top1"), out, resume=True)
    found, unbroken = result(out)["choice"], result(whole / "best")["choice"]
    assert found == unbroken
    assert found["choose"] == "best"
    assert found["step"] == found["best"]["step"] == by_hand(whole / "best", "top1")[1]
    assert json.loads((out / "run.json").read_text())["id"]


def test_without_validation_nothing_is_chosen(idx, tmp_path):
    recipe = recipe_of(tmp_path / "r.yaml", idx, "top1", data={"validation_fraction": 0.0}, duration="2 steps")
    assert tlscale.run(recipe, tmp_path / "run")["choice"] is None


def test_the_screen_says_how_sure_the_choice_is(idx, tmp_path, capsys):
    out = tmp_path / "run"
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx, "top1", duration="4 steps"), out)
    said, choice = capsys.readouterr().out, result(out)["choice"]
    at_best = (
        f"{choice['best']['figure']:.4f} ± {choice['best']['standard_error']:.4f} at step {choice['best']['step']}"
    )
    assert at_best in " ".join(said.split())
