"""Opens damaged bundles, one a line of stdin, and says on stdout what became of each.

    python -m tests.bundle.sweep_child BACKEND [LIBRARY]

A process of its own: what crashes or hangs it is the finding. An answer is the SHA-256 of the text
and sound that a bundle gives to a typed and a spoken question.
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
    """What the bundle says. Raises EdgeError if it is refused."""
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
