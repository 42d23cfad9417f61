"""A keep rule in words, as export and inspect print it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def policy_name(name: str, parameters: Mapping[str, Any]) -> str:
    """A policy's name with its single-valued parameters: `ffn-skip (stride 2)`."""
    single = [f"{key} {value}" for key, value in parameters.items() if not isinstance(value, list)]
    return f"{name} ({', '.join(single)})" if single else name


def policy_line(policy: Mapping[str, Any] | None) -> str:
    """The policy of a bundle's manifest in one line: its name, what it skips and what it reads."""
    if policy is None:
        return "none: a dense model"
    reads = ", ".join(read["name"] for read in policy["inputs"])
    name = policy_name(policy["name"], policy["parameters"])
    return f"{name}, skips {' and '.join(policy['branches'])}, reads {reads}"
