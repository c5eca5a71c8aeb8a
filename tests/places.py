"""Paths in the checkout that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny"
OFFICIAL_SIZE = ROOT / "checkpoints" / "official-size"
QUESTIONS_FOLDER = TINY / "questions"
