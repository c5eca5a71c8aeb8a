"""Opens damaged bundles, one per line of stdin, and prints the outcome of each.

    python -m tests.bundle.sweep_child BACKEND [LIBRARY]

It runs as a separate process, because a crash or a hang is an outcome. An answer is the SHA-256 of
the bundle's text and sound for a typed and a spoken question.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import EdgeError
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation, TextPiece
from deeptalk_edge.runtime.settings import BackendChoice, ConversationSettings


def answer(place: Path, backend: BackendChoice) -> str:
    """Return the bundle's answer. Raises EdgeError if the bundle is refused."""
    bundle = Bundle.open(place)
    settings = dataclasses.replace(ConversationSettings.of(bundle), backend=backend)
    chirp = np.sin(np.arange(8000, dtype=np.float32) ** 2 * 1e-4) * np.float32(0.3)
    said = hashlib.sha256()
    with Conversation(bundle, settings) as talk:
        for question in ("Why?", chirp):
            for event in talk.ask(question):
                if isinstance(event, TextPiece):
                    said.update(event.text.encode())
                elif isinstance(event, AudioChunk):
                    said.update(event.pcm.tobytes())
    return said.hexdigest()


def outcome(place: Path, backend: BackendChoice) -> tuple[str, str]:
    """`answered` and the answer, `refused` and the message, or `traceback`."""
    try:
        return "answered", answer(place, backend)
    except EdgeError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except Exception:
        return "traceback", traceback.format_exc()


def main() -> None:
    backend: BackendChoice = "ort" if sys.argv[1] == "ort" else "cpu"
    if len(sys.argv) > 2:
        native_library.LIBRARY = Path(sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(outcome(Path(line.rstrip("\n")), backend)), flush=True)


if __name__ == "__main__":
    main()
