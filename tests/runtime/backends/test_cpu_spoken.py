"""The tiny checkpoint's spoken answers from its CPU bundle, through both backends.

The contract: equal text for at least 22 of 24 questions. Both use the same int8 experts; the
kernels also round the dense weights and every activation to int8, ONNX Runtime does not.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.manifest import NATIVE_CODEC, NATIVE_INDEX, NATIVE_WEIGHTS
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.runtime.backends.cpu.codec import CpuCodec
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings, TurnDone
from deeptalk_edge.runtime.settings import BackendChoice
from tests.manifests import edit_manifest
from tests.native.cpu import built
from tests.places import TINY
from tests.runtime.backends.cpu.resident import Resident
from tests.runtime.test_conversation import rewrite_golden

QUESTIONS = sorted((TINY / "questions").glob("*.wav"))

asked = pytest.mark.parametrize(
    ("questions", "least"),
    [(QUESTIONS[::6], 4), pytest.param(QUESTIONS, 22, marks=pytest.mark.slow)],
    ids=["4", "all"],
)


@pytest.fixture(scope="module")
def cpu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Shared: never write to it."""
    place = tmp_path_factory.mktemp("tiny") / "bundle"
    export_bundle(TINY, place, ExportSettings(profile=load_profile("cpu-int8")))
    return Bundle.open(place)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the library that the sources build."""
    built.install(monkeypatch)


def chosen(bundle: Bundle, backend: BackendChoice) -> ConversationSettings:
    return replace(ConversationSettings.of(bundle), backend=backend)


def opened(bundle: Bundle, settings: ConversationSettings) -> Backend:
    backend = open_backend(bundle, settings.backend, settings.for_backend())
    backend.close()
    return backend


def texts(bundle: Bundle, backend: BackendChoice, questions: list[Path]) -> list[str]:
    said = []
    with Conversation(bundle, chosen(bundle, backend)) as talk:
        for question in questions:
            talk.reset()
            *_, done = talk.ask(read_utterance(question))
            assert isinstance(done, TurnDone)
            said.append(done.text)
    return said


def num_right(bundle: Bundle, questions: list[Path]) -> int:
    """Answers of the kernels that are the script's."""
    expected = [question.with_suffix(".txt").read_text().splitlines()[1] for question in questions]
    return sum(map(str.__eq__, texts(bundle, "cpu", questions), expected))


def with_cache(bundle: Bundle, kind: str) -> Bundle:
    precision = {**bundle.manifest.precision, "kv_cache": kind}
    return replace(bundle, manifest=replace(bundle.manifest, precision=precision))


@asked
@pytest.mark.usefixtures("kernels")
def test_both_backends_say_the_same(cpu_bundle: Bundle, questions: list[Path], least: int) -> None:
    native, ort = (texts(cpu_bundle, backend, questions) for backend in ("cpu", "ort"))
    assert sum(mine == other for mine, other in zip(native, ort, strict=True)) >= least


@pytest.mark.parametrize(
    "questions",
    [QUESTIONS[:8], pytest.param(QUESTIONS, marks=pytest.mark.slow)],
    ids=["8", "all"],
)
@pytest.mark.usefixtures("kernels")
def test_answers_stay_right_in_a_long_conversation(
    cpu_bundle: Bundle, questions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """With all turns in sight 3 of 24 are right, with one earlier turn 14."""
    argv = ["run", "--bundle", str(cpu_bundle.path), "--json", "--wav", *map(str, questions)]
    assert main(argv) == 0
    said = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    wanted = [question.with_suffix(".txt").read_text().splitlines()[1] for question in questions]
    assert sum(map(str.__eq__, said, wanted)) >= len(questions) - 1


@pytest.mark.usefixtures("kernels")
def test_questions_with_capitals_and_punctuation_are_understood(cpu_bundle: Bundle) -> None:
    num_right = 0
    with Conversation(cpu_bundle, ConversationSettings.of(cpu_bundle, mode="text")) as talk:
        for question in QUESTIONS[::3]:
            asked, wanted = question.with_suffix(".txt").read_text().splitlines()
            *_, done = talk.ask(f" {asked.capitalize()}, please?!")
            num_right += isinstance(done, TurnDone) and done.text == wanted
    assert num_right >= 7


@pytest.mark.usefixtures("kernels")
def test_a_conversation_names_its_backend(cpu_bundle: Bundle) -> None:
    with Conversation(cpu_bundle, chosen(cpu_bundle, "cpu")) as talk:
        assert talk.setup.backend == "cpu"
        assert talk.setup.kernel_path
    with Conversation(cpu_bundle, chosen(cpu_bundle, "ort")) as talk:
        assert (talk.setup.backend, talk.setup.kernel_path) == ("ort", None)


@asked
@pytest.mark.usefixtures("kernels")
def test_int4_experts_answer_as_well_as_int8(
    tmp_path: Path, questions: list[Path], least: int
) -> None:
    profile = load_profile("cpu-int8").with_precision(["experts=int4:32"])
    export_bundle(TINY, tmp_path / "bundle", ExportSettings(profile=profile))
    assert num_right(Bundle.open(tmp_path / "bundle"), questions) >= least


@asked
@pytest.mark.usefixtures("kernels")
def test_an_int8_cache_answers_as_well_as_bfloat16(
    cpu_bundle: Bundle, questions: list[Path], least: int
) -> None:
    assert num_right(with_cache(cpu_bundle, "int8"), questions) >= least


@pytest.fixture(scope="module")
def int8_ear(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose encoder multiplies in int8. Shared: never write to it."""
    place = tmp_path_factory.mktemp("ear") / "bundle"
    profile = load_profile("cpu-int8").with_precision(["encoder=int8"])
    export_bundle(TINY, place, ExportSettings(profile=profile))
    return Bundle.open(place)


@asked
@pytest.mark.usefixtures("kernels")
def test_an_int8_encoder_answers_as_well_as_float32(
    int8_ear: Bundle, cpu_bundle: Bundle, questions: list[Path], least: int
) -> None:
    sizes = [bundle.manifest.files["encoder.bin"].bytes for bundle in (int8_ear, cpu_bundle)]
    assert sizes[0] < sizes[1] / 2
    assert num_right(int8_ear, questions) >= least


@pytest.mark.usefixtures("kernels")
def test_an_int8_encoder_may_round_differently_and_passes_the_check(
    int8_ear: Bundle, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(int8_ear.path, tmp_path / "bundle"))
    with np.load(place / "golden.npz") as golden:
        features = golden["near_features"]
    step = np.abs(features).max()
    Conversation(rewrite_golden(place, near_features=features + 0.02 * step)).close()
    with pytest.raises(BackendError, match=r"encoder\.onnx: this device computes something else"):
        Conversation(rewrite_golden(place, near_features=features + 0.1 * step))


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_an_export_states_its_cache(tmp_path: Path, kind: str) -> None:
    profile = load_profile("cpu-int8").with_precision([f"kv_cache={kind}"])
    export_bundle(TINY, tmp_path / "bundle", ExportSettings(profile=profile))
    assert Bundle.open(tmp_path / "bundle").manifest.precision["kv_cache"] == kind


@pytest.mark.parametrize(
    ("stated", "kept"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("int8", "int8")]
)
@pytest.mark.usefixtures("kernels")
def test_the_manifest_says_which_cache_the_kernels_keep(
    cpu_bundle: Bundle, stated: str, kept: str
) -> None:
    bundle = with_cache(cpu_bundle, stated)
    found = open_backend(bundle, "cpu", ConversationSettings.of(bundle).for_backend()).engine
    expected = CpuEngine(
        bundle, context_rows=32, cache_kind=kept, open_experts=lambda: Resident(bundle)
    )
    spec = bundle.manifest.model
    rows = np.random.default_rng(0).integers(0, spec.vocabulary.size, (20, 8))
    no_features = np.empty((0, spec.decoder.width), np.float32)
    for engine in (found, expected):
        engine.prefill(rows, no_features, np.zeros(len(rows), np.bool_))
    np.testing.assert_array_equal(found.logits().text, expected.logits().text)
    found.close()
    expected.close()


@pytest.mark.parametrize("backend", ["cpu", "native", "ort"])
@pytest.mark.usefixtures("kernels")
def test_the_size_of_the_pool_changes_no_answer(
    cpu_bundle: Bundle, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = set()
    for pool in ("100%", "42%", "8"):  # 8 is the smallest
        out = tmp_path / "answer.wav"
        argv = ["run", "--bundle", str(cpu_bundle.path), "--backend", backend, "--pool", pool]
        assert main([*argv, "--wav", str(QUESTIONS[0]), "--out", str(out), "--json"]) == 0
        answers.add((json.loads(capsys.readouterr().out)["text"], out.read_bytes()))
    assert len(answers) == 1


@pytest.mark.usefixtures("kernels")
def test_a_native_bundle_runs_on_the_kernels_by_default(cpu_bundle: Bundle) -> None:
    backend = opened(cpu_bundle, ConversationSettings.of(cpu_bundle))
    assert isinstance(backend.engine, CpuEngine)
    assert isinstance(backend.codec, CpuCodec)


@pytest.mark.usefixtures("kernels")
def test_a_native_bundle_without_the_codecs_weights_keeps_its_graph(cpu_bundle: Bundle) -> None:
    manifest = cpu_bundle.manifest
    files = {name: entry for name, entry in manifest.files.items() if name != NATIVE_CODEC}
    older = replace(cpu_bundle, manifest=replace(manifest, files=files))
    assert isinstance(opened(older, ConversationSettings.of(older)).codec, OrtCodec)


def test_without_the_kernels_onnx_runtime_answers_and_the_warning_says_what_to_do(
    cpu_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(native_library, "LIBRARY", tmp_path / "libdeeptalk_cpu.so")
    with caplog.at_level(logging.WARNING, logger="deeptalk_edge.runtime.backends.open"):
        backend = opened(cpu_bundle, ConversationSettings.of(cpu_bundle))
    assert isinstance(backend.engine, OrtEngine)
    assert isinstance(backend.codec, OrtCodec)
    (record,) = (r for r in caplog.records if r.name == "deeptalk_edge.runtime.backends.open")
    assert "install a C++ compiler and deeptalk-edge again" in record.getMessage()
    with pytest.raises(BackendError, match="missing or does not load"):
        opened(cpu_bundle, chosen(cpu_bundle, "cpu"))


def test_a_bundle_without_native_weights_is_refused_if_the_kernels_are_required(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--backend", "native"]
    assert main(argv) == 1
    assert "made for the backend ort, this is cpu; export" in capsys.readouterr().err


@pytest.mark.parametrize("name", [NATIVE_WEIGHTS, NATIVE_INDEX])
def test_a_native_bundle_without_one_of_its_files_is_refused(
    cpu_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    place = Path(shutil.copytree(cpu_bundle.path, tmp_path / "bundle"))
    edit_manifest(place, lambda m: m["files"].pop(name))
    with pytest.raises(ArtifactError, match=f"{name} has no size and hash"):
        Bundle.open(place)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["segment_01.onnx", "segment_02.bin", "embedding.bin"])
def test_files_that_the_kernels_do_not_read_are_checked_when_onnx_runtime_runs(
    cpu_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    place = Path(shutil.copytree(cpu_bundle.path, tmp_path / "bundle"))
    content = bytearray((place / name).read_bytes())
    content[100] ^= 1
    (place / name).write_bytes(content)
    bundle = Bundle.open(place)
    with Conversation(bundle, chosen(bundle, "cpu")) as talk:
        assert talk.bundle is bundle
    with pytest.raises(ArtifactError, match=f"{name}: altered"):
        Conversation(bundle, chosen(bundle, "ort"))
    with pytest.raises(ArtifactError, match=f"{name}: altered"):
        bundle.verify()


@pytest.mark.usefixtures("kernels")
def test_native_weights_of_another_model_fail_the_golden_check(
    cpu_bundle: Bundle, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(cpu_bundle.path, tmp_path / "bundle"))
    table = json.loads((place / NATIVE_INDEX).read_text())["arrays"]["table"]
    weights = np.memmap(place / NATIVE_WEIGHTS, np.float32, mode="r+", offset=0)
    first = table["scales_offset"] // 4
    weights[first : first + table["rows"]] *= 1.2
    weights.flush()
    altered = Bundle(place, cpu_bundle.manifest)  # otherwise its missing hash is reported first
    with pytest.raises(BackendError, match=r"^native\.bin: this device computes something else"):
        Conversation(altered, chosen(altered, "cpu"))
