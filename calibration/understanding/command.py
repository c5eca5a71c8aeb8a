"""`deeptalk-edge calibrate CHECKPOINT --understanding`: what tells its questions from other sounds.

Half of the recordings fit the word head and the distance, the other half the scores: on its own
recordings a head is surer than on any other.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.understanding import LINE, Understanding, read_understanding
from deeptalk_edge.calibration.understanding.cues import Measured, measure
from deeptalk_edge.calibration.understanding.fit import Sets, fit_manifold, fit_understanding
from deeptalk_edge.calibration.understanding.recordings import (
    Recording,
    broken_off,
    framed,
    read_others,
    read_questions,
)
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.prompt import folded
from deeptalk_edge.model.word_head import WordHead
from deeptalk_edge.progress import progress

log = logging.getLogger(__name__)

_FEWEST = 50
"""Questions; of fewer, 2 % is less than one."""


def fit_from_recordings(args: argparse.Namespace, bundle: Bundle) -> Understanding:
    """Fit, and write the files to `args.output`.

    Raises SettingsError if there are too few recordings, AudioError if one cannot be read.
    """
    questions = read_questions(args.utterances)
    if len(questions) < _FEWEST:
        raise SettingsError(
            f"{len(questions)} recordings have their words beside them; expected {_FEWEST} or more"
        )
    rng = random.Random(args.seed)
    rng.shuffle(questions)
    half = len(questions) // 2
    first = _measured(bundle, [replace(one, answer="") for one in questions[:half]], args, "fit")
    second = _measured(bundle, questions[half:], args, "questions")
    parts = [
        replace(one, pcm=framed(part), answer="")
        for one in questions[half::2]
        if (part := broken_off(one.pcm, rng)) is not None
    ] + read_others(args.parts)
    sets = Sets(
        questions=[one for one in second if one.is_right],
        wrong=[one for one in second if not one.is_right],
        others=_measured(bundle, read_others(args.others), args, "others"),
        parts=_measured(bundle, parts, args, "parts"),
    )
    known = _known_questions(args.questions, questions)
    head = _head(bundle, first, known, args)
    source = (
        f"{len(questions)} questions, {len(sets.others)} others, {len(sets.parts)} parts; "
        f"{len(sets.questions)} of {len(second)} answered right"
    )
    found = fit_understanding(sets, head, known, fit_manifold(first), source)
    args.output.mkdir(parents=True, exist_ok=True)
    found.save(args.output)
    if args.line is not None:
        shutil.copyfile(args.line, args.output / LINE)
    return found


def say(found: Understanding, output: Path) -> None:
    """What was fitted, on stderr."""
    header = found.header
    print(f"{output}: {header.source}", file=sys.stderr)
    for name in ("before_prefill", "before_sound", "complete"):
        score = getattr(header, name)
        if score is not None:
            weights = ", ".join(f"{cue} {weight:.2f}" for cue, weight in score.weights.items())
            print(
                f"  {name}: {score.bias:.2f}, {weights}; at least {score.least_p:.3f}",
                file=sys.stderr,
            )


def _measured(
    bundle: Bundle, recordings: Sequence[Recording], args: argparse.Namespace, name: str
) -> list[Measured]:
    measured = measure(bundle, recordings, args.threads)
    found: list[Measured] = list(progress(measured, name=name, unit="clip", total=len(recordings)))
    if len(found) < len(recordings):
        log.warning("%s: %d recordings could not be asked", name, len(recordings) - len(found))
    return found


def _known_questions(path: Path | None, recorded: Sequence[Recording]) -> list[str]:
    """One a line of a file, else those that were recorded."""
    if path is None:
        return sorted({one.text for one in recorded})
    lines = path.read_text(encoding="utf-8").splitlines()
    return sorted({folded(line) for line in lines if line.strip()})


def _head(
    bundle: Bundle, measured: Sequence[Measured], questions: Sequence[str], args: argparse.Namespace
) -> WordHead | None:
    """A new head, or the one that the bundle has where torch is not installed."""
    if args.keep_head:
        old = read_understanding(bundle.path, bundle.manifest.model.decoder.width)
        if old is None or old.head is None:
            raise SettingsError("--keep-head: the checkpoint has no word head")
        return old.head
    from deeptalk_edge.training.word_head import fit_word_head

    words = {word for question in questions for word in question.split()}
    return fit_word_head(
        [one.features for one in measured],
        [one.recording.text for one in measured],
        words=sorted(words),
        seed=args.seed,
    )
