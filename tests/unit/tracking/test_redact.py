"""What goes to a tracker holds no secret, and all else as it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.tracking.redact import reason, redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pass@host.example/a?b=c", "https://host.example/a?b=c"),
        ("see s3://AKIA:SECRET@bucket/x and ftp://me@h/", "see s3://bucket/x and ftp://h/"),
        ("https://h/x?sig=abc%3D&page=2", "https://h/x?sig=[redacted]&page=2"),
        ("https://h/x?page=2&X-Amz-Security-Token=abc", "https://h/x?page=2&X-Amz-Security-Token=[redacted]"),
        ("trial 3 api_key=abc&x", "trial 3 api_key=[redacted]&x"),
        ("HUB_TOKEN=abc", "HUB_TOKEN=[redacted]"),
        ("monkey=3 cls_token", "monkey=3 cls_token"),
        ("someone@example.org", "someone@example.org"),
        (r"layer[12]\..*", r"layer[12]\..*"),
    ],
)
def test_strings(text, shown):
    assert redact(text) == shown
    assert redact({"a": [text, {"b": text}]}) == {"a": [shown, {"b": shown}]}


def test_secret_keys_lose_their_text_but_numbers_and_rules_stay():
    config = {"api_key": "k", "hub_token": "t", "db": {"Password": "p"}, "freeze": [{"cls_token": True}], "num": 3}
    shown = {
        "api_key": "[redacted]",
        "hub_token": "[redacted]",
        "db": {"Password": "[redacted]"},
        "freeze": [{"cls_token": True}],
        "num": 3,
    }
    assert redact(config) == shown


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc .*/", max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc", max_size=4), inner),
)


@given(plain)
def test_values_without_secrets_are_unchanged(value):
    assert redact(value) == value


@given(st.text("abcdefgh0123/:", min_size=8, max_size=20))
def test_user_info_never_survives(password):
    password = password.replace("/", "_")
    assert password not in redact(f"https://u:{password}@host.example/x")


def test_a_reason_is_one_short_line():
    assert reason(ValueError("at https://u:p@h/x\nmore")) == "ValueError: at https://h/x"
    assert reason(KeyboardInterrupt()) == "KeyboardInterrupt"  # type: ignore[arg-type]
    assert len(reason(ValueError("x" * 1000))) == 200
