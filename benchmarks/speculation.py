"""Self-speculative decoding: that it changes no token, what it gains, where the time goes, what it keeps in memory.

    python -m benchmarks.speculation equal  --work DIR    no token differs: 100 prompts, drafts, precisions, batches
    python -m benchmarks.speculation speed  --work DIR    each exit against plain decoding, and the account of its time
    python -m benchmarks.speculation gates  --work DIR    the same at lower budgets: do the speeds multiply?
    python -m benchmarks.speculation memory --work DIR    a speculative process's memory over a plain one's
    python -m benchmarks.speculation peer   --work DIR    Hugging Face's assistant_early_exit beside it, in PyTorch

The example model (or --model) continues held-out files of the standard library. Plain and speculative runs take turns
prompt by prompt in one process; figures are sums over all prompts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import Keep
from gsx_engines.generation import GenerationStats, generate
from gsx_engines.runners.select import open_runner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import open_draft
from gsx_engines.speculation.spec import parse_draft

PROMPT_TOKENS, NEW_TOKENS = 128, 128
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=1)
# What `peer` and `memory` run in a process of its own.
CHILD = "child"


def line(*cells: object) -> None:
    """A line of a table in Markdown."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def heading(*names: str) -> None:
    """The first two lines of a table."""
    line(*names)
    print("|---" * len(names) + "|")


def held_out_prompts(model: Path, count: int, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Windows of held-out library code, spread over its files."""
    from gsx_exporter.checkpoint import open_checkpoint
    from gsx_exporter.text import load_tokenizer
    from gsx_exporter.training.corpus import read_corpus, split

    tokenizer = load_tokenizer(open_checkpoint(model))
    prefix = tokenizer.encode("").ids
    rows = []
    for document in split(read_corpus())["heldout"]:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        size = tokens - len(prefix)
        rows += [prefix + ids[at : at + size] for at in range(0, len(ids) - size, 4 * size)]
    return [rows[number] for number in np.linspace(0, len(rows) - 1, count).astype(int)]


def exported(work: Path, model: Path, **options: object) -> Bundle:
    """A bundle of the model with these options; made once."""
    from gsx.workflows.export import export

    words = [f"{key}={getattr(value, 'scheme', value)}" for key, value in options.items()]
    name = "-".join(words).replace(":", "_") or "plain"
    path = work / name
    if not (path / "gsx.json").exists():
        export(model, path, **options)  # type: ignore[arg-type]
    return open_bundle(path)


def equal(args: argparse.Namespace) -> None:
    """Every token of speculative decoding against plain decoding's."""
    prompts = held_out_prompts(args.model, args.prompts)
    heading("draft", "precision", "budget", "batch", "sampling", "tokens", "differ")
    cases = [(f"exit:{layer}", "fp32") for layer in args.exits]
    cases += [("budget:0.5", "fp32"), ("layers:" + ",".join(f"{n}.mlp" for n in range(4, 12)), "fp32")]
    cases += [(f"exit:{args.exits[0]}", "fp16")]
    for spec, precision in cases:
        bundle = exported(args.work, args.model, budget=0.7, draft=spec, precision=precision)
        for budget in args.budgets:
            draft = open_draft(bundle, parse_draft(spec), args.threads)
            plain = open_runner(bundle, args.threads)
            # The portable graph, which runs batches and half precision, is slow: fewer prompts there.
            for batch, chosen in ((1, prompts), (4, prompts[::2])) if precision == "fp32" else ((1, prompts[::4]),):
                for sampling in (GREEDY, SAMPLED):
                    tokens = differ = 0
                    for at in range(0, len(chosen), batch):
                        rows = [row[: PROMPT_TOKENS - 8 * n] for n, row in enumerate(chosen[at : at + batch])]
                        options = {
                            "max_new_tokens": args.new_tokens,
                            "keep": Keep(budget=budget),
                            "sampling": sampling,
                            "stop_ids": [],
                        }
                        want = generate(plain, rows, **options).sequences
                        have = generate(draft.runner, rows, draft=draft, **options).sequences
                        for one, other in zip(want, have, strict=True):
                            tokens += len(one.tokens)
                            differ += sum(a != b for a, b in zip(one.tokens, other.tokens, strict=True))
                    kind = "greedy" if sampling.greedy else "sampled"
                    line(spec, precision, f"{budget:g}", batch, kind, f"{tokens:,}", differ)


@dataclass
class Account:
    """Sums over all prompts of one way of decoding."""

    tokens: int = 0
    seconds: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    rounds: int = 0
    tried: int = 0
    right: int = 0

    def add(self, stats: GenerationStats) -> None:
        self.tokens += stats.new_tokens - 1
        self.seconds += stats.decode_seconds
        self.draft += stats.draft_seconds
        self.verify += stats.verify_seconds
        self.rounds += stats.decode_steps
        self.tried += sum(stats.drafted)
        self.right += sum(stats.accepted)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def measure(
    bundle: Bundle,
    spec: str,
    length: int | None,
    prompts: Sequence[list[int]],
    budget: float,
    threads: int,
    sampling: Sampling,
) -> tuple[Account, Account]:
    """Plain and speculative decoding in turn. Returns: both accounts."""
    plain, draft = open_runner(bundle, threads), open_draft(bundle, parse_draft(spec), threads)
    options: dict[str, Any] = {"keep": Keep(budget=budget), "sampling": sampling, "stop_ids": []}
    accounts = Account(), Account()
    for number, prompt in enumerate([prompts[0], *prompts]):
        one = generate(plain, [prompt], max_new_tokens=NEW_TOKENS, **options)
        other = generate(draft.runner, [prompt], max_new_tokens=NEW_TOKENS, draft=draft, draft_length=length, **options)
        if one.sequences != other.sequences:  # in 8 bits a near tie may turn: `equal` counts them
            assert bundle.manifest.quantization is not None, "speculation changed the text"
        if number:  # the first one warms up
            accounts[0].add(one.stats)
            accounts[1].add(other.stats)
    return accounts


def speed(args: argparse.Namespace) -> None:
    """Tokens a second by exit and length, and where the time goes."""
    prompts = held_out_prompts(args.model, args.prompts)
    bundles = {layer: exported(args.work, args.model, budget=0.7, draft=f"exit:{layer}") for layer in args.exits}
    print(f"{len(prompts)} prompts of {PROMPT_TOKENS}, {NEW_TOKENS} new tokens, {args.threads} threads, budget 1\n")
    times = ("draft ms", "verify ms", "loop ms", "plain step ms")
    heading("sampling", "draft", "length", "right", "tokens/round", "tok/s", "plain", "ratio", "ideal", *times)
    for sampling in (GREEDY, SAMPLED):
        for layer in args.exits:
            bundle = bundles[layer]
            layers = bundle.manifest.decoder.num_layers
            for length in (*args.lengths, None):
                plain, found = measure(bundle, f"exit:{layer}", length, prompts, 1.0, args.threads, sampling)
                rounds = found.rounds
                per_round = found.tokens / rounds
                # A round would take this many plain steps if time followed the layers alone.
                ideal = "" if length is None else f"{per_round / (1 + length * layer / layers):.2f}"
                line(
                    "greedy" if sampling.greedy else "sampled",
                    f"exit:{layer}",
                    "adaptive" if length is None else str(length),
                    f"{found.right / max(found.tried, 1):.1%}",
                    f"{per_round:.2f}",
                    f"{found.speed:.0f}",
                    f"{plain.speed:.0f}",
                    f"{found.speed / plain.speed:.2f}",
                    ideal,
                    f"{1e3 * found.draft / rounds:.3f}",
                    f"{1e3 * found.verify / rounds:.3f}",
                    f"{1e3 * (found.seconds - found.draft - found.verify) / rounds:.3f}",
                    f"{1e3 * plain.seconds / plain.rounds:.3f}",
                )


def gates(args: argparse.Namespace) -> None:
    """Plain and speculative decoding at several budgets, in float32 and INT8."""
    from gsx.workflows.quantize import Quantize

    prompts = held_out_prompts(args.model, args.prompts)
    draft = f"exit:{args.exits[0]}"
    heading("products", "budget", "plain tok/s", "speculative", "ratio", "against plain float32 at budget 1")
    base = None
    for name, options in (("float32", {}), ("INT8", {"quantize": Quantize("int8")})):
        bundle = exported(args.work, args.model, budget=0.7, draft=draft, **options)
        for budget in (1.0, 0.85, 0.7, 0.5):
            plain, found = measure(bundle, draft, args.lengths[0], prompts, budget, args.threads, GREEDY)
            base = base or plain.speed
            ratios = (f"{found.speed / plain.speed:.2f}", f"{found.speed / base:.2f}")
            line(name, f"{budget:g}", f"{plain.speed:.0f}", f"{found.speed:.0f}", *ratios)


def resident_mb() -> float:
    """Memory of this process in MB: its own, and its part of what is shared."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name] = float(value) / 1024
    return found["Pss:"]


def memory(args: argparse.Namespace) -> None:
    """Whole processes that generate plainly and speculatively, one after the other."""
    from benchmarks.model import make_model

    large = args.work / "model-dense"
    if not large.exists():
        make_model(large, "small", None)
    heading("model", "plain MB", "speculative MB", "ratio", "weights MB")
    for name, model in (("example", args.model), ("12 layers, hidden 768", large)):
        bundle = exported(args.work / model.name, model, draft=f"exit:{args.exits[0]}")
        found = {}
        for kind in ("plain", "speculative"):
            found[kind] = child(kind=kind, bundle=str(bundle.directory), threads=args.threads)["pss"]
        cells = (f"{found['plain']:.0f}", f"{found['speculative']:.0f}")
        weights = f"{bundle.manifest.weights.size_bytes / 1e6:.0f}"
        line(name, *cells, f"{found['speculative'] / found['plain']:.3f}", weights)


def peer(args: argparse.Namespace) -> None:
    """transformers' generate with and without assistant_early_exit, on the same checkpoint read as a dense model."""
    prompts = held_out_prompts(args.model, max(4, args.prompts // 5))
    heading("runtime", "draft", "plain tok/s", "speculative tok/s", "ratio")
    for layer in args.exits:
        spec = f"exit:{layer}"
        found = child(kind="huggingface", model=str(args.model), exit=layer, prompts=prompts, threads=args.threads)
        plain, fast = found["plain"], found["speculative"]
        line("PyTorch, transformers", spec, f"{plain:.0f}", f"{fast:.0f}", f"{fast / plain:.2f}")
        bundle = exported(args.work, args.model, budget=0.7, draft=spec)
        one, other = measure(bundle, spec, None, prompts, 1.0, args.threads, GREEDY)
        ratio = f"{other.speed / one.speed:.2f}"
        line("ONNX Runtime, gsx", spec, f"{one.speed:.0f}", f"{other.speed:.0f}", ratio)


def child(**spec: object) -> dict[str, float]:
    """Run one thing in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speculation", CHILD, "--work", ".", "--spec", json.dumps(spec)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def run_child(args: argparse.Namespace) -> None:
    """The other side of `child`."""
    spec = json.loads(args.spec)
    if spec["kind"] == "huggingface":
        print(json.dumps(huggingface(spec)))
        return
    bundle = open_bundle(spec["bundle"])
    prompt = np.random.default_rng(0).integers(3, 1000, PROMPT_TOKENS).tolist()
    if spec["kind"] == "plain":
        runner = open_runner(bundle, spec["threads"])
        generate(runner, [prompt], max_new_tokens=NEW_TOKENS, stop_ids=[])
    else:
        assert bundle.manifest.draft is not None
        draft = open_draft(bundle, bundle.manifest.draft.draft, spec["threads"])
        generate(draft.runner, [prompt], max_new_tokens=NEW_TOKENS, stop_ids=[], draft=draft, draft_length=4)
    print(json.dumps({"pss": resident_mb()}))


def huggingface(spec: dict[str, object]) -> dict[str, float]:
    """Tokens a second of transformers, greedy, batch 1, with its K/V cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(str(spec["threads"])))
    model = AutoModelForCausalLM.from_pretrained(str(spec["model"]), dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def total(**options: object) -> float:
        seconds = 0.0
        for prompt in spec["prompts"]:  # type: ignore[attr-defined]
            ids = torch.tensor([prompt])
            started = time.perf_counter()
            model.generate(
                ids, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(ids), **options
            )
            seconds += time.perf_counter() - started
        return NEW_TOKENS * len(spec["prompts"]) / seconds  # type: ignore[arg-type]

    total()
    return {"plain": total(), "speculative": total(assistant_early_exit=spec["exit"])}


def main() -> None:
    """Run one part and print a table in Markdown."""
    parts: dict[str, Callable[[argparse.Namespace], None]] = {
        "equal": equal,
        "speed": speed,
        "gates": gates,
        "memory": memory,
        "peer": peer,
        CHILD: run_child,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--work", type=Path, required=True, help="directory for exports")
    parser.add_argument("--model", type=Path, default=Path("examples/model"))
    parser.add_argument("--exits", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--lengths", type=int, nargs="*", default=[2, 4, 6])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 0.7], help="of `equal`")
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS, help="of `equal`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spec", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts[args.part](args)


if __name__ == "__main__":
    main()
