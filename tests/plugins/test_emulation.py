"""The emulation of the kernels detects the mistakes that it is meant to detect: one kernel with such mistakes."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from tests.plugins.emulation import emulated_library
from tests.plugins.test_kernels import ORDERS

# In the order of mistakes.cu; the thread orders in which a mistake shows.
MISTAKES = {
    "none": None,
    "a barrier left out": "a race in shared memory",
    "no fence before an atomic": "a race in global memory: a read of 4 bytes",
    "no fence after an atomic": "a race in global memory: a read of 4 bytes",
    "a block waits for one that may not have started": r"waits for what nobody writes; \d+ blocks have not started",
    "a warp operation in some lanes": r"a warp operation \(reduce_add\) that not all lanes reach",
}
ONLY_TOGETHER = {"a block waits for one that may not have started"}


@pytest.fixture(scope="module")
def mistakes() -> ctypes.CDLL:
    library = ctypes.CDLL(str(emulated_library("mistakes", [Path(__file__).parent / "emulation" / "mistakes.cu"])))
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistakes: ctypes.CDLL, mistake: str, order: str) -> None:
    expected = MISTAKES[mistake]
    if mistake in ONLY_TOGETHER and order != "together":
        expected = None
    right = ctypes.c_bool()
    for seed in range(5):
        mistakes.emulation_set_order(ORDERS[order], seed)
        status = mistakes.addUpWith(list(MISTAKES).index(mistake), ctypes.byref(right))
        text = mistakes.cudaGetErrorString(status).decode() if status else None
        if expected is None:
            assert text is None
            assert right.value
        else:
            assert text is not None
            assert re.search(expected, text), text
