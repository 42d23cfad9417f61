"""How many threads ONNX Runtime gets where a server works on the same processors.

ONNX Runtime takes one for every core, and they wait for each other by spinning. A server that has to send every token
then finds no processor free: with both of two cores taken, sending took 2 ms in place of 0.3, and steps were slower
too, since a thread that gives way to the server makes the others wait (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def threads_beside_server(cpus: Path = CPUS) -> int | None:
    """Threads that leave the server a processor: one a core, and one fewer where cores have no second processor.

    Args: cpus: where Linux tells of its processors.
    Returns: None, for ONNX Runtime's own choice, on systems that do not say which processors may be used.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = os.sched_getaffinity(0)
    cores = {_core(cpus, number) for number in usable}
    return max(1, min(len(cores), len(usable) - 1))


def _core(cpus: Path, number: int) -> str:
    """Names the core of a processor, by all of that core's."""
    try:
        return (cpus / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)
