"""The errors that gsx shows to people: the base of all of them, and the kinds that every floor raises.

Each error has four parts: the thing, what was expected, what was found, and what to do. The command line prints them
without a traceback and exits with `exit_code`; library users catch `GsxError`. A kind is defined once, on the lowest
floor that raises it: see also `gsx_engines.errors` and `gsx_exporter.errors`.
"""

from __future__ import annotations


class GsxError(Exception):
    """Something that the user can mend went wrong.

    Args:
        what: the thing and what is wrong with it, e.g. "bundle out: model.onnx does not match gsx.json".
        expected: what should have been there.
        found: what was there instead.
        todo: the way out, e.g. a command to run.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, expected: str | None = None, found: str | None = None, todo: str | None = None
    ) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.todo = todo
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The text of the error, over at most three lines."""
        lines = [self.what]
        facts = []
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if self.found is not None:
            facts.append(f"found {self.found}")
        if facts:
            lines.append("  " + ", ".join(facts))
        if self.todo is not None:
            lines.append(f"  {self.todo}")
        return "\n".join(lines)


class UsageError(GsxError):
    """An option, argument or combination of them that cannot be used (exit code 2)."""

    exit_code = 2


class PluginLibraryError(GsxError):
    """The native library of kernels and plugins cannot be built, found or loaded, or one of its kernels fails."""
