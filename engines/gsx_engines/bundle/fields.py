"""Building blocks of the sections of `gsx.json`: the base class of a section, and types of fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)

Threshold = Annotated[
    float,
    BeforeValidator(lambda value: -math.inf if value is None else value),
    PlainSerializer(lambda value: None if value == -math.inf else value, return_type=float | None),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]}),
]
Table = Sequence[tuple[Threshold, Threshold]]
Budget = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Scale = Annotated[float, Field(gt=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# A file of the bundle; its name has no folders, so it cannot point outside the bundle.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]


class Section(BaseModel):
    """A part of the manifest. Unknown keys and wrong types are refused; a section is immutable."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)


class SparseSection(Section):
    """A section without the keys that have nothing to say: readers of bundles that were made before these keys were
    there refuse unknown ones. `sparse` names them."""

    sparse: ClassVar[frozenset[str]]

    @model_serializer(mode="wrap")
    def _leave_out(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = fields(self)
        return {name: value for name, value in values.items() if value or name not in self.sparse}


class TensorInfo(Section):
    """An input or output of a graph; a dynamic axis has a name in place of a size."""

    name: str
    type: str
    shape: tuple[int | str, ...]
