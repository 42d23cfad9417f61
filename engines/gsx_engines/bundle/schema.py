"""The schema of `gsx.json` as JSON Schema, for readers in other languages. Write it with
`python -m gsx_engines.bundle.schema`.

The C++ runtime compiles it in, so both accept the same manifests. Rules that a schema cannot express (sizes in order,
graphs that must be present) are in the validators of the sections, and again in C++.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gsx_engines.bundle.manifest import Manifest

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")


def manifest_schema() -> str:
    """The text of the schema, without titles and descriptions."""
    schema = Manifest.model_json_schema()
    _name_policies(schema)
    return json.dumps(_rules(schema), indent=1) + "\n"


def _name_policies(schema: dict[str, Any]) -> None:
    """Say which section of a policy belongs to which name: Pydantic leaves that out where a function decides.

    A name that is not in the mapping belongs to the one section that the mapping does not reach.
    """
    (union,) = [one for one in schema["properties"]["policy"]["anyOf"] if "oneOf" in one]
    names = {ref["$ref"]: schema["$defs"][ref["$ref"].split("/")[-1]]["properties"]["name"] for ref in union["oneOf"]}
    mapping = {name["const"]: ref for ref, name in names.items() if "const" in name}
    union["discriminator"] = {"mapping": mapping, "propertyName": "name"}


def _rules(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_rules(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # A property may have such a name too; its value is then a schema, not a text.
    texts = [key for key in ("title", "description") if isinstance(schema.get(key), str)]
    return {key: _rules(value) for key, value in schema.items() if key not in texts}


if __name__ == "__main__":
    SCHEMA_FILE.write_text(manifest_schema(), encoding="utf-8")
