"""Prefill on a GPU: does leaving out work save the time that the FLOPs predict?

    python -m benchmarks.gpu_prefill            Llama-3-8B's shape, bf16, 4,096 tokens
    python -m benchmarks.gpu_prefill --quick    the same code on a CPU, with a tiny shape

The traced decoder's own layers run in PyTorch with the CUDA kernels bound to the ops (`gsx_plugins.cuda.bind`): random
weights, scalar gates, rank selection, so that exactly the budget's share of the tokens is kept. The dense model is the
same without gates. The FLOPs are those of every product of the dense model, without the ones of skipped rows. K, V and
the gates are computed for all tokens, and attention reads a mask, so a kept row pays for every column.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Table, parse, parser, print_header, timed
from gsx.benchmarking.rounds import in_turn, ratios, spread
from gsx_exporter.config import ModelConfig, Scales
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, KeyValue
from gsx_exporter.families import NORMS_BEFORE
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.rope_config import ONLY_ROPE
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_plugins.errors import PluginLibraryError

MAX_APART = 0.08


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, in elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int

    @property
    def head(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads


LLAMA_3_8B = Shape(layers=32, hidden=4096, heads=32, kv_heads=8, mlp=14_336)
SMALL = Shape(layers=2, hidden=64, heads=4, kv_heads=2, mlp=160)


def flops(shape: Shape, tokens: int, kept: int, *, gated: bool) -> float:
    """Multiplications and additions of all layers, where `kept` of `tokens` run every branch."""
    rows = 2 * kept * shape.hidden * (2 * shape.hidden + 3 * shape.mlp) + 4 * kept * tokens * shape.hidden
    everyone = 2 * tokens * shape.hidden * 2 * shape.kv_heads * shape.head
    gates = 2 * (2 * tokens * shape.hidden) if gated else 0
    return float(shape.layers * (rows + everyone + gates))


def config_of(shape: Shape, gate: GateConfig | None) -> ModelConfig:
    """A Llama of this shape, without a vocabulary: only its layers are run."""
    return ModelConfig(
        family="llama",
        vocab_size=1,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head,
        max_positions=1 << 20,
        most_positions=1 << 20,
        rms_norm_eps=1e-5,
        tied_head=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm="none",
        norms=NORMS_BEFORE,
        norm_offset=0.0,
        activation="silu",
        fused=False,
        scales=Scales(),
        ropes={ONLY_ROPE: {"rope_type": "default", "rope_theta": 500_000.0}},
        rotary=(ONLY_ROPE,) * shape.layers,
        rotary_dim=shape.head,
        windows=(None,) * shape.layers,
        experts=None,
        loops=None,
        rejoins=False,
        loop_gate=False,
        sphere=None,
        bos_id=None,
        eos_ids=(),
        pad_id=None,
        gate=gate,
        router=None,
        exits=(),
        exit_classifiers=(),
    )


def make_layers(shape: Shape, gate: GateConfig | None, dtype: torch.dtype, device: str) -> list[DecoderLayer]:
    """Random layers whose states stay of order 1."""
    torch.manual_seed(0)
    layers = []
    options = DecoderOptions(GateSkip(gate, (), "rank") if gate else None, "compute", dtype)
    for _ in range(shape.layers):
        with torch.device("meta"):
            layer = DecoderLayer(config_of(shape, gate), options, 0)
        layer = layer.to_empty(device=device)
        for name, weight in layer.named_parameters():
            if name.endswith("norm.weight"):
                weight.data.fill_(1)
            else:
                weight.data.normal_(std=weight.shape[0] ** -0.5)
        layers.append(layer)
    return layers


def call_state(shape: Shape, tokens: int, kept: int, dtype: torch.dtype, device: str) -> CallState:
    """The values that all layers of a prefill share. Args: kept: how many tokens run each branch."""
    frequency = 500_000.0 ** -(torch.arange(0, shape.head, 2, device=device) / shape.head)
    angle = torch.arange(tokens, device=device)[:, None] * frequency
    return CallState(
        cos=angle.cos().to(dtype)[None],
        sin=angle.sin().to(dtype)[None],
        mask=torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None, None],
        values={
            "forced": torch.zeros(tokens, dtype=torch.bool, device=device),
            "forced_score": torch.zeros(tokens, device=device),
            "k": torch.tensor([kept]),  # on the CPU, so that nothing waits for the GPU
        },
    )


@torch.no_grad()
def prefill(layers: Sequence[DecoderLayer], hidden: Tensor, call: CallState) -> Tensor:
    """[N, H] through all layers, from an empty cache."""
    attention = layers[0].self_attn
    nothing = hidden.new_empty(1, attention.num_kv_heads, 0, attention.head_dim)
    for layer in layers:
        hidden, _, _, _ = layer(hidden, call, KeyValue(nothing, nothing))
    return hidden


def seconds_of(work: Callable[[], object], device: str) -> float:
    """One call: by CUDA events on a GPU, by the clock on a CPU."""
    if device == "cpu":
        return timed(work)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


@dataclass(frozen=True)
class Figure:
    """One form.

    Args:
        seconds: median of a prefill.
        flops: FLOPs of a prefill.
        time: median of seconds over the dense form's, within a round.
        work: FLOPs over the dense form's.
        saves: whether work is left out; with everything kept the row shows what the ops cost.
    """

    form: str
    seconds: float
    flops: float
    time: float
    work: float
    saves: bool

    @property
    def apart(self) -> float:
        """How far the time is from what the FLOPs predict, relative to the prediction."""
        return self.time / self.work - 1

    @property
    def reached(self) -> bool:
        """Whether that is near enough."""
        return not self.saves or abs(self.apart) <= MAX_APART


def measure(shape: Shape, tokens: int, budgets: Sequence[float], rounds: int, device: str) -> list[Figure]:
    """The dense form, and one for each budget."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(tokens, shape.hidden, device=device).to(dtype)
    forms = {"dense": (make_layers(shape, None, dtype, device), tokens)}
    gated = make_layers(shape, GateConfig(kind="scalar"), dtype, device)
    forms |= {f"budget {budget:g}": (gated, round(budget * tokens)) for budget in budgets}
    works = {}
    for name, (layers, kept) in forms.items():
        call = call_state(shape, tokens, kept, dtype, device)
        works[name] = lambda layers=layers, call=call: prefill(layers, hidden, call)
        out = works[name]()
        if not bool(torch.isfinite(out).all()):
            raise SystemExit(f"benchmarks.gpu_prefill: {name}: the states are not finite")
    times = in_turn(works, lambda name: seconds_of(works[name], device), rounds)
    dense_flops = flops(shape, tokens, tokens, gated=False)
    figures = []
    for name, (_, kept) in forms.items():
        left = flops(shape, tokens, kept, gated=name != "dense")
        ratio = ratios(times[name], times["dense"]).median
        figures.append(Figure(name, spread(times[name]).median, left, ratio, left / dense_flops, kept < tokens))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a table; exit code 1 without a GPU, or if the goal is missed on one."""
    made = parser("gpu_prefill", __doc__, rounds=20, quick={"device": "cpu", "small": True, "tokens": 16})
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    made.add_argument("--small", action="store_true", help="a tiny shape")
    made.add_argument("--tokens", type=int, default=4096, help="of the prompt (default: 4096)")
    made.add_argument("--budgets", type=float, nargs="+", default=(1.0, 0.7, 0.5), help="(default: 1 0.7 0.5)")
    args = parse(made, arguments)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            print("benchmarks.gpu_prefill: PyTorch sees no GPU here; --quick tries the script", file=sys.stderr)
            return 1
        from gsx_plugins.cuda import bind

        try:
            bind()
        except PluginLibraryError as error:
            print(error, file=sys.stderr)
            return 1
    print_header(made, args, arguments)
    shape = SMALL if args.small else LLAMA_3_8B
    figures = measure(shape, args.tokens, args.budgets, args.rounds, args.device)
    print(f"{args.tokens} tokens, {shape}, {args.device}, {args.rounds} rounds\n")
    lines = Table("form", "ms", "TFLOP/s", "time /dense", "FLOPs /dense", "apart")
    for one in figures:
        speed = f"{one.flops / one.seconds / 1e12:.0f}"
        lines.row(
            one.form, f"{one.seconds * 1e3:.2f}", speed, f"{one.time:.3f}", f"{one.work:.3f}", f"{one.apart:+.1%}"
        )
    reached = all(one.reached for one in figures)
    print(f"goal: at most {MAX_APART:.0%} apart: {'reached' if reached else 'missed'}")
    return 0 if reached or args.device == "cpu" else 1


if __name__ == "__main__":
    sys.exit(main())
