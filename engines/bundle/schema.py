"""The schema of `gsx.json` as JSON Schema, for readers that are no Python: `python -m engines.bundle.schema` writes it.

The C++ runtime compiles it in, so that both accept the same manifests. What no schema can say (sizes in order, graphs
that must be there) stands in the validators of `manifest.py`, and once more in C++.
"""

from __future__ import annotations

import json
from pathlib import Path

from engines.bundle.manifest import Manifest

SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")


def manifest_schema() -> str:
    """The schema's text."""
    return json.dumps(Manifest.model_json_schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(manifest_schema(), encoding="utf-8")
