"""The tiny checkpoint is observed, quantised, gated and exported; the measured table is what
runs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.calibration import Gate, Measure
from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.bundle.manifest import GATES
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.routing import ROUTING, read_routing
from deeptalk_edge.calibration.calibrate import (
    CalibrateSettings,
    as_report,
    covered,
    with_fitted_routers,
)
from deeptalk_edge.calibration.corpus import Utterance, read_corpus
from deeptalk_edge.calibration.gate import run_gate
from deeptalk_edge.calibration.observe import PHASES, observe, succession
from deeptalk_edge.calibration.report_page import report_page
from deeptalk_edge.calibration.table import HEADER, RECORDS, OpenTable, read_table, write_table
from deeptalk_edge.devices.profile import GateLimits, load_profile
from deeptalk_edge.errors import ArtifactError, ParityError, SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.runtime.experts.policy import Phase
from tests.calibration.conftest import TINY, Workshop
from tests.report.test_page import Outside

pytestmark = pytest.mark.slow  # 45 s in all

Damage = Callable[[bytes], bytes]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
INT4, INT8 = ExpertForm(dtype="int4", group=32), ExpertForm(dtype="int8")


@pytest.fixture(scope="session")
def table(workshop: Workshop) -> Path:
    """GPTQ in int4."""
    place = workshop.place / "table"
    settings = CalibrateSettings(method="gptq", floor=0, threshold=64)
    found = workshop.calibrated(place, settings, INT4)
    content = as_report(found)
    (place / "report.html").write_text(report_page(found, content), encoding="utf-8")
    return place


@pytest.fixture(scope="session")
def exported(workshop: Workshop, table: Path) -> Bundle:
    place = workshop.place / "int4"
    profile = load_profile("cpu-int8").with_precision(["kv_cache=int8"])
    export_bundle(TINY, place, ExportSettings(profile=profile, table=table))
    return Bundle.open(place)


def test_every_token_is_counted_where_it_was_routed(workshop: Workshop) -> None:
    seen, top_k = workshop.seen, workshop.checkpoint.spec.decoder.top_k
    rows = {layer: 0 for layer in seen.tokens}
    for each in seen.routes.passes:
        for call in each.calls:
            rows[call.layer] += len(call.ids)
    for row, layer in enumerate(seen.tokens):
        assert seen.counts[row].sum() == rows[layer] * top_k
    spoken = seen.counts[:, :, 2, 1].sum(axis=1)
    assert (spoken > 0).all()  # the checkpoint made the answers, so rows of codec ids are included
    assert (seen.latent_most > 0).all()


def test_stored_tokens_are_what_the_router_saw(workshop: Workshop) -> None:
    decoder = workshop.checkpoint.spec.decoder
    for layer, tokens in workshop.seen.tokens.items():
        gate = workshop.checkpoint.tensor(f"model.layers.{layer}.mlp.gate.weight")
        best = np.argsort(-(tokens.x[::50] @ gate.T), axis=1)[:, : decoder.top_k]
        assert (np.sort(best) == np.sort(tokens.ids[::50])).mean() > 0.99


def test_a_question_that_would_be_refused_is_observed_and_compared(
    workshop: Workshop, tmp_path: Path
) -> None:
    """The bundle's understanding would refuse noise; its rows are measured all the same."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    utterance = Utterance(
        name="noise", modality="spoken", language="en", turns=(noise,), answers=(None,)
    )
    seen = observe(workshop.reference, [utterance], tmp_path, max_rows=8)
    assert seen.num_answers == 1
    assert seen.counts[:, :, :, PHASES.index(Phase.SPEAKING)].sum() > 0
    gate = run_gate(workshop.reference, workshop.reference, [utterance], GateLimits())
    assert gate.rows > 0
    assert gate.measures["code_kl"].value == 0


def test_succession_is_a_share_of_the_steps_that_followed(workshop: Workshop) -> None:
    shares = succession(workshop.seen.routes)
    assert ((shares >= 0) & (shares <= 1)).all()
    top_k = workshop.checkpoint.spec.decoder.top_k
    sums = shares.sum(axis=2)
    steps = [p for p in workshop.seen.routes.passes if p.phase is Phase.SPEAKING]
    assert len(steps) > 50
    assert sums.max() <= 2 * top_k + 1e-6  # for two items


@pytest.mark.parametrize("method", ["mse", "awq", "smoothquant"])
def test_every_method_writes_a_table_that_opens(
    workshop: Workshop, tmp_path: Path, method: str
) -> None:
    settings = CalibrateSettings(method=method, floor=0, threshold=64)  # type: ignore[arg-type]
    found = workshop.calibrated(tmp_path / "table", settings, INT8)
    opened = OpenTable.open(tmp_path / "table", workshop.checkpoint.spec, workshop.origin.sha256)
    layer = workshop.checkpoint.spec.decoder.moe_layers[0]
    assert opened.weights(layer, 0).gate_up.dtype == np.int8
    assert opened.folds.is_empty is (method == "mse")
    assert found.table.calibration.error < 0.02


def test_the_exported_records_are_those_of_the_table_byte_for_byte(
    workshop: Workshop, table: Path, exported: Bundle
) -> None:
    opened = OpenTable.open(table, workshop.checkpoint.spec, workshop.origin.sha256)
    content = exported.file(exported.manifest.experts.file).read_bytes()
    for record in exported.manifest.experts.records:
        found = content[record.offset : record.offset + record.bytes]
        assert found == opened.record(record.layer, record.expert)[: record.bytes].tobytes()
    routing = read_routing(exported.file(ROUTING), exported.manifest.model.decoder)
    assert routing.speak.sum() > 0
    assert exported.describe()["calibration"]["method"] == "gptq"


def test_the_gate_passes_int4_and_a_stricter_limit_fails_it(
    workshop: Workshop, exported: Bundle
) -> None:
    limits = GateLimits(text_kl=0.05, code_kl=0.05, code_agreement=0.9)
    gate = run_gate(workshop.reference, exported, workshop.corpus.held_out, limits)
    assert gate.passed
    assert gate.measures["code_kl"].value is not None
    assert 0 < gate.measures["code_kl"].value < 0.05
    assert gate.measures["router_agreement"].value > 0.9  # type: ignore[operator]
    assert gate.measures["spoken_word_errors"].value is not None
    strict = replace(gate.measures["code_kl"], limit=0.0)
    assert replace(gate, measures={"code_kl": strict}).failed == ["code_kl"]


def test_a_model_compared_with_itself_does_not_differ(workshop: Workshop) -> None:
    held_out = workshop.corpus.held_out[:1]
    gate = run_gate(workshop.reference, workshop.reference, held_out, GateLimits())
    assert gate.measures["code_kl"].value == 0
    assert gate.measures["text_kl"].value == 0
    assert gate.measures["router_agreement"].value == 1
    assert gate.measures["same_text"].value == 1


def test_a_failed_gate_fails_the_export_and_names_the_figure(
    workshop: Workshop, table: Path, tmp_path: Path
) -> None:
    measures = {"code_kl": Measure(value=0.5, limit=0.1)}
    failed = Gate(utterances=1, rows=9, backend="cpu", measures=measures)
    copied = tmp_path / "table"
    copied.mkdir()
    for path in table.iterdir():
        if path.is_file():
            (copied / path.name).write_bytes(path.read_bytes())
    header = read_table(table)
    write_table(replace(header, calibration=replace(header.calibration, gate=failed)), copied)
    settings = ExportSettings(profile=load_profile("cpu-int8"), table=copied)
    with pytest.raises(ParityError, match=r"code_kl is 0\.5, allowed 0\.1"):
        export_bundle(TINY, tmp_path / "bundle", settings)
    with pytest.raises(SettingsError, match="backend ort holds float32"):
        export_bundle(TINY, tmp_path / "bundle", ExportSettings(table=table))


def test_layers_of_different_precision_run_alike_on_both_backends(
    workshop: Workshop, tmp_path: Path
) -> None:
    place = tmp_path / "table"
    settings = CalibrateSettings(method="rtn", floor=0)
    found = workshop.calibrated(place, settings, INT8)
    mixed = workshop.calibrated(tmp_path / "other", settings, INT4)
    # Layer 2 from the other table, so that the slots of a pool hold records of two sizes.
    records = list(found.table.records)
    content = bytearray((place / RECORDS).read_bytes())
    other = (tmp_path / "other" / RECORDS).read_bytes()
    for i, record in enumerate(mixed.table.records):
        if record.layer == 2:
            part = other[record.offset : record.offset + record.bytes]
            offset = records[i].offset
            content[offset : offset + len(part)] = part
            records[i] = replace(record, offset=offset)
    (place / RECORDS).write_bytes(bytes(content))
    layers = {**found.table.layers, "2": INT4}
    write_table(replace(found.table, layers=layers, records=tuple(records)), place)
    profile = load_profile("cpu-int8")
    manifest = export_bundle(
        TINY, tmp_path / "bundle", ExportSettings(profile=profile, table=place)
    )
    assert manifest.experts.layers == {"2": INT4}
    bundle = Bundle.open(tmp_path / "bundle")
    gate = run_gate(workshop.reference, bundle, workshop.corpus.held_out[:1], GateLimits())
    assert gate.passed


def test_routers_are_fitted_into_the_table_and_the_bundle(
    workshop: Workshop, tmp_path: Path
) -> None:
    place, profile = tmp_path / "table", load_profile("cpu-int8")
    settings = CalibrateSettings(method="rtn", floor=0)
    found = workshop.calibrated(place, settings, INT4)
    found = replace(found, corpus=read_corpus([TINY / "questions"], most=24))
    export_bundle(TINY, tmp_path / "unfitted", ExportSettings(profile=profile, table=place))
    unfitted = Bundle.open(tmp_path / "unfitted")
    fitted = with_fitted_routers(
        found, workshop.checkpoint, workshop.reference, unfitted, place, settings
    )
    said = fitted.table.calibration.routers
    assert said is not None
    assert said.fitted > said.trained
    opened = OpenTable.open(place, workshop.checkpoint.spec, workshop.origin.sha256)
    assert list(opened.folds.routers) == list(said.layers) != []
    export_bundle(TINY, tmp_path / "fitted", ExportSettings(profile=profile, table=place))
    gates = np.load(tmp_path / "fitted" / GATES)["gates"]
    layers = list(workshop.checkpoint.spec.decoder.moe_layers)
    for layer, router in opened.folds.routers.items():
        np.testing.assert_array_equal(gates[layers.index(layer)], router)
    assert "exported router" in report_page(fitted, as_report(fitted))
    assert "Not fitted" in report_page(found, as_report(found))


@pytest.mark.parametrize(
    ("name", "damage", "error"),
    [
        (HEADER, lambda b: b[: len(b) // 2], "not readable"),
        (HEADER, lambda b: b.replace(b'"format": 1', b'"format": 9'), "format 9"),
        (HEADER, lambda b: b.replace(b'"routing.npz"', b'"../routing.npz"'), "no file of a table"),
        (HEADER, lambda b: b.replace(b'"int4"', b'"int5"'), "calibrate again"),
        ("routing.npz", lambda b: b[:100] + b"x" + b[101:], "routing.npz"),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    workshop: Workshop, table: Path, tmp_path: Path, name: str, damage: Damage, error: str
) -> None:
    for path in table.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(damage((table / name).read_bytes()))
    with pytest.raises(ArtifactError, match=error):
        OpenTable.open(tmp_path, workshop.checkpoint.spec, workshop.origin.sha256)


def test_a_damaged_record_and_another_checkpoints_table_are_refused(
    workshop: Workshop, table: Path, tmp_path: Path
) -> None:
    spec = workshop.checkpoint.spec
    with pytest.raises(ArtifactError, match="made for the checkpoint tiny"):
        OpenTable.open(table, spec, "0" * 64)
    for path in table.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((table / RECORDS).read_bytes())
    content[100] ^= 1
    (tmp_path / RECORDS).write_bytes(content)
    opened = OpenTable.open(tmp_path, spec, workshop.origin.sha256)
    with pytest.raises(ArtifactError, match="layer 1, expert 0 is damaged"):
        opened.weights(1, 0)


def test_the_report_is_complete_and_loads_nothing_else(table: Path) -> None:
    content = (table / "report.html").read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(content)
    assert outside.fetched == []
    assert "script" not in outside.tags
    for said in ("Coverage", "layer 3", "Accuracy gate", "Size against accuracy", "svg"):
        assert said in content


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")
def test_a_browser_opens_the_report_without_a_request_or_an_error(
    table: Path, tmp_path: Path
) -> None:
    log = tmp_path / "net.json"
    command = [
        str(CHROMIUM),
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--disable-background-networking", "--disable-component-update", "--no-first-run"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--enable-logging=stderr", "--log-level=0", f"--log-net-log={log}", "--dump-dom"),
        (table / "report.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Size against accuracy" in done.stdout
    assert "CONSOLE" not in done.stderr
    own = [url for url in re.findall(r'"url":"([^"]+)"', log.read_text()) if "report" in url]
    assert own == []  # no request over a network on the page's behalf


def test_coverage_below_the_floor_fails_by_name(workshop: Workshop) -> None:
    settings = CalibrateSettings(floor=10**6)
    coverage = covered(workshop.checkpoint.spec, workshop.audio, workshop.seen, settings)
    with pytest.raises(SettingsError, match="24 of 24 experts"):
        coverage.check()
