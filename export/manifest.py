"""`manifest.json` as it is written; runtime/bundle.py reads it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from deeptalk_edge.runtime.bundle import FORMAT, MANIFEST, Manifest


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write the JSON form that `Bundle.open` reads; last of all, for it makes a bundle."""
    content = dataclasses.asdict(manifest)
    content["graphs"] = content.pop("ort_graphs")
    content["experts"] = {
        "file": content.pop("experts_file"),
        "dtype": content.pop("expert_dtype"),
        "group": content.pop("expert_group"),
        "records": content.pop("records"),
    }
    text = json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")
