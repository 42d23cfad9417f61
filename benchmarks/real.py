"""The real model against what people run instead of it: ONNX Runtime GenAI and llama.cpp, in quality and in speed.

    python -m benchmarks.real quality --work DIR [--llama ENV/bin/python]
    python -m benchmarks.real speed --work DIR [--llama ENV/bin/python]

Quality: KL divergence, same next token and perplexity against PyTorch in float32, with 95 % intervals, on text that
nothing was calibrated on and that is not Python (`descriptions.py`), in windows of 256 tokens. Speed: a prompt of 512
tokens of the same text and 65 new ones, all forms in turn. The model is SmolLM2-135M (`smollm2.py`), or any Llama with
`--model`. llama.cpp must be compiled, in an environment of its own: `llama.py` says how.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.bundles import exported
from benchmarks.descriptions import TEXT
from benchmarks.measure import Table, milliseconds, parse, parser, print_header
from benchmarks.peers import (
    GENAI_FORMS,
    NEW_TOKENS,
    PROMPT_TOKENS,
    Peer,
    genai_model,
    genai_peer,
    gsx_peer,
    llama_model,
    llama_peer,
    time_in_turn,
)
from benchmarks.smollm2 import checkpoint
from gsx.benchmarking.rounds import ratios, spread
from gsx.parity.estimate import Estimate
from gsx.parity.quality import closeness
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings
from gsx_engines.runners.select import open_runner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.evaluation import NextTokens, next_tokens
from gsx_exporter.text import tokenize
from gsx_plugins.errors import GsxError

WINDOW_TOKENS = 256
BASE = "gsx fp32"


@dataclass(frozen=True)
class Form:
    """A form of the model that gsx exports.

    Args:
        bits: of its weights; it is compared with the peers' forms of as many.
        options: of the export.
        keep: the keep settings of its requests.
    """

    bits: int
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: KeepSettings = AS_EXPORTED

    @property
    def whole(self) -> bool:
        """Whether nothing is skipped, so that quality is that of the arithmetic."""
        return "policy" not in self.options


def forms_of(layers: int) -> dict[str, Form]:
    """All forms of a model with this many layers: half of them are the first and last quarters."""
    first = layers // 4 + 1
    half = KeepSettings(layers=f"0-{first - 1},{layers - layers // 2 + first}-{layers - 1}")
    return {
        BASE: Form(32),
        "gsx, half of the layers": Form(32, {"policy": "layers"}, half),
        "gsx, ffn-skip 0.8": Form(32, {"policy": "ffn-skip", "budget": 0.8}),
        "gsx int8 weights": Form(8, {"quantize": Quantize("int8-weights")}),
        "gsx int8": Form(8, {"quantize": Quantize("int8")}),
        "gsx fp8": Form(8, {"quantize": Quantize("fp8")}),
        "gsx int4": Form(4, {"quantize": Quantize("int4")}),
        "gsx int8 weights, half of the layers": Form(
            8, {"policy": "layers", "quantize": Quantize("int8-weights")}, half
        ),
        "gsx int8, half of the layers": Form(8, {"policy": "layers", "quantize": Quantize("int8")}, half),
        "gsx int4, half of the layers": Form(4, {"policy": "layers", "quantize": Quantize("int4")}, half),
    }


# Peer's form -> bits of its weights. FP8 is only simulated on a CPU: its speed means nothing.
GENAI = {f"GenAI {form}": (form, {"fp32": 32, "int8": 8}.get(form, 4)) for form in GENAI_FORMS}
LLAMA = {f"llama.cpp {kind}": (kind, bits) for kind, bits in (("Q8_0", 8), ("Q4_1", 4), ("Q4_K_M", 4))}
SLOW = ("gsx fp8",)


@dataclass
class Forms:
    """What was asked for, made when it is needed and kept in the work directory.

    Args:
        names: of the forms, those of gsx and of its peers.
        llama: Python of the environment of `llama.py`; None leaves llama.cpp out.
    """

    model: Path
    work: Path
    names: Sequence[str]
    threads: int
    llama: str | None

    def __post_init__(self) -> None:
        layers = open_checkpoint(str(self.model)).config.num_layers
        self.of_gsx = {name: form for name, form in forms_of(layers).items() if name in self.names}
        self.of_genai = {name: form for name, (form, _) in GENAI.items() if name in self.names}
        self.of_llama = {name: kind for name, (kind, _) in LLAMA.items() if name in self.names and self.llama}

    def bundle(self, name: str) -> Bundle:
        """One of gsx's forms, exported."""
        folder = name.replace(", ", "-").replace(" ", "-")
        return exported(self.work / folder, self.model, **self.of_gsx[name].options)

    def file(self, name: str) -> Path:
        """A peer's form: GenAI's folder or llama.cpp's file."""
        if name in self.of_genai:
            return genai_model(self.model, self.work, self.of_genai[name])
        assert self.llama is not None
        return llama_model(self.model, self.work, self.llama, self.of_llama[name])

    def peer(self, name: str, *, logits: bool = False) -> Peer:
        """A form in a process of its own. Args: logits: whether llama.cpp keeps those of all tokens."""
        if name in self.of_gsx:
            return gsx_peer(name, self.bundle(name).directory, self.threads, self.of_gsx[name].keep)
        if name in self.of_genai:
            return genai_peer(name, self.file(name), self.threads)
        assert self.llama is not None
        return llama_peer(name, self.llama, self.file(name), self.threads, logits=logits)

    def bytes(self, name: str) -> int:
        """Bytes of the weights on disk."""
        if name in self.of_gsx:
            return self.bundle(name).manifest.weights.size_bytes
        path = self.file(name)
        return sum(one.stat().st_size for one in ([path] if path.is_file() else path.glob("model.onnx*")))

    def prepare(self) -> None:
        """Make everything."""
        for name in self.of_gsx:
            self.bundle(name)
        for name in (*self.of_genai, *self.of_llama):
            self.file(name)


def quality(forms: Forms, tokens: int) -> None:
    """Measure the quality of whole models, and print a table."""
    windows = tokenize(open_checkpoint(str(forms.model)), TEXT, max_tokens=tokens, window=WINDOW_TOKENS).ids
    model = AutoModelForCausalLM.from_pretrained(forms.model, dtype=torch.float32).eval()
    sources = {name: _bundle_logits(forms.bundle(name), forms.threads) for name, f in forms.of_gsx.items() if f.whole}
    exchange = forms.work / "logits.npy"
    peers = {name: forms.peer(name, logits=True) for name in (*forms.of_genai, *forms.of_llama)}
    for name, peer in peers.items():
        sources[name] = lambda ids, peer=peer: peer.logits(ids, exchange)  # type: ignore[misc]
    found: dict[str, list[NextTokens]] = {name: [] for name in sources}
    for window in windows:
        with torch.no_grad():
            wanted = model(torch.from_numpy(window[None])).logits[0].numpy()
        for name, logits_of in sources.items():
            found[name].append(next_tokens(window, wanted, logits_of(window)))
    for peer in peers.values():
        peer.worker.stop()
    exchange.unlink(missing_ok=True)
    print(f"{windows.size:,} tokens of {TEXT.name}, in windows of {windows.shape[1]}; perplexity of PyTorch ", end="")
    print(f"{math.exp(np.mean([one.reference_losses for one in next(iter(found.values()))])):.2f}\n")
    lines = Table("form", "perplexity", "KL, nats", "next tokens that differ", "weights, MB")
    for name, compared in found.items():
        one = closeness(compared)
        cells = _interval(one.perplexity, "+.2%"), _interval(one.divergence, ".4f"), _interval(one.differing, ".1%")
        lines.row(name, *cells, f"{forms.bytes(name) / 1e6:.0f}")


def _bundle_logits(bundle: Bundle, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Logits [S, V] of ids [S], by the runner that generates."""
    runner = open_runner(bundle, threads)
    cache = runner.new_cache(1, WINDOW_TOKENS)

    def logits(ids: np.ndarray) -> np.ndarray:
        cache.roll_back([0])
        return runner.step(cache, ids[None], {}, logits="all").logits[0]

    return logits


def _interval(value: Estimate, form: str) -> str:
    return f"{value.value:{form}} ({value.low:{form}} to {value.high:{form}})"


def speed(forms: Forms, rounds: int) -> None:
    """Time all forms in turn, and print a table."""
    window = PROMPT_TOKENS
    (prompt,) = tokenize(open_checkpoint(str(forms.model)), TEXT, max_tokens=window, window=window).ids.tolist()
    names = [name for name in (*forms.of_gsx, *forms.of_genai, *forms.of_llama) if name not in SLOW]
    found = time_in_turn({name: forms.peer(name) for name in names}, prompt, rounds)
    prefill = {name: [one.prefill for one in answers] for name, answers in found.items()}
    decode = {name: [one.decode for one in answers] for name, answers in found.items()}
    bits = {name: form.bits for name, form in forms.of_gsx.items()}
    print(f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, {forms.threads} threads, {rounds} rounds\n")
    peers = {who: {b: n for n, (_, b) in reversed(all_.items()) if n in found} for who, all_ in PEERS.items()}
    lines = Table(
        *("form", "prefill ms", "time /fp32", "/GenAI", "/llama.cpp"),
        *("tokens/s", "speed /fp32", "/GenAI", "/llama.cpp", "peak MB"),
    )
    for name, answers in found.items():
        bases = [BASE if BASE in found else None, *(peers[who].get(bits.get(name, 0)) for who in PEERS)]
        slower = [ratios(prefill[name], prefill[base]) if base else None for base in bases]
        faster = [ratios(decode[base], decode[name]) if base else None for base in bases]
        lines.row(
            name,
            milliseconds(prefill[name], 0),
            *(None if one is None else f"{one:.2f}" for one in slower),
            f"{1 / spread(decode[name]).median:.1f}",
            *(None if one is None else f"{one:.2f}" for one in faster),
            f"{answers[-1].peak_mb:.0f}",
        )


PEERS: dict[str, dict[str, tuple[str, int]]] = {"GenAI": GENAI, "llama.cpp": LLAMA}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one of both, and print a table."""
    names = [*forms_of(8), *GENAI, *LLAMA]
    quick = {"tokens": 1024}
    work = "exports and the peers' models (4 GB)"
    made = parser("real", __doc__, work=work, rounds=5, threads=2, quick=quick)
    made.add_argument("what", choices=["quality", "speed"])
    made.add_argument("--model", type=Path, help="a dense Llama (default: SmolLM2-135M)")
    made.add_argument("--forms", nargs="*", choices=names, default=names, help="(default: all)")
    made.add_argument("--tokens", type=int, default=16384, help="of the text, for quality (default: 16384)")
    made.add_argument(
        "--llama",
        default=os.environ.get("GSX_LLAMA_PYTHON"),
        metavar="PYTHON",
        help="interpreter of an environment with llama-cpp-python (default: $GSX_LLAMA_PYTHON; none: left out)",
    )
    made.add_argument("--prepare", action="store_true", help="make exports and the peers' models, and measure nothing")
    args = parse(made, arguments)
    try:
        model = args.model or checkpoint()
    except GsxError as error:
        raise SystemExit(error.message) from None
    forms = Forms(model.resolve(), args.work.resolve(), args.forms, args.threads, args.llama)
    forms.prepare()
    if args.prepare:
        return
    torch.set_num_threads(args.threads)
    print_header(made, args, arguments)
    if args.what == "quality":
        quality(forms, args.tokens)
    else:
        speed(forms, args.rounds)


if __name__ == "__main__":
    main()
