"""Engines that cannot run are refused before native code parses them; failures in an answer do not
hang."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import (
    ArtifactError,
    BackendError,
    DoesNotFit,
    EdgeError,
    ExpertUnavailable,
    SettingsError,
    UsageError,
)
from deeptalk_edge.files import sha256_of
from deeptalk_edge.runtime.backends.tensorrt.plugin import check_plugin
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from tests.manifests import edit_manifest
from tests.runtime.backends.tensorrt.drill import FEATURES, MASK, ROWS
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda
from tests.runtime.backends.tensorrt.emulation import build_plugin, gpu, tensorrt_module
from tests.runtime.backends.tensorrt.test_engine import opened


def own_copy(bundle: Bundle, place: Path) -> Path:
    """A copy of a bundle: links to its files, and its own manifest."""
    place.mkdir()
    for path in bundle.path.iterdir():
        os.symlink(path, place / path.name)
    (place / "manifest.json").unlink()
    shutil.copy(bundle.path / "manifest.json", place)
    return place


def rewrite(place: Path, name: str, content: bytes) -> Bundle:
    """Change a file, size and hash as well."""
    (place / name).unlink()
    (place / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": sha256_of(place / name)}
    edit_manifest(place, lambda m: m["files"].update({name: entry}))
    return Bundle.open(place)


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "version", "error", "message"),
    [
        (
            {"driver": 0},
            None,
            BackendError,
            "no NVIDIA driver is loaded",
        ),
        (
            {"driver": 12040},
            None,
            BackendError,
            r"libcudart\.so\.13 is CUDA 13\.0, the driver supports up to 12\.4.*: update the",
        ),
        (
            {"capability": (8, 9)},
            None,
            ArtifactError,
            "its engines are for sm_87, this GPU is sm_89; export the checkpoint for this device",
        ),
        (
            {},
            "10.13.3.9",
            ArtifactError,
            r"built by TensorRT 10\.16\.2\.1, this machine has 10\.13\.3\.9; build them again",
        ),
        ({}, "9.2.0", BackendError, r"TensorRT 9\.2\.0: this runtime works with 10\.3, 10\.13"),
    ],
)
def test_another_machine_is_refused_before_an_engine_is_read(
    machine: dict[str, Any],
    version: str | None,
    error: type[EdgeError],
    message: str,
    drill_exact: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(Path, "read_bytes", read.append)
    with (
        tensorrt_module(tmp_path, version),
        gpu(**machine) as cuda,
        pytest.raises(error, match=message),
    ):
        opened(drill_exact)
    assert not read
    assert cuda.is_clean


def test_a_device_that_cuda_does_not_open_is_named(drill_exact: Bundle, tmp_path: Path) -> None:
    with tensorrt_module(tmp_path), gpu() as cuda:
        cuda.fail("cudaFree", 100)
        with pytest.raises(BackendError, match="cudaFree: no CUDA-capable device is detected"):
            opened(drill_exact)


def test_without_tensorrt_the_error_says_what_to_install(drill_exact: Bundle) -> None:
    with gpu(), pytest.raises(BackendError, match="TensorRT is not installed here: it comes with"):
        opened(drill_exact)


def test_a_module_that_does_not_load_gives_an_error(drill_exact: Bundle, tmp_path: Path) -> None:
    with tensorrt_module(tmp_path), gpu():
        (tmp_path / "modules/tensorrt/__init__.py").write_text("raise ImportError('libnvinfer')")
        with pytest.raises(BackendError, match=r"does not load \(libnvinfer\); install it again"):
            opened(drill_exact)


def test_engines_that_are_not_built_give_an_error_that_says_how(
    drill_exact: Bundle, cuda: EmulatedCuda
) -> None:
    unbuilt = {name: replace(e, engine=None) for name, e in drill_exact.manifest.engines.items()}
    bundle = Bundle(drill_exact.path, replace(drill_exact.manifest, engines=unbuilt))
    with pytest.raises(ArtifactError, match=r"no engine yet for encoder, embed.*; build"):
        opened(bundle)


@pytest.mark.parametrize(
    "content", [lambda c: c[: len(c) // 2], lambda c: b"x" * 4096, lambda c: b""]
)
def test_an_engine_that_tensorrt_refuses_is_named_with_its_reason(
    content: Callable[[bytes], bytes], drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path
) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    bundle = rewrite(place, "step.engine", content((place / "step.engine").read_bytes()))
    with pytest.raises(
        BackendError,
        match=r"step\.engine: TensorRT 10\.16\.2\.1 on sm_87 does not load it \(",
    ):
        opened(bundle)


def test_a_truncated_engine_is_refused_by_its_size(drill_exact: Bundle, tmp_path: Path) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    content = (place / "head.engine").read_bytes()
    (place / "head.engine").unlink()
    (place / "head.engine").write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"head\.engine: "):
        Bundle.open(place)


def test_engines_of_another_model_are_refused(
    drill_exact: Bundle, exact: Bundle, cuda: EmulatedCuda, tmp_path: Path
) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    bundle = rewrite(place, "encoder.engine", (exact.path / "encoder.engine").read_bytes())
    with pytest.raises(ArtifactError, match=r"encoder\.engine: made for a window of"):
        opened(bundle)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        ({"abi": 2}, "a plugin of ABI 2, this runtime wants 1; build it again with `make plugin`"),
        ({"sm": "89", "ptx": "89"}, "holds code for sm 89, this GPU is sm_87; build it again"),
        (None, "not our plugin, or of an older build"),
    ],
)
def test_a_plugin_of_another_build_or_gpu_is_refused_before_tensorrt_loads_it(
    built: dict[str, Any] | None,
    message: str,
    drill_small: Bundle,
    cuda: EmulatedCuda,
    tmp_path: Path,
) -> None:
    place = own_copy(drill_small, tmp_path / "bundle")
    library = build_plugin(tmp_path / "other", **(built or {}))
    content = library.read_bytes()
    if built is None:
        content = content.replace(b"dt_moe_build", b"dt_moe_other")
    with pytest.raises(BackendError, match=rf"libdt_moe_plugin\.so: {message}"):
        opened(rewrite(place, "libdt_moe_plugin.so", content))


def test_a_plugin_that_is_missing_or_no_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"absent\.so: the plugin is missing"):
        check_plugin(tmp_path / "absent.so", "sm_87")
    (tmp_path / "no.so").write_bytes(b"no library")
    with pytest.raises(BackendError, match=r"no\.so: not a library for this machine"):
        check_plugin(tmp_path / "no.so", "sm_87")


@pytest.mark.parametrize(("sm", "gpu_sm"), [("80", "sm_87"), ("87", "sm_87"), ("80", "sm_100")])
def test_machine_code_serves_later_minor_versions_and_ptx_all_later_cards(
    sm: str, gpu_sm: str, tmp_path: Path
) -> None:
    check_plugin(build_plugin(tmp_path, sm=sm, ptx=sm), gpu_sm)


@pytest.mark.parametrize("name", ["embedding.bin", "experts.bin"])
def test_a_truncated_file_that_an_engine_reads_is_named(
    name: str, drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path
) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    bundle = Bundle.open(place)
    content = (place / name).read_bytes()
    (place / name).unlink()
    (place / name).write_bytes(content[: len(content) // 2])
    with pytest.raises((ArtifactError, ExpertUnavailable), match=rf"{name}"):
        opened(bundle)


def test_a_damaged_expert_is_named(drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    content = bytearray((place / "experts.bin").read_bytes())
    record = drill_exact.manifest.experts.records[3]
    content[record.offset + 5] ^= 1
    (place / "experts.bin").unlink()
    (place / "experts.bin").write_bytes(content)
    where = f"layer {record.layer}, expert {record.expert} is damaged"
    with pytest.raises(ExpertUnavailable, match=where):
        opened(Bundle.open(place))


def test_a_self_check_that_differs_names_the_engine(
    drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path
) -> None:
    place = own_copy(drill_exact, tmp_path / "bundle")
    with np.load(place / "golden.npz") as file:
        golden = {name: file[name] for name in file.files}
    golden["text_logits"][1, 3] += 0.01 * np.abs(golden["text_logits"]).max()
    np.savez(tmp_path / "golden.npz", **golden)
    bundle = rewrite(place, "golden.npz", (tmp_path / "golden.npz").read_bytes())
    with pytest.raises(BackendError, match=r"embed\.engine, step\.engine, head\.engine: this"):
        opened(bundle)


@pytest.mark.parametrize("megabytes", [0.2, 0.5])
def test_a_device_with_too_little_memory_says_how_much_is_missing(
    megabytes: float, drill_exact: Bundle, tmp_path: Path
) -> None:
    with (
        tensorrt_module(tmp_path),
        gpu(memory_bytes=int(megabytes * 1e6)) as cuda,
        pytest.raises(DoesNotFit, match=r"cudaMalloc: out of memory .* MB asked for, .* free"),
    ):
        opened(drill_exact)
    assert cuda.is_clean


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_rows": 65}, "its engines hold 64 rows, 65 are asked for"),
        ({"encoder_window": "near"}, "an engine for the whole window; leave out"),
        ({"backend": "ort"}, "ONNX Runtime cannot run it"),
        ({"backend": "cpu"}, "made for"),
    ],
)
def test_settings_that_engines_do_not_support_are_refused(
    changes: dict[str, Any], message: str, drill_exact: Bundle, cuda: EmulatedCuda
) -> None:
    settings = replace(ConversationSettings.of(drill_exact), **changes)
    with pytest.raises(EdgeError, match=message):
        Conversation(drill_exact, settings)


def test_a_bundle_without_engines_is_refused(drill_on_cpu: Bundle, cuda: EmulatedCuda) -> None:
    settings = replace(ConversationSettings.of(drill_on_cpu), backend="tensorrt")
    with pytest.raises(ArtifactError, match="made for the backend ort, it has no engines"):
        Conversation(drill_on_cpu, settings)


def test_routes_are_not_recorded(drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path) -> None:
    with (
        Conversation(drill_exact) as talk,
        pytest.raises(SettingsError, match="routes are not recorded on engines"),
        talk.record_routes(tmp_path / "routes.npz"),
    ):
        pass


# In mid-conversation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "error"),
    [
        ("cudaGraphLaunch", 700, BackendError),
        ("cudaGraphLaunch", 2, DoesNotFit),
        ("cudaStreamSynchronize", 700, BackendError),
        ("cudaMemcpy2DAsync", 700, BackendError),
    ],
)
@pytest.mark.parametrize("is_sticky", [True, False])
def test_a_failure_in_a_step_ends_the_answer_and_a_new_conversation_works(
    call: str,
    code: int,
    error: type[EdgeError],
    is_sticky: bool,
    drill_exact: Bundle,
    tmp_path: Path,
) -> None:
    with tensorrt_module(tmp_path), gpu() as cuda:
        talk = Conversation(drill_exact)
        answer = talk.begin("Why?")
        for _ in range(14):  # two pieces of sound
            answer.advance()
        cuda.fail(call, code, sticky=is_sticky)
        with pytest.raises(error, match=rf"{call}: .* \(CUDA error {code}\)"):
            list(iter(answer.advance, None))
        said = answer.finish(2048)
        assert said == answer.text[: len(said)]  # the heard part stays
        if is_sticky:
            with pytest.raises(error, match=rf"CUDA error {code}"):
                list(talk.ask("And then?"))
        else:
            talk.reset()
            assert list(talk.ask("And then?"))
        talk.close()
        assert cuda.is_clean or is_sticky  # a lost device gives nothing back
    with tensorrt_module(tmp_path), gpu() as cuda, Conversation(drill_exact) as talk:
        assert list(talk.ask("Why?"))


def test_logits_that_are_not_finite_are_an_error_and_a_reset_recovers(
    drill_exact: Bundle, cuda: EmulatedCuda
) -> None:
    backend = opened(drill_exact)
    engine = backend.engine
    engine.prefill(ROWS[:12], FEATURES, MASK)
    expected = engine.decode_step(ROWS[20:21]).text.copy()
    engine.reset()
    engine.prefill(ROWS[:12], FEATURES * np.float32(np.nan), MASK)
    with pytest.raises(BackendError, match=r"head\.engine: the logits are not finite"):
        engine.logits()
    with pytest.raises(BackendError, match=r"failed before .*not finite"):
        engine.decode_step(ROWS[20:21])
    engine.trim(3)
    engine.reset()
    engine.prefill(ROWS[:12], FEATURES, MASK)
    np.testing.assert_array_equal(engine.decode_step(ROWS[20:21]).text, expected)
    backend.close()


def test_a_full_context_is_an_error_and_leaves_the_rows_unchanged(
    drill_exact: Bundle, cuda: EmulatedCuda
) -> None:
    backend = opened(drill_exact)
    engine, no_audio = backend.engine, np.zeros(65, np.bool_)
    with pytest.raises(DoesNotFit, match="65 rows of conversation, the cache holds 64"):
        engine.prefill(ROWS[:65], FEATURES[:0], no_audio)
    assert engine.num_rows == 0
    engine.prefill(ROWS[:63], FEATURES[:0], no_audio[:63])
    engine.decode_step(ROWS[70:71])
    with pytest.raises(DoesNotFit, match="the cache holds 64"):
        engine.feed(ROWS[71:72])
    assert engine.num_rows == 64
    engine.trim(10)
    engine.decode_step(ROWS[71:72])
    backend.close()


def test_a_closed_engine_makes_no_cuda_calls(drill_exact: Bundle, cuda: EmulatedCuda) -> None:
    backend = opened(drill_exact)
    backend.close()
    backend.close()
    uses: list[Callable[[], object]] = [
        lambda: backend.engine.feed(ROWS[:1]),
        lambda: backend.engine.decode_step(ROWS[:1]),
        lambda: backend.engine.prefill(ROWS[:12], FEATURES, MASK),
        backend.engine.logits,
        backend.engine.reset,
        lambda: backend.encoder.hear(np.zeros(1600, np.float32)),
        lambda: backend.codec.decode(ROWS[:1, :7], position=0, length=1, state=ROWS[0], noise=[]),
    ]
    for use in uses:
        with pytest.raises(UsageError, match="is closed"):
            use()


def test_the_error_of_a_failed_cuda_call_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all calls of the binding on a device that refuses each."""
    from deeptalk_edge.runtime.cuda import Cudart

    with gpu() as emulated:
        cuda = Cudart()
        calls: dict[str, Callable[[], object]] = {
            "cudaDeviceGetAttribute": lambda: cuda.compute_capability,
            "cudaMalloc": lambda: cuda.malloc(1),
            "cudaFree": lambda: cuda.free(1),
            "cudaHostAlloc": lambda: cuda.host_malloc(1),
            "cudaFreeHost": lambda: cuda.host_free(1),
            "cudaHostRegister": lambda: cuda.register(1, 1),
            "cudaHostUnregister": lambda: cuda.unregister(1),
            "cudaHostGetDevicePointer": lambda: cuda.device_pointer(1),
            "cudaMemset": lambda: cuda.memset(1, 0, 1),
            "cudaMemsetAsync": lambda: cuda.begin_memset(1, 0, 1, 1),
            "cudaMemcpyAsync": lambda: cuda.copy_to_device(1, 1, 1, 1),
            "cudaMemcpy": lambda: cuda.copy_from_device(1, 1, 1),
            "cudaMemcpy2DAsync": lambda: cuda.copy_rows(
                1, 1, 1, 1, row_bytes=1, num_rows=1, stream=1
            ),
            "cudaDeviceGetStreamPriorityRange": cuda.make_stream,
            "cudaStreamCreateWithPriority": cuda.make_stream,
            "cudaStreamDestroy": lambda: cuda.destroy_stream(1),
            "cudaStreamSynchronize": lambda: cuda.synchronize(1),
            "cudaEventCreateWithFlags": cuda.make_event,
            "cudaEventDestroy": lambda: cuda.destroy_event(1),
            "cudaEventRecord": lambda: cuda.record(1, 1),
            "cudaEventQuery": lambda: cuda.is_done(1),
            "cudaEventSynchronize": lambda: cuda.wait(1),
            "cudaEventElapsedTime": lambda: cuda.elapsed_ms(1, 1),
            "cudaStreamBeginCapture": lambda: cuda.begin_capture(1),
            "cudaStreamEndCapture": lambda: cuda.end_capture(1),
            "cudaGraphLaunch": lambda: cuda.launch(1, 1),
            "cudaGraphExecDestroy": lambda: cuda.destroy_graph(1),
        }
        for name, call in calls.items():
            emulated.fail(name, 700)
            with pytest.raises(BackendError, match=f"^{name}: an illegal memory access"):
                call()
