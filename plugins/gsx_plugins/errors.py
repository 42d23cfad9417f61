"""The error of this floor. The floors above turn it into their own (it has the same four parts)."""

from __future__ import annotations


class PluginError(Exception):
    """The plugin library cannot be built, found or used.

    Args: the thing and what is wrong with it; what should have been there; what was; the way out.
    """

    def __init__(
        self, what: str, *, expected: str | None = None, found: str | None = None, todo: str | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.expected, self.found, self.todo = what, expected, found, todo

    def __str__(self) -> str:
        facts = [f"expected {self.expected}"] if self.expected else []
        facts += [f"found {self.found}"] if self.found else []
        lines = [self.what, *(["  " + ", ".join(facts)] if facts else []), *([f"  {self.todo}"] if self.todo else [])]
        return "\n".join(lines)


class ArchitectureError(PluginError):
    """A GPU architecture that the library cannot be built for."""
