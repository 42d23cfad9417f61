"""All ops of the domain by name (only their ONNX halves, so importing this does not need torch)."""

from __future__ import annotations

from collections.abc import Mapping

from gsx_plugins.domain import OnnxOp
from gsx_plugins.full_attention.onnx_op import FULL_ATTENTION
from gsx_plugins.gated_scatter_add.onnx_op import GATED_SCATTER_ADD
from gsx_plugins.gathered_attention.onnx_op import GATHERED_ATTENTION
from gsx_plugins.routed_experts.onnx_op import ROUTED_EXPERTS
from gsx_plugins.threshold_gather.onnx_op import THRESHOLD_GATHER
from gsx_plugins.topk_gather.onnx_op import TOPK_GATHER

OPS: Mapping[str, OnnxOp] = {
    op.name: op
    for op in (
        TOPK_GATHER,
        THRESHOLD_GATHER,
        GATED_SCATTER_ADD,
        GATHERED_ATTENTION,
        FULL_ATTENTION,
        ROUTED_EXPERTS,
    )
}


def register_all() -> None:
    """Register the schema of every op with onnx."""
    for op in OPS.values():
        op.register()
