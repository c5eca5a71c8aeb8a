"""DPO on an undertrained checkpoint: does the margin rise, and do the word errors fall?

start      what `make tiny` has after its speaking stage, from `--work`: it was trained on typed
           questions only, and does not speak all answers right. Its split is the shipped
           checkpoint's, which DPO does not use
pairs      `train pairs` on questions of the training set, in a sample that is not evaluated
align      DPO in both forms, and beside them the control: as many steps on the better answers
           alone (`finetune`), for a better answer teaches without a worse one, too
score      `train eval` before and after, on typed questions whose answers training never had
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from deeptalk_edge.bench.harness import TINY, arguments, measured
from deeptalk_edge.flags import amount, count
from deeptalk_edge.training.tiny.corpus import Corpus, load_corpus
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.publish import AUDIO_EXPERTS_FILE, publish
from deeptalk_edge.training.tiny.tokens import TINY_CODEC
from deeptalk_edge.training.tiny.train import TrainSettings, Workshop
from deeptalk_edge.training.tiny.units import UnitVoice


def main(argv: Sequence[str] | None = None) -> int:
    """Train, pair, align, and print the scores."""
    parser = arguments("preference", __doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="of `make tiny`")
    parser.add_argument("--out", type=Path, default=Path("build/preference"))
    parser.add_argument("--questions", type=count, default=300, help="to make pairs of")
    parser.add_argument("--samples", type=count, default=8, help="answers to each of them")
    parser.add_argument("--held-out", type=count, default=200, help="questions to score")
    parser.add_argument("--dpo-steps", type=count, default=40)
    parser.add_argument(
        "--rates", type=amount, nargs="+", default=[2e-5, 1e-4], help="of DPO and of the control"
    )
    parser.add_argument("--threads", type=count, default=2)
    args = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with measured(args) as figures:
        out: Path = args.out
        start, corpus, units = _undertrained(args.work, out / "checkpoint")
        seen, new = out / "seen.jsonl", out / "new.jsonl"
        _write_questions(corpus, units, _different(corpus, Split.TRAIN)[: args.questions], seen)
        held_out = _different(corpus, Split.NEW_COMBINATION)[: args.held_out]
        _write_questions(corpus, units, held_out, new)
        figures["before"] = _scored(start, new, args.held_out)
        _show("before", figures["before"])
        pairs = out / "pairs.jsonl"
        limits = ("--max-samples", str(args.questions), "--samples", str(args.samples))
        print(_train("pairs", str(start), f"TQAA={seen}", "-o", str(pairs), *limits), flush=True)
        winners = out / "winners.jsonl"
        winners.write_text("".join(map(_winner, pairs.read_text("utf-8").splitlines())), "utf-8")
        for rate in args.rates:
            for form, recipe, data, changes in (
                ("proper", "preference", pairs, {"preference.mode": "proper"}),
                ("released", "preference", pairs, {"preference.mode": "released"}),
                ("winners alone", "finetune", winners, {}),
            ):
                name = f"{form}, {rate:g}"
                run = out / name.replace(", ", "_").replace(" ", "_")
                source = f'[{{path = "{data}", task = "TQAA"}}]'
                changes |= {
                    "checkpoint": json.dumps(str(start)),
                    "output": json.dumps(str(run)),
                    "data.train": source,
                    "data.evaluate": source,
                    "data.accumulation": "4",
                    "optimiser.num_steps": str(args.dpo_steps),
                    "optimiser.learning_rate": str(rate),
                }
                _train(recipe, *(f"--set={key}={value}" for key, value in changes.items()))
                figures[name] = _scored(run / "final", new, args.held_out) | _margins(run)
                _show(name, figures[name])
    return 0


def _undertrained(work: Path, out: Path) -> tuple[Path, Corpus, UnitVoice]:
    """The checkpoint to align, and what its data is made of."""
    corpus, units = load_corpus(work / "corpus"), UnitVoice.load(work / "units.npz")
    workshop = Workshop(corpus, units, TINY_CODEC, TrainSettings(), "cpu")
    model = workshop.new_model()
    model.load_state_dict(load_file(work / "speaking.safetensors"), strict=False)
    split = json.loads((TINY / AUDIO_EXPERTS_FILE).read_text(encoding="utf-8"))
    codec_encoder = work / "tokeniser.safetensors"
    publish(model, workshop.tokenizer, split, work / "snac", codec_encoder, out)
    return out, corpus, units


def _different(corpus: Corpus, split: Split) -> list[int]:
    """One utterance of each question, in an order that mixes the intents."""
    chosen = (i for half in (False, True) for i in corpus.select(split, is_test=half))
    one_each = {corpus.utterances[i].question: i for i in chosen}
    return [one_each[question] for question in sorted(one_each, key=lambda q: q[::-1])]


def _write_questions(corpus: Corpus, units: UnitVoice, chosen: Sequence[int], path: Path) -> None:
    """Typed questions with spoken answers, as JSONL."""
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
        lines.append(json.dumps({"conversations": [question, answer]}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _winner(line: str) -> str:
    pair = json.loads(line)
    question, answer = pair["conversations"]
    turns = [question, {**answer, "codec": pair["win_codec"]}]
    return json.dumps({"conversations": turns}) + "\n"


def _train(*words: str) -> str:
    """Run `deeptalk-edge train`; returns what it printed."""
    command = [sys.executable, "-m", "deeptalk_edge.cli", "train", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _scored(checkpoint: Path, data: Path, limit: int) -> dict[str, Any]:
    said = _train("eval", str(checkpoint), f"TQAA={data}", f"--max-samples={limit}", "--json")
    found: dict[str, Any] = json.loads(said)
    typed: dict[str, Any] = found["typed"] | {"codebook_accuracy": found["codebook_accuracy"]}
    return typed


def _margins(run: Path) -> dict[str, list[float]]:
    """What the run's evaluations say of the pairs; nothing of a run without pairs."""
    journal = map(json.loads, (run / "journal.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        "margins": [e["margin"] for e in journal if e["kind"] == "evaluation" and "margin" in e]
    }


def _show(name: str, scores: dict[str, Any]) -> None:
    spoken, text = scores["spoken_exact"], scores["text_exact"]
    print(
        f"{name:20} spoken exact {spoken['share']:.3f} ({spoken['low']:.3f} to "
        f"{spoken['high']:.3f}), word errors {scores['spoken_word_error_rate']:.3f}, "
        f"text exact {text['share']:.3f}, margins {scores.get('margins', [])}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
