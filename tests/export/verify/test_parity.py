"""The parity report passes equal outputs and names different ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bench.parity import torch_outputs
from deeptalk_edge.bundle.expert_record import ExpertDtype, ExpertWeights, RecordFormat
from deeptalk_edge.bundle.manifest import Experts
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.graphs.builder import Precision
from deeptalk_edge.export.graphs.codec import export_codec
from deeptalk_edge.export.graphs.decoder import export_engine_embed_and_head
from deeptalk_edge.export.graphs.encoder import export_encoder
from deeptalk_edge.export.graphs.layers import Dense
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.packed.experts import RoundedExperts, write_experts
from deeptalk_edge.export.verify.golden import golden_inputs, golden_outputs
from deeptalk_edge.export.verify.parity import (
    MEDIAN_ROW,
    ParityReport,
    bundle_differences,
    check,
    difference,
    parity_report,
)
from deeptalk_edge.export.verify.run_step import engine_outputs
from tests.export.checkpoints import write_checkpoint
from tests.export.graphs.test_step import SPECS_OF_ENGINES
from tests.specs import SPECS

Array = NDArray[np.float32]
Reference = dict[str, Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """Inputs of the report without torch."""

    place: Path
    checkpoint: Checkpoint

    def ort_outputs(self) -> Reference:
        bundle = Bundle.open(self.place / "bundle")
        inputs = golden_inputs(self.checkpoint.spec)
        return golden_outputs(bundle.path, bundle.manifest, inputs)

    def report(self, outputs: Reference, **precision: str) -> ParityReport:
        """Report on a bundle whose manifest names these precisions."""
        manifest = Bundle.open(self.place / "bundle").manifest
        manifest = replace(manifest, precision={**manifest.precision, **precision})
        return parity_report(outputs, self.checkpoint, self.checkpoint.codec, manifest)

    def engine_report(
        self,
        place: Path,
        precision: Precision,
        dense: Dense,
        experts: ExpertDtype,
        spoil: Callable[[ExpertWeights], ExpertWeights] | None = None,
    ) -> ParityReport:
        """Write the graphs of engines in these precisions, damage their experts, and compare
        them."""
        checkpoint, spec = self.checkpoint, self.checkpoint.spec.decoder
        group = 64 if experts == "int4" else None
        records = RecordFormat(
            dtype=experts, group=group, width=spec.width, ffn_width=spec.expert_ffn_width
        )
        export_encoder(checkpoint, place, precision=precision, is_fixed=True)
        export_engine_embed_and_head(checkpoint, place, precision=precision)
        export_codec(checkpoint.codec, "off", place, precision=precision)
        step = StepSettings(records=records, precision=precision, dense=dense, num_items=2)
        export_step(checkpoint, place, step)
        rewrite_as_operators(place / "step.onnx", place / "step_native.onnx")
        audio: list[list[int]] = [[1, 3] for _ in spec.moe_layers]
        path = place / "experts.bin"
        source = RoundedExperts(checkpoint, records)
        written = write_experts(spec, source, audio, path, lambda layer, done: None)
        if spoil:
            rewrite_experts(path, records, spoil)
        parts = dict.fromkeys(("encoder", "kv_cache", "head", "codec"), precision)
        manifest = replace(
            Bundle.open(self.place / "bundle").manifest,
            experts=Experts(file="experts.bin", dtype=experts, group=group, records=tuple(written)),
            precision={**parts, "decoder": precision if dense in ("float", "given") else dense},
        )
        outputs = engine_outputs(place, path, manifest, golden_inputs(checkpoint.spec))
        return parity_report(outputs, checkpoint, checkpoint.codec, manifest)


def rewrite_experts(
    path: Path, records: RecordFormat, change: Callable[[ExpertWeights], ExpertWeights]
) -> None:
    content = np.fromfile(path, np.uint8).reshape(-1, records.record_bytes)
    changed = [records.pack(change(records.unpack(record))) for record in content]
    np.concatenate(changed).tofile(path)


@pytest.fixture(scope="module")
def bundle_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    directory = tmp_path_factory.mktemp("parity")
    written = write_checkpoint(directory / "checkpoint", SPECS["yarn"])
    export_bundle(written.place, directory / "bundle", ExportSettings())
    delay = Bundle.open(directory / "bundle").manifest.codec.delay_samples
    return directory / "bundle", torch_outputs(written.model, written.codec, delay)


def test_a_bundle_agrees_with_torch_on_every_output(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    differences = bundle_differences(*bundle_and_reference)
    assert {one.name for one in differences} == set(bundle_and_reference[1])
    check(differences)


def test_golden_npz_holds_what_torch_computes(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    place, reference = bundle_and_reference
    golden = np.load(place / "golden.npz")
    for name, expected in reference.items():
        np.testing.assert_allclose(golden[name], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["features", "text_logits", "code_logits", "sound"])
def test_a_bundle_that_differs_is_named(
    bundle_and_reference: tuple[Path, Reference], name: str
) -> None:
    place, reference = bundle_and_reference
    with pytest.raises(ParityError, match=f"{name}: .* exceeds"):
        check(bundle_differences(place, {**reference, name: reference[name] + 5e-4}))


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:-1], lambda x: np.full_like(x, np.nan), lambda x: x + np.inf],
    ids=["shape", "NaN", "infinite"],
)
def test_outputs_that_cannot_be_compared_differ_infinitely(spoil: Callable[[Array], Array]) -> None:
    found = difference("x", spoil(np.zeros(3, np.float32)), np.zeros(3, np.float32), 1.0)
    assert found.greatest == np.inf
    assert not found.is_within


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A bundle for ONNX Runtime and the graphs of engines, of one checkpoint."""
    place = tmp_path_factory.mktemp("small")
    spec = SPECS_OF_ENGINES["yarn"]
    whole_groups = replace(spec.decoder, value_dim=16, dense_ffn_width=128)
    written = write_checkpoint(place / "checkpoint", replace(spec, decoder=whole_groups))
    export_bundle(written.place, place / "bundle", ExportSettings())
    return Small(place=place, checkpoint=Checkpoint.open(written.place))


def test_the_report_of_a_float32_bundle_passes(small: Small) -> None:
    report = small.report(small.ort_outputs())
    report.check()
    assert {one.name for one in report.differences} == set(small.ort_outputs())
    assert all(one.relative < 1e-5 for one in report.differences)
    assert report.equal_tokens == report.tokens == 11 * 8
    assert json.loads(json.dumps(report.as_json()))["tokens"] == 88


LOGITS = ("text_logits", "code_logits")


@pytest.mark.parametrize(
    ("precision", "names", "share"),
    [
        ({}, ("features", "near_features", "hidden", *LOGITS, "sound"), 1e-4),
        ({"encoder": "float16"}, ("features", "near_features"), 0.02),
        ({"encoder": "int8"}, ("features", "near_features"), 0.2),
        ({"codec": "float16"}, ("sound",), 0.02),
        ({"decoder": "float16"}, ("hidden", *LOGITS), 0.5),
        ({"decoder": "float16"}, (MEDIAN_ROW,), 0.01),
    ],
)
def test_an_error_a_few_times_the_measured_one_is_refused_by_name(
    small: Small, precision: dict[str, str], names: tuple[str, ...], share: float
) -> None:
    outputs = small.ort_outputs()
    for name in names:
        output = "hidden" if name == MEDIAN_ROW else name
        wrong = outputs[output] + share * np.abs(outputs[output]).max()
        report = small.report({**outputs, output: wrong}, **precision)
        assert name in [one.name for one in report.differences if not one.is_within]
        with pytest.raises(ParityError, match=f"{name}: .* exceeds"):
            report.check()


@pytest.mark.parametrize(("decoder", "enough"), [("float32", 88), ("float16", 80)])
def test_other_tokens_fail_the_report(small: Small, decoder: str, enough: int) -> None:
    report = small.report(small.ort_outputs(), decoder=decoder)
    replace(report, equal_tokens=enough).check()
    with pytest.raises(ParityError, match=f"{enough - 1} of 88 tokens"):
        replace(report, equal_tokens=enough - 1).check()


def test_rows_at_a_near_tie_are_allowed_larger_errors(small: Small) -> None:
    outputs = small.ort_outputs()
    error = np.zeros_like(outputs["hidden"])
    error[3] = 0.1 * np.abs(outputs["hidden"]).max()
    report = small.report({**outputs, "hidden": outputs["hidden"] + error}, decoder="float16")
    assert all(one.is_within for one in report.differences)


def _gate_and_up_swapped(weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, gate_up=np.roll(weights.gate_up, len(weights.gate_up) // 2, axis=0))


def _values_a_tenth_too_great(weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, down=(weights.down * np.float16(1.1)).astype(weights.down.dtype))


def _scales_of_the_rows_before(weights: ExpertWeights) -> ExpertWeights:
    assert weights.down_scales is not None
    return replace(weights, down_scales=np.roll(weights.down_scales, 1, axis=0))


def _scales_a_tenth_too_great(weights: ExpertWeights) -> ExpertWeights:
    assert weights.down_scales is not None
    scales = (weights.down_scales * np.float32(1.1)).astype(weights.down_scales.dtype)
    return replace(weights, down_scales=scales)


def _nibbles_swapped(weights: ExpertWeights) -> ExpertWeights:
    down = weights.down
    return replace(weights, down=down.reshape(-1, 2)[:, ::-1].reshape(down.shape))


@pytest.mark.parametrize(
    ("experts", "spoil"),
    [
        ("float16", _gate_and_up_swapped),
        ("float16", _values_a_tenth_too_great),
        ("int8", _scales_of_the_rows_before),
        ("int8", _scales_a_tenth_too_great),
        ("int4", _nibbles_swapped),
        ("int4", _scales_a_tenth_too_great),
    ],
)
def test_wrong_experts_are_refused_in_every_precision(
    small: Small,
    experts: ExpertDtype,
    spoil: Callable[[ExpertWeights], ExpertWeights],
    tmp_path: Path,
) -> None:
    report = small.engine_report(tmp_path, "float16", "float", experts, spoil)
    with pytest.raises(ParityError, match=f"{MEDIAN_ROW}: .* exceeds"):
        report.check()


@pytest.mark.parametrize(
    ("precision", "dense", "experts"),
    [
        ("float32", "float", "float32"),
        ("float16", "float", "float16"),
        ("float16", "float", "int8"),
        ("float16", "int8", "int4"),
        ("float16", "int4", "int4"),
        ("float16", "given", "int8"),
    ],
)
def test_the_graphs_of_engines_pass_in_every_precision(
    small: Small, precision: Precision, dense: Dense, experts: ExpertDtype, tmp_path: Path
) -> None:
    report = small.engine_report(tmp_path, precision, dense, experts)
    report.check()
    # The graphs compute in halves; the manifest does not only name them.
    is_exact = precision == "float32"
    assert all((one.relative < 1e-5) is is_exact for one in report.differences)
    assert (report.unrounded_tokens == report.tokens) is (dense in ("float", "given"))
