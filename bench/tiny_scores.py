"""The report of `make tiny`: scores the tiny checkpoint's spoken answers through its bundle.

The real runtime answers, voice detector included, and recognisers transcribe the waveform. The
report is Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from deeptalk_edge.bench.harness import BUNDLE, TINY, arguments, measured
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.files import write_file
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.vad import WebRtcDetector, find_utterance
from deeptalk_edge.runtime.conversation import (
    AudioChunk,
    Conversation,
    ConversationSettings,
    TextPiece,
)
from deeptalk_edge.runtime.lm.encoder import EncoderWindow
from deeptalk_edge.runtime.understanding import ANSWER_ALL
from deeptalk_edge.sound.wav import WavWriter
from deeptalk_edge.training.snac_files import load_snac
from deeptalk_edge.training.tiny.corpus import Corpus, Samples, load_corpus
from deeptalk_edge.training.tiny.domain import answers_never_trained
from deeptalk_edge.training.tiny.evaluate import (
    HELD_OUT,
    Controls,
    SetScore,
    evaluate,
    run_controls,
)
from deeptalk_edge.training.tiny.quality import CodecScore, codec_quality
from deeptalk_edge.training.tiny.scorer import KioskRecogniser, Recogniser, WhisperRecogniser
from deeptalk_edge.training.tiny.tokens import Tokeniser
from deeptalk_edge.training.tiny.units import UnitVoice

CLIPS_PER_SET = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Score a bundle on the held-out half of its checkpoint's corpus."""
    parser = arguments("tiny_scores", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--snac", type=Path, default=TINY / "snac", help="the codec")
    parser.add_argument("--work", type=Path, default="build/tiny", help="of `make tiny`")
    parser.add_argument("--report", type=Path, default=TINY / "SCORES.md", metavar="MD")
    parser.add_argument("--clips", type=Path, help="write some held-out questions here as WAV")
    parser.add_argument("--encoder-window", choices=get_args(EncoderWindow), default="whole")
    parser.add_argument("--every", type=int, default=1, help="score one question in so many")
    parser.add_argument(
        "--open-every", type=int, default=2, help="and so many times fewer by the open recogniser"
    )
    args = parser.parse_args(argv)
    with measured(args) as figures:
        corpus = load_corpus(args.work / "corpus")
        if args.clips:
            write_clips(corpus, args.clips)
        # Two processes; the codec's task runs first because it is the shortest, so they end
        # together.
        with get_context("spawn").Pool(2, _open_judge, (args,)) as pool:
            codec = pool.apply_async(_judge_codec)
            halves = [pool.apply_async(_judge_kiosk, (is_test,)) for is_test in (False, True)]
            validation, test = (half.get() for half in halves)
            num_controls, controls, quality = codec.get()
            pool.close()
            pool.join()
        lines = [
            f"Seed {corpus.seed}; one question in {args.every}, of which the open recogniser hears "
            f"one in {args.open_every}. Answers by the exported bundle and the runtime, "
            "batch-parallel, greedy.",
            "",
            "## Validation halves",
            "",
            *_score_table(validation),
            "",
            "## Test halves",
            "",
            *_score_table(test),
            "",
            f"Controls (n = {num_controls}), spoken exact: untrained decoder "
            f"{controls.untrained_decoder:.3f}, shuffled codes {controls.shuffled_codes:.3f}.",
            "",
            "## The codec alone, true codes decoded",
            "",
            *_quality_table(quality),
        ]
        write_file(args.report, ("\n".join(lines) + "\n").encode())
        print("\n".join(lines))
        figures.update({"validation": validation, "test": test, "controls": controls})
    return 0


class _Judge:
    """The models that one process scores with."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        self.args = args
        self.corpus = load_corpus(args.work / "corpus")
        self.units = UnitVoice.load(args.work / "units.npz")
        self.codec = load_snac(args.snac)
        self.closed, self.opened = KioskRecogniser(), WhisperRecogniser(threads=1)


_judges: list[_Judge] = []  # one in a worker process


def _open_judge(args: argparse.Namespace) -> None:
    _judges.append(_Judge(args))


def _judge_kiosk(is_test: bool) -> list[SetScore]:
    """Score the halves of the held-out sets."""
    (judge,) = _judges
    bundle = Bundle.open(judge.args.bundle)
    settings = dataclasses.replace(
        ConversationSettings.of(bundle),
        encoder_window=judge.args.encoder_window,
        understanding=ANSWER_ALL,  # what it answers, not what it refuses
    )
    with Conversation(bundle, settings) as talk:
        return evaluate(
            lambda pcm: answer(talk, pcm),
            judge.corpus,
            judge.units,
            judge.codec,
            judge.closed,
            judge.opened,
            is_test=is_test,
            every=judge.args.every,
            open_every=judge.args.open_every,
        )


def _judge_codec() -> tuple[int, Controls, list[CodecScore]]:
    """Score the controls, with their number, and the codec alone."""
    (judge,) = _judges
    asked = sorted(answers_never_trained())[::16]
    controls = run_controls(asked, judge.units, judge.codec, judge.closed)
    tokeniser = Tokeniser.load(judge.args.work / "tokeniser.safetensors")
    recognisers: dict[str, Recogniser] = {"closed": judge.closed, "open": judge.opened}
    quality = codec_quality(
        judge.corpus, tokeniser, judge.units, judge.codec, recognisers, every=judge.args.every
    )
    return len(asked), controls, quality


def answer(talk: Conversation, pcm: Samples) -> tuple[str, Samples]:
    """Ask one question in a new conversation; returns text and 24 kHz sound."""
    talk.reset()
    start, end = find_utterance(pcm, WebRtcDetector())
    text, sound = "", [np.zeros(0, np.float32)]
    for event in talk.ask(pcm[start:end]):
        if isinstance(event, TextPiece):
            text += event.text
        elif isinstance(event, AudioChunk):
            sound.append(event.pcm)
    return text, np.concatenate(sound)


def write_clips(corpus: Corpus, directory: Path) -> None:
    """Write some questions of each validation half as WAV files, with their words and answers."""
    directory.mkdir(parents=True, exist_ok=True)
    for first, split in enumerate(HELD_OUT):
        chosen = corpus.select(split, is_test=False)
        stride = len(chosen) // CLIPS_PER_SET  # anew in each set: the questions are equal
        for number, i in enumerate(chosen[first * stride // 3 :: stride][:CLIPS_PER_SET]):
            place = directory / f"{split.value}-{number}.wav"
            with WavWriter(place, RATE_HZ) as writer:
                writer.write(corpus.questions[i])
            utterance = corpus.utterances[i]
            place.with_suffix(".txt").write_text(
                f"{utterance.question}\n{utterance.answer}\n", encoding="utf-8"
            )


def _score_table(scores: Sequence[SetScore]) -> list[str]:
    lines = [
        "| set | n | text exact | spoken exact | spoken WER | text = speech | open WER (ceiling) | "
        "open n |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        lines.append(
            f"| {s.split.value.replace('_', ' ')} | {s.spoken.num_answers} | {s.text_exact:.3f} | "
            f"{s.spoken.exact_rate:.3f} | {s.spoken.word_error_rate:.3f} | {s.agreed:.3f} | "
            f"{s.opened.word_error_rate:.3f} ({s.ceiling.word_error_rate:.3f}) | "
            f"{s.opened.num_answers} |"
        )
    return lines


def _quality_table(scores: Sequence[CodecScore]) -> list[str]:
    lines = [
        "| set | n | STOI | PESQ-WB | recogniser | exact, decoded | WER, decoded | "
        "exact, recording | WER, recording |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in scores:
        for name, decoded in s.decoded.items():
            recorded = s.recorded[name]
            lines.append(
                f"| {s.name} | {decoded.num_answers} | {s.stoi:.3f} | {s.pesq:.2f} | {name} | "
                f"{decoded.exact_rate:.3f} | {decoded.word_error_rate:.3f} | "
                f"{recorded.exact_rate:.3f} | {recorded.word_error_rate:.3f} |"
            )
    return lines
