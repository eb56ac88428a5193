"""Each strategy is a valid recipe that differs from the given one in what it is about, and in nothing else."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.errors import RecipeError
from tlscale.recipe.load import diff_recipes
from tlscale.recipe.schema import Recipe
from tlscale.recipe.strategies import MLP_HEAD, STRATEGIES, at_size, derive, fit_to_size, with_seed

EARLY = ("layer1", "layer2")
PARAMETERS = ("conv1.weight", "layer1.0.weight", "layer2.0.weight")

# A recipe in which as much as may be is not as it is by itself.
FULL = {
    "name": "full",
    "seed": 3,
    "data": {"source": "fashion_mnist", "image_size": 64, "train_limit": 5000, "augment": ["flip"], "workers": 0},
    "backbone": {"name": "resnet18", "weights": "w.pth", "allow_pickle": True, "min_matched": 0.8}
    | {"sha256": "a" * 64, "drop_rate": 0.1, "drop_path_rate": 0.1},
    "freeze": r"(conv1|layer1)\..*",
    "head": [{"linear": 32}, "gelu", "linear"],
    "codes": {"views": 2, "pool": ["avg", "max"], "layer": "layer3", "disk_gib": 3.0},
    "duration": "7 epochs",
    "batch_size": 32,
    "drop_last": True,
    "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 1e-4, "layer_decay": 0.7, "lr_rules": [{"conv1.*": 0.1}]},
    "schedule": {"warmup": "1 epochs", "decay": "linear"},
    "loss": {"label_smoothing": 0.1},
    "compute": {"gradient_checkpointing": True, "compile": True, "channels_last": True, "threads": 2},
    "evaluate": {"every": "1 epochs", "select": "loss", "batch_size": 16},
    "checkpoint": {"every": "2 epochs", "keep": 3},
    "log_every": "5 steps",
    "track": ["wandb"],
    "wandb": {"tags": ["x"]},
}
SAME = ("seed", "data.source", "data.train_limit", "data.validation_fraction", "data.image_size", "backbone.name")
OF_TRAINING = ("batch_size", "duration", "schedule.warmup", "schedule.decay", "loss.label_smoothing", "data.augment")


def recipe(base=FULL, **changes):
    return Recipe.model_validate({**base, **changes})


def get(found, dotted):
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def variant(strategy, base=None):
    return derive(base or recipe(), strategy, early_layers=EARLY, parameter_names=PARAMETERS)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_variant_is_valid_and_about_the_same_images(strategy):
    made = variant(strategy)
    assert Recipe.model_validate(made.to_plain()) == made
    assert made.name == f"full_{strategy}"
    keys = SAME if strategy in ("codes", "early_codes") else (*SAME, *OF_TRAINING)
    assert {key: get(made, key) for key in keys} == {key: get(recipe(), key) for key in keys}
    kept = ("track", "wandb", "compute.threads", "codes.memory_mib")
    kept += () if strategy in ("codes", "early_codes") else ("log_every", "evaluate.batch_size", "codes.disk_gib")
    assert {key: get(made, key) for key in kept} == {key: get(recipe(), key) for key in kept}


def test_the_probes_choose_between_their_layers():
    codes, early = variant("codes"), variant("early_codes")
    assert (codes.codes.layer, codes.codes.pool) == (["penultimate"], ["avg"])
    assert (early.codes.layer, early.codes.pool) == (["layer1", "layer2"], ["avg", "max"])
    assert codes.probe.kind == early.probe.kind == "logistic"
    assert codes.backbone.weights == "w.pth"


def test_the_recipes_own_probe_is_kept():
    backbone = {key: value for key, value in FULL["backbone"].items() if not key.startswith("drop_")}
    base = recipe({"name": FULL["name"], "backbone": backbone}, data={"source": "fashion_mnist"})
    base = Recipe.model_validate({**base.to_plain(), "probe": {"kind": "ridge"}, "codes": {"layer": "layer3"}})
    assert variant("early_codes", base).probe.kind == "ridge"
    assert variant("head", base).probe is None
    assert variant("head", base).codes.layer is None


def test_new_layers_are_trained_alone_and_at_their_own_rate():
    head, mlp = variant("head"), variant("mlp")
    for made in (head, mlp):
        assert [(rule.pattern, rule.value) for rule in made.freeze] == [(".*", True)]
        assert (made.backbone.drop_rate, made.backbone.drop_path_rate) == (0.0, 0.0)
        assert made.compute.gradient_checkpointing is False
        assert (made.optim.name, made.optim.layer_decay, made.optim.lr_rules) == ("adamw", None, ())
    assert (head.head, head.optim.lr, head.optim.weight_decay) == (["linear"], 5e-3, 0.0)
    assert (mlp.head, mlp.optim.lr) == (MLP_HEAD, 2e-3)


def test_finetune_is_the_recipe_itself():
    of_probes = ["codes.layer", "codes.pool"]
    assert [key for key, _, _ in diff_recipes(recipe(), variant("finetune"))] == ["name", *of_probes]


@pytest.mark.parametrize("freeze", [".*", [r"conv1\..*", r"layer\d\..*"], [{r"layer.*": True}, {"c.*": True}]], ids=str)
def test_finetune_of_what_freezes_all_freezes_nothing(freeze):
    assert variant("finetune", recipe(freeze=freeze)).freeze == ()


def test_finetune_keeps_a_freeze_that_leaves_something():
    rules = [{r"layer2\..*": False}, {".*": True}]
    assert len(variant("finetune", recipe(freeze=rules)).freeze) == 2


def test_scratch_spares_no_layer():
    made = variant("scratch")
    assert (made.backbone.weights, made.backbone.sha256, made.freeze) == ("none", None, ())
    assert (made.optim.name, made.optim.lr) == ("sgd", 0.1)
    assert (made.optim.layer_decay, made.optim.lr_rules) == (None, ())
    assert made.head == recipe().head


def staged(*stages):
    return recipe({key: value for key, value in FULL.items() if key not in ("freeze", "duration")}, stages=list(stages))


def test_stages_are_kept_by_finetune_and_added_up_by_the_others():
    base = staged({"freeze": ".*", "duration": "1.5 epochs"}, {"duration": "2 epochs"})
    assert variant("finetune", base).stages == base.stages
    for strategy in ("head", "mlp", "scratch"):
        assert variant(strategy, base).stages is None
        assert str(variant(strategy, base).duration) == "3.5 epochs"
    assert variant("codes", base).stages is None
    all_frozen = staged({"freeze": ".*", "duration": "1 epochs"}, {"freeze": ".*", "duration": "2 epochs"})
    assert (variant("finetune", all_frozen).stages, str(variant("finetune", all_frozen).duration)) == (None, "3 epochs")


def test_stages_in_different_units_cannot_be_added_up():
    base = staged({"freeze": ".*", "duration": "10 steps"}, {"duration": "2 epochs"})
    with pytest.raises(RecipeError, match="10 steps, 2 epochs, which cannot be added up"):
        variant("head", base)


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "scratch"])
def test_nothing_is_transferred_from_random_weights(strategy):
    base = recipe(backbone={"name": "resnet18", "weights": "none"})
    with pytest.raises(RecipeError, match=r"backbone\.weights.* is none.*--strategies scratch"):
        variant(strategy, base)
    assert variant("scratch", base).backbone.weights == "none"


def test_wrong_strategies_say_which_there_are():
    with pytest.raises(RecipeError, match="Did you mean 'finetune'.*early_codes"):
        variant("fine_tune")
    with pytest.raises(RecipeError, match="no layers before"):
        derive(recipe(), "early_codes")


def test_names_tell_the_runs_apart_and_stay_valid():
    made = with_seed(at_size(variant("early_codes", recipe(name="n" * 100)), 1000), 7)
    assert re.fullmatch(r"n{50}_early_codes_1000_s7", made.name)
    assert with_seed(recipe(name="n" * 100), 7).name == "n" * 97 + "_s7"
    assert (made.data.train_limit, made.seed) == (1000, 7)
    assert at_size(recipe(), None).data.train_limit is None
    assert at_size(recipe(), None).name == "full_all"


# -- sizes ------------------------------------------------------------------------------------------------------------


def steps_of(found, num_images):
    return found.duration.to_steps(num_images=num_images, batch_size=found.batch_size)


def test_a_short_run_is_lengthened_with_all_that_goes_by_epochs():
    short = fit_to_size(at_size(recipe(), 100), 210)  # 90 images in batches of 32, the short one dropped: 14 steps
    assert str(short.duration) == "210 steps"
    assert str(short.evaluate.every) == "30 steps"  # 2 of 14, as before
    assert str(short.checkpoint.every) == "60 steps"
    assert str(short.schedule.warmup) == "30 steps"
    assert short.drop_last is True


def test_images_that_fill_no_batch_are_not_dropped():
    assert fit_to_size(at_size(recipe(), 20), 0).drop_last is False
    assert str(fit_to_size(at_size(recipe(), 20), 0).duration) == "7 epochs"


def test_what_is_long_enough_or_is_no_training_stays():
    for made in (at_size(recipe(), 5000), at_size(variant("codes"), 100), at_size(recipe(), None)):
        assert fit_to_size(made, 200) == made


def test_stages_are_lengthened_together():
    base = staged({"freeze": ".*", "duration": "1 epochs"}, {"duration": "3 epochs"})
    made = fit_to_size(at_size(base, 100), 80)
    assert [str(stage.duration) for stage in made.stages] == ["20 steps", "60 steps"]


@given(size=st.integers(1, 3000), epochs=st.integers(1, 30), batch=st.integers(1, 300), least=st.integers(0, 500))
def test_no_run_is_shorter_than_asked_or_than_its_epochs(size, epochs, batch, least):
    base = recipe(duration=f"{epochs} epochs", batch_size=batch, drop_last=False)
    made = fit_to_size(at_size(base, size), least)
    num_images = size - int(size * 0.1)
    assert steps_of(made, num_images) == max(least, epochs * -(-num_images // batch))
    assert made.evaluate.every.to_steps(num_images=num_images, batch_size=batch) <= steps_of(made, num_images)
