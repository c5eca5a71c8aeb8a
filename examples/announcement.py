"""Answers that the user cannot interrupt: a safety notice, a price that must be said in full."""

import argparse
import sys

from deeptalk_edge import Bundle, Conversation
from deeptalk_edge.cli import as_program
from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.events import TextPiece, TurnDone
from deeptalk_edge.runtime.loop.settings import ReplyPolicy


def main(bundle: str, port: SoundPort | None = None) -> None:
    with Conversation(Bundle.open(bundle)) as talk, talk.listen(port) as live:
        live.set_policy(ReplyPolicy(interruptible=False, commit="full"))
        for event in live:
            if isinstance(event, TextPiece):
                print(event.text, end="", flush=True)
            elif isinstance(event, TurnDone):
                print()
                live.set_policy(ReplyPolicy())  # from the second answer on


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", help="directory made by `deeptalk-edge export`")
    # One line for what goes wrong, and Ctrl-C or SIGTERM end it well.
    sys.exit(as_program(lambda: main(parser.parse_args().bundle)))
