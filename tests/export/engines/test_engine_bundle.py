"""The shipped checkpoint as a bundle with engines: with the plugin, without, and on the device."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle, Machine
from deeptalk_edge.bundle.target import MoeForm
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import ArtifactError, BackendError, SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.engines.build import EngineSettings, unsupported_nodes
from deeptalk_edge.export.engines.inspect import EngineGraph, read_plan
from tests.manifests import edit_manifest
from tests.places import ROOT

CHECKPOINT = ROOT / "checkpoints/tiny"
TARGETS = ("sm_86", "sm_89", "sm_120")


def rtx(moe: MoeForm) -> DeviceProfile:
    """Three generations of cards at once."""
    profile = load_profile("rtx-4090")
    capabilities = profile.facts.compute_capabilities
    assert capabilities is not None
    facts = replace(profile.facts, compute_capabilities=replace(capabilities, value=TARGETS))
    return replace(profile, moe=moe, facts=facts)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("native") / "bundle"
    export_bundle(CHECKPOINT, place, ExportSettings(profile=rtx("operators")))
    return Bundle.open(place)


@pytest.fixture(scope="module")
def with_plugin(tmp_path_factory: pytest.TempPathFactory, plugin: Path) -> Bundle:
    place = tmp_path_factory.mktemp("plugin") / "bundle"
    export_bundle(CHECKPOINT, place, ExportSettings(profile=rtx("plugin"), plugin=plugin))
    return Bundle.open(place)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """For a Jetson, exported on a machine without TensorRT."""
    place = tmp_path_factory.mktemp("jetson") / "bundle"
    export_bundle(CHECKPOINT, place, ExportSettings(profile=jetson()))
    return Bundle.open(place)


def jetson() -> DeviceProfile:
    return replace(load_profile("agx-orin-64gb"), moe="operators")


def plan_of(bundle: Bundle, name: str) -> list[EngineGraph]:
    engine = bundle.manifest.engines[name].engine
    assert engine is not None
    return read_plan(bundle.file(engine))


@pytest.mark.parametrize("form", ["native", "with_plugin"])
def test_every_engine_is_for_every_target_and_copies_no_expert_weight_or_cache(
    form: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(form)
    spec = bundle.manifest.model.decoder
    graphs = {name: plan_of(bundle, name) for name in bundle.manifest.engines}
    assert set(graphs) == {"encoder", "embed", "step", "head", "codec"}
    assert {graph.targets for plan in graphs.values() for graph in plan} == {TARGETS}
    expert, cache = spec.width * spec.expert_ffn_width, 1024 * spec.latent_dim
    assert len(graphs["encoder"][0].fused_attentions) == bundle.manifest.model.encoder.num_layers
    for graph in graphs["step"]:
        assert graph.moves_of(min(expert, cache)) == []
        # Scores of the whole context are as large as an expert of this small model.
        of_experts = [
            tensor.name
            for tensor in graph.temporaries_of(expert)
            if {spec.expert_ffn_width, 2 * spec.expert_ffn_width}.intersection(tensor.dims)
        ]
        assert of_experts == []
    # As before B was free in a prompt; signals between streams would add more.
    most = [112, 112] if form == "native" else [105, 105, 113]
    assert all(len(g.operations) <= n for g, n in zip(graphs["step"], most, strict=True))
    moes = [len(graph.plugins) for graph in graphs["step"]]
    assert moes == ([0, 0] if form == "native" else [3, 3, 3])


@pytest.mark.parametrize("moe", ["plugin", "operators"])
def test_of_our_nodes_tensorrt_lacks_only_those_of_the_plugin(
    moe: MoeForm, plugin: Path, tmp_path: Path
) -> None:
    """In the bundle for a Jetson, which carries its graphs."""
    orin = replace(load_profile("agx-orin-64gb"), moe=moe)
    manifest = export_bundle(CHECKPOINT, tmp_path / "bundle", ExportSettings(profile=orin))
    without = EngineSettings(backend="tensorrt_rtx")
    missing: dict[str, list[str]] = {}
    for name, entry in manifest.engines.items():
        graph = tmp_path / "bundle" / str(entry.graph)
        missing[name] = [node.operator for node in unsupported_nodes(graph, without)]
        assert unsupported_nodes(graph, replace(without, plugins=(plugin,))) == []
    expected = ["DtMoE"] * len(manifest.model.decoder.moe_layers) if moe == "plugin" else []
    assert missing == {name: expected if name == "step" else [] for name in manifest.engines}


def test_a_bundle_with_engines_is_complete_and_names_its_target(with_plugin: Bundle) -> None:
    manifest = with_plugin.manifest
    assert with_plugin.verify() == sum(entry.bytes for entry in manifest.files.values())
    described: dict[str, Any] = json.loads(json.dumps(with_plugin.describe()))
    assert described["target"] == {
        "backend": "tensorrt_rtx",
        "device": "rtx-4090",
        "compute_capabilities": list(TARGETS),
        "tensorrt": "1.7.1.116",
        "cuda": "13.0",
        "moe": "plugin",
        "plugin": "libdt_moe_plugin.so",
    }
    assert described["precision"]["experts"] == described["experts"]["dtype"] == "int8"
    assert {path.name for path in with_plugin.path.iterdir()} == {*manifest.files, "manifest.json"}
    assert not [name for name in manifest.files if name.startswith(("segment", "expert.onnx"))]
    step = manifest.engines["step"]
    assert (step.weights, step.weight_places) == ("step.bin", "step.weights.json")
    assert {"step.bin", "step.weights.json"} <= manifest.files.keys()


def test_golden_outputs_are_computed_with_rounded_weights(native: Bundle, tmp_path: Path) -> None:
    export_bundle(CHECKPOINT, tmp_path / "exact", ExportSettings())
    found, exact = (np.load(p / "golden.npz") for p in (native.path, tmp_path / "exact"))
    for name, least in (("features", 1e-6), ("text_logits", 1e-4), ("sound", 1e-6)):
        error = np.abs(found[name] - exact[name]).max() / np.abs(exact[name]).max()
        assert least < error < 0.1


def test_onnx_runtime_refuses_a_bundle_with_engines(native: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"for tensorrt_rtx on rtx-4090; ONNX .*Leave out --backend .*cpu-int8"
    ):
        _ = native.manifest.ort_graphs


RIGHT = Machine(backend="tensorrt_rtx", compute_capability="sm_89", tensorrt="1.7.1.116")


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (replace(RIGHT, backend="ort"), "made for tensorrt_rtx, this is ort; export"),
        (replace(RIGHT, compute_capability="sm_90"), "for sm_86, sm_89, sm_120, this GPU is sm_90"),
        (replace(RIGHT, tensorrt="1.7.2"), r"built by TensorRT 1\.7\.1\.116, .* has 1\.7\.2"),
    ],
)
def test_another_device_or_version_is_refused_before_a_file_is_read(
    machine: Machine, message: str, native: Bundle, tmp_path: Path
) -> None:
    assert Bundle.open(native.path, machine=RIGHT).manifest == native.manifest
    (tmp_path / "manifest.json").write_bytes(native.file("manifest.json").read_bytes())
    with pytest.raises(ArtifactError, match=message):
        Bundle.open(tmp_path, machine=machine)


@pytest.mark.parametrize("name", ["step.engine", "libdt_moe_plugin.so", "step.bin"])
def test_altered_native_code_is_refused(name: str, with_plugin: Bundle, tmp_path: Path) -> None:
    for path in with_plugin.path.iterdir():
        os.symlink(path, tmp_path / path.name)
    altered = bytearray(with_plugin.file(name).read_bytes())
    altered[len(altered) // 2] ^= 1
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(altered)
    with pytest.raises(ArtifactError, match=rf"{name}: altered"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["step.bin", "step.weights.json"])
def test_weights_that_are_inputs_are_files_of_the_bundle(
    name: str, with_plugin: Bundle, tmp_path: Path
) -> None:
    shutil.copy(with_plugin.file("manifest.json"), tmp_path)
    edit_manifest(tmp_path, lambda m: m["files"].pop(name))
    with pytest.raises(ArtifactError, match=f"{name} has no size and hash"):
        Bundle.open(tmp_path)


def test_a_jetsons_bundle_waits_for_its_engines(unfinished: Bundle, tmp_path: Path) -> None:
    manifest = unfinished.manifest
    assert {name: (e.engine, e.graph) for name, e in manifest.engines.items()} == {
        "encoder": (None, "encoder.onnx"),
        "embed": (None, "embed.onnx"),
        "step": (None, "step_native.onnx"),
        "head": (None, "head.onnx"),
        "codec": (None, "codec.onnx"),
    }
    assert manifest.target.tensorrt == "10.16"
    machine = Machine(backend="tensorrt", compute_capability="sm_87", tensorrt="10.16.2.1")
    with pytest.raises(
        ArtifactError, match="no engine yet for encoder, embed, step, head, codec; build"
    ):
        Bundle.open(unfinished.path, machine=machine)
    with pytest.raises(BackendError, match="tensorrt is not installed here; it comes with JetPack"):
        export_bundle(unfinished.path, tmp_path / "done", ExportSettings(profile=jetson()))


def test_the_device_builds_the_engines_of_such_a_bundle(
    unfinished: Bundle, tmp_path: Path, full_tensorrt: Path
) -> None:
    settings = ExportSettings(profile=jetson())
    seen: list[tuple[str, int, int]] = []
    finished = export_bundle(
        unfinished.path, tmp_path / "finished", settings, lambda *step: seen.append(step)
    )
    assert seen == [(f"{name} engine", i, 5) for i, name in enumerate(finished.engines)]
    machine = Machine(backend="tensorrt", compute_capability="sm_87", tensorrt="10.16.2.1")
    bundle = Bundle.open(tmp_path / "finished", machine=machine)
    bundle.verify()
    assert bundle.manifest == finished
    assert {e.engine for e in finished.engines.values()} <= set(finished.files)


def test_only_a_bundle_for_tensorrt_is_finished_later(native: Bundle, tmp_path: Path) -> None:
    for settings in (ExportSettings(profile=jetson()), ExportSettings()):
        with pytest.raises(SettingsError, match="is a bundle for tensorrt_rtx"):
            export_bundle(native.path, tmp_path / "done", settings)


@pytest.mark.parametrize("plugin", [None, Path("absent.so")])
def test_an_rtx_profile_with_the_plugin_needs_the_library(
    plugin: Path | None, tmp_path: Path
) -> None:
    settings = ExportSettings(profile=rtx("plugin"), plugin=plugin)
    with pytest.raises(SettingsError, match="make plugin"):
        export_bundle(CHECKPOINT, tmp_path / "bundle", settings)


def test_the_device_needs_the_plugin_of_the_graphs(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    orin = load_profile("agx-orin-64gb")
    export_bundle(CHECKPOINT, tmp_path / "bundle", ExportSettings(profile=orin))
    request.getfixturevalue("full_tensorrt")
    with pytest.raises(SettingsError, match="name it by --plugin"):
        export_bundle(tmp_path / "bundle", tmp_path / "done", ExportSettings(profile=jetson()))
    with pytest.raises(SettingsError, match="name it by --plugin"):
        export_bundle(CHECKPOINT, tmp_path / "done", ExportSettings(profile=orin))


@pytest.mark.parametrize(
    ("part", "dtype"), [("encoder", "int8"), ("codec", "float32"), ("kv_cache", "bfloat16")]
)
def test_a_precision_that_the_graphs_do_not_have_is_refused(
    part: str, dtype: str, tmp_path: Path
) -> None:
    profile, change = load_profile("rtx-4090"), cast("dict[str, Any]", {part: dtype})
    profile = replace(profile, precision=replace(profile.precision, **change))
    if part == "codec":
        profile = replace(profile, precision=replace(profile.precision, decoder="bfloat16"))
    with pytest.raises(SettingsError, match="graphs take float16"):
        export_bundle(CHECKPOINT, tmp_path / "bundle", ExportSettings(profile=profile))


def test_a_killed_export_continues_with_the_next_engine(tmp_path: Path) -> None:
    place = tmp_path / "bundle"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from deeptalk_edge.devices.profile import load_profile\n"
        "from deeptalk_edge.export import bundle\n"
        "from deeptalk_edge.export.engines import bundle as engines\n"
        "build = engines.build_engine\n"
        "def die_at_the_head(graph, engine, *rest):\n"
        "    if engine.name == 'head.engine': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return build(graph, engine, *rest)\n"
        "engines.build_engine = die_at_the_head\n"
        "settings = bundle.ExportSettings(profile=load_profile('rtx-4090'))\n"
        "bundle.export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), settings)\n"
    )
    died = subprocess.run(
        [sys.executable, "-c", program, str(CHECKPOINT), str(place)], cwd=ROOT, check=False
    )
    assert died.returncode == -signal.SIGKILL
    staging = tmp_path / ".bundle.partial"
    built = {
        name: (staging / name).stat().st_mtime_ns for name in ("encoder.engine", "step.engine")
    }
    export_bundle(CHECKPOINT, place, ExportSettings(profile=load_profile("rtx-4090")))
    assert {name: (place / name).stat().st_mtime_ns for name in built} == built
    Bundle.open(place).verify()
