"""Time and memory of exporting models that are larger than memory: the 8 B shape of Llama 3, and Qwen3-30B-A3B's.

    python -m benchmarks.size --work DIR --shape 8b --forms bf16 genai

Weights are random, in bfloat16, in a file for each layer. Each export is a process of its own, Python's start included.
Its peak is that of its own pages, sampled every 20 ms: pages of mapped files count only in the second figure, the
kernel's (`ru_maxrss`), since the system takes those back when it needs them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, PretrainedConfig

from benchmarks.bundles import GSX
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import random_text, write_companions
from gsx_exporter.checkpoint.tensors import expected_tensors
from gsx_exporter.config import ModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
    "30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "vocab_size": 151936,
    },
    # To try it out.
    "tiny": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 256,
    },
}
_INT8 = ("--int8", "--keep-precision", "none")
GSX_FORMS = {
    "bf16": ("--precision", "bf16"),
    "fp16": ("--precision", "fp16"),
    "int8": _INT8,
    "int8-weights": (*_INT8, "--weights-only"),
}
GENAI = "genai"
WORDS = 12_000
_EVERY_SECONDS = 0.02
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Run:
    """A finished process: exit status, seconds, the most GB of its own pages and of all its pages, and GB written."""

    status: int
    seconds: float
    own_gb: float
    all_gb: float
    written_gb: float


def make(path: Path, hf: PretrainedConfig) -> Path:
    """Write a checkpoint from one block of random numbers, with another offset for each tensor."""
    config = ModelConfig.from_hf(hf)
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in expected_tensors(config).items():
        parts = name.split(".")
        shards.setdefault(f"layer-{parts[2]}" if "layers" in parts else parts[-2], {})[name] = size
    path.mkdir(parents=True)
    places: dict[str, str] = {}
    number = 0
    for shard, tensors in shards.items():
        values = {}
        for name, size in tensors.items():
            number += 1
            count = torch.Size(size).numel()
            rolled = block.roll(1009 * number)
            many = rolled.repeat(-(-count // _BLOCK))[:count].reshape(size)
            values[name] = torch.ones(size, dtype=torch.bfloat16) if "norm" in name else many.clone()
        file = f"model-{shard}.safetensors"
        save_file(values, path / file, metadata={"format": "pt"})
        places |= dict.fromkeys(values, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    write_companions(path, hf)
    return path


def run(command: Sequence[str], output: Path, log: Path) -> Run:
    """Run a command that writes a directory, and watch its memory. Args: log: gets its output."""
    shutil.rmtree(output, ignore_errors=True)
    started, own = time.perf_counter(), 0
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        while True:
            found, status, usage = os.wait4(process.pid, os.WNOHANG)
            if found:
                break
            own = max(own, _own_pages(process.pid))
            time.sleep(_EVERY_SECONDS)
    seconds = time.perf_counter() - started
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) if output.is_dir() else 0
    return Run(os.waitstatus_to_exitcode(status), seconds, own / 1e9, usage.ru_maxrss * 1024 / 1e9, written / 1e9)


def _own_pages(pid: int) -> int:
    """Bytes of a process's pages that no file has."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    sizes = dict(line.split(":", 1) for line in text.splitlines())
    return sum(1024 * int(sizes[key].split()[0]) for key in ("RssAnon", "RssShmem") if key in sizes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    quick = {"shape": "tiny", "tokens": 256, "layers": 2}
    made = parser("size", __doc__, work="the model, and one export at a time (8b: 34 GB)", quick=quick)
    made.add_argument("--shape", choices=SHAPES, default="8b", help="of the model (default: 8b)")
    made.add_argument("--layers", type=int, help="fewer layers than the shape has")
    made.add_argument("--forms", nargs="*", choices=[*GSX_FORMS, GENAI], default=["bf16", "int8"], help="exports")
    made.add_argument("--tokens", type=int, default=4096, help="of calibration text (default: 4,096)")
    made.add_argument("--genai-precision", default="bf16", help="of GenAI's builder, for CUDA (default: bf16)")
    args = parse(made, arguments)
    keys = dict(SHAPES[args.shape])
    keys["num_hidden_layers"] = args.layers or keys["num_hidden_layers"]
    hf = AutoConfig.for_model(
        keys.pop("model_type"), **keys, max_position_embeddings=8192, tie_word_embeddings=False, eos_token_id=0
    )
    hf.dtype = "bfloat16"
    model = args.work / f"{args.shape}-{hf.num_hidden_layers}"
    if not model.exists():
        make(model.with_suffix(".partial"), hf).rename(model)
    text = args.work / f"{args.shape}.txt"
    if not text.exists():
        random_text(text, hf.vocab_size, WORDS)
    print_header(made, args, arguments)
    largest = max(2 * torch.Size(size).numel() for size in expected_tensors(ModelConfig.from_hf(hf)).values())
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    print(f"checkpoint: {stored / 1e9:.1f} GB, {hf.num_hidden_layers} layers; largest tensor {largest / 1e9:.2f} GB\n")
    heads = ("own pages, GB", "above the largest tensor, GB", "with mapped files, GB", "written GB")
    lines = Table("export", "seconds", *heads)
    for form in args.forms:
        output = args.work / "export"
        if form == GENAI:
            command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(output)]
            command += ["-p", args.genai_precision, "-e", "cuda", "-c", str(args.work / "cache")]
        else:
            command = [*GSX, "export", str(model), "-o", str(output), *GSX_FORMS[form]]
            command += ["--calibration", str(text), "--calibration-tokens", str(args.tokens)] if "int8" in form else []
        one = run(command, output, args.work / f"{args.shape}-{form}.log")
        name = f"GenAI builder, {args.genai_precision}" if form == GENAI else f"gsx {form}"
        figures = [f"{x:.2f}" for x in (one.own_gb, one.own_gb - largest / 1e9, one.all_gb, one.written_gb)]
        lines.row(name if not one.status else f"{name}: ended with {one.status}", f"{one.seconds:.0f}", *figures)
        shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
