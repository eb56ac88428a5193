"""Errors are data that survive a trip to another process, and are rendered once."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import tlscale
from tlscale import errors
from tlscale.errors import NonFiniteLossError, RecipeError, TlscaleError, flag, option
from tlscale.recipe.load import load_recipe

KINDS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TlscaleError)
]  # fmt: skip


def raise_in_a_process(kind):
    error = kind("is too small", key="data.image_size", remedy="Write at least 32.")
    error.reported_by_main = True
    raise error


def raise_of_a_recipe(path):
    load_recipe(path)


@pytest.mark.parametrize("kind", KINDS)
def test_all_errors_are_data(kind):
    error = kind("is too small", key="data.image_size", remedy="Write at least 32.")
    assert (error.key, error.problem, error.remedy) == ("data.image_size", "is too small", "Write at least 32.")
    assert str(error) == "data.image_size: is too small. Write at least 32."
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.key, again.problem, again.remedy, str(again)) == (error.key, error.problem, error.remedy, str(error))


def test_parts_that_are_not_there_are_not_rendered():
    assert str(TlscaleError("the disk is full")) == "the disk is full"
    assert str(TlscaleError("not a regex", key="freeze")) == "freeze: not a regex"
    assert str(TlscaleError("the disk is full", remedy="Free some space.")) == "the disk is full. Free some space."


def test_options_are_shown_as_arguments_to_callers_in_python():
    remedy = "Free some space, then " + flag("resume") + f" goes on; {option('images-from', 'LIST').python}, a--b -- c"

    def fail():
        raise TlscaleError("no " + option("data") + " x", key=option("top-k"), remedy=remedy)

    with pytest.raises(TlscaleError) as caught:
        fail()
    assert (
        str(caught.value) == "--top-k: no --data x. Free some space, then --resume goes on; images_from=LIST, a--b -- c"
    )
    assert caught.value.args == ("no --data x",)
    other = caught.value.recast(RecipeError, "optim.lr", before="here: ")
    assert str(other) == str(caught.value).replace("--top-k: ", "optim.lr: here: ")
    with pytest.raises(TlscaleError) as caught:
        errors.speaks_python(fail)()
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.key, error.problem, error.args) == ("top_k", "no data x", ("no data x",))
        assert error.remedy == "Free some space, then resume=True goes on; images_from=LIST, a--b -- c"
        assert "resume=True" in str(error)


def test_an_error_comes_back_whole_from_another_process(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: a b\noptim: {lr: x}\n")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        error = pool.submit(raise_in_a_process, tlscale.TlscaleError).exception()
        of_recipe = pool.submit(raise_of_a_recipe, tmp_path / "recipe.yaml").exception()
    assert isinstance(error, TlscaleError)
    assert (error.key, error.reported_by_main) == ("data.image_size", True)
    assert isinstance(of_recipe, RecipeError)
    with pytest.raises(RecipeError) as here:
        load_recipe(tmp_path / "recipe.yaml")
    assert of_recipe.mistakes == here.value.mistakes
    assert str(of_recipe) == str(here.value)


def test_the_step_of_a_loss_that_is_not_finite_survives():
    again = pickle.loads(pickle.dumps(NonFiniteLossError("not finite", 7, key="loss")))
    assert (again.step, again.key) == (7, "loss")


def test_mistakes_of_a_recipe_are_data(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("name: a\ndata: {source: fashion_mnist}\nbackbone: {name: resnet18}\noptim: {lr: x}\nseeed: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, ["duration=5"])
    of_lr, of_seed, of_duration = caught.value.mistakes
    assert (of_lr.origin.where, of_lr.origin.line, of_lr.key, of_lr.value) == (str(file), 4, "optim.lr", "'x'")
    assert (of_lr.problem, of_lr.remedy) == ("must be a number from 1e-12 to 1e+38", None)
    assert (of_seed.key, of_seed.problem, of_seed.remedy) == ("seeed", "unknown key", "Did you mean 'seed'?")
    assert (of_duration.origin.where, of_duration.origin.line) == ("command line: duration=5", 0)
    lines = str(caught.value).splitlines()
    assert lines == ["3 mistakes in the recipe:", str(of_lr), str(of_seed), of_duration.shown(in_python=True)]
    assert lines[3].startswith("overrides: duration=5: ")
    assert str(of_duration).startswith("command line: duration=5: ")
    file.write_text("name: a\ndata: {source: fashion_mnist}\nbackbone: {name: resnet18}\noptim: {lr: x}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert (caught.value.key, caught.value.problem) == ("optim.lr", "must be a number from 1e-12 to 1e+38")


def test_names_in_errors_do_not_reach_the_terminal_raw():
    error = TlscaleError("class 'a\x1b[31m\ntop1 1.0000\udce9' is empty:\n  x: 1", key="data.path", remedy="Fill it")
    assert str(error) == r"data.path: class 'a\x1b[31m\ntop1 1.0000\udce9' is empty:" + "\n  x: 1\n  Fill it"


def test_what_a_library_says_is_one_line():
    assert errors.first_line(ValueError("\n one. two \nthree")) == "one. two "
    assert errors.first_sentence(ValueError("one. two\nthree")) == "one"
    assert errors.kind_and_line(ValueError()) == "ValueError: no message"
    assert len(errors.first_line(ValueError("x" * 300))) == 200
