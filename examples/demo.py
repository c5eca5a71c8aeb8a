"""`make demo`: three spoken questions in, three spoken answers out.

The questions are spoken on the spot by espeak-ng; the checkpoint never heard them in training, nor
the voice. Where espeak-ng is missing, such recordings from the repository serve.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from deeptalk_edge.cli import as_program
from deeptalk_edge.cli import main as deeptalk_edge

QUESTIONS = (
    "can I have six tickets for Vienna",
    "which way to platform eleven",
    "please call room four four one",
)
VOICE = "en-gb-scotland+f4"
RECORDED = Path(__file__).parent.parent / "checkpoints" / "tiny" / "questions"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the sound")
    parser.add_argument("--wav", type=Path, nargs="+", help="ask with these recordings instead")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wavs = args.wav or ask_aloud(args.out)
    answer = args.out / "answer.wav"
    command = ["run", "--bundle", str(args.bundle), "--out", str(answer), "--forget"]
    code = deeptalk_edge([*command, "--wav", *map(str, wavs)])
    if code == 0:
        print(f"\nlisten to the answers: {args.out}/answer*.wav")
    return code


def ask_aloud(folder: Path) -> list[Path]:
    """The three questions as WAV files in `folder`."""
    program = shutil.which("espeak-ng")
    if program is None:
        return sorted(RECORDED.glob("*.wav"))[: len(QUESTIONS)]
    wavs = []
    for number, question in enumerate(QUESTIONS, 1):
        wav = folder / f"question-{number}.wav"
        subprocess.run([program, "-v", VOICE, "-w", str(wav), question], check=True)
        print(f'question-{number}.wav: "{question}"')
        wavs.append(wav)
    return wavs


if __name__ == "__main__":
    sys.exit(as_program(main))
