"""How many threads ONNX Runtime gets if a server runs on the same processors.

By default ONNX Runtime uses one thread for every core, and these wait for each other by spinning. A server that has to
send every token then finds no free processor: with both of two cores in use, sending took 2 ms instead of 0.3, and
steps were slower too, since a thread that yields to the server makes the others wait (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")


def threads_beside_server(cpus: Path = CPUS) -> int | None:
    """A number of threads that leaves a processor to the server: one per core, or one fewer if cores have no second
    hardware thread.

    Args:
        cpus: where Linux describes its processors.
    Returns: None, for ONNX Runtime's own choice, on systems that do not report which processors may be used.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    usable = os.sched_getaffinity(0)
    cores = {_core(cpus, number) for number in usable}
    return max(1, min(len(cores), len(usable) - 1))


def _core(cpus: Path, number: int) -> str:
    """A name for the core of a processor: the list of all processors on this core."""
    try:
        return (cpus / f"cpu{number}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)
