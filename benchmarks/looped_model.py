"""A small looped model, trained here: what figures on looped models need, since a random one predicts nothing.

    python -m benchmarks.looped_model -o MODEL [--steps 600]

It is shaped like Dory (a normalized Transformer, nGPT): 1 layer, 3 looped ones, 1 layer; up to 4 loops; hidden 96. Each
step draws a number of loops, so that the model reads and writes with each of them, and a draft of fewer loops guesses
what all of them would say. The text is Python's standard library, as for the example model; the tokenizer is trained on
it. Weights are normed after each step, as nGPT does it (arXiv:2410.01131, 2.6).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DoryConfig, PreTrainedTokenizerFast

from gsx_exporter.training.data import read_rows
from gsx_exporter.training.fresh import write_base
from gsx_exporter.training.settings import DataSettings, ExitSettings, ModelShape, TrainSettings
from gsx_plugins.files import writing_folder
from gsx_plugins.progress import silent

VOCABULARY, HIDDEN, LENGTH, BATCH, LOOPS, SEED = 2048, 96, 128, 8, 4, 20261130
# Of the learning rate: constant after a warm-up, then linearly to 0 over the last part.
RATE, WARM_UP, DECAY = 4e-3, 40, 0.3
# Steps between two lines of progress, and held-out rows at the end.
EVERY, HELD_OUT = 50, 32


def configuration() -> DoryConfig:
    """The model's shape. Half of the layers see 64 tokens."""
    return DoryConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=5,
        n_input_layers=1,
        n_recurrent_layers=3,
        n_output_layers=1,
        n_recurrent_loops=LOOPS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=1024,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        initializer_range=HIDDEN**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def norm_weights(model: Any) -> None:
    """Norm every matrix along its axis of size hidden."""
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            weight.copy_(nn.functional.normalize(weight, dim=0 if writes else 1))


def train(out: Path, steps: int) -> None:
    """Train the model and write it to a new directory."""
    torch.manual_seed(SEED)
    data = DataSettings(length=LENGTH)
    shape = ModelShape(vocab_size=VOCABULARY, hidden_size=HIDDEN)
    settings = TrainSettings(
        mode="full", new=shape, exits=ExitSettings(every=4), data=data
    )  # of which the text is read
    with tempfile.TemporaryDirectory() as place, writing_folder(out) as folder:
        base = Path(place) / "base"
        write_base(settings, base, silent)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        rows = read_rows(data, tokenizer, end_of_text=0, seed=SEED, held_out_rows=HELD_OUT)
        model = AutoModelForCausalLM.from_config(configuration(), dtype=torch.float32, attn_implementation="sdpa")
        norm_weights(model)
        run(model, rows.train, steps)
        found = evaluate(model, rows.held_out)
        print("held out, nats a token by loops:", json.dumps(found))
        model.model.config.n_recurrent_loops = LOOPS
        model.save_pretrained(folder)
        for path in base.glob("*token*"):
            shutil.copy(path, folder)


def run(model: Any, text: Any, steps: int) -> None:
    """Train for some steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    rng, began = np.random.default_rng(SEED), time.monotonic()
    order, losses = rng.permutation(len(text)), list[float]()
    for step in range(steps):
        picked = order[np.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        ids = torch.tensor([text[int(row)]["input_ids"][:LENGTH] for row in picked])
        model.model.config.n_recurrent_loops = int(rng.integers(1, LOOPS + 1))
        left = min(1.0, (steps - step) / max(1.0, DECAY * steps))
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARM_UP) * left
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        # A gradient that is not finite, as one in some hundred steps has, would end in every weight.
        if bool(nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()):
            optimizer.step()
            norm_weights(model)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if (step + 1) % EVERY == 0:
            spent = time.monotonic() - began
            print(f"{step + 1} of {steps}, {spent:.0f} s: {np.mean(losses[-EVERY:]):.3f} nats a token", flush=True)


@torch.no_grad()
def evaluate(model: Any, text: Any) -> dict[int, float]:
    """Nats a token of held-out text with each number of loops."""
    ids = torch.tensor([row["input_ids"] for row in text.take(HELD_OUT) if len(row["input_ids"]) == LENGTH])
    found = {}
    for loops in range(1, LOOPS + 1):
        model.model.config.n_recurrent_loops = loops
        found[loops] = round(float(model(ids, labels=ids, use_cache=False).loss), 3)
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    train(given.out, given.steps)


if __name__ == "__main__":
    main()
