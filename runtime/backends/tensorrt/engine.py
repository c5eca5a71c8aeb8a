"""The language model on TensorRT: embed, step and head, one CUDA graph a step. See `Engine`.

step      one launch copies rows and positions from pinned memory, runs embed, step and head, and
          copies logits and the count of missing experts to pinned memory; nothing in it depends on
          the row. Then the new rows are copied to their places in the cache. There is one wait
feed      launches and returns; `logits` waits. The one stream keeps everything in order, so a cache
          may be trimmed or forked before the step is done
prefill   256 rows at a time if the engine has a profile for that, else row by row through the
          graphs without a head
failure   after an error of CUDA or TensorRT, or NaN or infinite logits, nothing runs until `reset`;
          rows are still counted, so that a conversation can be finished as it was heard
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError, EdgeError, SettingsError
from deeptalk_edge.lifetime import while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.tensorrt.cache import KINDS, CacheShape, DeviceCache
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice, Stopwatch
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine
from deeptalk_edge.runtime.backends.tensorrt.passes import PassInputs, PassOutputs
from deeptalk_edge.runtime.backends.tensorrt.weights import (
    bind_experts,
    bind_tables,
    bind_weights,
)
from deeptalk_edge.runtime.lm.cached_engine import CachedEngine
from deeptalk_edge.runtime.lm.engine import Logits

Array = NDArray[np.float32]

log = logging.getLogger(__name__)


class TensorrtEngine(CachedEngine[DeviceCache]):
    """One conversation on one GPU. The device closes with its last user."""

    def __init__(
        self,
        device: GpuDevice,
        bundle: Bundle,
        engines: Mapping[str, LoadedEngine],
        *,
        stream: int,
        context_rows: int,
        num_items: int = 1,
        uses_graphs: bool = True,
    ) -> None:
        """Load weights and experts, allocate the cache, and capture the graphs.

        `engines` are attached to `stream`; `num_items` is the most items that a conversation
        decodes at once.

        Raises ArtifactError if the engines do not match the manifest, BackendError if TensorRT
        refuses one, DoesNotFit if the device has not enough memory, SettingsError if they were
        built for fewer rows or items.
        """
        self._device, self._cuda, self._stream = device, device.cuda, stream
        self._spec = bundle.manifest.model
        self._embed, self._step, self._head = (engines[n] for n in ("embed", "step", "head"))
        self._plan = _Profiles(self._step)
        if num_items > self._plan.num_lanes:
            raise SettingsError(
                f"{bundle.path}: its step was built for one answer at a time; choose the mode "
                "single or text, or export the checkpoint for batch-parallel"
            )
        if context_rows > self._plan.capacity:
            raise SettingsError(
                f"{bundle.path}: its engines hold {self._plan.capacity} rows, {context_rows} are "
                "asked for; export the checkpoint again with more context rows"
            )
        self._uses_graphs = uses_graphs
        self._graphs: dict[tuple[int, bool], int] = {}
        self._failure: str | None = None
        self._in_flight: Stopwatch | None = None
        """Stopwatch of the pass under way."""
        self._step_watch = device.stopwatch("step", stream)
        self._prompt_watch = device.stopwatch("prefill", stream)
        super().__init__(self._open_cache(context_rows), device.share())
        self._open_passes()
        self._bind(bundle)
        self._capture_all()

    @while_open
    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        self._check_prompt(features, audio_mask)
        self._check_alive()
        self._cache.check_room(len(rows))  # refuse the whole prompt, not its end
        placed = np.zeros((len(rows), self._spec.decoder.width), np.float32)
        placed[audio_mask] = features
        size = self._plan.prefill_rows
        with self._guarded():
            for start in range(0, len(rows), size):
                part = slice(start, start + size)
                self._wait()
                if self._plan.prefill is None:
                    self._row_inputs.fill(
                        rows[part], self._cache.num_rows, placed[part], audio_mask[part]
                    )
                    self._run_row(with_head=False)
                else:
                    self._run_prompt(rows[part], placed[part], audio_mask[part])
            self._wait()
        if len(rows):
            self._fed_items = 1

    @while_open
    def feed(self, rows: Ids) -> None:
        """Launch a step; `logits` waits for it."""
        self._feed(rows)

    @while_open
    def decode_step(self, rows: Ids) -> Logits:
        self._feed(rows)
        return self._read_logits()

    @while_open
    def _last_logits(self) -> Logits:
        self._check_fed()
        self._check_alive()
        return self._read_logits()

    @while_open
    def reset(self) -> None:
        if self._failure is not None:
            self._recover()
        self._cache.reset()
        self._forget_fed()

    def _feed(self, rows: Ids) -> None:
        self._check_step(rows)
        self._check_alive()
        self._cache.check_room(1)
        with self._guarded():
            self._wait()
            lanes = np.resize(rows, (self._plan.num_lanes, rows.shape[1]))
            self._row_inputs.fill(lanes[:, None], self._cache.num_rows)
            self._run_row(with_head=True)
        self._fed_items = len(rows)
        self._has_logits = True

    def _read_logits(self) -> Logits:
        with self._guarded():
            if not self._has_logits:
                self._head_of_prompt()
            self._wait()
        logits = self._outputs.logits()
        if not (np.isfinite(logits.text.max()) and np.isfinite(logits.codes.max())):
            self._fail("the logits are not finite")
            raise BackendError(
                f"{self._head.path}: the logits are not finite; check the bundle "
                "with `deeptalk-edge bundle verify`, or export it with decoder=float32"
            )
        return logits

    # One pass -------------------------------------------------------------------------------------

    def _run_row(self, *, with_head: bool) -> None:
        """Launch a step for the row in the inputs, and append its new cache rows."""
        watch = self._step_watch if with_head else self._prompt_watch
        watch.start()
        profile = self._plan.decode_profile(self._cache.num_rows)
        graph = self._graphs.get((profile, with_head))
        if graph is None:
            self._enqueue_row(profile, with_head=with_head)
        else:
            self._cuda.launch(graph, self._stream)
        self._append(self._plan.num_lanes, 1, watch)

    def _enqueue_row(self, profile: int, *, with_head: bool) -> None:
        """Enqueue the part of a step that does not depend on the row: a CUDA graph's content."""
        outputs, lanes = self._outputs, self._plan.num_lanes
        self._bind_embed(0, self._row_inputs, 1)
        self._row_inputs.upload(self._stream)
        self._embed.enqueue(0)
        self._bind_rows(profile, self._row_inputs, lanes, 1)
        self._step.enqueue(profile)
        if with_head:
            self._bind_head(outputs.hidden)
            self._head.enqueue()
            outputs.fetch_logits(lanes, self._stream)
        outputs.fetch_missing(self._stream)

    def _run_prompt(self, rows: Ids, features: Array, mask: NDArray[np.bool_]) -> None:
        """Run many rows at once, in the profile that takes them."""
        profile, lanes, count = self._plan.prefill, self._plan.prefill_lanes, len(rows)
        assert profile is not None
        inputs = self._prompt_inputs
        self._prompt_watch.start()
        shape = (lanes, *rows.shape)
        inputs.fill(np.broadcast_to(rows, shape), self._cache.num_rows, features, mask)
        of_prompts = self._embed.num_profiles - 1
        self._bind_embed(of_prompts, inputs, count)
        inputs.upload(self._stream)
        self._embed.enqueue(of_prompts)
        self._bind_rows(profile, inputs, lanes, count)
        self._step.enqueue(profile)
        self._outputs.fetch_missing(self._stream)
        self._append(lanes, count, self._prompt_watch)
        self._last_row = count - 1

    def _append(self, num_lanes: int, num_rows: int, watch: Stopwatch) -> None:
        """Copy the new rows to the cache: the end of a pass."""
        self._has_logits = False
        self._last_row = 0
        self._cache.append(self._outputs.new, num_lanes=num_lanes, num_rows=num_rows)
        watch.stop()
        self._in_flight = watch

    def _head_of_prompt(self) -> None:
        """Compute the logits of the last row of lane 0; every lane holds the same row."""
        outputs, lanes, watch = self._outputs, self._plan.num_lanes, self._prompt_watch
        self._wait()
        watch.start()
        width = self._spec.decoder.width * self._step.dtype("hidden").itemsize
        source = outputs.hidden + self._last_row * width
        for lane in range(lanes):
            self._cuda.copy_on_device(outputs.last + lane * width, source, width, self._stream)
        self._bind_head(outputs.last)
        self._head.enqueue()
        outputs.fetch_logits(lanes, self._stream)
        watch.stop()
        self._in_flight, self._has_logits = watch, True

    def _wait(self) -> None:
        """Wait for the pass under way, and check that no expert was missing."""
        if self._in_flight is None:
            return
        self._cuda.synchronize(self._stream)
        self._in_flight.read()
        self._in_flight = None
        if self._outputs.missing.any():
            layers = self._spec.decoder.moe_layers
            where = [layers[i] for i in np.flatnonzero(self._outputs.missing)]
            raise BackendError(
                f"{self._step.path}: experts of layers {where} were not found though all are "
                "resident; export the bundle again with this version"
            )

    # Opening --------------------------------------------------------------------------------------

    def _open_cache(self, context_rows: int) -> DeviceCache:
        decoder, step = self._spec.decoder, self._step
        widths = {kind: step.shape(f"{kind}_{0}")[2] for kind in KINDS}
        if widths != {"latent": decoder.latent_dim, "rope": decoder.rope_dim}:
            raise ArtifactError(f"{step.path}: a cache of {widths}; export the bundle again")
        shape = CacheShape(
            num_layers=decoder.num_layers,
            num_lanes=self._plan.num_lanes,
            sizes=self._plan.sizes,
            row_bytes=tuple(  # type: ignore[arg-type]
                widths[kind] * step.dtype(f"{kind}_0").itemsize for kind in KINDS
            ),
        )
        return DeviceCache(self._device, shape, self._stream, capacity=context_rows)

    def _open_passes(self) -> None:
        model, plan, device = self._spec, self._plan, self._device
        columns = model.vocabulary.num_codebooks + 1
        width = model.decoder.width
        self._row_inputs = PassInputs(device, plan.num_lanes, 1, columns, width)
        if plan.prefill is not None:
            self._prompt_inputs = PassInputs(
                device, plan.prefill_lanes, plan.prefill_rows, columns, width
            )
        most_rows = max(plan.num_lanes, plan.prefill_lanes * plan.prefill_rows)
        self._outputs = PassOutputs(
            device, model, self._step, self._head, num_lanes=plan.num_lanes, most_rows=most_rows
        )
        self._has_logits = False
        self._last_row = 0

    def _bind(self, bundle: Bundle) -> None:
        """Bind all buffers whose addresses never change."""
        device, step, outputs = self._device, self._step, self._outputs
        bind_tables(device, bundle, self._embed, self._head)
        bind_weights(device, bundle, step)
        bind_experts(device, bundle, step, self._stream)
        self._embed.bind("x", outputs.x)
        for name, address in outputs.of_step.items():
            step.bind(name, address)
        for name, address in outputs.of_head.items():
            self._head.bind(name, address)
        for profile, size in enumerate(self._plan.sizes):
            lanes = self._plan.lanes[profile]
            for layer in range(self._spec.decoder.num_layers):
                for kind in KINDS:
                    name = f"{kind}_{layer}"
                    shape = (lanes, size, step.shape(name)[2])
                    address = self._cache.address(kind, size, layer)
                    step.bind(name, address, shape, profile=profile)

    def _bind_embed(self, profile: int, inputs: PassInputs, count: int) -> None:
        for name, (address, shape) in inputs.of_embed(count).items():
            self._embed.bind(name, address, shape, profile=profile)

    def _bind_rows(self, profile: int, inputs: PassInputs, lanes: int, count: int) -> None:
        shape = (lanes, count, self._spec.decoder.width)
        self._step.bind("x", self._outputs.x, shape, profile=profile)
        self._step.bind("positions", inputs.positions_at, (count,), profile=profile)

    def _bind_head(self, hidden: int) -> None:
        self._head.bind("hidden", hidden, (self._plan.num_lanes, self._spec.decoder.width))

    def _capture_all(self) -> None:
        """Run every step once, because TensorRT allocates in its first run, and then capture it.

        Prompt passes are not captured, because their shapes differ.
        """
        variants = [(profile, True) for profile in self._plan.decode]
        if self._plan.prefill is None:
            variants += [(profile, False) for profile in self._plan.decode]
        for profile, with_head in variants:
            self._enqueue_row(profile, with_head=with_head)
            self._cuda.synchronize(self._stream)
            if self._uses_graphs:
                self._graphs[profile, with_head] = self._captured(profile, with_head)

    def _captured(self, profile: int, with_head: bool) -> int:
        for engine, used in ((self._embed, 0), (self._step, profile), (self._head, 0)):
            engine.check_capturable(used)
        self._cuda.begin_capture(self._stream)
        try:
            self._enqueue_row(profile, with_head=with_head)
        finally:
            graph = self._cuda.end_capture(self._stream)
            self._device.hold(lambda: self._cuda.destroy_graph(graph))
        return graph

    # Failure --------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """After any failure on the device, the engine only counts rows."""
        try:
            yield
        except EdgeError as error:
            self._fail(str(error))
            raise

    def _fail(self, reason: str) -> None:
        self._failure, self._cache.is_lost, self._in_flight = reason, True, None

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise BackendError(
                f"the GPU's engine failed before ({self._failure}); begin a new conversation"
            )

    def _recover(self) -> None:
        """Start again with a cache of zeros; raises if the device is lost."""
        self._cuda.synchronize(self._stream)
        self._cache.clear()
        self._failure, self._cache.is_lost = None, False


class _Profiles:
    """The purposes of a step's profiles, derived from their shapes."""

    def __init__(self, step: LoadedEngine) -> None:
        """Raises ArtifactError if no profile is for decoding."""
        x = [step.most("x", profile) for profile in range(step.num_profiles)]
        self.sizes = tuple(step.most("latent_0", p)[1] for p in range(step.num_profiles))
        self.lanes = tuple(shape[0] for shape in x)
        self.decode = [profile for profile, shape in enumerate(x) if shape[1] == 1]
        if not self.decode:
            raise ArtifactError(f"{step.path}: no profile takes one row; export the bundle again")
        self.capacity = max(self.sizes[profile] for profile in self.decode)
        self.num_lanes = self.lanes[self.decode[0]]
        prompts = [profile for profile, shape in enumerate(x) if shape[1] > 1]
        self.prefill = prompts[0] if prompts else None
        self.prefill_rows = x[prompts[0]][1] if prompts else 1
        self.prefill_lanes = self.lanes[prompts[0]] if prompts else self.num_lanes

    def decode_profile(self, num_rows: int) -> int:
        """Return the smallest profile that sees all rows so far."""
        return min(
            (profile for profile in self.decode if num_rows <= self.sizes[profile]),
            key=lambda profile: self.sizes[profile],
        )
