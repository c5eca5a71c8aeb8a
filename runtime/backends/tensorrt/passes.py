"""Inputs and outputs of a pass: pinned memory and its copy on the device.

Addresses are fixed when the engine is opened, so a CUDA graph may keep them. The inputs of a pass
are one block on each side, so one copy transfers all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice, offsets_of
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine, Shape
from deeptalk_edge.runtime.lm.engine import Logits

Array = NDArray[np.float32]


class PassInputs:
    """Rows (B, T, K + 1), positions (T), audio features (T, C), and the mask of rows with
    features."""

    def __init__(
        self, device: GpuDevice, num_items: int, num_rows: int, num_columns: int, width: int
    ) -> None:
        self._cuda = device.cuda
        self._num_items, self._columns, self._width = num_items, num_columns, width
        sizes = [8 * num_items * num_rows * num_columns, 4 * num_rows]
        sizes += [4 * num_rows * width, num_rows]
        *self._offsets, self._num_bytes = offsets_of(sizes)
        self._host = device.pinned(self._num_bytes)
        self._host.array[:] = 0
        self._device = device.malloc(self._num_bytes)

    @property
    def positions_at(self) -> int:
        """Address of the positions on the device."""
        return self._device + self._offsets[1]

    def fill(
        self,
        rows: Ids,
        first: int,
        features: Array | None = None,
        audio_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Write rows (B, T, K + 1), or (T, K + 1) for all items, beginning at position `first`.

        Call it after the last pass has read its inputs.
        """
        count = rows.shape[-2]
        view, offsets = self._host.view, self._offsets
        view(np.int64, (self._num_items, count, self._columns), offsets[0])[...] = rows
        view(np.int32, (count,), offsets[1])[...] = np.arange(first, first + count)
        heard = view(np.float32, (count, self._width), offsets[2])
        heard[...] = 0.0 if features is None else features
        view(np.bool_, (count,), offsets[3])[...] = False if audio_mask is None else audio_mask

    def upload(self, stream: int) -> None:
        """Copy all inputs to the device."""
        self._cuda.copy_to_device(self._device, self._host.address, self._num_bytes, stream)

    def of_embed(self, num_rows: int) -> dict[str, tuple[int, Shape]]:
        """Address and shape of each input of embed."""
        at = [self._device + offset for offset in self._offsets]
        return {
            "rows": (at[0], (self._num_items, num_rows, self._columns)),
            "features": (at[2], (num_rows, self._width)),
            "audio_mask": (at[3], (num_rows,)),
        }


class PassOutputs:
    """The outputs of embed, step and head, for at most `most_rows` rows."""

    def __init__(
        self,
        device: GpuDevice,
        model: ModelSpec,
        step: LoadedEngine,
        head: LoadedEngine,
        *,
        num_lanes: int,
        most_rows: int,
    ) -> None:
        """`most_rows` is the most of B x T in a pass."""
        decoder, vocabulary = model.decoder, model.vocabulary
        self._cuda = device.cuda
        width, layers = decoder.width * step.dtype("hidden").itemsize, len(decoder.moe_layers)
        self.x = device.malloc(most_rows * decoder.width * step.dtype("x").itemsize)
        self.hidden = device.malloc(most_rows * width)
        self.last = device.malloc(num_lanes * width)
        """Hidden state of a prompt's last row, repeated for each lane."""
        self.new = {
            kind: device.malloc(
                decoder.num_layers * most_rows * dim * step.dtype(f"new_{kind}s").itemsize
            )
            for kind, dim in (("latent", decoder.latent_dim), ("rope", decoder.rope_dim))
        }
        self._missing = device.malloc(4 * layers)
        self.of_step = {
            "hidden": self.hidden,
            "new_latents": self.new["latent"],
            "new_ropes": self.new["rope"],
            "missing": self._missing,
            "expert_ids": device.malloc(4 * layers * most_rows * decoder.top_k),
        }
        pinned = device.pinned(4 * layers)
        self._missing_host = pinned.address
        self.missing = pinned.view(np.int32, (layers,))
        self.missing[:] = 0
        codes = (vocabulary.num_codebooks, vocabulary.codebook_block)
        self._text = _Fetched(device, head.dtype("text_logits"), (vocabulary.text_size,), num_lanes)
        self._codes = _Fetched(device, head.dtype("code_logits"), codes, num_lanes)
        self.of_head = {"text_logits": self._text.address, "code_logits": self._codes.address}

    def fetch_logits(self, num_lanes: int, stream: int) -> None:
        """Copy the text logits of the last lane and the code logits of the first to the host: item
        0 speaks, the last item writes."""
        self._text.fetch(self._cuda, num_lanes - 1, stream)
        self._codes.fetch(self._cuda, 0, stream)

    def fetch_missing(self, stream: int) -> None:
        """Copy each layer's count of experts without a slot to the host."""
        self._cuda.copy_to_host(self._missing_host, self._missing, self.missing.nbytes, stream)

    def logits(self) -> Logits:
        """The logits that were copied; wait for the stream first."""
        return Logits(self._text.values(), self._codes.values())


class _Fetched:
    """One lane of an output (B, ...), in pinned memory."""

    def __init__(
        self, device: GpuDevice, dtype: np.dtype[Any], shape: tuple[int, ...], num_lanes: int
    ) -> None:
        self._lane_bytes = int(np.prod(shape)) * dtype.itemsize
        self.address = device.malloc(num_lanes * self._lane_bytes)
        pinned = device.pinned(self._lane_bytes)
        self._host, self._array = pinned.address, pinned.view(dtype.type, (1, *shape))

    def fetch(self, cuda: Any, lane: int, stream: int) -> None:
        cuda.copy_to_host(
            self._host, self.address + lane * self._lane_bytes, self._lane_bytes, stream
        )

    def values(self) -> Array:
        """(1, ...), float32."""
        return self._array.astype(np.float32, copy=False)
