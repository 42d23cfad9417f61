"""What each family costs: its prefill and decode next to a Llama of the same shape, and next to GenAI's own export.

    python -m benchmarks.family_speed --work DIR

Random models in float32 (hidden size 576, 12 layers, 9 and 3 heads, MLP 1,536, vocabulary 4,096; with experts: 8 of
width 512, 2 for a token), dense and with scalar gates on both branches at budget 0.5. All forms answer the same prompt
in turn. GenAI's builder does not take every family; where it does not, its columns are empty.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.peers import Answer, Peer, genai_model, genai_peer, gsx_peer, time_in_turn
from gsx.benchmarking.rounds import ratios
from gsx.workflows.export import export
from gsx_exporter.gate_config import GateConfig
from tests.tiny import FAMILY_KEYS, FAMILY_NAMES, tiny_checkpoint

BUDGET = 0.5
PROMPT_TOKENS = 512
SHAPE: dict[str, Any] = {
    "hidden": 576,
    "heads": 9,
    "kv_heads": 3,
    "vocab": 4096,
    "intermediate_size": 1536,
    "head_dim": 64,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 512},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512},
}


def made(work: Path, family: str, layers: int, gate: GateConfig | None = None) -> Path:
    """A family's model, made once."""
    path = work / f"{family}-{layers}{'-gated' if gate else ''}" / "model"
    if not path.exists():
        shape = {**SHAPE, **EXPERTS.get(family, {}), "max_position_embeddings": 2048}
        shape |= {"sliding_window": 256} if "sliding_window" in FAMILY_KEYS[family] else {}
        # As in the Phi models without LongRoPE; GenAI's builder takes any other for one with it.
        shape |= {"original_max_position_embeddings": 2048} if family == "phi3" else {}
        tiny_checkpoint(path, family, gate=gate, layers=layers, tokenizer=True, **shape)
    return path


def bundle_of(model: Path) -> Path:
    """A model's export, made once."""
    path = model.parent / "bundle"
    if not path.exists():
        gated = model.parent.name.endswith("-gated")
        export(model, path, budget=BUDGET if gated else None, calibration_tokens=2048)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Time each family, and print a table."""
    given = parser("family_speed", __doc__, work="models and exports", quick={"families": ["phi3"], "layers": 2})
    given.add_argument("--families", nargs="*", choices=FAMILY_NAMES, default=list(FAMILY_NAMES))
    given.add_argument("--layers", type=int, default=12, help="(default: 12)")
    given.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    given.add_argument("--threads", type=int, default=2, help="(default: 2)")
    given.add_argument("--prepare", action="store_true", help="make models and exports, and measure nothing")
    args = parse(given, arguments)
    print_header(given, args, arguments)
    heads = ("prefill ms", "/llama", "/GenAI", "tokens/s", "time /llama", "speed /GenAI", "gates 0.5: speed /GenAI")
    lines = Table("family", *heads)
    prompt = np.random.default_rng(0).integers(3, 4000, PROMPT_TOKENS).tolist()
    for family in args.families:
        peers = _peers(args.work, family, args.layers, args.threads, prepare=args.prepare)
        if args.prepare:
            continue
        lines.row(family, *_cells(time_in_turn(peers, prompt, args.rounds)))


def _cells(found: Mapping[str, Sequence[Answer]]) -> list[str]:
    """Cells of a family, from the answers of its forms."""

    def of(one: str, other: str, part: str) -> str:
        if not {one, other} <= found.keys():
            return ""
        times, base = ([getattr(answer, part) for answer in found[name]] for name in (one, other))
        return f"{ratios(times, base):.2f}"

    dense = found["dense"]
    return [
        f"{1e3 * statistics.median(answer.prefill for answer in dense):.0f}",
        of("dense", "llama", "prefill"),
        of("dense", "genai", "prefill"),
        f"{1 / statistics.median(answer.decode for answer in dense):.1f}",
        of("dense", "llama", "decode"),
        of("genai", "dense", "decode"),
        of("genai", "gated", "decode"),
    ]


def _peers(work: Path, family: str, layers: int, threads: int, *, prepare: bool) -> dict[str, Peer]:
    model = made(work, family, layers)
    paths = {
        "dense": bundle_of(model),
        "llama": bundle_of(made(work, "llama", layers)),
        "gated": bundle_of(made(work, family, layers, GateConfig("scalar", "pre_norm"))),
    }
    try:
        genai: Path | None = genai_model(model, model.parent, "fp32")
    except SystemExit:  # its builder does not know the family
        genai = None
    if prepare:
        return {}
    peers = {name: gsx_peer(name, path, threads) for name, path in paths.items()}
    return peers if genai is None else {**peers, "genai": genai_peer("genai", genai, threads)}


if __name__ == "__main__":
    main()
