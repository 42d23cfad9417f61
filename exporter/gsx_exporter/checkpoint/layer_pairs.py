"""Checkpoints that store a layer as two blocks: Dory's, whose block 2i is layer i's attention and block 2i + 1 its MLP.

The names are those that transformers changes when it loads such a checkpoint (conversion_mapping.py, `dory`;
core_model_loading.py, `LayerPairCollapse`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = re.compile(r"layers\.(\d+)\.(mixer|attn_alpha|mlp_alpha)(?=\.|$)")
_RATES = {"attn_alpha": "lambda_1", "mlp_alpha": "lambda_2"}


def as_whole_layers(names: Mapping[str, str]) -> dict[str, str]:
    """Tensors under the names of transformers' layers; others stay as they are.

    Args: names: tensor name, as transformers would call it of any other family -> as it is stored.
    """
    return {_whole(name): stored for name, stored in names.items()}


def _whole(name: str) -> str:
    name = re.sub(r"^backbone\.", "model.", name).replace(".embeddings.", ".embed_tokens.")
    return _PART.sub(_layer, name).replace(".self_attn.g_proj.", ".self_attn.gate_proj.")


def _layer(found: re.Match[str]) -> str:
    block, part = int(found[1]), found[2]
    return f"layers.{block // 2}.{_RATES.get(part, ('self_attn', 'mlp')[block % 2])}"
