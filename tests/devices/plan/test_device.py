"""A verdict, its reason, and the nearest option that works."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from deeptalk_edge.bundle.memory import RESERVE_BYTES, pool_slots
from deeptalk_edge.devices.facts import Fact
from deeptalk_edge.devices.plan.device import Model, near_window, plan_device
from deeptalk_edge.devices.plan.page import page
from deeptalk_edge.devices.plan.picture import parts_of, svg
from deeptalk_edge.devices.plan.source import model_of_checkpoint
from deeptalk_edge.devices.plan.times import Question
from deeptalk_edge.devices.profile import DeviceProfile, load_profile, profile_names
from deeptalk_edge.errors import SettingsError
from tests.places import OFFICIAL_SIZE

QUESTION = Question()


@pytest.fixture(scope="module")
def official() -> Model:
    return model_of_checkpoint(OFFICIAL_SIZE)


def with_fact(profile: DeviceProfile, name: str, value: float, **more: object) -> DeviceProfile:
    fact: Fact[float] = Fact(value=value, source="this test", confirmed=True, **more)  # type: ignore[arg-type]
    facts = replace(profile.facts, **{name: fact})  # type: ignore[arg-type]
    return replace(profile, facts=facts)


@pytest.mark.parametrize(
    ("device", "verdict"),
    [
        ("thor", "fits"),
        ("rtx-4090", "fits"),
        ("rtx-4060", "pages"),
        ("orin-nx-8gb", "refuses"),
        ("orin-nano-8gb", "refuses"),  # two items take longer than the sound that they make
        ("orin-nano-4gb", "refuses"),
        ("cpu", "unknown"),
    ],
)
def test_each_device_has_its_verdict_and_a_reason(
    official: Model, device: str, verdict: str
) -> None:
    plan = plan_device(official, load_profile(device), QUESTION)
    assert plan.verdict == verdict
    assert plan.reason
    assert (plan.why_no_times is None) is (plan.expected is not None)


def test_a_refused_plan_names_the_nearest_option_that_works(official: Model) -> None:
    plan = plan_device(official, load_profile("orin-nano-8gb"), QUESTION)
    assert plan.nearest
    assert plan.nearest.startswith("one item (--items 1): pages")
    one = plan_device(official, load_profile("orin-nano-8gb"), Question(num_items=1))
    assert (one.verdict, one.nearest) == ("pages", None)


def test_a_resident_device_that_is_short_of_memory_is_told_to_page_or_pack(
    official: Model,
) -> None:
    small = with_fact(load_profile("agx-orin-32gb"), "usable_memory_bytes", 14 * 10**9)
    plan = plan_device(official, small, QUESTION)
    assert plan.verdict == "refuses"
    assert "GB of memory short" in plan.reason
    assert plan.nearest
    assert "paged" in plan.nearest or "int4" in plan.nearest


def test_the_slots_are_those_that_the_runtime_would_open(official: Model) -> None:
    profile = load_profile("laptop-8gb")
    memory = plan_device(official, profile, QUESTION).memory
    assert memory.usable
    others = sum(memory.parts.values()) - RESERVE_BYTES
    decoder = official.spec.decoder
    assert memory.slots == pool_slots(
        num_records=memory.num_experts,
        slot_bytes=memory.expert_bytes,
        num_layers=len(decoder.moe_layers),
        top_k=decoder.top_k,
        available_bytes=memory.usable.value - others,
    )


def test_a_power_mode_that_slows_the_memory_slows_the_step(official: Model) -> None:
    profile = load_profile("agx-orin-64gb")
    best, slow = (
        plan_device(official, profile, QUESTION, power_mode=mode) for mode in (None, "MODE_15W")
    )
    assert best.floor
    assert slow.floor
    assert slow.floor.step_ms[1] == pytest.approx(best.floor.step_ms[1] * 3199 / 2133, rel=0.001)
    with pytest.raises(SettingsError, match=r"no power mode '7W'; its modes: MAXN, MODE_15W"):
        plan_device(official, profile, QUESTION, power_mode="7W")


def test_every_figure_from_an_unconfirmed_fact_is_marked(official: Model) -> None:
    profile = load_profile("rtx-3060")  # its memory's rate is confirmed, its products' is not
    plan = plan_device(official, profile, QUESTION)
    assert plan.unconfirmed == {
        "memory": ("usable_memory_bytes",),
        "prefill": ("float16_tflops",),
        "total": ("float16_tflops",),
    }
    text = page([plan], "official")
    assert "computed, not measured" in text
    lines = {line.strip().split(",")[0]: line for line in text.splitlines()}
    for figure in ("prefill", "voice to voice", "first sound"):
        assert lines[figure].count("?") == 2, figure  # the floor and what to expect
    assert "?" not in lines["step"]
    for name in ("usable_memory_bytes", "float16_tflops"):
        profile = with_fact(profile, name, getattr(profile.facts, name).value)
    assert plan_device(official, profile, QUESTION).unconfirmed == {}


def test_the_paging_of_a_refused_plan_is_marked_too(official: Model) -> None:
    plan = plan_device(official, load_profile("orin-nano-8gb"), QUESTION)
    assert plan.verdict == "refuses"
    assert plan.unconfirmed["paging"] == ("disk_read_gb_per_s", "usable_memory_bytes")
    assert set(plan.unconfirmed["paging"]) <= set(plan.unconfirmed["total"])


def test_a_bundle_for_the_cpu_is_not_timed_by_a_gpus_rates(official: Model) -> None:
    profile = load_profile("thor").on_backend("cpu")
    plan = plan_device(official, profile, QUESTION)
    assert plan.expected is None
    assert "on its CPU" in (plan.why_no_times or "")


def test_measured_rates_are_reached_and_need_no_efficiency(official: Model) -> None:
    profile = load_profile("cpu-int8")
    for name, value in (
        ("memory_bandwidth_gb_per_s", 10),
        ("int8_tops", 1),
        ("float32_tflops", 0.1),
        ("usable_memory_bytes", 32 * 10**9),
    ):
        profile = with_fact(profile, name, value, measured="probe")
    plan = plan_device(official, profile, replace(QUESTION, num_items=1))
    assert plan.expected
    assert plan.floor
    assert plan.assumptions.step_efficiency == 1
    assert "reads and products of many rows add up" in page([plan], "official")
    assert plan.floor.voice_to_voice_ms < plan.expected.voice_to_voice_ms


def test_a_near_window_is_as_long_as_the_question(official: Model) -> None:
    assert near_window(QUESTION, official.spec).encoder_frames == 251
    long = near_window(Question(seconds=100), official.spec)
    assert long.encoder_frames == official.spec.encoder.max_frames


def test_all_devices_fit_into_one_picture_and_one_table(official: Model) -> None:
    plans = [plan_device(official, load_profile(name), QUESTION) for name in profile_names()]
    picture = svg(plans, "a <model>")
    tree = ElementTree.fromstring(picture)
    texts = {element.text for element in tree.iter() if element.tag.endswith("text")}
    assert set(profile_names()) <= texts
    assert "a <model>: voice to voice, ms; computed, not measured" in texts
    expected = plans[-1].expected
    assert expected
    assert sum(parts_of(expected).values()) == pytest.approx(expected.voice_to_voice_ms)
    table = page(plans, "official").splitlines()
    assert [line.split()[0] for line in table[2 : 2 + len(plans)]] == profile_names()
