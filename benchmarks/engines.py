"""What building TensorRT-RTX engines takes, in time, memory and size: the example model, and 1.1 B parameters.

    python -m benchmarks.engines --work DIR        (needs 12 GB of disk and 8 GB of memory; --shape small needs little)

An engine is built in a process of its own; its peak is the kernel's account of that process (`ru_maxrss`, which counts
pages of mapped files too), and its seconds are those of the build alone. Both stand in `engine.json`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from transformers import LlamaConfig

from benchmarks.model import SHAPES
from exporter.checkpoint import expected_tensors
from exporter.config import ModelConfig

EXAMPLE = Path(__file__).parent.parent / "examples" / "model"


def make_large(path: Path) -> None:
    """A dense 1.1 B checkpoint in fp16: one block of random numbers, begun at another place for each tensor.

    (`benchmarks.model` makes true random weights in fp32, at ten times the cost; TensorRT looks at sizes alone here.)
    """
    hf = LlamaConfig(**SHAPES["1b"], max_position_embeddings=2048, tie_word_embeddings=False, eos_token_id=0)
    hf.architectures = ["LlamaForCausalLM"]
    block = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(np.float16)
    tensors = {
        name: np.resize(np.roll(block, 1009 * number), size)
        for number, (name, size) in enumerate(expected_tensors(ModelConfig.from_hf(hf)).items())
    }
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    hf.save_pretrained(path)


def command(*arguments: str) -> str:
    """Run the command line of this environment; returns what it printed."""
    code = "from gsx.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def bundles(work: Path, shape: str) -> Iterator[tuple[str, Path, Sequence[str]]]:
    """Name, bundle and further options of `gsx build`, for each engine to build."""
    if shape == "1b":
        model, bundle = work / "model-1b", work / "bundle-1b"
        if not bundle.exists():
            if not model.exists():
                make_large(model)
            command("export", str(model), "-o", str(bundle), "--precision", "fp16")
        yield "1.1 B, dense, fp16", bundle, ()
        return
    for precision in ("fp32", "fp16", "bf16"):
        bundle = work / f"example-{precision}"
        if not bundle.exists():
            command("export", str(EXAMPLE), "-o", str(bundle), "--budget", "0.7", "--precision", precision)
        yield f"example, masks, {precision}", bundle, ("--plugins", "none")
        yield f"example, plugins, {precision}", bundle, ()


def main() -> None:
    """Build each engine and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=["small", "1b"], default="1b")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print("| engine | ops | weights MB | engine MB | build s | whole command s | peak MB | peak / weights |")
    print("|---|---|---|---|---|---|---|---|")
    for name, bundle, options in bundles(args.work, args.shape):
        weights = json.loads((bundle / "gsx.json").read_text())["weights"]["size_bytes"]
        started = time.perf_counter()
        entry = json.loads(command("build", str(bundle), "--json", *options))
        seconds = time.perf_counter() - started
        made = entry["graphs"]["model"]
        print(
            f"| {name} | {', '.join(sorted(set(made['forms'].values()))) or 'none'} | {weights / 1e6:.1f} "
            f"| {made['size_bytes'] / 1e6:.1f} | {made['build_seconds']:.1f} | {seconds:.1f} "
            f"| {made['peak_bytes'] / 1e6:.0f} | {made['peak_bytes'] / weights:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
