"""Places to write to whose names are not UTF-8: refused before the work, which libraries would do after it."""

import os

import pytest

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tlscale.commands.codes_file import check_file
from tlscale.commands.evaluate import evaluate_run
from tlscale.commands.predict import predict_for_people
from tlscale.errors import TlscaleError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    data = put_small_folder(folder / "data")
    recipe = small_recipe(folder / "r.yaml", data, data={"source": "folder"}, probe={"kind": "ridge"})
    tlscale.run(recipe, folder / "run")
    return folder / "run"


WRITERS = {
    "evaluate": lambda run, out: evaluate_run(run, (), out=out),
    "predict": lambda run, out: predict_for_people(
        run, [str(run.parent / "data")], f"{out}.parquet", None, resume=False, top_k=1, all_probabilities=False
    ),
    "export": lambda run, out: tlscale.export(run, to="timm", out=out),
    "codes": lambda _, out: check_file(out, 1),
    "run": lambda run, out: tlscale.run(run / "recipe.yaml", out),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_that_is_not_utf8_is_refused_before_the_work(writer, run, tmp_path):
    with pytest.raises(TlscaleError, match="the name is not UTF-8. Give another place") as raised:
        WRITERS[writer](run, tmp_path / "caf\udce9")
    assert raised.value.exit_code == 2
    assert os.listdir(tmp_path) == []
