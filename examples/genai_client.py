"""Run a gsx bundle with ONNX Runtime GenAI, a client that does not know gsx.

    pip install onnxruntime-genai
    python examples/genai_client.py out/demo "def " --max-new-tokens 64

`model.onnx` runs unchanged: its names are the ones that GenAI uses, its custom ops come with their definitions, and the
thresholds have the exported budget as their default. GenAI only needs a `genai_config.json` in addition, which this
script writes into a separate directory, next to links to the bundle's files.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.tokens import BundleTokenizer


def genai_config(bundle: Bundle) -> dict[str, Any]:
    """`genai_config.json` for a bundle's `model.onnx`."""
    shape = bundle.manifest.decoder
    return {
        "model": {
            "type": "llama",  # GenAI's name for a decoder whose cache is a pair of tensors per layer
            "vocab_size": shape.vocab_size,
            "context_length": shape.max_positions,
            "bos_token_id": shape.bos_id or 0,
            "eos_token_id": list(shape.eos_ids) or [shape.vocab_size],
            "pad_token_id": shape.pad_id or 0,
            "decoder": {
                "filename": bundle.manifest.graphs["model"].file,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.num_heads,
                "num_key_value_heads": shape.num_kv_heads,
                "num_hidden_layers": shape.num_layers,
                "session_options": {"log_id": "gsx", "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": shape.max_positions, "past_present_share_buffer": False, "do_sample": False},
    }


def greedy(bundle: Bundle, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt, computed by ONNX Runtime GenAI."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for path in bundle.directory.resolve().iterdir():
            (directory / path.name).symlink_to(path)
        (directory / "genai_config.json").write_text(json.dumps(genai_config(bundle)))
        model = og.Model(str(directory))
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + max_new_tokens, do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        tokens: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
    return tokens


def main() -> None:
    """Continue a text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    tokenizer = BundleTokenizer(bundle)
    prompt = tokenizer.encode(args.prompt)
    print(tokenizer.decode(prompt + greedy(bundle, prompt, args.max_new_tokens)))


if __name__ == "__main__":
    main()
