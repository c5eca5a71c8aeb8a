"""A kiosk: people walk up, talk, interrupt and walk away; the screen shows what is said."""

import argparse
import sys

from deeptalk_edge import Bundle, Conversation
from deeptalk_edge.cli import as_program
from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.events import (
    Interrupted,
    SoundLost,
    SpeechStarted,
    TextPiece,
    TurnDone,
    TurnFailed,
)
from deeptalk_edge.runtime.loop.settings import LoopSettings

KIOSK = LoopSettings(forget_ms=30_000)  # 30 s of silence: the next customer


def main(bundle: str, port: SoundPort | None = None) -> None:
    with Conversation(Bundle.open(bundle)) as talk, talk.listen(port, KIOSK) as live:
        for event in live:
            match event:
                case SpeechStarted():
                    print("(listening)")
                case TextPiece(text):
                    print(text, end="", flush=True)
                case Interrupted(heard_s):
                    print(f" ... stopped after {heard_s:.1f} s", end="")
                case TurnDone(_, _, voice) if voice and voice.audible_ms:
                    print(f"\n(answered within {voice.audible_ms:.0f} ms)")
                case TurnFailed(error):
                    print(f"\n(no answer, please ask again: {error})")
                case SoundLost(error):
                    print(f"(out of order: {error})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="directory made by `deeptalk-edge export`")
    # One line for what goes wrong, and Ctrl-C or SIGTERM end it well.
    sys.exit(as_program(lambda: main(parser.parse_args().bundle)))
