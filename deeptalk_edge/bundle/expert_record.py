"""The packed expert record: the one definition that exporter, CPU kernels and GPU plugin read.

    record = gate_up (2G, C) | down (C, G) | gate_up scales | down scales | zeros to a whole page

C model width, G expert FFN width; both matrices row-major, gate rows before up rows. A record is
what a kernel reads: nothing is repacked between the disk and the multiply-add.

dtype      one weight                                 scales
float32    4 bytes                                    none
float16    2 bytes                                    none
bfloat16   2 bytes, here held as uint16               none
int8       1 byte                                     float32, one per row
int4       half a byte, byte = 16 * odd + even + 8    float16, one per `group` weights of a row

A weight's value is its integer times its scale. The int4 byte is a signed sum, so that
`odd = byte >> 4` and `even = (byte & 15) - 8` hold in any arithmetic, floating point included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import Between

PAGE_BYTES = 4096
"""Records start and end on pages, as direct I/O wants."""

ExpertDtype = Literal["float32", "float16", "bfloat16", "int8", "int4"]
INT4_GROUPS = (32, 64, 128)

Array: TypeAlias = npt.NDArray[Any]

_ALIGN_BYTES = 16  # the kernels load 16 bytes at a time, so every row and section starts on 16
_STORED_AS: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
    "int4": np.dtype("i1"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """Where one expert lies in the file."""

    layer: Annotated[int, Between(0, 1023)]
    expert: Annotated[int, Between(0, 4095)]
    offset: Annotated[int, Between(0, 1 << 48)]
    bytes: Annotated[int, Between(1, 1 << 32)]
    crc32: Annotated[int, Between(0, (1 << 32) - 1)]


@dataclass(frozen=True, slots=True)
class Section:
    """One array inside a record, as it is stored."""

    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The arrays of one expert: weights unpacked to one element each, scales where there are any.

    int4 weights are int8 in -8 to 7; bfloat16 weights are their upper 16 bits in uint16.
    """

    gate_up: Array
    """(2G, C)"""

    down: Array
    """(C, G)"""

    gate_up_scales: Array | None = None
    """(2G, 1) float32 for int8; (2G, C / group) float16 for int4."""

    down_scales: Array | None = None
    """(C, 1) or (C, G / group)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """The precision of some experts: those of a layer, or the MLPs that every token takes."""

    dtype: ExpertDtype
    group: Annotated[int, Between(1, 1 << 16)] | None = None
    """Weights that share a scale; only for int4."""

    def __str__(self) -> str:
        return f"{self.dtype}:{self.group}" if self.group else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordFormat:
    """Sizes and precision of every routed expert of a model; gives each byte its place."""

    dtype: ExpertDtype
    width: int
    ffn_width: int
    group: int | None = None
    """Weights that share a scale; only for int4."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(ExpertDtype):
            known = ", ".join(get_args(ExpertDtype))
            raise ValueError(f"expert dtype {self.dtype!r}: expected one of {known}")
        if (self.dtype == "int4") is not (self.group in INT4_GROUPS):
            raise ValueError(
                f"{self.dtype} experts with group {self.group}: int4 needs a group of "
                f"{', '.join(map(str, INT4_GROUPS))}, every other dtype none"
            )
        for name, size in (("width", self.width), ("ffn_width", self.ffn_width)):
            step = self.group or (4 if self.dtype == "float32" else 16)
            if size <= 0 or size % step:
                raise ValueError(f"{name} = {size}: {self.dtype} experts need a multiple of {step}")

    @property
    def sections(self) -> dict[str, Section]:
        """Every array of the record by its name in `ExpertWeights`, in file order."""
        shapes = {"gate_up": (2 * self.ffn_width, self.width), "down": (self.width, self.ffn_width)}
        stored = _STORED_AS[self.dtype]
        pack = 2 if self.dtype == "int4" else 1
        sections: dict[str, Section] = {}
        offset = 0
        for name, (rows, columns) in shapes.items():
            sections[name] = Section(offset, (rows, columns // pack), stored)
            offset = _aligned(sections[name].end, _ALIGN_BYTES)
        if self.dtype in ("int8", "int4"):
            scale: np.dtype[Any] = np.dtype("<f4" if self.dtype == "int8" else "<f2")
            for name, (rows, columns) in shapes.items():
                groups = columns // self.group if self.group else 1
                sections[f"{name}_scales"] = Section(offset, (rows, groups), scale)
                offset = _aligned(sections[f"{name}_scales"].end, _ALIGN_BYTES)
        return sections

    @property
    def content_bytes(self) -> int:
        """Bytes of a record before the zeros that fill its last page."""
        return max(section.end for section in self.sections.values())

    @property
    def record_bytes(self) -> int:
        """Bytes from one record to the next."""
        return _aligned(self.content_bytes, PAGE_BYTES)

    def pack(self, weights: ExpertWeights) -> npt.NDArray[np.uint8]:
        """Lay one expert out as a record, (record_bytes,).

        Raises ValueError if an array is missing, of another shape or dtype, or out of range.
        """
        record = np.zeros(self.record_bytes, np.uint8)
        sections = self.sections
        if "gate_up_scales" not in sections and (
            weights.gate_up_scales is not None or weights.down_scales is not None
        ):
            raise ValueError(f"{self.dtype} experts carry no scales; scales were given")
        for name, section in sections.items():
            array = getattr(weights, name)
            if self.dtype == "int4" and not name.endswith("_scales"):
                array = pack_int4(array)
            if array is None or array.shape != section.shape or array.dtype != section.dtype:
                found = "nothing" if array is None else f"{array.dtype} {array.shape}"
                raise ValueError(
                    f"{name} of a {self.dtype} expert: expected {section.dtype} {section.shape} "
                    f"as stored, found {found}"
                )
            record[section.offset : section.end] = _bytes_of(array)
        return record

    def unpack(self, record: npt.NDArray[np.uint8]) -> ExpertWeights:
        """Read a record; float and int8 arrays are views of it.

        Raises ArtifactError if it has another size.
        """
        if record.dtype != np.uint8 or record.shape != (self.record_bytes,):
            raise ArtifactError(
                f"expert record: expected {self.record_bytes} bytes, found {record.dtype} "
                f"{record.shape}; export the bundle again"
            )
        arrays = {
            name: record[section.offset : section.end].view(section.dtype).reshape(section.shape)
            for name, section in self.sections.items()
        }
        if self.dtype == "int4":
            arrays["gate_up"] = unpack_int4(arrays["gate_up"])
            arrays["down"] = unpack_int4(arrays["down"])
        return ExpertWeights(**arrays)

    def dequantise(self, weights: ExpertWeights) -> tuple[Array, Array]:
        """The values of the weights: `gate_up` (2G, C) and `down` (C, G), float32."""
        return (
            self._values(weights.gate_up, weights.gate_up_scales),
            self._values(weights.down, weights.down_scales),
        )

    def _values(self, weights: Array, scales: Array | None) -> Array:
        if self.dtype == "bfloat16":
            return from_bfloat16(weights)
        values = weights.astype(np.float32)
        if scales is None:
            return values
        repeats = weights.shape[1] // scales.shape[1]
        return values * np.repeat(scales.astype(np.float32), repeats, axis=1)


def pack_int4(weights: Array) -> npt.NDArray[np.int8]:
    """(N, K) int8 in -8 to 7 to (N, K / 2) bytes, even element in the low nibble."""
    if weights.dtype != np.int8 or weights.ndim != 2 or weights.shape[1] % 2:
        raise ValueError(
            f"int4 weights: expected int8 (N, even K), found {weights.dtype} {weights.shape}"
        )
    if weights.size and (weights.min() < -8 or weights.max() > 7):
        raise ValueError(f"int4 weights run from {weights.min()} to {weights.max()}, not -8 to 7")
    packed = (weights[:, 1::2] << 4) + weights[:, ::2] + 8
    return packed.astype(np.int8)


def unpack_int4(packed: Array) -> npt.NDArray[np.int8]:
    """The inverse of `pack_int4`."""
    weights = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    weights[:, ::2] = (packed & 15) - 8
    weights[:, 1::2] = packed >> 4
    return weights


def to_bfloat16(values: Array) -> npt.NDArray[np.uint16]:
    """Round finite float32 to the nearest bfloat16, ties to even, held in uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: Array) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 held in uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _aligned(offset: int, step: int) -> int:
    return -(-offset // step) * step


def _bytes_of(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
