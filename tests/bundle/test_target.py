"""Older names of backends and MoE forms are read, and today's are written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import read_manifest, write_manifest
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.manifests import edit_manifest


def test_a_bundle_for_native_is_read_as_one_for_cpu(int8_bundle: Bundle, tmp_path: Path) -> None:
    place = Path(shutil.copytree(int8_bundle.path, tmp_path / "bundle"))

    def as_before(content: dict[str, Any]) -> None:
        assert content["target"]["backend"] == "cpu"
        content["target"]["backend"] = "native"

    edit_manifest(place, as_before)
    manifest = read_manifest(place / "manifest.json")
    assert manifest.target == int8_bundle.manifest.target
    write_manifest(manifest, place)
    assert json.loads((place / "manifest.json").read_text())["target"]["backend"] == "cpu"


def test_native_in_a_profile_or_in_settings_means_cpu(int8_bundle: Bundle, tmp_path: Path) -> None:
    settings = ConversationSettings.of(int8_bundle)
    changed = {name: getattr(settings, name) for name in settings.__slots__}
    assert ConversationSettings(**{**changed, "backend": "native"}).backend == "cpu"
    for name, old in (("cpu-int8", 'backend = "cpu"'), ("rtx-4090", 'moe = "operators"')):
        source = Path("devices/profiles") / f"{name}.toml"
        text = source.read_text()
        assert old in text
        place = tmp_path / source.name
        place.write_text(text.replace(old, old.split('"')[0] + '"native"'))
        assert load_profile(str(place)) == load_profile(name)
