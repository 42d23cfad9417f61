"""Checking that there is enough memory for a build before it begins."""

from __future__ import annotations

from pathlib import Path

from gsx_engines.errors import EngineError

# Peak memory of a build, measured with TensorRT-RTX 1.7.1 (benchmarks/RESULTS.md): multiples of the weights, once and
# for every profile, since each copies the weights; and bytes for everything else.
_BASE, _PROFILE, _SLACK = 1.5, 2, 1 << 30
# Files of a container's control group, in versions 2 and 1: its folder, memory limit, memory use, and the reclaimable
# part of the use.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def check_memory(weight_bytes: int, profiles: int) -> None:
    """Refuse to begin a build for which there is not enough memory.

    Args:
        weight_bytes: bytes of weights of the largest graph.
        profiles: number of profiles.
    Raises:
        EngineError: less memory is available than builds of this size have needed.
    """
    needed = int((_BASE + _PROFILE * profiles) * weight_bytes) + _SLACK
    free = available_memory()
    if free is not None and free < needed:
        several = "profile" if profiles == 1 else "profiles"
        raise EngineError(
            "not enough memory to build an engine",
            expected=f"{needed / 1e9:.1f} GB available, for {weight_bytes / 1e9:.1f} GB of weights and "
            f"{profiles} {several}",
            found=f"{free / 1e9:.1f} GB",
            todo="close other programs, give fewer --profile, or build on a machine with more memory",
        )


def available_memory() -> int | None:
    """Bytes of available memory, including caches, on the machine and in the container; None if it is not known."""
    found = [free for free in (_of_machine(), *(_of_group(*group) for group in _GROUPS)) if free is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    kilobytes = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    return None if kilobytes is None else kilobytes * 1024


def _of_group(folder: Path, limit: str, use: str, cache: str) -> int | None:
    """Available memory of a control group; None if there is no such group, or if it has no limit ("max")."""
    try:
        most, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit, use))
    except (OSError, ValueError):
        return None
    return max(most - used + _numbers(folder / "memory.stat").get(cache, 0), 0)


def _numbers(path: Path) -> dict[str, int]:
    """Read a file whose lines begin with a name and a number."""
    try:
        words = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in words if len(line) >= 2}
    except (OSError, ValueError):
        return {}
