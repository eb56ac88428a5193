"""Recipes as YAML text that `yaml_reader` reads back."""

from __future__ import annotations

from typing import Any

import yaml

from tlscale.recipe.yaml_reader import KINDS, TEXT_TAG


class _Dumper(yaml.SafeDumper):
    """Quote all text that the reader would not take for that text."""

    yaml_implicit_resolvers: dict[Any, Any] = {None: KINDS}  # noqa: RUF012 - PyYAML's way to configure it

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Block(dict[str, Any]):
    """Hold a mapping that is written with one key a line."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the line breaks of Unicode as they are, and reads them back as blanks; escaped they survive.
    return dumper.represent_scalar(TEXT_TAG, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    _Block, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=False)
)


def write_yaml(plain: dict[str, Any]) -> str:
    """Write plain values as text that reads back: two levels of one key a line, what is below in one line."""
    blocks = {key: _Block(value) if isinstance(value, dict) and value else value for key, value in plain.items()}
    text = yaml.dump(
        _Block(blocks), Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=110
    )
    return str(text)
