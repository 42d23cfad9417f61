"""The machine code of every architecture in the library: what a kernel's speed depends on but its results do not show.

The disassembler comes with the CUDA toolkit, or from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from gsx_plugins.build import find_nvcc
from gsx_plugins.errors import PluginLibraryError

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
REGISTERS = 65_536  # of a multiprocessor, on all of them
REGISTER_STEP = 8  # in which a thread gets them

# Threads of a block, and blocks that a multiprocessor must be able to hold.
BLOCKS = {
    "gatherRows": (256, 5),
    "addToCopy": (256, 5),
    "addInPlace": (256, 5),
    "mapRows": (256, 4),
    "selectInOneBlock": (1024, 1),
    "countDigits": (256, 4),
    "writeBest": (256, 4),
    "selectInTiles": (256, 4),
    "skipProduct": (256, 1),
    "attendStep": (128, 2),
}
# A product of one row needs fewer registers: two blocks, so that one loads while the other waits.
_ONE_ROW = re.compile(r"skipProductI\w+?Li\d+ELi1ELi\dEE")
# Of the same kernels with wide loads, by the start of the mangled name: what a thread has in flight, of each matrix.
# (Scales ..E2: INT8 in blocks, which takes half as many columns of two matrices.)
_PRODUCTS = {
    r"skipProductI\w+?ELi16ELi1ELi1EE": ("LDG.E.128", 8),
    r"skipProductI\w+?ELi16ELi1ELi2EE": ("LDG.E.128", 16),
    r"skipProductI\w+?E2ELi8ELi1ELi2EE": ("LDG.E.64", 16),
}
# Of the kernels that move 16 bytes at a time: loads and stores of a thread, by the kernel's start in its mangled name.
# (Gates: Lb0, a row as wide as the others; Lb1, one element.)
VECTORS = {
    r"gatherRowsILi16E": (4, 4),
    r"addToCopyI\w+?Li16ELb0E": (6, 2),
    r"addToCopyI\w+?Li16ELb1E": (4, 2),
    r"addInPlaceI\w+?Li16ELb0E": (6, 2),
    r"addInPlaceI\w+?Li16ELb1E": (4, 2),
}
# Attention of a step, by the rows of a block: columns of K and of V that a thread has in flight.
_ATTENTION = {r"attendStepI\w+?ELi4EE": 16, r"attendStepI\w+?ELi8EE": 8}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", re.MULTILINE)
_ARITHMETIC = re.compile(r"FADD|FMUL|F2F")  # not HFMA2, which also loads constants


class Disassembler:
    """cuobjdump, wherever it is installed."""

    def __init__(self, library: Path) -> None:
        nvidia = find_spec("nvidia")
        packages = (nvidia.submodule_search_locations if nvidia else None) or ()
        places = [Path(package) / "cu13" / "bin" for package in packages]
        with suppress(PluginLibraryError):
            places.append(find_nvcc()[0].resolve().parent)
        self._path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
        self._library = library
        if any(shutil.which(name, path=self._path) is None for name in ("cuobjdump", "nvdisasm")):
            pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")

    def read(self, architecture: str, *options: str) -> list[tuple[str, str]]:
        """(mangled name, its description) of every kernel."""
        program = shutil.which("cuobjdump", path=self._path)
        command = [str(program), "-arch", architecture, *options, str(self._library)]
        environment = {**os.environ, "PATH": self._path}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        parts = re.split(r"Function\s*:?\s+(\w+):?\n", done.stdout)[1:]
        return list(zip(parts[::2], parts[1::2], strict=True))


@pytest.fixture(scope="module")
def disassembler(plugin_library: Path) -> Disassembler:
    return Disassembler(plugin_library)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers(disassembler: Disassembler, architecture: str) -> None:
    """No stack, nothing spilled, and registers for as many threads as the kernel wants at a time."""
    met = set()
    for name, text in disassembler.read(architecture, "-res-usage"):
        kernel = next(kernel for kernel in BLOCKS if kernel in name)
        met.add(kernel)
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        assert used["STACK"] == used["LOCAL"] == 0, f"{name}: {text.strip()}"
        threads, blocks = BLOCKS[kernel]
        if kernel == "selectInOneBlock":  # its threads are a template argument
            threads = int(re.findall(r"ILi(\d+)E", name)[0])
        if _ONE_ROW.search(name):
            blocks = 2
        given = -(-used["REG"] // REGISTER_STEP) * REGISTER_STEP
        assert given * threads * blocks <= REGISTERS, f"{name}: {used['REG']} registers"
    assert met == set(BLOCKS)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])  # a family each; it takes seconds
def test_loads_in_flight(disassembler: Disassembler, architecture: str) -> None:
    """Rows move 16 bytes at a time, and a thread's loads have all begun before it works on the first one."""
    named = {
        name: counts
        for name, _ in disassembler.read(architecture, "-res-usage")
        for pattern, counts in VECTORS.items()
        if re.search(pattern, name)
    }
    assert len(named) == 1 + 4 * 3
    for name, text in disassembler.read(architecture, "-sass", "-fun", ",".join(named)):
        operations = _INSTRUCTION.findall(text)
        loads = [at for at, operation in enumerate(operations) if operation.startswith("LDG.E.128")]
        stores = [at for at, operation in enumerate(operations) if operation.startswith("STG.E.128")]
        assert (len(loads), len(stores)) == named.pop(name), name
        work = [at for at, operation in enumerate(operations) if _ARITHMETIC.match(operation)]
        assert loads[-1] < min([*work, *stores]), f"{name}: a load waits for what another one brought"
        assert sum(operation.startswith("STG") for operation in operations) == len(stores), name
    assert not named


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_products_have_their_loads_in_flight(disassembler: Disassembler, architecture: str) -> None:
    """Of a step's product with one row: as many rows of each matrix as a thread can hold, before it adds anything; and
    nothing is read byte by byte."""
    named = {
        name: wanted
        for name, _ in disassembler.read(architecture, "-res-usage")
        for pattern, wanted in _PRODUCTS.items()
        if re.search(pattern, name)
    }
    # Three types of rows; of 16 bits, with weights in INT8 (two kinds of scales) and E4M3 too; one matrix or two.
    assert len(named) == 2 * (3 + 2 * 3)
    for name, text in disassembler.read(architecture, "-sass", "-fun", ",".join(named)):
        operations, (load, count) = _INSTRUCTION.findall(text), named.pop(name)
        first_sum = operations.index("FFMA")
        assert sum(operation.startswith(load) for operation in operations[:first_sum]) >= count, name
        assert not [operation for operation in operations if operation.startswith(("LDG.E.U8", "LDG.E.S8"))], name
    assert not named


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_attention_has_its_loads_in_flight(disassembler: Disassembler, architecture: str) -> None:
    """A tile's columns, of K and V, before anything is exchanged between threads to score them; 16 bytes at a time."""
    named = {
        name: wanted
        for name, _ in disassembler.read(architecture, "-res-usage")
        for pattern, wanted in _ATTENTION.items()
        if re.search(pattern, name)
    }
    assert len(named) == 2 * 2 * 3  # types, rows, widths of heads
    for name, text in disassembler.read(architecture, "-sass", "-fun", ",".join(named)):
        operations = _INSTRUCTION.findall(text)
        mask = max(
            at for at, operation in enumerate(operations) if operation.startswith("LDG.E.U8")
        )  # of older columns
        scores = next(at for at in range(mask, len(operations)) if operations[at].startswith("SHFL"))
        loads = [operation for operation in operations[mask + 1 : scores] if operation.startswith("LDG")]
        assert loads == ["LDG.E.128"] * named.pop(name), f"{name}: {loads}"
    assert not named
