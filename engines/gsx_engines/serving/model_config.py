"""Triton's model configuration, `config.pbtxt`: a checked description, and its text.

It covers only what gsx writes. Values are checked when the description is made, so nothing invalid is written; the text
is in protobuf's text format (names and structure: Triton's `model_config.proto`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")]
Axis = Annotated[int, Field(ge=-1)]
DataType = Literal[
    "TYPE_BOOL",
    "TYPE_INT32",
    "TYPE_INT64",
    "TYPE_UINT32",
    "TYPE_UINT64",
    "TYPE_FP16",
    "TYPE_FP32",
    "TYPE_FP64",
    "TYPE_BF16",
    "TYPE_STRING",
]


class _Checked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tensor(_Checked):
    """An input or output.

    Args:
        dims: as in Triton, -1 for any size; empty for a scalar, which a client sends as an array of one.
        optional: whether a request may leave it out.
        shape_tensor: whether TensorRT reads its values on the host before it runs.
    """

    name: Name
    data_type: DataType
    dims: tuple[Axis, ...]
    optional: bool = False
    shape_tensor: bool = False


class TritonConfig(_Checked):
    """A model of a repository.

    Args:
        batch: Triton's `max_batch_size`; above 0, tensors have an axis for it in front of `dims`.
        gpus: numbers of the GPUs that get an instance each; empty for all that Triton sees.
        profiles: for the backend `tensorrt`, numbers of the optimization profiles that an instance uses.
    """

    name: Name
    backend: Literal["python", "tensorrt"]
    inputs: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    outputs: Annotated[tuple[Tensor, ...], Field(min_length=1)]
    kind: Literal["KIND_CPU", "KIND_GPU"]
    decoupled: bool
    parameters: Mapping[Name, str]
    batch: Annotated[int, Field(ge=0)] = 0
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    profiles: tuple[int, ...] = ()

    def text(self) -> str:
        """The configuration as protobuf text."""
        lines = [f"name: {_quoted(self.name)}", f"backend: {_quoted(self.backend)}", f"max_batch_size: {self.batch}"]
        if self.backend == "tensorrt":
            lines.insert(1, 'platform: "tensorrt_plan"')
        for field, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                lines += [
                    f"{field} {{",
                    f"  name: {_quoted(tensor.name)}",
                    f"  data_type: {tensor.data_type}",
                    f"  dims: [{', '.join(map(str, tensor.dims or (1,)))}]",
                    *(["  reshape { shape: [] }"] if not tensor.dims else []),
                    *(["  optional: true"] if tensor.optional else []),
                    *(["  is_shape_tensor: true"] if tensor.shape_tensor else []),
                    "}",
                ]
        profiles = [f"  profile: {_quoted(str(number))}" for number in self.profiles]
        gpus = [f"  gpus: [{', '.join(map(str, self.gpus))}]"] if self.gpus else []
        lines += ["instance_group {", "  count: 1", f"  kind: {self.kind}", *gpus, *profiles, "}"]
        if self.decoupled:
            lines += ["model_transaction_policy {", "  decoupled: true", "}"]
        for name, value in self.parameters.items():
            lines += ["parameters {", f"  key: {_quoted(name)}", f"  value {{ string_value: {_quoted(value)} }}", "}"]
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string in protobuf's text format, which accepts all ASCII escapes of JSON."""
    return json.dumps(text)
