"""llama.cpp as a peer: a checkpoint written as GGUF. llama.cpp itself is compiled in an environment of its own:

    python -m venv ENV
    CMAKE_ARGS="-DGGML_NATIVE=ON" ENV/bin/pip install llama-cpp-python==0.3.36    (minutes)

    python -m benchmarks.llama MODEL OUT.gguf --type Q8_0
    ENV/bin/python -m benchmarks.llama F32.gguf OUT.gguf --type Q4_K_M

Types of single matrices (F32, Q8_0, Q4_1) are written from a checkpoint of Llama's; mixes of types (Q4_K_M) are made by
llama.cpp from such a file. llama.cpp rotates neighbouring channels of a head where Hugging Face rotates halves, so the
rows of Q and K are put into that order. The file has no tokenizer: ids go in and come out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

# Name below `model.layers.{i}.` -> name below `blk.{i}.`.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """The name of a checkpoint's tensor in the file."""
    stem = name.removesuffix(".weight")
    if stem in ENDS:
        return f"{ENDS[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Q's or K's weight [heads x D, H] with the halves of each head in turn: row 0, D/2, 1, D/2 + 1, ..."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(model: Path, path: Path, kind: str) -> None:
    """Write a checkpoint as one file. Args: kind: type of the matrices, as GGUF calls it; norms stay float32."""
    import gguf
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    matrices = gguf.GGMLQuantizationType[kind]
    with safe_open(model / "model.safetensors", "pt") as tensors:  # NumPy has no bfloat16
        for name in tensors.keys():  # noqa: SIM118 (a file, no dictionary)
            value = tensors.get_tensor(name).float().numpy()
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value = interleaved(value, heads if "q_proj" in name else kv_heads)
            of_type = matrices if value.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(gguf_name(name), gguf.quantize(value, of_type), raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def mix(source: Path, path: Path, kind: str) -> None:
    """Quantize a file in float32 to a mix of types. Args: kind: as llama.cpp calls it, e.g. Q4_K_M."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), parameters):
        raise SystemExit(f"llama.cpp could not quantize {source} to {kind}: code {code}")


def main() -> None:
    """Write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", default="Q8_0")
    args = parser.parse_args()
    partial = args.output.with_suffix(".partial")
    (write_gguf if args.model.is_dir() else mix)(args.model, partial, args.type)
    partial.replace(args.output)


if __name__ == "__main__":
    main()
