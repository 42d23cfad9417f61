"""The C++ runtime's TensorRT side, from `openModel` on, over a stand-in for TensorRT and CUDA: see
engines/cpp/tests/standin/standin.h for what it checks, and what it cannot check.

Without TensorRT's headers (GSX_TEST_TENSORRT_ROOTS) it cannot be compiled, and the tests are skipped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engines.cpp.conftest import NEEDS, ROOTS, StandIn, headers_of, run
from tests.engines.cpp.toy_bundles import Change, version_of, write_bundle

PLUGINS = 'extern "C" void* const* getCreators(int& count) { static void* one = &one; count = 1; return &one; }'


@pytest.mark.parametrize("root", ROOTS, ids=str)
def test_it_repeats_the_vectors(root: Path, stand_ins: list[StandIn]) -> None:
    """Tokens, counters, errors, and every byte that an engine finds at the addresses that it was given."""
    if headers_of(root) is None:
        pytest.skip(NEEDS)
    one = next(one for one in stand_ins if one.version == version_of(headers_of(root) or root))
    code, says = one.check("vectors", one.vectors, one.vectors.parent)
    assert code == 0, says
    assert " 0 different" in says


@pytest.mark.parametrize("setting", ["graphs=0", "reuse=1"])
def test_it_repeats_them_otherwise(stand_in: StandIn, setting: str) -> None:
    """Without CUDA graphs; with device memory that comes back at the same address."""
    code, says = stand_in.check("vectors", stand_in.vectors, stand_in.vectors.parent, setting)
    assert code == 0, says


CASES = [f"{case}, stop ids" for case in ("gated, plain", "copy, exit:3", "rank, counted by the host, plain")]


@pytest.mark.parametrize("case", [*CASES, "steps, plain, few"])
def test_it_goes_on_after_every_failure(stand_in: StandIn, case: str) -> None:
    """Each call of CUDA and TensorRT fails once: an error of gsx, nothing lost, and the next generation is right."""
    code, says = stand_in.check("failures", stand_in.vectors, stand_in.vectors.parent, case)
    assert code == 0, says


@pytest.mark.parametrize("case", ["gated, plain, stop ids", "steps, plain, few"])
def test_a_lost_gpu(stand_in: StandIn, case: str) -> None:
    """From each call on in turn nothing works: every generation says so, and what the model has is freed."""
    code, says = stand_in.check("deaths", stand_in.vectors, stand_in.vectors.parent, case)
    assert code == 0, says


def left_out(engine: dict[str, Any]) -> None:
    """Engines for steps that were built with another TensorRT."""
    if engine["kv_layout"] == "step":
        engine["tensorrt_version"] = "9.9.9.9"


@pytest.mark.parametrize(
    ("record", "damage", "reason"),
    [
        (left_out, False, "tensorrt_version differs\n  expected 9.9.9.9"),
        (lambda entry: None, True, "is incomplete"),
        (lambda entry: None, False, None),
    ],
    ids=["another version", "a damaged file", "all is well"],
)
def test_steps_that_cannot_be_used_are_left_out_with_a_warning(
    stand_in: StandIn, tmp_path: Path, record: Change, damage: bool, reason: str | None
) -> None:
    """They are only faster: the others write the same text. As `test_engine_loading.py` has it for Python."""
    bundle = tmp_path / "bundle"
    write_bundle(bundle, stand_in.manifests["steps"], stand_in.version, record=record)
    if damage:
        for name, entry in stand_in.manifests["steps"]["engines"].items():
            for graph in entry["graphs"].values() if entry["kv_layout"] == "step" else ():
                (bundle / "engines" / name / graph["file"]).write_bytes(b"short")
    code, says = stand_in.check("generate", bundle)
    *warnings, tokens, _ = says.splitlines()
    _, want = stand_in.check("generate", stand_in.vectors.parent / "steps")
    assert (code, tokens) == (0, want.splitlines()[0])
    assert bool(warnings) == (reason is not None)
    if reason is not None:
        assert reason in says
        assert warnings[0].startswith("warning: steps run on the engines for all calls, which are slower: ")
        assert re.search(r"--context \d+ --batch \d+ --step \d+", says)


def test_gsx_run(stand_in: StandIn) -> None:
    """The program itself, with the bundle's draft."""
    want = next(
        one for one in stand_in.cases if one.get("name") == "gated, exit:3, sampled" and len(one["prompts"]) == 1
    )
    options = ["--max-new-tokens", "24", "--draft-length", "3", "--temperature", "0.8", "--top-k", "12"]
    program = stand_in.build / f"gsx-run_{stand_in.number}"
    command = [str(program), str(stand_in.vectors.parent / "gated"), *options, "--top-p", "0.9", "--seed", "7"]
    prompt = " ".join(map(str, want["prompts"][0]))
    found = json.loads(run([*command, "--json"], input=prompt))
    assert (found["ids"], found["finish"]) == tuple(want["sequences"][0].values())
    assert found["stats"]["accepted_by_place"] == want["stats"]["accepted"]
    assert [int(line) for line in run(command, input=prompt).split()] == found["ids"]


def narrower(engine: dict[str, Any]) -> None:
    """An engine whose first profile takes fewer tokens than its record says."""
    engine["manifest"]["engines"]["toy"]["profiles"][0]["tokens"] = [1, 1, 2]


def fewer(engine: dict[str, Any]) -> None:
    """An engine with one profile."""
    del engine["manifest"]["engines"]["toy"]["profiles"][1:]


def more(engine: dict[str, Any]) -> None:
    """An engine with an input that is not in its record."""
    unknown = {"name": "unknown", "type": "float", "shape": [1]}
    for graph in engine["manifest"]["engines"]["toy"]["graphs"].values():
        graph["inputs"].append(unknown)


def no_present(entry: dict[str, Any]) -> None:
    """A record that has no K and V among the outputs."""
    for graph in entry["graphs"].values():
        graph["outputs"] = [one for one in graph["outputs"] if not one["name"].startswith("present.")]


def version(text: str) -> Change:
    """A record of another TensorRT."""
    return lambda entry: entry.update(tensorrt_version=text)


@dataclass(frozen=True)
class Row:
    """What is wrong, and the message about it."""

    says: str
    settings: tuple[str, ...] = ()
    record: Change = lambda entry: None
    plan: Change = field(default=lambda plan: None)
    model: str = "dense"


ROWS = {
    "no GPU": Row("no NVIDIA GPU can be used\n  expected a GPU and its driver, found no CUDA-capable", ("devices=0",)),
    "no driver": Row("found CUDA driver version is insufficient", ("failing=cudaGetDeviceCount",)),
    "no properties": Row("asking for the GPU's properties", ("failing=cudaGetDeviceProperties",)),
    "built with another TensorRT": Row("tensorrt_version differs", record=version("9.9.9.9")),
    "no runtime": Row("does not start\n  found stand-in: made to fail", ("failing=createInferRuntime",)),
    "no engine": Row("cannot load the engine\n  found stand-in: the magic tag", plan=lambda plan: plan.clear()),
    "refused": Row("cannot load the engine\n  found stand-in: made", ("failing=deserializeCudaEngine",)),
    "plugins that nobody loads": Row("found stand-in: no plugin", plan=lambda plan: plan.update(plugins=True)),
    "no stream": Row("CUDA failed while making a stream", ("failing=cudaStreamCreate",)),
    "no context": Row("not enough memory for an execution context", ("failing=createExecutionContext",)),
    "a profile less": Row("the engine has no profile 1", plan=fewer),
    "a narrower profile": Row(
        "does not accept input_ids with shape [1, 6]\n  found stand-in: input_ids: axis 1 is 6, profile 0 takes 1 to 2",
        plan=narrower,
    ),
    "an address": Row("does not accept the memory for attention_mask", ("failing=setTensorAddress",)),
    "an address on the host": Row(
        "does not accept the memory for", ("failing=setTensorAddress",), model="rank, counted by the host"
    ),
    "an input more": Row("could not run the engine\n  found stand-in: unknown: has no address", plan=more),
    "no K and V": Row("found stand-in: present.0.key: has no address", record=no_present),
    "no run": Row("could not run the engine\n  found stand-in: made to fail", ("failing=enqueueV3",)),
    "no pinned memory": Row("CUDA failed while pinning", ("failing=cudaMallocHost",)),
    "no memory": Row("bytes\n  found out of memory", ("failing=cudaMalloc",)),
    "no clearing": Row("CUDA failed while clearing memory", ("failing=cudaMemsetAsync",)),
    "no copy": Row("CUDA failed while copying attention_mask to the GPU", ("failing=cudaMemcpyAsync",)),
    "no end": Row("CUDA failed while choosing a profile", ("failing=cudaStreamSynchronize",)),
    "no recording": Row("CUDA failed while recording a CUDA graph", ("failing=cudaStreamBeginCapture",)),
    "no graph": Row("CUDA failed while making a CUDA graph", ("failing=cudaGraphInstantiate",)),
    "no launch": Row("CUDA failed while replaying a CUDA graph", ("failing=cudaGraphLaunch",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_it_refuses(name: str, stand_in: StandIn, tmp_path: Path) -> None:
    row = ROWS[name]
    write_bundle(tmp_path / "bundle", stand_in.manifests[row.model], stand_in.version, record=row.record, plan=row.plan)
    code, says = stand_in.check("generate", tmp_path / "bundle", *row.settings)
    assert code == 1, says
    assert row.says in says


def test_a_library_of_another_version(stand_in: StandIn, tmp_path: Path) -> None:
    """None of its objects is called, since its classes have another layout."""
    major, rest = stand_in.version.split(".", 1)
    write_bundle(tmp_path / "bundle", stand_in.manifests["dense"], stand_in.version, record=version(f"99.{rest}"))
    code, says = stand_in.check("generate", tmp_path / "bundle", "major=99", "failing=createInferRuntime")
    assert code == 1
    assert (
        f"is not the one that gsx was built for\n  expected major version {major}, that of the headers, found 99."
        in says
    )


@pytest.fixture
def generate(stand_in: StandIn, tmp_path: Path) -> Callable[..., str]:
    """Generate with a separate bundle, and check the tokens. Returns: the number of CUDA graph launches."""

    def one(*settings: str, **changes: Change) -> str:
        write_bundle(tmp_path / "bundle", stand_in.manifests["gated"], stand_in.version, **changes)
        code, says = stand_in.check("generate", tmp_path / "bundle", *settings)
        want = next(
            one for one in stand_in.cases if one.get("name") == "gated, plain, greedy" and len(one["prompts"]) == 1
        )
        assert code == 0, says
        tokens, launches = says.splitlines()
        assert json.loads(tokens) == want["sequences"][0]["tokens"]
        return launches

    return one


def test_what_cannot_be_recorded_runs(generate: Callable[..., str]) -> None:
    assert generate("records=0") == "0 launches of CUDA graphs"


def test_a_plugin_library(generate: Callable[..., str], tmp_path: Path) -> None:
    """It is loaded, and an engine whose rows only the GPU counts is never recorded."""
    library = tmp_path / "plugins.so"
    run(["g++", "-shared", "-fPIC", "-xc++", "-", "-o", str(library)], input=PLUGINS)
    used = {"sha256": hashlib.sha256(library.read_bytes()).hexdigest(), "source_hash": "0" * 64}

    def record(entry: dict[str, Any]) -> None:
        entry["plugins"] = used
        for graph in entry["graphs"].values():
            graph["forms"] = {"ThresholdGather": "plugin"}

    changes: dict[str, Change] = {"record": record, "plan": lambda plan: plan.update(plugins=True)}
    assert generate(f"plugins={library}", **changes) == "0 launches of CUDA graphs"


def test_a_library_without_plugins(stand_in: StandIn, tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    library.write_bytes(b"no library")
    used = {"sha256": hashlib.sha256(b"no library").hexdigest(), "source_hash": "0" * 64}
    bundle = tmp_path / "bundle"
    write_bundle(bundle, stand_in.manifests["dense"], stand_in.version, record=lambda entry: entry.update(plugins=used))
    code, says = stand_in.check("generate", bundle, f"plugins={library}")
    assert code == 1
    assert f"the plugin library {library} does not load\n  found stand-in: {library}: file too short" in says
