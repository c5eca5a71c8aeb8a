"""Ask a bundle one spoken question; the answer's text and sound come as they are made."""

import sys
from pathlib import Path

from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.audio.wav import WavWriter
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation, TextPiece


def main(bundle: str, question: str, answer: str) -> None:
    with (
        Conversation(Bundle.open(Path(bundle))) as talk,
        WavWriter(Path(answer), talk.rate_hz) as writer,
    ):
        for event in talk.ask(read_utterance(Path(question))):
            if isinstance(event, TextPiece):
                print(event.text, end="", flush=True)
            elif isinstance(event, AudioChunk):
                writer.write(event.pcm)  # or hand it to a sound card
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
