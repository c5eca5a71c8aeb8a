"""Device profiles: refusals, and the shipped ones."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path

import pytest

from deeptalk_edge.bundle.precision import CPU_KERNELS, FLOAT32
from deeptalk_edge.devices.profile import (
    RTX_TARGETS,
    load_profile,
    parse_profile,
    profile_names,
)
from deeptalk_edge.errors import SettingsError
from tests.places import ROOT

JETSONS = (
    *("orin-nano-4gb", "orin-nano-8gb", "orin-nx-8gb", "orin-nx-16gb"),
    *("agx-orin-32gb", "agx-orin-64gb", "thor", "thor-t4000"),
)
CARDS = (
    *("rtx-3060", "rtx-4060", "rtx-4070", "rtx-4090", "rtx-5060", "rtx-5090"),
    *("rtx-a2000-12gb", "rtx-4000-ada", "h100", "h200"),
)
CPUS = ("cpu", "cpu-int8", "arm-cpu", "laptop-8gb")
NAMES = tuple(sorted((*JETSONS, *CARDS, *CPUS, "dgx-spark")))

READ = 'address = "https://a.b/c", date = "2026-11-30"'

TOML = f"""
name = "board"
summary = "a board"
backend = "tensorrt"
moe = "plugin"
expert_residency = "paged"

[precision]
encoder = "float16"
decoder = "float16"
experts = "int4"
expert_group = 128
head = "float16"
codec = "float16"
kv_cache = "float16"

[facts]
compute_capabilities = {{ value = ["sm_87"], source = "a list", confirmed = true, {READ} }}
memory_bytes = {{ value = 8, source = "a page", confirmed = false }}
memory_shared = {{ value = true, source = "a page", confirmed = true, measured = "probe" }}
disk_read_gb_per_s = {{ value = 3, source = "a guess", confirmed = false }}

[[power_modes]]
name = "15W"
id = 1
watts = 15
memory_bandwidth_gb_per_s = 68
source = "a file"
confirmed = false

[paging]
source = "a guess"
pool_bytes = 100
link = "disk"
link_gb_per_s = [1, 2.5]
attention_ms = 0.5
fixed_ms = 5
prefill_row_ms = 0.25

[paging.experts.int4]
record_bytes = 10
decode_ms = 0.75
prefill_ms = 0.125
"""


def test_all_promised_profiles_come_with_the_package() -> None:
    assert tuple(profile_names()) == NAMES
    pattern = re.search(
        r'"deeptalk_edge.devices" = \["(profiles[^"]*)"', (ROOT / "pyproject.toml").read_text()
    )
    assert pattern is not None
    folder = resources.files("deeptalk_edge.devices") / "profiles"
    assert all(fnmatch(f"profiles/{entry.name}", pattern[1]) for entry in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_profile_is_complete_and_has_the_name_of_its_file(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    facts = profile.facts
    if name == "cpu":
        assert profile.precision == FLOAT32
    if name == "cpu-int8":
        assert profile.precision == CPU_KERNELS
    if name in CPUS:
        return
    for needed in ("memory_bytes", "usable_memory_bytes", "memory_bandwidth_gb_per_s"):
        assert getattr(facts, needed), needed
    for needed in ("float16_tflops", "int8_tops", "precisions", "disk_read_gb_per_s", "storage"):
        assert getattr(facts, needed), needed
    assert facts.usable_memory_bytes
    assert facts.memory_bytes
    assert facts.usable_memory_bytes.value < facts.memory_bytes.value
    assert (facts.pcie is not None) is (facts.host_link_gb_per_s is not None) is (name in CARDS)
    assert (facts.jetpack is not None) is (name in JETSONS)
    assert bool(profile.power_modes) is (name in JETSONS and name != "thor-t4000")


def test_a_profile_has_one_default_power_mode_and_the_nano_s_cap_memory() -> None:
    for name in NAMES:
        modes = load_profile(name).power_modes
        assert sum(mode.is_default for mode in modes) == bool(modes), name
    nano = {mode.name: mode for mode in load_profile("orin-nano-8gb").power_modes}
    assert nano["15W"].memory_bandwidth_gb_per_s == 68.0  # EMC at 2133 of 3199 MHz
    assert nano["MAXN_SUPER"].memory_bandwidth_gb_per_s is None


def test_a_file_in_the_users_directory_is_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    place = tmp_path / "deeptalk-edge" / "devices"
    place.mkdir(parents=True)
    (place / "board.toml").write_text(TOML, encoding="utf-8")
    (place / "thor.toml").write_text(TOML, encoding="utf-8")
    assert "board" in profile_names()
    assert load_profile("board").summary == "a board"
    assert load_profile("thor").summary == "a board"  # the user's profile comes first


def test_a_guess_is_never_confirmed() -> None:
    for name in NAMES:
        facts = load_profile(name).facts
        for fact in (getattr(facts, field) for field in facts.__dataclass_fields__):
            if fact and re.search("guess|from memory|no address|quoted by others", fact.source):
                assert not fact.confirmed, fact


def test_a_users_profile_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(TOML, encoding="utf-8")
    profile = load_profile(str(path))
    assert (profile.name, profile.targets) == ("board", ("sm_87",))
    assert profile.facts.memory_bytes
    assert profile.facts.memory_bytes.confirmed is False
    assert profile.facts.disk_read_gb_per_s
    assert profile.facts.disk_read_gb_per_s.value == 3
    assert profile.facts.int8_tops is None
    assert [mode.name for mode in profile.power_modes] == ["15W"]
    assert profile.paging
    assert profile.paging.link_gb_per_s == (1, 2.5)
    assert profile.paging.experts["int4"].prefill_ms == 0.125


def test_an_unknown_device_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'tx2'.*orin-nano-8gb.*TOML file"):
        load_profile("tx2")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name =", "nick =", "profile has no nick"),
        ('head = "float16"', 'hat = "float16"', "precision has no hat"),
        ("memory_bytes", "memory_gb", "facts has no memory_gb"),
        ("confirmed = false }\nmemory_sh", "sure = 1 }\nmemory_sh", "memory_bytes has no sure"),
        ('summary = "a board"', "", "profile lacks summary"),
        ('summary = "a board"', "summary = 3", "summary = 3: expected text"),
        ('codec = "float16"', "", "precision lacks codec"),
        ('source = "a page", confirmed = false', "confirmed = false", "memory_bytes lacks source"),
        ('"a page", confirmed = false', '"", confirmed = false', "say where the value comes from"),
        ("confirmed = false }", "confirmed = true }", "is confirmed without evidence"),
        (', date = "2026-11-30"', "", "is confirmed without evidence"),
        ('"2026-11-30"', '"yesterday"', "date is 'yesterday', expected a day"),
        ('"https://a.b/c"', '"a shelf"', "is confirmed without evidence"),
        ("watts = 15", "watts = 0", "power_modes '15W': watts is 0"),
        ("watts = 15", "volts = 15", "power_modes has no volts"),
        ("[[power_modes]]", "[power_modes]", "expected tables"),
        ("confirmed = false", 'confirmed = "no"', "expected true or false"),
        ("value = 8", "value = 8.5", "a whole number above 0"),
        ("value = 8", "value = true", "a whole number above 0"),
        ("value = 8", "value = 0", "a whole number above 0"),
        ("value = 3", "value = inf", "a number above 0"),
        ("value = 3", 'value = "fast"', "a number above 0"),
        ("pool_bytes", "pool_gb", "paging has no pool_gb"),
        ("prefill_ms = 0.125", "", "int4 lacks prefill_ms"),
        ("decode_ms = 0.75", "decode_ms = 0", "paging.experts.int4.decode_ms is 0, expected"),
        ("[1, 2.5]", "[]", "paging.link_gb_per_s is [], expected a list of rates"),
        ('"disk"', '"tape"', "paging.link is 'tape', expected disk or pcie"),
        ("value = true", "value = 1", "memory_shared.value is 1, expected true or false"),
        ('["sm_87"]', '["8.7"]', "a list such as"),
        ('["sm_87"]', "[]", "a list such as"),
        ('backend = "tensorrt"', 'backend = "tvm"', "backend = 'tvm': known are ort"),
        ('"plugin"', '"split"', "with backend tensorrt: expected plugin or operators"),
        ('"paged"', '"swapped"', "known are resident, paged"),
        ('encoder = "float16"', 'encoder = "int3"', "encoder = 'int3': known are float32"),
        ('codec = "float16"', 'codec = "bfloat16"', "codec = 'bfloat16': known are float32, "),
        ("expert_group = 128", "", "int4 needs one of 32, 64, 128"),
        ("expert_group = 128", "expert_group = 16", "int4 needs one of 32, 64, 128"),
        ('experts = "int4"', 'experts = "int8"', "every other precision none"),
        ('backend = "tensorrt"\nmoe = "plugin"', 'backend = "ort"\nmoe = "split"', "float32 throu"),
        (
            'backend = "tensorrt"\nmoe = "plugin"',
            'backend = "native"\nmoe = "split"',
            "head in int8",
        ),
        ('backend = "tensorrt"', 'backend = "tensorrt_rtx"', "does not build for sm_87, only for"),
        ('compute_capabilities = { value = ["sm_87"]', 'cuda = { value = "1"', "needs a GPU"),
        ("[facts]", "facts = 3\n[fact]", "precision has no facts"),
        ("[facts]", "[facts", "line 17"),
    ],
)
def test_a_profile_that_is_wrong_is_refused_by_name(old: str, new: str, words: str) -> None:
    assert TOML.count(old) >= 1
    with pytest.raises(SettingsError, match=f"^board.toml: .*{re.escape(words)}"):
        parse_profile(TOML.replace(old, new, 1), "board.toml")


def test_another_backend_has_its_default_precision_and_moe_form() -> None:
    card = load_profile("rtx-4090")
    assert card.on_backend("tensorrt_rtx") is card
    assert card.on_backend("ort").precision == FLOAT32
    assert card.on_backend("ort").moe == "split"
    assert card.on_backend("cpu").precision == CPU_KERNELS
    assert load_profile("cpu").on_backend("cpu").precision == CPU_KERNELS
    on_device = card.on_backend("tensorrt")
    assert (on_device.moe, on_device.precision) == ("plugin", card.precision)


@pytest.mark.parametrize(
    ("name", "words"),
    [("cpu", "states no compute_capabilities"), ("orin-nano-8gb", "does not build for sm_87")],
)
def test_a_backend_that_the_device_lacks_is_refused(name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_profile(name).on_backend("tensorrt_rtx")


def test_tensorrt_rtx_can_build_for_every_rtx_profile() -> None:
    assert all(set(load_profile(n).targets) <= set(RTX_TARGETS) for n in NAMES if n[:3] == "rtx")


@pytest.mark.parametrize(
    ("changes", "experts", "group"),
    [
        (["experts=int8"], "int8", None),
        (["experts=int4:64"], "int4", 64),
        (["experts=float16", "experts=int4:128", "head=int8"], "int4", 128),
    ],
)
def test_a_chosen_precision_replaces_that_of_the_device(
    changes: list[str], experts: str, group: int | None
) -> None:
    precision = load_profile("thor").with_precision(changes).precision
    assert (precision.experts, precision.expert_group) == (experts, group)
    assert precision.decoder == "float16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("experts", "expected PART=DTYPE"),
        ("router=int8", "a part of encoder, decoder"),
        ("expert_group=64", "a part of encoder, decoder"),
        ("codec=bfloat16", "known are float32, float16"),
        ("experts=int4", "int4 needs one of 32, 64, 128"),
        ("experts=int4:96", "int4 needs one of 32, 64, 128"),
        ("experts=int8:64", "every other precision none"),
    ],
)
def test_a_precision_that_is_not_built_is_refused(change: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        load_profile("thor").with_precision([change])


@pytest.mark.parametrize("kv_cache", ["bfloat16", "int8"])
def test_our_kernels_take_two_kinds_of_cache(kv_cache: str) -> None:
    profile = load_profile("cpu-int8").with_precision([f"kv_cache={kv_cache}", "experts=int4:32"])
    assert (profile.precision.kv_cache, profile.precision.experts) == (kv_cache, "int4")


def test_with_our_kernels_the_encoder_may_be_int8() -> None:
    profile = load_profile("cpu-int8").with_precision(["encoder=int8"])
    assert profile.precision.encoder == "int8"
    with pytest.raises(SettingsError, match="the encoder in float32 or int8"):
        load_profile("cpu-int8").with_precision(["encoder=float16"])


@pytest.mark.parametrize("kv_cache", ["float32", "float16"])
def test_our_kernels_refuse_other_kinds_of_cache(kv_cache: str) -> None:
    with pytest.raises(SettingsError, match="kv_cache in bfloat16 or int8"):
        load_profile("cpu-int8").with_precision([f"kv_cache={kv_cache}"])


@pytest.mark.parametrize("name", ["cpu", "rtx-4090", "orin-nano-8gb"])
def test_a_backend_without_an_int8_cache_names_its_kinds(name: str) -> None:
    with pytest.raises(SettingsError, match=r"choose float32 .* or backend cpu"):
        load_profile(name).with_precision(["kv_cache=int8"])


def test_a_bundle_for_onnx_runtime_has_one_precision() -> None:
    with pytest.raises(SettingsError, match="cpu: a bundle for backend ort is float32"):
        load_profile("cpu").with_precision(["experts=int8"])
