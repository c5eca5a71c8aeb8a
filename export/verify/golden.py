"""`golden.npz`: small inputs through the exported graphs, and what came out.

The inputs touch every graph: a chirp for the encoder; a prompt of text and heard rows, then one
more row, for the decoder with and without a cache; four frames for the codec, silent for two.
A device that gives other outputs is wrong, whatever its libraries say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.export.graphs.builder import Array
from deeptalk_edge.model.features import RATE_HZ, log_mel, max_samples, num_frames
from deeptalk_edge.model.rows import codec_columns, text_rows
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.ort.graph import int8_saturates, keep_int8_exact

_CHIRP_MS = 300
_TEXT_ROWS = 3
_HEARD_ROWS = 4
_CODEC_FRAMES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenInputs:
    """What the graphs are given."""

    pcm: NDArray[np.float32]
    """A chirp at 16 kHz, (N,)."""
    rows: NDArray[np.int64]
    """A prompt, (1, T, K + 1)."""
    audio_mask: NDArray[np.bool_]
    """The rows that hear the first frames of the chirp, (T,)."""
    next_row: NDArray[np.int64]
    """(1, 1, K + 1)."""
    codes: NDArray[np.int64]
    """Codec frames, (A, K)."""


def golden_inputs(spec: ModelSpec) -> GoldenInputs:
    """The inputs for a model: they follow from its sizes alone."""
    vocabulary = spec.vocabulary
    num_samples = min(RATE_HZ * _CHIRP_MS // 1000, max_samples(spec.encoder))
    seconds = np.arange(num_samples) / RATE_HZ
    chirp = 0.5 * np.sin(2 * np.pi * (200 + 2000 * seconds) * seconds)
    num_heard = min(_HEARD_ROWS, num_frames(num_samples))
    num_rows = 2 * _TEXT_ROWS + num_heard
    ids = np.arange(num_rows) * 7 % vocabulary.text_size
    audio_mask = np.zeros(num_rows, np.bool_)
    audio_mask[_TEXT_ROWS : _TEXT_ROWS + num_heard] = True
    columns = np.arange(vocabulary.num_codebooks)
    frames = np.arange(_CODEC_FRAMES)[:, None] * 11 + columns * 5
    codes = (frames % vocabulary.codebook_size).astype(np.int64)
    return GoldenInputs(
        pcm=chirp.astype(np.float32),
        rows=text_rows(vocabulary, ids)[None],
        audio_mask=audio_mask,
        next_row=np.append(codes[0] + codec_columns(vocabulary, 0), vocabulary.bos)[None, None],
        codes=codes,
    )


def golden_outputs(
    directory: Path, manifest: Manifest, inputs: GoldenInputs
) -> dict[str, NDArray[np.float32]]:
    """Run the graphs of a bundle, or of one that is being made."""
    graphs = manifest.ort_graphs
    files = {"encoder": graphs.encoder, "head": graphs.head, "codec": graphs.codec}
    decoder = DecoderRunner(directory, manifest)
    return run_golden(
        inputs,
        manifest,
        open_graph=lambda name: GraphRunner(directory / files[name]),
        decode=lambda feeds: [decoder.run(**one) for one in feeds],
    )


def run_golden(
    inputs: GoldenInputs,
    manifest: Manifest,
    *,
    open_graph: Callable[[str], GraphRunner],
    decode: Callable[[Sequence[Mapping[str, Array]]], Sequence[Array]],
) -> dict[str, NDArray[np.float32]]:
    """The golden outputs by their names, with one graph in memory at a time.

    `open_graph` opens encoder, head and codec. `decode` takes what embed takes, twice, each
    going on from the one before, and returns their hidden states.
    """
    spec = manifest.model
    heard = num_frames(len(inputs.pcm))
    mel = log_mel(inputs.pcm, spec.encoder)[None]
    outputs = encoded(open_graph("encoder"), mel, heard)
    features = outputs["features"]
    spread = np.zeros((len(inputs.audio_mask), spec.decoder.width), np.float32)
    spread[inputs.audio_mask] = features[: inputs.audio_mask.sum()]
    no_features = np.zeros((1, spec.decoder.width), np.float32)
    hidden = decode(
        [
            {"rows": inputs.rows, "features": spread, "audio_mask": inputs.audio_mask},
            {
                "rows": inputs.next_row,
                "features": no_features,
                "audio_mask": np.zeros(1, np.bool_),
            },
        ]
    )
    logits = open_graph("head")({"hidden": np.concatenate([h[:, -1] for h in hidden])})
    return outputs | {
        "hidden": np.concatenate([h[0] for h in hidden]),
        "text_logits": logits["text_logits"],
        "code_logits": logits["code_logits"],
        "sound": _decode_codes(open_graph("codec"), manifest, inputs.codes),
    }


def encoded(encoder: GraphRunner, mel: Array, num_frames: int) -> dict[str, NDArray[np.float32]]:
    """The first features (num_frames, C) of a log-mel (1, M, 2F): `features`; and, if the graph
    takes windows of any length, `near_features`, of a window that ends with these frames."""
    if "num_frames" not in encoder.input_names:
        return {"features": encoder({"log_mel": mel})["features"][:num_frames]}
    kept = np.array(num_frames, np.int64)
    return {
        name: encoder({"log_mel": window, "num_frames": kept})["features"]
        for name, window in (("features", mel), ("near_features", mel[..., : 2 * num_frames]))
    }


def _decode_codes(
    codec: GraphRunner, manifest: Manifest, codes: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The stream's first samples, as the graph gives them; a noise tape is silent."""
    noise = {
        f"noise_{i}": np.zeros(len(codes) * rate, np.float32)
        for i, rate in enumerate(manifest.codec.noise_rates)
    }
    feeds: dict[str, Array] = {
        "codes": codes,
        "position": np.array(0, np.int64),
        "length": np.array(len(codes), np.int64),
        "state": np.zeros(manifest.codec.state_size, np.float32),
    }
    return codec(feeds | noise)["pcm"]


def _multiplies_integers(graph: Path | bytes) -> bool:
    model = (
        onnx.load_from_string(graph)
        if isinstance(graph, bytes)
        else onnx.load(graph, load_external_data=False)
    )
    return any(node.op_type == "MatMulInteger" for node in model.graph.node)


def plain_session(graph: Path | bytes, weights_folder: Path) -> onnxruntime.InferenceSession:
    """A graph on one thread as it is written: weights stay mapped, nothing is kept for a later run.

    Rewriting and packing copy every weight, and move float16's roundings; beside int4 weights they
    round activations to int8. Only integer products are rewritten on a CPU without VNNI: as they
    are written, they overflow there (an error of 12 % of the largest feature of the tiny encoder,
    3 % without overflow).
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_EXTENDED
        if int8_saturates() and _multiplies_integers(graph)
        else levels.ORT_DISABLE_ALL
    )
    options.enable_cpu_mem_arena = False
    keep_int8_exact(options)
    for key, value in (
        ("session.disable_prepacking", "1"),
        ("session.model_external_initializers_file_folder_path", str(weights_folder)),
    ):
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class GraphRunner:
    """One graph, by names: slow and plain."""

    def __init__(self, path: Path, bound: Mapping[str, Array] | None = None) -> None:
        """`bound` are inputs that stay as they are."""
        self._session = plain_session(path, path.parent)
        inputs = self._session.get_inputs()
        self.input_names = [value.name for value in inputs]
        self._halves = {value.name for value in inputs if value.type == "tensor(float16)"}
        self._output_names = [value.name for value in self._session.get_outputs()]
        self._bound = dict(bound or {})

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {
            name: array.astype(np.float16, copy=False) if name in self._halves else array
            for name, array in feeds.items()
        }
        outputs: Sequence[Any] = self._session.run(None, {**self._bound, **given})
        return dict(zip(self._output_names, outputs, strict=True))


class DecoderRunner:
    """The decoder's graphs as docs/bundle.md joins them: the plainest program that does.

    A segment is loaded for its turn and an expert read for its own, so memory holds one of each.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self._directory = directory
        self._manifest = manifest
        self._spec = manifest.model.decoder
        self._expert = GraphRunner(directory / manifest.ort_graphs.expert)
        self._records = {
            (record.layer, record.expert): record for record in manifest.experts.records
        }
        self._caches: dict[str, Array] = {}
        self.expert_ids: list[Array] = []
        """(B, T, top_k) for each MoE layer of the last run."""

    def run(self, rows: Array, features: Array, audio_mask: Array) -> Array:
        """Rows (B, T, K + 1) after those of earlier runs to hidden states (B, T, C)."""
        graphs = self._manifest.ort_graphs
        feeds = {"rows": rows, "features": features, "audio_mask": audio_mask}
        values = GraphRunner(self._directory / graphs.embed)(feeds)
        self.expert_ids = []
        for i, name in enumerate(graphs.segments):
            values = self._run_segment(GraphRunner(self._directory / name), values, len(rows))
            if "hidden" in values:
                break
            self.expert_ids.append(values["expert_ids"])
            values["routed"] = self._route(self._spec.moe_layers[i], values)
            values["carried"] = values["residual"]
        return values["hidden"]

    def _run_segment(
        self, segment: GraphRunner, values: Mapping[str, Array], num_items: int
    ) -> dict[str, Array]:
        null_row = np.zeros((1, num_items, self._spec.cache_width), np.float32)
        caches = [name for name in segment.input_names if name.startswith("cache_")]
        pasts = {name: self._caches.get(name, null_row) for name in caches}
        plain = {name: values[name] for name in segment.input_names if name not in pasts}
        outputs = segment(plain | pasts)
        for name, past in pasts.items():
            new = outputs[name.replace("cache_", "new_")]
            self._caches[name] = np.concatenate([past, new])
        return outputs

    def _route(self, layer: int, values: Mapping[str, Array]) -> Array:
        """The weighted sum over the chosen experts, in ascending id: (B, T, C)."""
        normed = values["normed"].reshape(-1, self._spec.width)
        ids = values["expert_ids"].reshape(len(normed), -1)
        weights = values["expert_weights"].reshape(len(normed), -1)
        routed = np.zeros_like(normed)
        for expert in np.unique(ids).tolist():
            tokens, picks = np.nonzero(ids == expert)
            y = self._expert({"x": normed[tokens], **self._weights(layer, expert)})["y"]
            routed[tokens] += weights[tokens, picks, None] * y
        return routed.reshape(values["normed"].shape)

    def _weights(self, layer: int, expert: int) -> dict[str, Array]:
        record = self._records[layer, expert]
        records = self._manifest.record_format_of(layer)
        path = self._directory / self._manifest.experts.file
        content = np.fromfile(path, np.uint8, records.record_bytes, offset=record.offset)
        gate_up, down = records.dequantise(records.unpack(content))
        return {"gate_up": gate_up, "down": down}
