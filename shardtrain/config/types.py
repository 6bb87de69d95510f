"""The types of values in a config: numbers within bounds, and mappings that nothing can change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from shardtrain.config.frozen import freeze, thaw
from shardtrain.sharding import mesh_axes

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float64"]

_frozen = (AfterValidator(freeze), PlainSerializer(thaw))
Options = Annotated[Mapping[str, Any], *_frozen]
Flags = Annotated[Mapping[str, bool | int | float | str], *_frozen]
#: How much of each mesh axis is across the slow network.
SlowSizes = Annotated[Mapping[str, Count], *_frozen]


def _as_tuple(value: Any) -> Any:
    """One mesh axis, several, or null for none; pydantic refuses anything else."""
    return mesh_axes(value) if isinstance(value, str | list | None) else value


Rules = Annotated[Mapping[str, Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]], *_frozen]
