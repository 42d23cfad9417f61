"""`gsx bench`: what bundles and their settings take, in time and memory, next to each other.

Each bundle is loaded in a process of its own. All settings run in turn within each round, and ratios to the first one
are taken within a round (`gsx/benchmarking/`). Next to each ratio stands the work that is left, counted from what the
calls kept: time that is above it is what skipping costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path

from gsx.backend_names import BackendName, Device
from gsx.benchmarking.forms import Form, forms_of, parse_setting, prompts_of
from gsx.benchmarking.machine import machine
from gsx.benchmarking.measure import Shape, time_forms
from gsx.benchmarking.report import BenchReport
from gsx.benchmarking.rows import rows_of
from gsx.defaults import BENCH_NEW_TOKENS, BENCH_PROMPT_TOKENS, BENCH_ROUNDS, BENCH_SECONDS
from gsx.workflows.memory import check_memory
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.cost import work_of
from gsx_exporter.text import read_text
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# Packages whose versions a figure may depend on.
_PACKAGES = ("gsx", "numpy", "onnxruntime", "torch", "tensorrt", "tensorrt-rtx")


def bench(
    bundle: Bundle | str | Path,
    *others: Bundle | str | Path,
    settings: Sequence[str] = (),
    prompt_lengths: Sequence[int] | None = None,
    batches: Sequence[int] = (1,),
    new_tokens: int = BENCH_NEW_TOKENS,
    rounds: int = BENCH_ROUNDS,
    seconds: float = BENCH_SECONDS,
    text: str | Path | None = None,
    threads: int | None = None,
    backend: BackendName = "onnxruntime",
    device: Device | None = None,
    on_progress: OnProgress = silent,
) -> BenchReport:
    """Time bundles at their settings, next to each other: first token, tokens per second, memory, and the work left.

    Args:
        bundle: an opened bundle or its directory. Its first setting, the one that keeps most, is what all others are
            compared with.
        others: more bundles.
        settings: keep settings, `budget:B`, `layers:SET`, `exit:E`, `speedup:R`, `exit-threshold:T` or `loops:N`, each
            for the bundles that can read it; none for those that `gsx verify` verifies. A bundle with a draft drafts
            too.
        prompt_lengths: in tokens; None for 128 and 512, as far as the models' context allows.
        batches: numbers of prompts that are continued together.
        new_tokens: of each prompt.
        rounds: how often everything runs, at most; one more round before them does not count.
        seconds: when to stop: then there are fewer rounds, at least one for the shortest prompts.
        text: UTF-8 text file that prompts are taken from; None for the text that ships with gsx.
        threads: number of threads of the runtime; None for its own choice.
        backend: the runtime; the TensorRT ones run engines from `gsx build`, PyTorch runs the weights directly.
        device: where PyTorch runs; None for a GPU if PyTorch sees one, else the CPU.
        on_progress: called with the progress.
    Returns: a row for each setting at each prompt length and batch; `write_page` writes them as one HTML page.
    Raises:
        GsxError: a bundle or an option cannot be used, or there is not enough memory to load the bundles.
    Example:
        >>> report = gsx.bench("out/demo", settings=["budget:1", "budget:0.5"], prompt_lengths=[16], new_tokens=8)
        >>> [row.form for row in report.rows]
        ['budget 1.0', 'budget 0.5']
        >>> report.rows[1].token.left < 1
        True
        >>> report.write_page("out/bench.html")
    """
    given = (*(prompt_lengths or ()), *batches, new_tokens, rounds, 1 if threads is None else threads)
    names = (*("prompt length" for _ in prompt_lengths or ()), *("batch" for _ in batches))
    for name, number in zip((*names, "new tokens", "rounds", "threads"), given, strict=True):
        if number < 1:
            raise UsageError(name, expected="at least 1", found=str(number))
    if not seconds > 0:
        raise UsageError("seconds to measure", expected="more than 0", found=f"{seconds:g}")
    on_progress(Progress("reading the bundles"))
    bundles = [one if isinstance(one, Bundle) else open_bundle(one) for one in (bundle, *others)]
    forms = forms_of(bundles, _names(bundles), [parse_setting(one) for one in settings])
    lengths = _lengths(bundles, prompt_lengths, new_tokens)
    shapes = sorted({Shape(batch, length) for batch in batches for length in lengths})
    _check_memory(bundles, forms, shapes[-1], new_tokens)
    words, source = read_text(Path(text) if text else None)
    prompts = {shape: [prompts_of(one, words, shape.batch, shape.prompt_tokens) for one in bundles] for shape in shapes}
    specs = [
        {"bundle": one.directory.resolve(), "threads": threads, "backend": backend, "device": device} for one in bundles
    ]
    found = time_forms(
        forms, prompts, specs, new_tokens=new_tokens, rounds=rounds, seconds=seconds, on_progress=on_progress
    )
    labels = {form.name: (str(bundles[form.bundle].directory), str(form.keep), form.draft) for form in forms}
    notes = [f"No time was left for prompts of {shape}." for shape in shapes if shape not in found]
    counted = min(len(answers) for shape in found.values() for answers in shape.values())
    if counted < rounds:
        notes.append(f"The time was up after {counted} of {rounds} rounds of some prompts.")
    return BenchReport(
        rows=tuple(row for shape, answers in found.items() for row in rows_of(shape, answers, labels)),
        new_tokens=new_tokens,
        threads=threads,
        backend=backend,
        text=source,
        date=date.today().isoformat(),
        machine=machine(_PACKAGES),
        notes=tuple(notes),
    )


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """Names of the bundles' directories, or their paths where two have the same."""
    short = [bundle.directory.resolve().name for bundle in bundles]
    if len(set(short)) == len(short):
        return short
    paths = [str(bundle.directory) for bundle in bundles]
    if len(set(paths)) == len(paths):
        return paths
    raise UsageError("a bundle is given twice", expected="different bundles", found=", ".join(paths))


def _lengths(bundles: Sequence[Bundle], asked: Sequence[int] | None, new_tokens: int) -> list[int]:
    """The prompt lengths: those asked for, or the default ones that fit into every model's context."""
    shortest = min(bundles, key=lambda bundle: bundle.manifest.decoder.max_positions)
    room = shortest.manifest.decoder.max_positions - new_tokens
    if room < 1 or max(asked or (1,)) > room:
        raise UsageError(
            f"prompt and new tokens are longer than the context of bundle {shortest.directory}",
            expected=f"at most {shortest.manifest.decoder.max_positions} tokens together",
            found=f"{max(asked or (1,))} and {new_tokens}",
            todo="shorten them with --prompt-lengths and --new-tokens",
        )
    return sorted(set(asked)) if asked else sorted({min(length, room) for length in BENCH_PROMPT_TOKENS})


def _check_memory(bundles: Sequence[Bundle], forms: Sequence[Form], shape: Shape, new_tokens: int) -> None:
    """Refuse to load what has no room: the weights of all processes, and K and V of the largest calls."""
    needed = 0.0
    for number, _ in {form.process for form in forms}:
        manifest = bundles[number].manifest
        tokens = shape.batch * (shape.prompt_tokens + new_tokens)
        kv = manifest.decoder.num_caches * work_of(bundles[number]).key_bytes * tokens
        needed += manifest.weights.size_bytes + kv
    check_memory(
        "not enough memory to load all bundles next to each other",
        needed,
        "weights, keys and values",
        "give fewer bundles, smaller batches or shorter prompts",
    )
