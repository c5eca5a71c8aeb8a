"""DPO on an undertrained checkpoint: does the margin rise, and do the word errors fall?

    python -m deeptalk_edge.bench wide_checkpoint
    python -m deeptalk_edge.bench preference --checkpoint build/wide/checkpoint --work build/wide

The checkpoint answers typed questions, one in five wrong when spoken. `train pairs` samples its
answers to training questions and picks pairs; DPO in both forms follows. `train eval` scores it
before and after on typed questions held out: the words that a recogniser hears against the
requested text. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeptalk_edge.bench.wide_checkpoint import typed_course
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.units import UnitVoice


def different(corpus: Corpus, chosen: Sequence[int]) -> list[int]:
    """One utterance a question; the corpus has each in several voices."""
    return list({corpus.utterances[i].question: i for i in chosen}.values())


def write_questions(corpus: Corpus, units: UnitVoice, chosen: Sequence[int], path: Path) -> None:
    """Write typed questions with spoken answers as JSONL."""
    lines = []
    for i in chosen:
        utterance = corpus.utterances[i]
        codes, starts = units.answer_codes(utterance.answer)
        answer = {
            "role": "assistant",
            "content": utterance.answer,
            "codec": codes.flatten().tolist(),
            "word_frames": [int(start) for start in starts],
        }
        question = {"role": "user", "content": utterance.question}
        lines.append(json.dumps({"conversations": [question, answer]}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(*arguments: str) -> str:
    """Run `deeptalk-edge train`; returns what it printed."""
    command = [sys.executable, "-m", "deeptalk_edge.cli", "train", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def scored(checkpoint: Path, data: Path, limit: int) -> dict[str, Any]:
    """Typed questions: spoken exact with its interval, and word errors."""
    said = train("eval", str(checkpoint), f"TQAA={data}", "--max-samples", str(limit), "--json")
    found: dict[str, Any] = json.loads(said)["typed"]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, pair, align, and print the scores."""
    parser = argparse.ArgumentParser(prog="bench preference", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/wide/checkpoint"))
    parser.add_argument("--work", type=Path, default=Path("build/wide"))
    parser.add_argument("--tiny", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--questions", type=int, default=200, help="to sample answers to")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=40, help="of DPO")
    parser.add_argument("--rate", type=float, default=1e-4)
    args = parser.parse_args(argv)
    work, start = args.work, args.checkpoint
    corpus, units = typed_course(work, args.tiny, workers=2)
    train_data, held_out = work / "train.jsonl", work / "held_out.jsonl"
    seen = different(corpus, corpus.select(Split.TRAIN, is_test=False))
    new = different(corpus, corpus.select(Split.NEW_COMBINATION, is_test=True))
    write_questions(corpus, units, seen[:: max(1, len(seen) // args.questions)], train_data)
    write_questions(corpus, units, new[: args.held_out], held_out)
    found: dict[str, Any] = {"before": scored(start, held_out, args.held_out)}
    print("before", found["before"], flush=True)
    pairs = work / "pairs.jsonl"
    count = str(args.questions)
    print(
        train("pairs", str(start), f"TQAA={train_data}", "-o", str(pairs), "--max-samples", count)
    )
    for mode in ("proper", "released"):
        run = work / f"dpo_{mode}"
        changes = {
            "checkpoint": json.dumps(str(start)),
            "output": json.dumps(str(run)),
            "data.train": f'[{{path = "{pairs}", task = "RQACONVA"}}]',
            "data.evaluate": f'[{{path = "{pairs}", task = "RQACONVA"}}]',
            "data.accumulation": "4",
            "preference.mode": mode,
            "optimiser.num_steps": str(args.steps),
            "optimiser.learning_rate": str(args.rate),
        }
        flags = [f"--set={name}={value}" for name, value in changes.items()]
        train("preference", *flags)
        margins = [e["margin"] for e in _journal(run) if e["kind"] == "evaluation"]
        found[mode] = {**scored(run / "final", held_out, args.held_out), "margins": margins}
        print(mode, found[mode], flush=True)
    print(json.dumps(found))
    return 0


def _journal(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
