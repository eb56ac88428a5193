"""The recipe as a JSON Schema, by which an editor completes keys, shows what they are, and marks mistakes.

Promise: it refuses no recipe that is right. What only the recipe's own check can tell (options that have no effect with
others) it lets pass.
"""

from __future__ import annotations

from typing import Any

from tlscale.recipe.retired import RETIRED, RetiredKey
from tlscale.recipe.schema import Recipe
from tlscale.recipe.schema_keys import all_keys

_EXTENDS = {"type": "string", "description": "Another recipe to start from, in the same folder or below it."}


def editor_schema() -> dict[str, Any]:
    """Return the schema of recipe files, which may extend others and then need not be whole."""
    schema = Recipe.model_json_schema(mode="validation")
    sections = schema["$defs"]
    required = {"": schema.pop("required")}
    for name, section in (("data", "DataSection"), ("backbone", "BackboneSection")):
        required[name] = sections[section].pop("required")
    whole = {name: {"required": keys} for name, keys in required.items() if name}
    for row in RETIRED:
        if isinstance(row, RetiredKey):
            _add_retired(row, sections)
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "if": {"required": ["extends"]},
        "else": {"required": required[""], "properties": whole},
    }


def _add_retired(row: RetiredKey, sections: dict[str, Any]) -> None:
    """Allow a key that is ignored with the value that it had by default."""
    above, _, name = row.key.rpartition(".")
    section = all_keys()[above].section
    assert section is not None, "retired keys were in sections"
    known = {"const": row.default, "deprecated": True, "description": row.remedy}
    sections[section.__name__]["properties"][name] = known
