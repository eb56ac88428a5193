"""The key of codes: whatever may change a bit of them changes their address, and nothing else does."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.small_runs import environment
from tlscale.codes import key as key_module
from tlscale.codes.key import CodesKey

KEY = CodesKey(
    weights="a" * 64,
    transform={"input": {"image_size": 96, "mean": (0.485, 0.456), "interpolation": "bicubic"}, "seed": 0},
    layers=("layer3", "penultimate"),
    pools=("avg", "as is"),
    dtype="auto",
    compute={"precision": "fp32", "device": "cpu", "channels_last": False},
    versions={"torch": "2.15.0", "timm": "1.0.31"},
)
CHANGES = {
    "weights": ["b" * 64, ""],
    "transform": [{}, {**KEY.transform, "seed": 0.0}, {**KEY.transform, "more": None}],
    "layers": [("penultimate", "layer3"), ("layer2", "penultimate")],
    "pools": [("as is", "avg"), ("max", "as is")],
    "dtype": ["float32", "float16", "bfloat16", "float64"],
    "compute": [{**KEY.compute, "precision": "bf16"}, {**KEY.compute, "channels_last": True}],
    "versions": [{**KEY.versions, "torch": "2.15.1"}, {"torch": "2.15.0"}],
}
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_every_field_has_its_changes():
    assert CHANGES.keys() == {field.name for field in fields(CodesKey)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in CHANGES for value in CHANGES[name]])
def test_a_change_of_any_field_is_another_address(name, value):
    assert replace(KEY, **{name: value}).digest() != KEY.digest()


def test_all_changes_differ_from_one_another():
    digests = [replace(KEY, **{name: value}).digest() for name in CHANGES for value in CHANGES[name]]
    assert len(set(digests)) == len(digests)


def test_a_new_format_is_another_address(monkeypatch):
    before = KEY.digest()
    monkeypatch.setattr(key_module, "FORMAT", key_module.FORMAT + 1)
    assert KEY.digest() != before


def test_the_digest_is_pinned():
    # If this fails, everything that users have kept is computed anew. Then FORMAT must change as well.
    assert KEY.digest() == "7749fa63efcea785161d7025514ecafdc442c2e1b647f1b604c4e47e712b3ff3"


def test_another_process_has_the_same_digest():
    code = f"from tlscale.codes.key import CodesKey; print({KEY!r}.digest())"
    made = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONHASHSEED="7"), capture_output=True, text=True, check=True
    )
    assert made.stdout.strip() == KEY.digest()


@given(transform=st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_the_order_of_names_does_not_count_and_json_loses_nothing(transform):
    key = replace(KEY, transform=transform)
    turned = replace(KEY, transform=dict(reversed(transform.items())))
    assert turned.digest() == key.digest()
    back = json.loads(json.dumps(key.to_plain()))
    assert CodesKey(**{**back, "layers": tuple(back["layers"]), "pools": tuple(back["pools"])}).digest() == key.digest()


@given(one=PLAIN, other=PLAIN)
def test_values_that_differ_in_json_differ_in_the_digest(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    digests = [replace(KEY, transform={"x": value}).digest() for value in (one, other)]
    assert (digests[0] == digests[1]) == same


def test_tuples_count_as_lists():
    assert replace(KEY, transform={"mean": (1, 2)}).digest() == replace(KEY, transform={"mean": [1, 2]}).digest()


@pytest.mark.parametrize("value", [{1: "x"}, {"x": {2: 3}}, {"x": {1, 2}}, {"x": b"bytes"}, {"x": object()}])
def test_what_json_would_change_is_refused(value):
    with pytest.raises(TypeError):
        replace(KEY, transform=value).digest()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_refused(value):
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        replace(KEY, transform={"x": value}).digest()


@pytest.mark.parametrize(
    "changes", [{"dtype": "int8"}, {"layers": ()}, {"layers": ("a", "a")}, {"pools": ("avg",)}, {"dtype": "double"}]
)
def test_a_key_that_makes_no_sense_is_a_bug(changes):
    with pytest.raises(AssertionError):
        replace(KEY, **changes)
