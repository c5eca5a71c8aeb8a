"""The plan of an export: its sizes equal the written files', and its verdict follows from them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.facts import Fact
from deeptalk_edge.devices.plan.memory import fitted_profile, record_format
from deeptalk_edge.devices.plan.shapes import (
    codec_shapes,
    embedding_shapes,
    encoder_shapes,
    segment_shapes,
    stored_bytes,
)
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.dry_run.files import copied_files
from deeptalk_edge.export.dry_run.forecast import plan_export
from deeptalk_edge.export.graphs.codec import CodecNoise, export_codec
from deeptalk_edge.export.graphs.decoder import export_embed_and_head, export_segments
from deeptalk_edge.export.graphs.encoder import export_encoder
from deeptalk_edge.export.packed.experts import EXPERTS_FILE, RoundedExperts, write_experts
from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from deeptalk_edge.runtime.backends.cpu.library import CpuContext
from tests.export.checkpoints import (
    CODEC,
    ODD_CODEC,
    CodecTensors,
    random_codec,
    write_checkpoint,
)
from tests.native.cpu import built
from tests.places import OFFICIAL_SIZE, TINY
from tests.specs import PLAIN

# Wide enough that every weight has its own pages, with another number than its neighbour.
WIDE = replace(
    PLAIN,
    decoder=replace(
        PLAIN.decoder,
        width=264,
        num_layers=4,
        nope_dim=72,
        rope_dim=24,
        value_dim=56,
        latent_dim=272,
        dense_ffn_width=700,
        expert_ffn_width=88,
        num_dense_layers=2,
    ),
    encoder=replace(PLAIN.encoder, width=276, ffn_width=420, max_frames=64),
    projector_width=600,
)
WIDE_UNTIED = replace(WIDE, decoder=replace(WIDE.decoder, num_shared_experts=0), tied_head=False)
WIDE_CODEC = replace(CODEC, latent_dim=300, decoder_dim=512)
WIDE_ODD_CODEC = replace(ODD_CODEC, latent_dim=300, decoder_dim=512)


_BUILDS_ENGINES = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs TensorRT-RTX"),
]


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "cpu-int8",
        "cpu-int8 encoder=int8",
        "orin-nano-8gb",
        "agx-orin-64gb",
        pytest.param("rtx-4060", marks=_BUILDS_ENGINES),
    ],
)
def test_a_plan_names_every_file_of_the_bundle_and_its_size(device: str, tmp_path: Path) -> None:
    name, *precision = device.split()
    profile = load_profile(name).with_precision(precision)
    if profile.has_engines:
        profile = profile.with_precision(["experts=int8"])  # the tiny experts are not whole groups
    plan = plan_export(
        read_model_spec(TINY),
        read_codec_spec(TINY / "snac"),
        profile,
        copied=copied_files(TINY),
    )
    export_bundle(TINY, tmp_path / "bundle", ExportSettings(profile=profile))
    written = {path.name: path.stat().st_size for path in (tmp_path / "bundle").iterdir()}
    planned = {file.name: file for file in plan.files}
    assert planned.keys() >= written.keys()
    left_to_device = {name for name in planned if name.endswith(".engine")}
    missing = planned.keys() - written.keys()
    assert missing == (left_to_device if profile.backend == "tensorrt" else set())
    for name, size in written.items():
        assert size <= planned[name].bytes, name
        assert size == planned[name].bytes or not planned[name].is_exact, name
    # Float weights of a step whose experts run in the plugin are inputs.
    assert ("step.weights.json" in written) is (device == "agx-orin-64gb")
    if not profile.has_engines:
        assert plan.total_bytes < 1.01 * sum(written.values())  # for rounding


@pytest.mark.parametrize("spec", [WIDE, WIDE_UNTIED], ids=["tied", "an untied head"])
def test_the_shapes_are_those_of_the_graphs(spec: ModelSpec, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", spec).place)
    export_encoder(checkpoint, tmp_path)
    export_embed_and_head(checkpoint, tmp_path)
    export_segments(checkpoint, tmp_path)
    planned = {
        "encoder.bin": encoder_shapes(spec),
        "embedding.bin": embedding_shapes(spec),
        **{f"segment_{i:02d}.bin": s for i, s in enumerate(segment_shapes(spec.decoder))},
    }
    if not spec.tied_head:
        planned["head.bin"] = embedding_shapes(spec)
    written = {path.name: path.stat().st_size for path in tmp_path.glob("*.bin")}
    assert {name: stored_bytes(shapes) for name, shapes in planned.items()} == written


@pytest.mark.parametrize("spec", [WIDE_CODEC, WIDE_ODD_CODEC])
@pytest.mark.parametrize("noise", ["off", "tape"])
def test_the_shapes_are_those_of_the_codec(
    spec: CodecSpec, noise: CodecNoise, tmp_path: Path
) -> None:
    export_codec(CodecTensors(random_codec(spec)), noise, tmp_path)
    shapes = codec_shapes(spec, with_noise=noise == "tape")
    assert stored_bytes(shapes) == (tmp_path / "codec.bin").stat().st_size


@pytest.mark.parametrize("precision", ["float16", "int8", "int4:64"])
def test_the_size_of_experts_is_that_of_their_records(precision: str, tmp_path: Path) -> None:
    spec = replace(PLAIN, decoder=replace(PLAIN.decoder, width=64, expert_ffn_width=128))
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", spec).place)
    profile = load_profile("thor").with_precision([f"experts={precision}"])
    no_audio: list[list[int]] = [[] for _ in spec.decoder.moe_layers]
    records = record_format(spec, profile)
    path = tmp_path / EXPERTS_FILE
    source = RoundedExperts(checkpoint, records)
    write_experts(spec.decoder, source, no_audio, path, lambda layer, records: None)
    assert _size(spec, profile, EXPERTS_FILE) == path.stat().st_size


def test_the_official_size_is_planned_from_its_config_files_alone() -> None:
    model, codec = read_model_spec(OFFICIAL_SIZE), read_codec_spec(OFFICIAL_SIZE / "snac")
    plan = plan_export(model, codec, load_profile("orin-nano-8gb"))
    by_name = {file.name: file for file in plan.files}
    # 1664 experts of 3 x 2048 x 1408 weights: half a byte each, and a float16 scale for 128.
    weights = 3 * 2048 * 1408
    assert by_name["experts.bin"].bytes == 1664 * -(-(weights // 2 + weights // 64) // 4096) * 4096
    assert by_name["experts.bin"].is_exact
    half = plan_export(model, codec, load_profile("thor")).memory.parts  # float16 but for experts
    dense = half["decoder"] + half["head"]
    assert dense == pytest.approx(2 * (15.557e9 - 1664 * weights), rel=0.02)  # value_up is padded
    assert plan.memory.fits
    assert plan.memory.slots is not None
    assert 64 < plan.memory.slots < 1664


@pytest.mark.parametrize(("spare_bytes", "fits"), [(0, True), (-1, False)])
@pytest.mark.parametrize("device", ["orin-nano-8gb", "agx-orin-64gb"])
def test_the_needed_memory_is_just_enough(device: str, spare_bytes: int, fits: bool) -> None:
    model, codec = read_model_spec(OFFICIAL_SIZE), read_codec_spec(OFFICIAL_SIZE / "snac")
    profile = load_profile(device)
    needed = plan_export(model, codec, profile).memory.needed_bytes
    plan = plan_export(model, codec, _with_memory(profile, needed + spare_bytes))
    assert plan.memory.fits is fits
    assert plan.memory.min_slots == (64 if profile.expert_residency == "paged" else 1664)


def test_more_memory_holds_more_experts_up_to_all_of_them() -> None:
    model, codec = read_model_spec(OFFICIAL_SIZE), read_codec_spec(OFFICIAL_SIZE / "snac")
    profile = load_profile("rtx-4060")
    needed = plan_export(model, codec, profile).memory

    def slots(spare_bytes: int) -> int | None:
        more = _with_memory(profile, needed.needed_bytes + spare_bytes)
        return plan_export(model, codec, more).memory.slots

    assert slots(10 * needed.expert_bytes) == 64 + 10
    assert slots(10**12) == 1664


def test_a_device_of_unknown_memory_gets_no_verdict() -> None:
    memory = plan_export(PLAIN, CODEC, load_profile("cpu")).memory
    assert (memory.fits, memory.slots) == (None, None)


def test_the_cache_follows_the_conversation() -> None:
    cpu = load_profile("cpu")
    one, two = (
        plan_export(PLAIN, CODEC, cpu, context_rows=rows).memory.parts["kv_cache"]
        for rows in (999, 1999)
    )
    decoder = PLAIN.decoder
    # KvCache: one item, and apart from it two side by side
    assert two == 2 * one == 2 * 3 * 4 * 1000 * decoder.num_layers * decoder.cache_width


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(("latent_dim", "rope_dim"), [(512, 64), (64, 16), (272, 120), (129, 122)])
def test_a_native_cache_is_planned_as_it_is_allocated(
    latent_dim: int, rope_dim: int, kind: str
) -> None:
    tiny, profile = read_model_spec(TINY), load_profile("cpu-int8")
    decoder = replace(tiny.decoder, latent_dim=latent_dim, rope_dim=rope_dim)
    spec, profile = replace(tiny, decoder=decoder), profile.with_precision([f"kv_cache={kind}"])
    planned = plan_export(spec, CODEC, profile, context_rows=1000).memory.parts["kv_cache"]
    context = CpuContext(built.library())
    row_bytes = context.cache_row_bytes(latent_dim, rope_dim, kind)
    context.close()
    assert planned == 2 * decoder.num_layers * 1000 * row_bytes


def test_experts_that_fit_no_group_are_refused_with_the_device() -> None:
    with pytest.raises(SettingsError, match=r"thor: width = 24: int4 .* multiple of 128"):
        plan_export(PLAIN, CODEC, load_profile("thor"))


def _size(spec: ModelSpec, profile: DeviceProfile, name: str) -> int:
    plan = plan_export(spec, CODEC, profile)
    return next(file.bytes for file in plan.files if file.name == name)


def _with_memory(profile: DeviceProfile, usable_bytes: int) -> DeviceProfile:
    usable = Fact(value=usable_bytes, source="this test", confirmed=True)
    return replace(profile, facts=replace(profile.facts, usable_memory_bytes=usable))


@pytest.mark.parametrize(
    ("device", "changes", "group"),
    [("orin-nano-8gb", [], 32), ("cpu-int8", ["experts=int4:64"], 32), ("cpu-int8", [], None)],
)
def test_the_int4_group_divides_the_widths_and_a_change_is_reported(
    device: str, changes: list[str], group: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    profile = fitted_profile(load_profile(device).with_precision(changes), read_model_spec(TINY))
    assert profile.precision.expert_group == group
    assert ("groups of 32" in caplog.text) is (group == 32)
    assert "does not divide the widths 192 and 160" in caplog.text or group is None


def test_a_group_that_fits_stays(caplog: pytest.LogCaptureFixture) -> None:
    official = read_model_spec(OFFICIAL_SIZE)
    profile = load_profile("orin-nano-8gb")
    assert fitted_profile(profile, official) == profile
    assert not caplog.text


def test_widths_that_no_group_divides_are_refused() -> None:
    odd = replace(PLAIN, decoder=replace(PLAIN.decoder, width=48))
    with pytest.raises(SettingsError, match="width = 48: int4 experts need a multiple of 128"):
        plan_export(odd, CODEC, load_profile("orin-nano-8gb"))


def test_an_exporter_needs_memory_for_the_larger_of_embedding_and_encoder() -> None:
    """Doubling one of them raises the need only if it is the larger one."""

    def need(**changes: object) -> float:
        model = replace(read_model_spec(OFFICIAL_SIZE), **changes)  # type: ignore[arg-type]
        codec = read_codec_spec(OFFICIAL_SIZE / "snac")
        plan = plan_export(model, codec, load_profile("cpu"), copied={"tokenizer.json": 0})
        assert plan.build_memory_bytes.value is not None
        return plan.build_memory_bytes.value

    official = read_model_spec(OFFICIAL_SIZE)
    vocabulary = replace(official.vocabulary, text_size=2 * official.vocabulary.text_size)
    assert official.encoder is not None
    small = replace(official.encoder, num_layers=official.encoder.num_layers // 2)
    large = replace(official.encoder, num_layers=8 * official.encoder.num_layers)
    assert need(encoder=small) <= need() < need(encoder=large)
    assert need() <= need(vocabulary=vocabulary)
    assert need(encoder=large) == need(encoder=large, vocabulary=vocabulary)
    assert need(encoder=small) < need(encoder=small, vocabulary=vocabulary)
