"""Ask a bundle what a recording asks; the answers' text and sound come as they are made."""

import argparse
import sys
from pathlib import Path

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import as_program
from deeptalk_edge.files import check_inputs_stay
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation, TextPiece
from deeptalk_edge.runtime.loop.utterances import read_utterances
from deeptalk_edge.sound.wav import WavWriter


def main(bundle: Path, question: Path, answer: Path) -> None:
    check_inputs_stay([question], [answer])
    with (
        Conversation(Bundle.open(bundle)) as talk,
        WavWriter(answer, talk.rate_hz) as writer,
    ):
        for utterance in read_utterances(question, talk.max_question_samples):
            for event in talk.ask(utterance):
                if isinstance(event, TextPiece):
                    print(event.text, end="", flush=True)
                elif isinstance(event, AudioChunk):
                    writer.write(event.pcm)  # or hand it to a sound card
            print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, help="directory made by `deeptalk-edge export`")
    parser.add_argument("question", type=Path, help="WAV to ask with")
    parser.add_argument("answer", type=Path, help="WAV to write")
    # One line for what goes wrong, and Ctrl-C or SIGTERM end it well.
    sys.exit(as_program(lambda: main(**vars(parser.parse_args()))))
