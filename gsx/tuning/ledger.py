"""What earlier runs of `gsx tune` measured, in a file of the work folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from gsx_plugins.files import disk_error, writing_file

FILE = "measurements.json"
_VERSION = 1

Kind = Literal["quality", "time", "export", "export of a kind", "sets"]


class Ledger:
    """Measurements by what they depend on. Each is on disk as soon as it is there.

    Args: folder: where the file is; one that cannot be read counts as empty.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._values: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            found = json.loads(self._path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and found.get("version") == _VERSION:
                self._values = found["values"]

    def __len__(self) -> int:
        return sum(key.startswith(("quality", "time")) for key in self._values)

    def get(self, kind: Kind, *parts: object) -> Any:
        """A measurement; None if there is none. Args: parts: what it depends on."""
        return self._values.get(_key(kind, parts))

    def put(self, value: Any, kind: Kind, *parts: object) -> None:
        """Keep a measurement, of JSON values.

        Raises:
            GsxError: the file cannot be written.
        """
        self._values[_key(kind, parts)] = value
        text = json.dumps({"version": _VERSION, "values": self._values}, indent=1) + "\n"
        try:
            with writing_file(self._path) as work:
                work.write_text(text, encoding="utf-8")
        except OSError as error:
            raise disk_error(self._path, error, todo="free some space, or give another --work") from error


def _key(kind: Kind, parts: tuple[object, ...]) -> str:
    return " | ".join((kind, *map(str, parts)))
