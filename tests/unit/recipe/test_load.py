"""Loading, overriding, extending and dumping recipes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlscale.errors import RecipeError
from tlscale.recipe.load import (
    MAX_BYTES,
    MAX_EXTENDS,
    diff_recipes,
    dump_recipe,
    load_recipe,
    load_stored_recipe,
    recipe_digest,
)
from tlscale.recipe.mistakes import Findings, Origin
from tlscale.recipe.schema import Recipe
from tlscale.recipe.schema_keys import all_keys
from tlscale.recipe.shipped import copy_recipe, recipe_summary, shipped_recipes
from tlscale.recipe.yaml_text import read_yaml, write_yaml

GOOD = "name: a\ndata: {source: fashion_mnist}\nbackbone: {name: resnet18}\n"
ROOT = Path(__file__).resolve().parents[3]


def read(text):
    """The value of YAML text, and the mistakes in it."""
    findings = Findings()
    node = read_yaml(text, lambda line: Origin("x.yaml", line), findings)
    return (None if node is None else node.plain()), [str(problem) for problem in findings.mistakes]


@pytest.fixture
def recipe_file(tmp_path):
    def write(text, name="recipe.yaml"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


def message(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1.5e+3", -1500.0),
        ("1_000.5", 1000.5),
        ("+2.0", 2.0),
        ("0", 0),
        ("-0", 0),
        ("10", 10),
        ("+7", 7),
        ("10_000", 10000),
        ("0.1", 0.1),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("NULL", "NULL"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x1F", "0x1F"),
        ("0o17", "0o17"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("1.2.3", "1.2.3"),
        ("1__0", "1__0"),
        ("_1", "_1"),
        ("=", "="),
        ("5%", "5%"),
        ("'10'", "10"),
        ('"true"', "true"),
        ("''", ""),
        ("layer[12]\\..*", "layer[12]\\..*"),
        ("10 epochs", "10 epochs"),
    ],
)
def test_scalars(text, value):
    got, mistakes = read(f"key: {text}\n")
    assert mistakes == []
    assert got == {"key": value}
    assert type(got["key"]) is type(value)


@pytest.mark.parametrize("text", ["010", "-01", "00", "01.5", "08", ".inf", "-.INF", ".nan", "1e999", "9" * 5000, "<<"])
def test_scalars_with_two_readings_or_none_are_refused(text):
    got, mistakes = read(f"key: {text}\nother: 1\n")
    assert got == {"other": 1}
    assert len(mistakes) == 1
    assert mistakes[0].startswith("x.yaml:1: ")


def test_lone_surrogates_are_refused():
    assert "is not Unicode text" in read(r'key: "\ud800"')[1][0]


def test_regexes_are_keys_as_text():
    assert read(r"{'layer4\..*': 0.1, .*: 1, no: 2}")[0] == {r"layer4\..*": 0.1, ".*": 1, "no": 2}


TEXTS = st.one_of(
    st.sampled_from(
        [
            "no",
            "1e3",
            "null",
            "10",
            "010",
            "~",
            "<<",
            ".inf",
            "=",
            "---",
            "...",
            "1_0",
            "",
            "true",
            "2024-01-01",
            "a: b",
            "# c",
            " x ",
            "a\nb",
            "\t",
            "*x",
            "&x",
            "!x",
            "-",
            "? x",
            "\\.",
            "'",
            '"',
            "\u2028",
            "\x85",
            "\x1b[0m",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.from_regex(r"\A[-+]?[0-9_.eE+-]{1,8}\Z"),
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**20), 10**20)
VALUES = st.recursive(
    TEXTS | NUMBERS | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4))
@settings(deadline=None)
def test_written_yaml_reads_back(plain):
    got, mistakes = read(write_yaml(plain))
    assert mistakes == []
    if plain:
        assert repr(got) == repr(plain)  # repr: 1, 1.0 and true differ


@settings(deadline=None)
@given(st.text(max_size=200) | st.text("[]{}:,-&*!|>'\"\n #%@a1 \t", max_size=60))
def test_no_text_makes_the_reader_fail(text):
    value, mistakes = read(text)
    assert value is None or mistakes == [] or all(mistake.startswith("x.yaml:") for mistake in mistakes)


# Files


def test_bytes_that_are_no_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(GOOD.encode() + b"# \xff\n")
    assert message(file).startswith(f"{file}:4: not UTF-8 text")
    file.write_bytes(GOOD.encode() + b"#" * MAX_BYTES)
    assert message(file).startswith(f"{file}:1: more than 1,000,000 bytes")
    file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    assert "not UTF-8 text" in message(file)
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())  # as Windows editors save it
    assert load_recipe(file).name == "a"


def test_alias_bomb_is_refused_without_expanding_it(recipe_file):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert "anchors and aliases are not read" in message(recipe_file(bomb))


def test_missing_file_lists_what_there_is(recipe_file, tmp_path):
    recipe_file(GOOD, "resnet.yaml")
    assert f"Did you mean '{tmp_path / 'resnet.yaml'}'?" in message(tmp_path / "resnte.yaml")
    assert "is a folder. Name a recipe file, such as resnet.yaml." in message(tmp_path)
    assert "cannot be read" in message("a\0b.yaml")


def test_all_mistakes_are_sorted_by_line_and_told_once(recipe_file):
    file = recipe_file(GOOD + "optim: {lr: x}\nseed: 010\nseeed: 1\nseed: 2\nhead: [relu]\n")
    lines = message(file, "batch_size=0", "loss.label_smoothing=2").splitlines()
    assert lines[0] == "6 mistakes in the recipe:"
    assert [line.split(":")[1] for line in lines[1:5]] == ["4", "5", "6", "8"]
    assert [line.split(":")[0] for line in lines[5:]] == ["overrides"] * 2


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        # what follows from a mistake is not another one
        ("name: a\ndata: {sorce: folder, path: x}\nbackbone: {name: b}\n", [], 1),
        ("name: a\ndata: {source: folder, pth: x}\nbackbone: {name: b}\n", [], 1),
        ("name: a\ndata: {source: foldr, path: x}\nbackbone: {name: b}\n", [], 1),
        (GOOD + "schedule: {decay: setp, step_every: 1 epochs, step_factor: 0.1}\n", [], 1),
        (GOOD + "schedule: {decay: step, step_every: 1, step_factor: 0.1}\n", [], 1),
        (GOOD + "schedule: {decay: step, step_evry: 1 epochs, step_factor: 0.1}\n", [], 1),
        (GOOD + "track: [wandbb]\nwandb: {project: x}\n", [], 1),
        (GOOD + "batch_size: x\ncompute: {micro_batch_size: 300}\n", [], 1),
        ("name: a\ndata: !x {source: folder}\nbackbone: {name: b}\n", [], 1),
        ("data: {source: fashion_mnist}\nbackbone: {name: b}\n", ["name="], 1),
        ("extends: gone.yaml\nschedule: {decay: step}\n", [], 1),
        # but what is wrong by itself is found behind other mistakes
        (GOOD + "schedule: {decay: step}\noptim: {lr: x}\nduration: 5%\n", [], 3),
        (
            "name: a\ndata: {source: folder, path: x, config: y, image_column: z, std: [0]}\nbackbone: {name: b}\n",
            [],
            3,
        ),
        (GOOD + "loss: {label_smoothing: x, class_weights: y}\nwandb: {project: 1}\n", [], 4),
    ],
)
def test_each_mistake_once(recipe_file, text, overrides, expected):
    lines = message(recipe_file(text), *overrides).splitlines()
    assert len([line for line in lines if "mistakes in the recipe:" not in line]) == expected, lines


# Extends


def test_sections_are_merged_and_the_rest_is_replaced(recipe_file):
    recipe_file(
        GOOD + "head: [{linear: 8}, relu, linear]\nfreeze: [{'a': true}]\n"
        "optim: {lr: 1e-2, weight_decay: 0.1, options: {momentum: 0.9}}\ntrack: [wandb]\n"
        "wandb: {project: p, tags: [x]}\n",
        "base.yaml",
    )
    recipe = load_recipe(
        recipe_file(
            "extends: base.yaml\nname: b\noptim: {lr: 1e-4, options: {nesterov: true}}\nfreeze: [{'b': true}]\n"
            "head: [linear]\nwandb: {tags: [y]}\n"
        )
    )
    assert (recipe.name, recipe.optim.lr, recipe.optim.weight_decay) == ("b", 1e-4, 0.1)
    assert recipe.optim.options == {"nesterov": True}
    assert [rule.pattern for rule in recipe.freeze] == ["b"]
    assert recipe.head == ["linear"]
    assert (recipe.wandb.project, recipe.wandb.tags) == ("p", ["y"])


def test_mistakes_name_the_file_that_they_are_in(recipe_file):
    base = recipe_file(GOOD + "optim:\n  lr: x\n  weight_decay: -1\n", "parts/base.yaml")
    child = recipe_file("\nextends: parts/base.yaml\noptim: {weight_decay: -2}\n")
    lines = message(child).splitlines()[1:]
    assert lines[0].startswith(f"{child}:3: optim.weight_decay = -2")
    assert lines[1].startswith(f"{base}:5: optim.lr = 'x'")


def test_chains_circles_and_their_length(recipe_file):
    recipe_file(GOOD + "seed: 5\n", "r0.yaml")
    for number in range(1, MAX_EXTENDS + 2):
        recipe_file(f"extends: r{number - 1}.yaml\nbatch_size: {number}\n", f"r{number}.yaml")
    folder = recipe_file("extends: y.yaml\n", "x.yaml").parent
    recipe_file("extends: x.yaml\n", "y.yaml")
    recipe = load_recipe(folder / f"r{MAX_EXTENDS}.yaml")
    assert (recipe.seed, recipe.batch_size) == (5, MAX_EXTENDS)
    assert f"more than {MAX_EXTENDS} files away" in message(folder / f"r{MAX_EXTENDS + 1}.yaml")
    assert message(folder / "x.yaml").startswith(f"{folder / 'y.yaml'}:1: extends = 'x.yaml': goes round in a circle")


def test_extends_stays_in_the_folder_of_the_first_file(recipe_file, tmp_path):
    outside = recipe_file(GOOD, "outside.yaml")
    recipe_file(GOOD, "in/base.yaml")
    recipe_file("extends: ../base.yaml\n", "in/sub/middle.yaml")
    assert load_recipe(recipe_file("extends: sub/middle.yaml\n", "in/r.yaml")).name == "a"
    assert "lies outside" in message(recipe_file("extends: ../outside.yaml\n", "in/r.yaml"))
    assert "lies outside" in message(recipe_file(f"extends: {outside}\n", "in/r.yaml"))
    assert "cannot be read" in message(recipe_file(GOOD + 'extends: "a\\0b"\n', "in/r.yaml"))
    (tmp_path / "in" / "loop.yaml").symlink_to(tmp_path / "in" / "loop.yaml")
    assert "cannot be read" in message(recipe_file("extends: loop.yaml\n", "in/r.yaml"))
    (tmp_path / "in" / "link.yaml").symlink_to(outside)
    assert "lies outside" in message(recipe_file("extends: link.yaml\n", "in/r.yaml"))


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        (" optim.lr = 1e-3", "optim.lr", 1e-3),
        ("head=[{linear: 64}, relu, linear]", "head", [{"linear": 64}, "relu", "linear"]),
        ("data.augment=none", "data.augment", []),
        ("data.augment=[flip, {crop: 0.5}]", "data.augment", ["flip", {"crop": 0.5}]),
        ("name=10", "name", "10"),
        ("name='10'", "name", "10"),
        ("data.test_split=a: b #c", "data.test_split", "a: b #c"),
        ("data.validation_split=null", "data.validation_split", None),
        ("data.train_split=null", "data.train_split", "null"),
        ("duration=0.5 epochs", "duration", "0.5 epochs"),
        ("compute.compile=true", "compute.compile", True),
        ("freeze=.*", "freeze", [{".*": True}]),
        (r"freeze=layer1\..*", "freeze", [{r"layer1\..*": True}]),
        (r"freeze=[a]\..*", "freeze", [{r"[a]\..*": True}]),
        (r"freeze=(conv1|bn1)\..*", "freeze", [{r"(conv1|bn1)\..*": True}]),
        (r"freeze='(conv1|bn1)\..*'", "freeze", [{r"(conv1|bn1)\..*": True}]),
        ("freeze=a{2}: *b", "freeze", [{"a{2}: *b": True}]),
        ("freeze=[a.*, b.*]", "freeze", [{"a.*": True}, {"b.*": True}]),
        ("freeze=[{a.*: false}, .*]", "freeze", [{"a.*": False}, {".*": True}]),
        ("freeze=[]", "freeze", []),
        ("optim.lr_rules={a.*: 0.1}", "optim.lr_rules", [{"a.*": 0.1}]),
        ("optim.options.momentum=0.9", "optim.options", {"nesterov": True, "momentum": 0.9}),
        ("optim.options={momentum: 0.9}", "optim.options", {"momentum": 0.9}),
        ("optim={lr: 0.5}", "optim.options", {"nesterov": True}),
        ("loss.class_weights.T-shirt/top v1.5=2", "loss.class_weights", {"T-shirt/top v1.5": 2.0}),
        ("loss.class_weights=balanced", "loss.class_weights", "balanced"),
    ],
)
def test_overrides(recipe_file, override, key, value):
    plain = load_recipe(recipe_file(GOOD + "optim: {options: {nesterov: true}}\n"), [override]).to_plain()
    for part in key.split("."):
        plain = plain[part]
    assert plain == value


def test_overrides_make_sections_and_the_last_one_holds(recipe_file):
    file = recipe_file(GOOD + "optim: {lr: wrong}\n")
    recipe = load_recipe(file, ["track=[wandb]", "wandb.project=p", "optim.lr=1", "optim.lr=2"])
    assert (recipe.wandb.project, recipe.optim.lr) == ("p", 2.0)


@given(
    st.text(max_size=40)
    | st.builds("{}={}".format, st.sampled_from(["freeze", "optim.lr", "name", "head", "optim"]), TEXTS)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_an_override_is_right_or_a_recipe_error(recipe_file, override):
    file = recipe_file(GOOD)
    try:
        said = dump_recipe(load_recipe(file, [override]))
    except RecipeError as error:
        said = str(error)
    assert "overrides: " in said or said.startswith("name: ")


KEYS = st.sampled_from([*all_keys(), "optim.lrr", "lr", "api_key", "data.pth", "loss.class_weights.a"])
ODD = st.sampled_from(
    ["step", "folder", "manifest", "linear", "5%", "1 epochs", "none", ["linear"], ["wandb"], {}, [], "cosin"]
)


@given(st.dictionaries(KEYS, ODD.map(copy.deepcopy) | VALUES, max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
def test_any_mixture_is_a_recipe_or_a_list_of_mistakes(recipe_file, values):
    tree = {"name": "a", "data": {"source": "fashion_mnist"}, "backbone": {"name": "resnet18"}}
    for dotted, value in values.items():
        *sections, last = dotted.split(".")
        place = tree
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    file = recipe_file(write_yaml(tree))
    try:
        lines = dump_recipe(load_recipe(file)).splitlines()[:1]
    except RecipeError as error:
        lines = str(error).split("\n")
        lines = lines[1:] if "mistakes in the recipe:" in lines[0] else lines
    assert lines
    assert all(line.startswith((f"{file}:", "name: ")) for line in lines)


# Paths


def test_local_paths_become_absolute(recipe_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    text = "name: a\ndata: {source: %s, path: %s}\nbackbone: {name: resnet18, weights: %s}\n"

    def paths(source, path, weights):
        recipe = load_recipe(recipe_file(text % (source, path, weights)))
        return recipe.data.path, recipe.backbone.weights

    here = str(tmp_path)
    assert paths("folder", "x/../y", "w.safetensors") == (f"{here}/y", f"{here}/w.safetensors")
    assert paths("disk", "~/y", "~/w.pth") == ("/home/somebody/y", "/home/somebody/w.pth")
    assert paths("hub", "user/set", "pretrained") == ("user/set", "pretrained")
    assert paths("idx", "/y", "none") == ("/y", "none")


# Dumping

MANY_TEXTS = TEXTS.filter(bool)
REGEXES = st.sampled_from(
    [r"layer[12]\..*", r".*\.bn\d\..*", "no", "1e3", "null", "10", "(a|b)+", r"\\", "x" * 200, "a: b"]
)
WEIGHTS = st.floats(0, 1e6, allow_nan=False)
LRS = st.sampled_from([1e-5, 1e-05, 3e-4, 1.0]) | st.floats(1e-12, 1e4)
RECIPES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["10", "no", "null", "1e3", "010", "a.b-c"]),
        "data": st.fixed_dictionaries(
            {"source": st.just("folder"), "path": st.sampled_from(["/x", "/a b/#c: d", "/\u00e9\n"])},
            optional={"classes": st.lists(MANY_TEXTS, min_size=2, max_size=5, unique=True)},
        ),
        "backbone": st.just({"name": "resnet18"}),
        "freeze": st.lists(st.dictionaries(REGEXES, st.booleans(), min_size=1, max_size=1), max_size=3),
        "head": st.sampled_from([["linear"], [{"linear": 3}, "relu", {"dropout": 1e-05}, "linear"]]),
        "duration": st.sampled_from(["10 epochs", "0.0000001 epochs", "12345678901.5 images", "3 steps"]),
        "optim": st.fixed_dictionaries(
            {
                "lr": LRS,
                "lr_rules": st.lists(st.dictionaries(REGEXES, WEIGHTS, min_size=1, max_size=1), max_size=3),
                "options": st.dictionaries(
                    MANY_TEXTS, st.booleans() | st.integers() | WEIGHTS | st.lists(WEIGHTS), max_size=3
                ),
            }
        ),
        "loss": st.fixed_dictionaries({"class_weights": st.just("balanced") | st.dictionaries(MANY_TEXTS, WEIGHTS)}),
    }
)


@given(RECIPES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_dumped_recipes_load_to_equal_ones(recipe_file, plain):
    recipe = Recipe.model_validate(plain)
    again = load_stored_recipe(recipe_file(dump_recipe(recipe))).recipe  # one with rules without effect, too
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)
    assert diff_recipes(recipe, again) == []
    assert list(again.optim.options) == list(recipe.optim.options)


def test_a_dump_is_complete_and_in_order(recipe_file):
    recipe = load_recipe(recipe_file(GOOD))
    text = dump_recipe(recipe)
    top = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert top == list(Recipe.model_fields)
    assert "\n  lr: 0.001\n" in text


def test_digest_and_diff(recipe_file):
    file = recipe_file(GOOD)
    one = load_recipe(file)
    same = load_recipe(recipe_file("backbone: {name: resnet18}\ndata:\n  source: fashion_mnist\nname: a\n", "s.yaml"))
    other = load_recipe(file, ["optim.lr=2e-3", "track=[wandb]", "wandb.project=p", "freeze=.*"])
    assert recipe_digest(one) == recipe_digest(same) != recipe_digest(other)
    assert diff_recipes(one, same) == []
    assert diff_recipes(one, other)[:3] == [
        ("freeze", [], [{".*": True}]),
        ("optim.lr", 1e-3, 2e-3),
        ("track", [], ["wandb"]),
    ]
    assert ("wandb.project", None, "p") in diff_recipes(one, other)


# Shipped recipes


@pytest.fixture
def package(recipe_file, tmp_path):
    recipe_file(f"# \n# What it does.\n# More.\n{GOOD}", "recipes/resnet.yaml")
    recipe_file(GOOD, "recipes/bare.yaml")
    recipe_file("no recipe", "recipes/notes.txt")
    return tmp_path / "tlscale"


def test_shipped_recipes_in_a_checkout_and_in_a_wheel(package, recipe_file):
    found = shipped_recipes(package)
    assert list(found) == ["bare", "resnet"]
    assert [recipe_summary(path) for path in found.values()] == ["", "What it does."]
    recipe_file(GOOD, "tlscale/_recipes/inside.yaml")
    assert list(shipped_recipes(package)) == ["inside"]


def test_copies_never_overwrite(package, tmp_path):
    target = tmp_path / "new" / "mine.yaml"
    assert load_recipe(copy_recipe("resnet", target, package)).name == "a"
    target.write_text("precious")
    with pytest.raises(RecipeError, match="exists and is left as it is"):
        copy_recipe("resnet", target, package)
    assert target.read_text() == "precious"
    assert copy_recipe("bare.yaml", target.parent, package) == target.parent / "bare.yaml"
    with pytest.raises(RecipeError, match=r"Did you mean 'resnet'\? There are: bare, resnet\."):
        copy_recipe("resnett", target, package)


# Imports


@pytest.mark.parametrize(
    ("module", "absent"),
    [("tlscale.recipe.schema", "yaml torch numpy"), ("tlscale.recipe.load", "torch numpy timm accelerate")],
)
def test_imports_are_light(module, absent):
    code = f"import sys, {module}; print(*[name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == ""
