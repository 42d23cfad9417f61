"""ONNX inputs and outputs, as a manifest describes them."""

from __future__ import annotations

import onnx

from gsx_engines.bundle.fields import TensorInfo


def tensor_info(value: onnx.ValueInfoProto) -> TensorInfo:
    """Name, type and shape of an input or output; a dynamic axis has its name."""
    tensor = value.type.tensor_type
    return TensorInfo(
        name=value.name,
        type=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        shape=tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim),
    )
