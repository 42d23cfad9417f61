"""Self-speculative decoding: that it changes no token, what it gains, where the time goes, how much memory it needs.

    python -m benchmarks.speculation equal  --work DIR    no token differs: 100 prompts, drafts, precisions, batches
    python -m benchmarks.speculation speed  --work DIR    each exit against plain decoding, and where its time goes
    python -m benchmarks.speculation gates  --work DIR    the same at lower budgets: do the speeds multiply?
    python -m benchmarks.speculation memory --work DIR    a speculative process's memory over a plain one's
    python -m benchmarks.speculation loops  --work DIR --model MODEL   drafts of fewer loops (looped_model.py makes one)
    python -m benchmarks.speculation vocabulary --work DIR --model MODEL   an exit whose head has fewer rows
    python -m benchmarks.speculation peer   --work DIR    Hugging Face's assistant_early_exit, in PyTorch

The example model (or --model) continues held-out files of the standard library. Plain and speculative runs take turns
prompt by prompt; figures are sums over all prompts, since one prompt's time says little.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import speculation_process
from benchmarks.bundles import EXAMPLE, Workshop, exported
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.prompts import chat_prompts, held_out_prompts
from gsx.benchmarking.rounds import repeated
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.generation.generate import generate
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.select import open_runner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import open_draft
from gsx_engines.speculation.spec import parse_draft
from gsx_exporter.checkpoint.opening import open_checkpoint

PROMPT_TOKENS = 128
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=1)
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED}


def drafting(args: Namespace, spec: str, **options: Any) -> Bundle:
    """The model exported with a draft."""
    words = [spec, *(f"{key}={getattr(value, 'scheme', value)}" for key, value in options.items())]
    return exported(args.work / "-".join(words).replace(":", "_"), args.model, budget=0.7, draft=spec, **options)


def equal(args: Namespace) -> None:
    """Every token of speculative decoding against plain decoding's."""
    prompts = held_out_prompts(args.model, args.prompts, PROMPT_TOKENS)
    lines = Table("draft", "precision", "budget", "batch", "sampling", "tokens", "differ")
    cases = [(f"exit:{layer}", "fp32") for layer in args.exits]
    cases += [("budget:0.5", "fp32"), ("layers:" + ",".join(f"{n}.mlp" for n in range(4, 12)), "fp32")]
    cases += [(f"exit:{args.exits[0]}", "fp16")]
    for spec, precision in cases:
        bundle = drafting(args, spec, precision=precision)
        # The portable graph, which runs batches and half precision, is slow: fewer prompts there.
        batches = [(1, prompts), (4, prompts[::2])] if precision == "fp32" else [(1, prompts[::4])]
        for budget in args.budgets:
            for batch, chosen in batches:
                for kind, sampling in SAMPLINGS.items():
                    options = {
                        "keep": KeepSettings(budget=budget),
                        "sampling": sampling,
                        "max_new_tokens": args.new_tokens,
                    }
                    counts = differing(bundle, spec, chosen, batch, args.threads, **options)
                    lines.row(spec, precision, f"{budget:g}", batch, kind, f"{counts[0]:,}", counts[1])


def differing(
    bundle: Bundle, spec: str, prompts: Sequence[list[int]], batch: int, threads: int, **options: Any
) -> tuple[int, int]:
    """Number of tokens generated, and of those that speculation changed. Batches are ragged."""
    plain, draft = open_runner(bundle, threads), open_draft(bundle, parse_draft(spec), threads)
    tokens = differ = 0
    for at in range(0, len(prompts), batch):
        rows = [row[: PROMPT_TOKENS - 8 * n] for n, row in enumerate(prompts[at : at + batch])]
        want = generate(plain, rows, stop_ids=[], **options).sequences
        have = generate(draft.runner, rows, draft=draft, stop_ids=[], **options).sequences
        for one, other in zip(want, have, strict=True):
            tokens += len(one.tokens)
            differ += sum(a != b for a, b in zip(one.tokens, other.tokens, strict=True))
    return tokens, differ


@dataclass(frozen=True)
class Account:
    """Sums over all prompts of one way of decoding; times in seconds."""

    tokens: int
    seconds: float
    draft: float
    verify: float
    rounds: int
    tried: int
    right: int

    @classmethod
    def of(cls, runs: Sequence[GenerationStats]) -> Account:
        """The sums. The first token of each run belongs to the prompt."""
        return cls(
            tokens=sum(one.new_tokens - 1 for one in runs),
            seconds=sum(one.decode_seconds for one in runs),
            draft=sum(one.draft_seconds for one in runs),
            verify=sum(one.verify_seconds for one in runs),
            rounds=sum(one.decode_steps for one in runs),
            tried=sum(sum(one.drafted) for one in runs),
            right=sum(sum(one.accepted) for one in runs),
        )

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def measure(
    args: Namespace,
    bundle: Bundle,
    spec: str,
    length: int | None,
    prompts: Sequence[list[int]],
    *,
    budget: float | None = 1.0,
    sampling: Sampling = GREEDY,
) -> tuple[Account, Account]:
    """Measure plain and speculative decoding in turn. Args: length: length of drafts; None: adaptive."""
    plain, draft = open_runner(bundle, args.threads), open_draft(bundle, parse_draft(spec), args.threads)
    options: dict[str, Any] = {"keep": KeepSettings(budget=budget), "sampling": sampling, "stop_ids": []}
    options["max_new_tokens"] = args.new_tokens
    order = iter([prompts[0], *prompts])  # the first one warms up

    def one_round() -> tuple[GenerationStats, GenerationStats]:
        prompt = next(order)
        one = generate(plain, [prompt], **options)
        other = generate(draft.runner, [prompt], draft=draft, draft_length=length, **options)
        if one.sequences != other.sequences:  # in 8 bits a near tie may flip: `equal` counts these
            assert bundle.manifest.quantization is not None, "speculation changed the text"
        return one.stats, other.stats

    found = repeated(one_round, len(prompts))
    return Account.of([one for one, _ in found]), Account.of([other for _, other in found])


def speed(args: Namespace) -> None:
    """Tokens per second by exit and length, and where the time goes."""
    prompts = held_out_prompts(args.model, args.prompts, PROMPT_TOKENS)
    bundles = {layer: drafting(args, f"exit:{layer}") for layer in args.exits}
    print(
        f"{len(prompts)} prompts of {PROMPT_TOKENS}, {args.new_tokens} new tokens, {args.threads} threads, budget 1\n"
    )
    times = ("draft ms", "verify ms", "loop ms", "plain step ms")
    lines = Table("sampling", "draft", "length", "right", "tokens/round", "tok/s", "plain", "ratio", "ideal", *times)
    for kind, sampling in SAMPLINGS.items():
        for layer, bundle in bundles.items():
            layers = bundle.manifest.decoder.num_layers
            for length in (*args.lengths, None):
                plain, found = measure(args, bundle, f"exit:{layer}", length, prompts, sampling=sampling)
                rounds = found.rounds
                per_round = found.tokens / rounds
                lines.row(
                    kind,
                    f"exit:{layer}",
                    "adaptive" if length is None else length,
                    f"{found.right / max(found.tried, 1):.1%}",
                    f"{per_round:.2f}",
                    f"{found.speed:.0f}",
                    f"{plain.speed:.0f}",
                    f"{found.speed / plain.speed:.2f}",
                    # What the ratio would be if time followed only the layers that run.
                    None if length is None else f"{per_round / (1 + length * layer / layers):.2f}",
                    f"{1e3 * found.draft / rounds:.3f}",
                    f"{1e3 * found.verify / rounds:.3f}",
                    f"{1e3 * (found.seconds - found.draft - found.verify) / rounds:.3f}",
                    f"{1e3 * plain.seconds / plain.rounds:.3f}",
                )


def gates(args: Namespace) -> None:
    """Plain and speculative decoding at several budgets, in float32 and INT8."""
    prompts = held_out_prompts(args.model, args.prompts, PROMPT_TOKENS)
    spec = f"exit:{args.exits[0]}"
    lines = Table("products", "budget", "plain tok/s", "speculative", "ratio", "against plain float32 at budget 1")
    base = None
    for name, options in (("float32", {}), ("INT8", {"quantize": Quantize("int8")})):
        bundle = drafting(args, spec, **options)
        for budget in (1.0, 0.85, 0.7, 0.5):
            plain, found = measure(args, bundle, spec, args.lengths[0], prompts, budget=budget)
            base = base or plain.speed
            figures = (f"{plain.speed:.0f}", f"{found.speed:.0f}", f"{found.speed / plain.speed:.2f}")
            lines.row(name, f"{budget:g}", *figures, f"{found.speed / base:.2f}")


def loops(args: Namespace) -> None:
    """Plain decoding of a looped model with all of its loops, and drafts of fewer, greedily."""
    prompts = held_out_prompts(args.model, args.prompts, PROMPT_TOKENS)
    lines = Table("draft", "length", "right", "tokens/round", "tok/s", "plain", "ratio")
    most = open_checkpoint(args.model).config.loops
    assert most is not None, f"{args.model} is not looped"
    for count in range(1, most.most):
        spec = f"loops:{count}"
        bundle = exported(args.work / spec.replace(":", "_"), args.model, policy="loops", draft=spec)
        for length in (*args.lengths, None):
            plain, found = measure(args, bundle, spec, length, prompts, budget=None)
            figures = (f"{found.right / max(found.tried, 1):.1%}", f"{found.tokens / found.rounds:.2f}")
            speeds = (f"{found.speed:.0f}", f"{plain.speed:.0f}", f"{found.speed / plain.speed:.2f}")
            lines.row(spec, "adaptive" if length is None else length, *figures, *speeds)


def vocabulary(args: Namespace) -> None:
    """Plain decoding, an exit with the whole head, and the same exit choosing among fewer tokens, all in turn."""
    spec = f"exit:{args.exits[0]}"
    bundles = []
    for count in (None, *args.vocabularies):
        text = {"draft_vocabulary": count, "calibration": args.calibration} if count else {}
        bundles.append(
            exported(args.work / f"{spec}-{count or 'all'}".replace(":", "_"), args.model, draft=spec, **text)
        )
    options: dict[str, Any] = {"max_new_tokens": args.new_tokens}
    if args.chats is None:
        prompts = held_out_prompts(args.model, args.prompts, PROMPT_TOKENS, args.text)
        options["stop_ids"] = []
    else:  # an answer has an end
        prompts, options["stop_ids"] = chat_prompts(bundles[0], args.chats, args.prompts)
    plain = open_runner(bundles[0], args.threads)
    drafts = [open_draft(bundle, parse_draft(spec), args.threads) for bundle in bundles]
    lines = Table(
        "tokens", "covered", "length", "right", "tokens/round", "draft ms/round", "of the whole head's", "ratio"
    )
    for length in (*args.lengths, None):
        order = iter([prompts[0], *prompts])  # the first one warms up

        def one_round(order: Iterator[list[int]] = order, length: int | None = length) -> list[GenerationStats]:
            prompt = next(order)
            runs = [generate(plain, [prompt], **options)]
            runs += [generate(one.runner, [prompt], draft=one, draft_length=length, **options) for one in drafts]
            assert all(one.sequences == runs[0].sequences for one in runs), "speculation changed the text"
            return [one.stats for one in runs]

        base, *found = map(Account.of, zip(*repeated(one_round, len(prompts)), strict=True))
        drafts_took = [one.draft / one.rounds for one in found]
        for bundle, one, took in zip(bundles, found, drafts_took, strict=True):
            chosen = bundle.manifest.draft.vocabulary if bundle.manifest.draft else None
            lines.row(
                bundle.manifest.decoder.vocab_size if chosen is None else chosen.tokens,
                None if chosen is None else f"{chosen.covered:.1%}",
                "adaptive" if length is None else length,
                f"{one.right / max(one.tried, 1):.1%}",
                f"{one.tokens / one.rounds:.2f}",
                f"{1e3 * took:.2f}",
                f"{took / drafts_took[0]:.2f}",
                f"{one.speed / base.speed:.2f}",
            )


def memory(args: Namespace) -> None:
    """Whole processes that generate plainly and speculatively, one after the other."""
    workshop = Workshop.of(args.work, args.shape)
    lines = Table("model", "plain MB", "speculative MB", "ratio", "weights MB")
    for name, model in (("example", args.model), (f"benchmark, {args.shape}", workshop.model())):
        bundle = exported(args.work / f"memory-{name.replace(', ', '-')}", model, draft=f"exit:{args.exits[0]}")
        asked = {"threads": args.threads, "tokens": PROMPT_TOKENS, "new_tokens": args.new_tokens}
        asked["vocabulary"] = min(1000, bundle.manifest.decoder.vocab_size)
        plain, speculative = (
            speculation_process.ask(kind, bundle=bundle.directory, **asked)["mb"] for kind in ("plain", "speculative")
        )
        weights = bundle.manifest.weights.size_bytes / 1e6
        lines.row(name, f"{plain:.0f}", f"{speculative:.0f}", f"{speculative / plain:.3f}", f"{weights:.0f}")


def peer(args: Namespace) -> None:
    """transformers' generate with and without assistant_early_exit, on the same checkpoint read as a dense model."""
    prompts = held_out_prompts(args.model, max(4, args.prompts // 5), PROMPT_TOKENS)
    lines = Table("runtime", "draft", "plain tok/s", "speculative tok/s", "ratio")
    asked = {"model": args.model, "prompts": prompts, "threads": args.threads, "new_tokens": args.new_tokens}
    for layer in args.exits:
        spec = f"exit:{layer}"
        found = speculation_process.ask("hugging face", exit=layer, **asked)
        plain, fast = found["plain"], found["speculative"]
        lines.row("PyTorch, transformers", spec, f"{plain:.0f}", f"{fast:.0f}", f"{fast / plain:.2f}")
        one, other = measure(args, drafting(args, spec), spec, None, prompts)
        lines.row("ONNX Runtime, gsx", spec, f"{one.speed:.0f}", f"{other.speed:.0f}", f"{other.speed / one.speed:.2f}")


PARTS: dict[str, Callable[[Namespace], None]] = {
    "equal": equal,
    "speed": speed,
    "gates": gates,
    "loops": loops,
    "vocabulary": vocabulary,
    "memory": memory,
    "peer": peer,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one part, and print a table."""
    quick = {"prompts": 4, "exits": [4], "lengths": [2], "budgets": [1.0], "new_tokens": 8, "shape": "tiny"}
    made = parser("speculation", __doc__, work="exports", threads=2, quick=quick)
    made.add_argument("part", choices=PARTS)
    made.add_argument("--model", type=Path, default=EXAMPLE, help="(default: the example model)")
    made.add_argument("--exits", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    made.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 6], help="of drafts (default: 2 4 6)")
    made.add_argument("--prompts", type=int, default=100, help="(default: 100)")
    made.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.7], help="of `equal` (default: 1 0.7)")
    made.add_argument("--new-tokens", type=int, default=128, help="(default: 128)")
    made.add_argument("--vocabularies", type=int, nargs="+", default=[128, 256], help="tokens (default: 128 256)")
    made.add_argument("--calibration", type=Path, help="text to choose them by (default: the one that ships with gsx)")
    made.add_argument("--text", type=Path, help="of the prompts in `vocabulary` (default: held-out Python files)")
    made.add_argument("--chats", type=Path, help="in place of --text: JSON Lines, answered to their ends")
    made.add_argument("--shape", default="small", help="of the benchmark model, in `memory` (default: small)")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
