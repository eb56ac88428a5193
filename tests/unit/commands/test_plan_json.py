"""`tlscale plan --json`: one object on standard output, with the keys that docs/screen.md lists, and nothing else."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main
from tlscale.training.setup import set_up

PAGE = Path(__file__).parents[3] / "docs" / "screen.md"
RESNET = {"name": "test_resnet", "weights": "none"}
CHANGES = {
    "half": {"freeze": r"(conv1|bn1|layer[12])\..*", "backbone": RESNET},
    "stages": {"stages": [{"freeze": ".*", "duration": "1 epochs"}, {"duration": "2 steps"}]},
    "fsdp2": {"compute": {"engine": "fsdp2"}},
    "probe": {"probe": {}, "backbone": RESNET, "codes": {"layer": ["layer3", "penultimate"]}},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return put_small_folder(tmp_path_factory.mktemp("pictures"))


def keys_of(plain, prefix=""):
    """All keys, without those that are names of the user's own."""
    if isinstance(plain, list):
        return {key for item in plain for key in keys_of(item, prefix)}
    if not isinstance(plain, dict) or prefix in ("augment.", "data.images."):
        return set()
    return {key for name, value in plain.items() for key in (name, *keys_of(value, f"{prefix}{name}."))}


@pytest.mark.parametrize("name", CHANGES)
def test_standard_output_is_one_object_with_the_keys_of_the_page(name, pictures, tmp_path):
    changes = {"data": {"source": "folder", "augment": ["flip"] if name == "stages" else []}, **CHANGES[name]}
    recipe = small_recipe(tmp_path / "r.yaml", pictures, **changes)
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml"), "--json", "--check-images"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert "all 80 images can be read" in done.stderr
    documented = set(re.findall(r"`(?:stages\[\]\.)?(\w+)`", PAGE.read_text().split("## `plan --json`")[1]))
    assert keys_of(plan) <= documented
    assert plan["data"]["images"] == {"train": 48, "validation": 12, "test": 20}
    setup = set_up(recipe, world_size=1)
    assert (plan["steps"] or {"total": 0})["total"] == setup.total_steps
    assert plan["parameters"] == {"trainable": setup.trainable_params, "total": setup.total_params}
    if name == "probe":
        assert plan["batch"] is None
        assert [(fit["layer"], fit["pool"]) for fit in plan["probe"]["fits"]] == [
            ("layer3", "avg"),
            ("penultimate", "avg"),
        ]
        return
    for stage in plan["stages"]:
        counted = sum(row["parameters"] for row in stage["freeze"] if not row["frozen"])
        head = sum(param.numel() for param in setup.classifier.head.parameters())
        of_network = {key: param.numel() for key, param in setup.classifier.rule_names().items()}
        assert sum(of_network[key] for group in stage["groups"] for key in group["tensors"]) == counted + head
        assert ("unsharded" in stage["memory_bytes"]) == (name == "fsdp2")
    assert plan["stages"][0]["codes"]["cached"] == (name == "half")


def test_a_plan_that_fails_leaves_standard_output_empty(tmp_path):
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "none.yaml"), "--json"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "there is no file" in done.stderr
