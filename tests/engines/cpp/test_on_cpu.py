"""The C++ runtime on a CPU, end to end on real bundles: tokens and counters are those of Python on the same graphs."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import gsx
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import draft_on
from gsx_engines.speculation.spec import parse_draft
from tests.gsx.command_line import edit_json

OLD = Path(__file__).parents[2] / "data" / "bundles-0.1.0"
PROMPTS = [[5, 60, 61, 7, 8, 9, 200, 11], [61, 7], [1, 30, 31, 32, 33]]
SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.97, seed=3, repetition_penalty=1.1)


@dataclass(frozen=True)
class Case:
    """A request. Args: draft: as `--draft`; None for plain decoding. keep: for all prompts, or one for each."""

    name: str
    keep: Mapping[str, Any] | Sequence[Mapping[str, Any]] = field(default_factory=dict)
    prompts: Sequence[list[int]] = tuple(PROMPTS)
    draft: str | None = None
    sampling: Sampling = GREEDY
    logprobs: int | None = None


GATED = [
    Case("one", prompts=PROMPTS[:1]),
    Case("a batch"),
    Case("sampled", sampling=SAMPLED, logprobs=2),
    Case("a budget", {"budget": 0.5}),
    Case("an early exit", draft="exit:2"),
    Case("an early exit, sampled", {"budget": 0.6}, draft="exit:2", sampling=SAMPLED),
    Case("a smaller budget", draft="budget:0.5"),
    Case("left-out branches", draft="layers:1.attn,2", prompts=PROMPTS[:1]),
]
# Bundles of tests/data, and what differs from rule to rule.
RULES = {
    "gateskip": GATED,
    "calm": [Case("exported"), Case("a threshold", {"exit_threshold": "0.3"})],
    "ffn-skip": [Case("exported"), Case("a budget", {"budget": 0.9})],
    "unified": [Case("exported"), Case("layers", [{"layers": "0,2"}, {"exit": 2}, {"speedup": 1.5}])],
}


def in_cpp(build: Path, bundle: Bundle, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """The answers of C++."""
    lines = []
    for case in cases:
        options = {"max_new_tokens": 20, "keep": case.keep, "sampling": _sampling(case.sampling), "stop_ids": None}
        options |= {"draft_length": 3} | ({} if case.logprobs is None else {"logprobs": case.logprobs})
        lines.append(json.dumps({"draft": case.draft, "prompts": case.prompts, "options": options}))
    done = subprocess.run(
        [build / "tests/gsx_on_cpu", bundle.directory],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _sampling(sampling: Sampling) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "seed", "repetition_penalty")
    return {name: value for name in names if (value := getattr(sampling, name)) is not None}


def in_python(bundle: Bundle, case: Case) -> Generation:
    """What Python generates on the same graphs, unchanged."""
    draft = parse_draft(case.draft) if case.draft else None
    runner: Runner = WholeRunner(PortableStage(bundle, threads=1))
    if case.draft and case.draft.startswith("exit"):
        runner = SplitRunner(*(PortableStage(bundle, graph, threads=1) for graph in ("draft", "verify")))
    keep = case.keep if isinstance(case.keep, Mapping) else None
    return generate(
        runner,
        case.prompts,
        max_new_tokens=20,
        keep=[_keep(one) for one in case.keep] if keep is None else _keep(keep),  # type: ignore[arg-type]
        sampling=case.sampling,
        draft=draft_on(runner, draft) if draft else None,
        draft_length=3,
        logprobs=case.logprobs,
    )


def _keep(given: Mapping[str, Any]) -> KeepSettings:
    return KeepSettings(**{key: float(value) if key == "exit_threshold" else value for key, value in given.items()})


def compare(build: Path, bundle: Bundle, cases: Sequence[Case]) -> None:
    """Tokens, reasons, counters and log-probabilities are the same."""
    for case, found in zip(cases, in_cpp(build, bundle, cases), strict=True):
        wanted = in_python(bundle, case)
        assert "error" not in found, (case.name, found)
        sequences = [{"tokens": one.tokens, "finish": one.finish} for one in wanted.sequences]
        assert [{key: one[key] for key in ("tokens", "finish")} for one in found["sequences"]] == sequences, case.name
        stats = wanted.stats
        counters = {name: getattr(stats, name) for name in ("decode_steps", "kept_rows", "gated_rows")}
        assert found["stats"] == counters | {"drafted": [*stats.drafted], "accepted": [*stats.accepted]}, case.name
        for one, own in zip(found["sequences"], wanted.sequences, strict=True):
            assert [token[0] for token in one["logprobs"]] == pytest.approx([token.logprob for token in own.logprobs])


@pytest.mark.parametrize("rule", RULES)
def test_rules(cpu_build: Path, rule: str) -> None:
    cases = RULES[rule]
    assert not any(case.draft for case in cases) or {case.draft for case in cases} > {"exit:2", "budget:0.5"}
    compare(cpu_build, open_bundle(OLD / rule), cases)


# Exports that other tests make too, with a request of each besides a plain one.
MADE: dict[str, tuple[dict[str, Any], Case]] = {
    "thresholds": ({}, Case("budgets in one batch", [{"budget": 1.0}, {"budget": 0.5}, {"budget": 0.7}])),
    "ranks": ({"select": "rank", "calibration": None}, Case("a batch", {"budget": 0.5})),
    "half precision": ({"precision": "fp16"}, Case("a batch")),
    "8 bits": ({"quantize": Quantize("int8", ("none",))}, Case("a batch")),
    "weights in 8 bits": ({"quantize": Quantize("int8-weights", ("none",))}, Case("a batch")),
    "a draft among few tokens": (
        {"draft": "exit:1", "draft_vocabulary": 40},
        Case("drafted, sampled", draft="exit:1", sampling=SAMPLED, logprobs=2),
    ),
    "copied K and V": ({"kv_policy": "copy", "budget": 0.5, "draft": "exit:1"}, Case("drafted", draft="exit:1")),
}


@pytest.mark.parametrize("name", MADE)
def test_forms(cpu_build: Path, make_tiny_bundle: Callable[..., Path], name: str) -> None:
    options, request = MADE[name]
    compare(cpu_build, open_bundle(make_tiny_bundle(**options)), [Case("one", prompts=PROMPTS[:1]), request])


def test_other_families(cpu_build: Path, family_bundle: Bundle) -> None:
    compare(cpu_build, family_bundle, [Case("plain", prompts=PROMPTS[:1]), Case("a batch", {"budget": 0.6})])


def test_it_is_what_gsx_generate_writes(cpu_build: Path, tmp_path: Path) -> None:
    """`gsx-run` on a CPU and `gsx generate`, whose graphs are lowered, give the same ids and the same report."""
    command = [cpu_build / "gsx-run", OLD / "gateskip", "--json", "--max-new-tokens", "20", "--threads", "1"]
    for options in ([], ["--budget", "0.5"], ["--temperature", "1", "--seed", "5"], ["--no-speculative"]):
        done = subprocess.run(
            [*command, *options], input="5 60 61 7", capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        names = {"--budget": "budget", "--temperature": "temperature", "--seed": "seed"}
        given = {names[key]: float(value) for key, value in zip(options[::2], options[1::2], strict=False)}
        if "seed" in given:
            given["seed"] = int(given["seed"])
        speculative = False if "--no-speculative" in options else None
        wanted = gsx.generate(
            OLD / "gateskip",
            ids=[5, 60, 61, 7],
            max_new_tokens=20,
            threads=1,
            speculative=speculative,
            **given,  # type: ignore[arg-type]
        )
        assert found["ids"] == list(wanted.ids), options
        assert (found["finish"], found["budget"], found["draft"]) == (wanted.finish, wanted.budget, wanted.draft)


def test_what_it_refuses(cpu_build: Path, make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Bundles whose graphs Python changes before they run on a CPU."""
    eight_bits = make_tiny_bundle(kv_cache="int8")
    bfloat = shutil.copytree(OLD / "gateskip", tmp_path / "bundle")
    edit_json(bfloat / "gsx.json", lambda manifest: manifest.update(precision="bf16"))
    for bundle, says in ((eight_bits, "K and V in 8 bits do not run here"), (bfloat, "no bfloat16 products on a CPU")):
        (found,) = in_cpp(cpu_build, open_bundle(bundle), [Case("refused")])
        assert says in found["error"]
        assert "gsx generate" in found["error"]


def test_a_damaged_bundle(cpu_build: Path, tmp_path: Path) -> None:
    """Whatever is wrong with the files is a message: ONNX Runtime's own refusals too."""
    for file, content, says in (
        ("weights.bin", b"", "weights.bin does not match"),
        ("model.onnx", b"no model", "model.onnx does not match"),
    ):
        bundle = shutil.copytree(OLD / "gateskip", tmp_path / file)
        (bundle / file).write_bytes(content)
        done = subprocess.run(
            [cpu_build / "gsx-run", bundle], input="1 2", capture_output=True, text=True, check=False, timeout=60
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert says in done.stderr
    done = subprocess.run(
        [cpu_build / "gsx-run", OLD / "gateskip", "--backend", "tensorrt"],
        input="1",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--backend\n  expected onnxruntime, found 'tensorrt'" in done.stderr
