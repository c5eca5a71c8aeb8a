"""How good is a checkpoint? The same questions, typed and spoken, and its answers to them.

text       the answer's words as they should be
spoken     the words that a recogniser hears in the waveform: against the *requested* text, where
           the official script compares with the model's own
agreed     what is heard is what was written, right or wrong
codebooks  the share of the data's codes that the model would have chosen, each under the data's own
           history
language   the loss of the text on typed questions beside the base model's: what adapting has cost

Rates come with Wilson's 95 % interval and their n: only answers in English letters are heard. The
recogniser is pocketsphinx with the grammar of all wanted answers for `exact`, and with any string
of their words for the word errors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.sound.recogniser import SentenceRecogniser, WordRecogniser
from deeptalk_edge.training.answering import Answerer, Samples, open_reader, questions_of
from deeptalk_edge.training.data.check import sources_of
from deeptalk_edge.training.data.dataset import (
    Reader,
    build_index,
    evaluation_plans,
    load_batch,
    spread,
)
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.losses import IGNORE, token_losses
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.objective import encode_batch, run
from deeptalk_edge.training.stages.recipe import Source
from deeptalk_edge.training.tiny.scorer import (
    Recogniser,
    can_be_heard,
    normalise,
    pronounce,
    score,
)

_Z = 1.959964  # 95 %
_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of n, with its interval."""

    share: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.share:.3f} ({self.low:.3f} to {self.high:.3f}, n = {self.n})"


def wilson(hits: int, n: int) -> Rate:
    """Wilson's score interval of a share. Source: Wilson 1927."""
    if not n:
        return Rate(math.nan, 0.0, 1.0, 0)
    share, square = hits / n, _Z * _Z
    middle = (share + square / (2 * n)) / (1 + square / n)
    half = _Z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return Rate(share, max(0.0, middle - half), min(1.0, middle + half), n)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerScores:
    """Answers to questions of one kind; None where no answer can be heard."""

    text_exact: Rate
    spoken_exact: Rate | None
    spoken_word_error_rate: float | None
    agreed: Rate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """All of an evaluation."""

    spoken: AnswerScores | None
    """Questions that are heard; None where the data has no recordings."""
    typed: AnswerScores | None
    """The same questions, typed."""
    codebook_accuracy: tuple[float, ...]
    language_loss: float
    base_language_loss: float | None

    @property
    def language_drop(self) -> float | None:
        """By how much the text's perplexity is worse than the base model's, as a share of it."""
        if self.base_language_loss is None:
            return None
        return math.exp(self.language_loss - self.base_language_loss) - 1

    def json(self) -> str:
        return json.dumps({**asdict(self), "language_drop": self.language_drop}, indent=1)

    def text(self) -> str:
        lines = []
        for name, scores in (("spoken questions", self.spoken), ("typed questions", self.typed)):
            if scores is None:
                lines.append(f"{name}: none")
                continue
            lines += [f"{name}:", f"  text exact     {scores.text_exact}"]
            if scores.spoken_word_error_rate is None:
                lines.append("  spoken         not heard: the recogniser knows English alone")
                continue
            lines += [
                f"  spoken exact   {scores.spoken_exact}",
                f"  spoken WER     {scores.spoken_word_error_rate:.3f}",
                f"  text = speech  {scores.agreed}",
            ]
        codebooks = " ".join(f"{share:.3f}" for share in self.codebook_accuracy) or "none"
        lines.append(f"codebook accuracy, slowest first: {codebooks}")
        lines.append(f"language: {self.language_loss:.4f} nats a text id")
        if self.language_drop is not None:
            lines.append(
                f"language drop: perplexity {self.language_drop:+.1%} against the base "
                f"({self.base_language_loss:.4f} nats)"
            )
        return "\n".join(lines)


def evaluate_checkpoint(
    checkpoint: Path, data: Sequence[str], *, base: Path | None, max_samples: int
) -> Scores:
    """Score a checkpoint on some data.

    Raises SettingsError if no sample is good or a recogniser is missing, ArtifactError if a file is
    damaged.
    """
    sources = sources_of(data)
    config = read_config(checkpoint)
    reader = open_reader(config, sources)
    answerer = Answerer(config)
    spoken = score_answers(answerer, reader, "AQACONVA", max_samples)
    typed = score_answers(answerer, reader, "TQAA", max_samples)
    typed_sources = tuple(Source(path=s.path, task="TQA", system=s.system) for s in sources)
    language = open_reader(config, typed_sources)
    loss = text_loss(answerer.model, language, max_samples)
    base_loss = None
    if base is not None:
        base_config = read_config(base)
        base_reader = open_reader(base_config, typed_sources)
        base_loss = text_loss(Answerer(base_config).model, base_reader, max_samples)
    return Scores(
        spoken=spoken,
        typed=typed,
        codebook_accuracy=codebook_accuracy(answerer.model, reader, max_samples),
        language_loss=loss,
        base_language_loss=base_loss,
    )


def score_answers(
    answerer: Answerer, reader: Reader, task: str, max_samples: int
) -> AnswerScores | None:
    """Ask every question once, greedily; None where no sample has such a question."""
    questions = [question for _, question in questions_of(reader, task, max_samples)]
    if not questions:
        return None
    wanted = [normalise(question.answer) for question in questions]
    english = [i for i, text in enumerate(wanted) if can_be_heard(text)]
    some, rate_hz = [wanted[i] for i in english], answerer.codec.spec.sampling_rate
    recognisers = (  # before the answers take their time: one may be missing
        (SentenceRecogniser(some, rate_hz, pronounce), WordRecogniser(some, rate_hz, pronounce))
        if some
        else None
    )
    said = answerer.answers(questions)
    texts = [normalise(one.text) for one in said]
    text_exact = _share_equal(texts, wanted)
    if recognisers is None:
        return AnswerScores(
            text_exact=text_exact, spoken_exact=None, spoken_word_error_rate=None, agreed=None
        )
    closed, opened = recognisers
    frames = [said[i].frames for i in english]
    heard, words = zip(*hear_answers(frames, answerer.sound_of, (closed, opened)), strict=True)
    return AnswerScores(
        text_exact=text_exact,
        spoken_exact=_share_equal(heard, some),
        spoken_word_error_rate=score([*map(opened.fold, some)], words).word_error_rate,
        agreed=_share_equal(heard, [texts[i] for i in english]),
    )


def hear_answers(
    answers: Sequence[Ids], sound_of: Callable[[Ids], Samples], recognisers: Sequence[Recogniser]
) -> list[tuple[str, ...]]:
    """What each recogniser hears in each answer (A, K). Equal answers are heard once: one question
    in many voices has few different ones, and any string of words takes seconds to recognise."""
    distinct = {frames.tobytes(): frames for frames in answers}
    heard: dict[bytes, tuple[str, ...]] = {}
    for key, frames in distinct.items():
        sound = sound_of(frames)
        heard[key] = tuple(hear(sound) for hear in recognisers)
    return [heard[frames.tobytes()] for frames in answers]


@torch.inference_mode()
def codebook_accuracy(model: DeepTalk, reader: Reader, max_samples: int) -> tuple[float, ...]:
    """Of each codebook the share of the data's codes that the model ranks first; () where the data
    has none."""
    hits = torch.zeros(model.spec.vocabulary.num_codebooks)
    asked = torch.zeros_like(hits)
    for batch in _batches(reader, max_samples):
        targets = batch.targets[..., :-1]
        rows = (targets != IGNORE).any(dim=-1)
        found = model.code_logits(run(model, batch, encode_batch(model, batch))[rows]).argmax(-1)
        known = targets[rows] != IGNORE
        hits += ((found == targets[rows]) & known).sum(dim=0)
        asked += known.sum(dim=0)
    return tuple((hits / asked).tolist()) if bool((asked > 0).all()) else ()


@torch.inference_mode()
def text_loss(model: DeepTalk, reader: Reader, max_samples: int) -> float:
    """Mean loss of a text id of the answers to typed questions, in nats; NaN where there are
    none."""
    total, count = 0.0, 0
    for batch in _batches(reader, max_samples):
        rows = batch.targets[..., -1] != IGNORE
        logits = model.text_logits(run(model, batch, None)[rows])
        targets = batch.targets[rows][:, -1:]
        losses = token_losses(logits, logits.new_zeros(len(targets), 0, 1), targets, (1.0,))
        total += float(losses["text"]) * len(targets)
        count += len(targets)
    return total / count if count else math.nan


def _batches(reader: Reader, max_samples: int) -> list[Batch]:
    entries = build_index(reader).entries
    some = spread(entries, max_samples)
    batches = [load_batch(reader, plan) for plan in evaluation_plans(some, _BATCH_SIZE)]
    return [batch for batch in batches if isinstance(batch, Batch)]


def _share_equal(texts: Sequence[str], others: Sequence[str]) -> Rate:
    return wilson(sum(a == b for a, b in zip(texts, others, strict=True)), len(texts))
