"""Edits manifests and updates their checksum."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import MANIFEST, checksum_of


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON in place, its checksum included."""
    content = json.loads((bundle / MANIFEST).read_text())
    edit(content)
    kept = {name: content[name] for name in content.keys() - {"format", "checksum"}}
    content["checksum"] = checksum_of(kept)
    (bundle / MANIFEST).write_text(json.dumps(content))
