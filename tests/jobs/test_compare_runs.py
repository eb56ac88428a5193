"""`tlscale compare` of finished runs, of backbones, with overrides, and as lines for others to run."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import put_small_idx, small_recipe
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, RecipeError, RunFolderError
from tlscale.recipe.load import load_recipe

pytestmark = pytest.mark.slow  # six runs
PROBE = {"probe": {"kind": "ridge"}, "backbone": {"name": "test_resnet"}}


def invoke(*words):
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, idx: Path) -> Path:
    """A folder of runs: one recipe with two seeds, another, and what is no finished run."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(folder.parent / "photos.yaml", idx, **PROBE)
    for seed in (0, 1):
        tlscale.run(recipe.with_(seed=seed), folder / f"photos_s{seed}")
    tlscale.run(recipe.with_(**{"probe.kind": "knn"}), folder / "other_s0")
    shutil.copytree(folder / "other_s0", folder / "begun")
    (folder / "begun" / "result.json").unlink()
    (folder / "notes").mkdir()
    return folder


def test_finished_runs_are_tabulated_and_tested_in_pairs(runs, tmp_path):
    found = tlscale.compare(sorted(runs.iterdir()))
    assert {(run["variant"], run["seed"]) for run in found["runs"]} == {("photos", 0), ("photos", 1), ("other", 0)}
    assert {row["strategy"] for row in found.table} >= {"photos", "other"}
    assert len(found["pairs"]) == 1
    assert found["pairs"][0]["num_images"] == 37
    for run in found["runs"]:
        own = json.loads((Path(run["folder"]) / "result.json").read_text())
        assert (run["top1"], run["interval95"]) == (own["top1"], own["top1_interval95"])
    passed_over = [note for note in found["notes"] if note.startswith("Passed over")]
    assert [note.split("'")[2] for note in passed_over] == [" is not finished.", " is no run folder."]
    assert found.folder is None
    done = invoke("compare", *sorted(runs.glob("*_s0")), "--out", tmp_path / "table")
    assert done.exit_code == 0, done.output
    for name in ("compare.md", "compare.json", "compare.png"):
        assert (tmp_path / "table" / name).stat().st_size > 500


def test_recipes_of_one_name_are_told_apart(runs, tmp_path):
    """The same folder name twice, and other recipes: they are no seeds of one."""
    shutil.copytree(runs / "photos_s0", tmp_path / "a" / "photos_s0")
    found = tlscale.compare([runs / "photos_s0", tmp_path / "a" / "photos_s0", runs / "other_s0"])
    labels = [run["variant"] for run in found["runs"]]
    assert len(set(labels)) == 3
    assert [label.rpartition("/")[2] for label in labels] == ["photos_s0", "photos_s0", "other"]


def test_a_folder_of_other_projects_and_stray_files_has_a_table_for_each(runs, tmp_path, monkeypatch):
    """By a glob that no shell has expanded, from both doors."""
    everything = tmp_path / "runs"
    shutil.copytree(runs, everything)
    shutil.rmtree(everything / "begun")
    data = put_small_idx(tmp_path / "data", train=40, test=20)
    recipe = small_recipe(tmp_path / "r.yaml", data, **PROBE)
    tlscale.run(recipe, everything / "elsewhere")
    (everything / "notes.txt").write_text("mine")
    (everything / "broken").mkdir()
    shutil.copytree(everything / "other_s0", everything / "broken", dirs_exist_ok=True)
    (everything / "broken" / "run.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    found = tlscale.compare("runs/*", out="table")
    first, second = found.tables
    assert [Path(run["folder"]).name for run in first["runs"]] == ["elsewhere"]
    assert [Path(run["folder"]).name for run in second["runs"]] == ["other_s0", "photos_s0", "photos_s1"]
    assert [pair["num_images"] for pair in found["pairs"]] == [37]
    assert len(found.table) == len(first.table) + len(second.table)
    assert len(found["runs"]) == 4
    passed = [note for note in found["notes"] if note.startswith("Passed over: ")]
    assert [note.split("'")[1] for note in passed] == ["runs/broken", "runs/notes", "runs/notes.txt"]
    assert json.loads(Path("table/compare.json").read_text()) == found
    assert "37 test images" in Path("table/table_2/compare.md").read_text()
    assert (repr(found), found._repr_html_().count("<table>")) == ("Comparison(4 runs in 2 tables)", 2)
    done = invoke("compare", "runs/*")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("Comparison of runs, ") == 2
    assert "Passed over: 'runs/notes.txt' is a file." in done.stdout
    with pytest.raises(RunFolderError, match=r"nothing matches 'gone/\*'"):
        tlscale.compare("gone/*")


def test_what_cannot_be_tabulated_is_refused(runs, idx, tmp_path):
    recipe = runs.parent / "photos.yaml"
    with pytest.raises(RecipeError, match="is a folder, and .*photos.yaml' a recipe"):
        tlscale.compare([runs / "photos_s0", recipe])
    with pytest.raises(RunFolderError, match="there is no folder '.*gone'. Name the folders of finished runs"):
        tlscale.compare([runs / "photos_s0", runs / "gone"])
    with pytest.raises(RecipeError, match="^sizes: it has no effect on runs that are finished"):
        tlscale.compare([runs / "photos_s0"], sizes=[10])
    with pytest.raises(RunFolderError, match="no finished run among '.*begun', '.*notes'"):
        tlscale.compare([runs / "begun", runs / "notes"])
    with pytest.raises(RunFolderError, match="^out: .* is a run folder"):
        tlscale.compare([runs / "photos_s0"], out=runs / "photos_s1")
    done = invoke("compare", runs / "photos_s0", "optim.lr=1")
    assert (done.exit_code, "key=value: it has no effect" in done.stderr) == (EXIT_BAD_INPUT, True)


def test_backbones_with_overrides_as_jobs_whose_table_is_gathered(runs, tmp_path):
    """Each line runs by itself, in any order, and their table is that of a comparison that ran them."""
    out, recipe = tmp_path / "out", runs.parent / "photos.yaml"
    words = [recipe, "probe.kind=logistic", "--backbones", "test_resnet,test_vit", "--seeds", "0", "--out", out]
    done = invoke("compare", *words, "--print-jobs")
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[4] for line in lines] == [str(out / "test_resnet_s0"), str(out / "test_vit_s0")]
    assert not (out / "test_vit_s0").exists()
    assert invoke("compare", *words, "--print-jobs").stdout == done.stdout, "the same lines again"
    for line in reversed(lines):
        assert line[0] == "tlscale"
        assert load_recipe(line[2]).probe.kind == "logistic"
        assert invoke(*line[1:]).exit_code == 0
    (gather,) = done.stderr.splitlines()
    assert invoke(*shlex.split(gather.removeprefix("then: tlscale "))).exit_code == 0
    gathered = json.loads((out / "table" / "compare.json").read_text())
    whole = invoke("compare", *words, "--resume")
    assert whole.exit_code == 0, whole.output
    compared = json.loads((out / "compare.json").read_text())
    assert (gathered["runs"], gathered["pairs"]) == (compared["runs"], compared["pairs"])
    assert [run["variant"] for run in compared["runs"]] == ["test_resnet", "test_vit"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbones": ["test_vit", "test_vit"]}, "backbones: it names one twice"),
        ({"backbones": ["test_vit"], "strategies": ["codes"]}, "backbones: each is compared with the strategy of one"),
        ({"backbones": ["test_vti"]}, "test_vti"),
    ],
    ids=str,
)
def test_wrong_backbones_are_refused_before_anything_runs(options, message, runs, tmp_path):
    with pytest.raises(tlscale.TlscaleError, match=message):
        tlscale.compare(runs.parent / "photos.yaml", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_override_changes_one_recipe(runs, tmp_path):
    done = invoke("compare", runs.parent / "photos.yaml", runs.parent / "b.yaml", "seed=1", "--out", tmp_path / "out")
    assert done.exit_code == EXIT_BAD_INPUT
    assert "seed=1: it changes one recipe" in done.stderr
