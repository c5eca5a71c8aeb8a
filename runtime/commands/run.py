"""`deeptalk-edge run`: ask a bundle questions and hear what it says."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from deeptalk_edge.bundle.target import backend_name
from deeptalk_edge.files import STDOUT
from deeptalk_edge.runtime.commands import live as live_command

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.runtime.commands.run_options import RunOptions
    from deeptalk_edge.runtime.conversation import Conversation, Metrics, TurnDone
    from deeptalk_edge.runtime.events import Setup, Transcript
    from deeptalk_edge.runtime.questions import Question
    from deeptalk_edge.runtime.settings import ConversationSettings

_AHEAD_S = 0.5  # sound that --realtime produces ahead of its playing

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `run`."""
    parser.add_argument(
        "--bundle", type=Path, required=True, help="directory made by `deeptalk-edge export`"
    )
    parser.add_argument(
        "--wav",
        type=Path,
        nargs="+",
        default=[],
        metavar="WAV",
        help="spoken questions, in turn; each utterance in a file is one",
    )
    parser.add_argument(
        "--text", action="append", default=[], help="a written question; may be repeated"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="WAV",
        help="write the answer; several turns are numbered -1, -2; - is stdout",
    )
    parser.add_argument(
        "--mode",
        choices=("batch-parallel", "single", "text"),
        help="text from a silent copy of the answer, from the spoken one, or text alone; "
        "default: the bundle's",
    )
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default: the bundle's")
    parser.add_argument(
        "--speaker", metavar="TOKEN", help="voice of the answers; default: the bundle's"
    )
    parser.add_argument(
        "--forget", action="store_true", help="begin a new conversation with each question"
    )
    parser.add_argument(
        "--max-turns",
        metavar="N",
        help="turns that the model sees at once, the question included: a number, or `all` that "
        "fit; default: the bundle's",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same answer (default 0)")
    parser.add_argument(
        "--as-released", action="store_true", help="with the bugs of the published loop"
    )
    parser.add_argument(
        "--encoder-window",
        choices=("whole", "near"),
        default="whole",
        help="what the encoder sees: all of its window, as trained, or the utterance and a second "
        "of silence, many times quicker and not exact",
    )
    parser.add_argument(
        "--realtime", action="store_true", help="no faster than the sound would play"
    )
    parser.add_argument(
        "--require-signature",
        type=Path,
        metavar="PUB",
        help="refuse a bundle that is not signed with this key (`deeptalk-edge bundle sign`)",
    )
    parser.add_argument(
        "--backend",
        type=backend_name,
        choices=("auto", "cpu", "ort", "tensorrt", "fake"),
        default="auto",
        help="what runs the bundle: our own kernels for the CPU, ONNX Runtime, engines on a "
        "GPU, or a fake that needs no weights; default: the engines of a bundle that has them, "
        "else the kernels, where the bundle and this machine have them",
    )
    parser.add_argument(
        "--no-cuda-graphs",
        dest="cuda_graphs",
        action="store_false",
        help="on a GPU: launch every kernel of a step by itself, for a profiler or a comparison",
    )
    parser.add_argument(
        "--kernel-cache",
        type=Path,
        metavar="FILE",
        help="with TensorRT-RTX: keep the kernels compiled at the first start in FILE; later "
        "starts read them",
    )
    parser.add_argument(
        "--pool",
        metavar="N",
        help="experts kept in memory: a number or a share such as 42%%; default: as many as fit",
    )
    parser.add_argument(
        "--paging-policy",
        choices=("lru", "decayed", "phased"),
        default="phased",
        help="which expert makes room (default phased); changes no answer",
    )
    parser.add_argument(
        "--record-routes",
        type=Path,
        metavar="FILE",
        help="write which experts were chosen, for `deeptalk-edge profile`",
    )
    parser.add_argument(
        "--answer-all",
        action="store_true",
        help="answer every question, understood or not (default: where the bundle can tell, what "
        "was not understood gets a spoken line)",
    )
    parser.add_argument(
        "--least-understood",
        type=float,
        metavar="P",
        help="refuse a question that was understood with less than this probability, 0 to 1; "
        "default: the bundle's",
    )
    parser.add_argument(
        "--not-understood",
        type=lambda name: name if name in ("bundle", "silence") else Path(name),
        default="bundle",
        metavar="WAV",
        help="what is said then: a mono WAV at the codec's rate, or `silence`; default: the "
        "bundle's line",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a turn on stdout")
    live_command.add_arguments(parser.add_argument_group("by voice"))


def main(args: argparse.Namespace) -> int:
    """Run the conversation; returns the exit code.

    Raises EdgeError if anything that the user named cannot be used; KeyboardInterrupt after what
    was said so far is saved.
    """
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.bundle.signature import PublicKey
    from deeptalk_edge.model.features import max_samples
    from deeptalk_edge.model.noise import check_seed
    from deeptalk_edge.runtime.audio.end_of_turn import open_end_of_turn
    from deeptalk_edge.runtime.commands.named_files import answer_place, check_files
    from deeptalk_edge.runtime.commands.run_options import RunOptions
    from deeptalk_edge.runtime.conversation import Conversation
    from deeptalk_edge.runtime.questions import open_questions

    options = RunOptions.of(args)
    check_seed(options.seed)
    _check_threads(options.threads)
    check_files(options, options.num_named)
    start_s = time.perf_counter()
    key = PublicKey.read(options.require_signature) if options.require_signature else None
    bundle = Bundle.open(options.bundle, public_key=key)
    questions = open_questions(
        options.wav,
        options.text,
        max_samples(bundle.manifest.model.encoder),
        open_end_of_turn(options.hangover),
    )
    if len(questions) > options.num_named:
        check_files(options, len(questions))
    metrics = []
    with ExitStack() as stack:
        talk = stack.enter_context(Conversation(bundle, _settings(options, bundle)))
        log.info("%s: loaded in %.0f ms", options.bundle, (time.perf_counter() - start_s) * 1000)
        if options.record_routes:
            stack.enter_context(talk.record_routes(options.record_routes))
        if options.mic:
            return live_command.main(options, talk)
        for turn, question in enumerate(questions, 1):
            if options.forget:
                talk.reset()
            out = answer_place(options.out, turn, len(questions))
            metrics.append(_take_turn(talk, question, out, turn, options))
    if not options.json:
        print(_table(metrics), file=_text_out(options))
    return 0


def _settings(options: RunOptions, bundle: Bundle) -> ConversationSettings:
    """The bundle's own, but for what the user chose."""
    from deeptalk_edge.runtime.experts.open import PagingSettings
    from deeptalk_edge.runtime.settings import ConversationSettings
    from deeptalk_edge.runtime.understanding import UnderstandingSettings

    settings = ConversationSettings.of(
        bundle,
        mode=options.mode,
        seed=options.seed,
        threads=options.threads,
        as_released=options.as_released,
    )
    return dataclasses.replace(
        settings,
        system=settings.system if options.system is None else options.system,
        speaker=settings.speaker if options.speaker is None else options.speaker,
        max_turns=_max_turns(options.max_turns, default=settings.max_turns),
        encoder_window=options.encoder_window,
        backend=options.backend,
        cuda_graphs=options.cuda_graphs,
        kernel_cache=options.kernel_cache,
        paging=PagingSettings(pool=options.pool, policy=options.paging_policy),
        understanding=UnderstandingSettings(
            refuses=not options.answer_all,
            least_p=options.least_understood,
            line=options.not_understood,
        ),
    )


def _max_turns(flag: str | None, *, default: int | None) -> int | None:
    from deeptalk_edge.errors import SettingsError

    if flag is None:
        return default
    if flag == "all":
        return None
    try:
        return int(flag)
    except ValueError:
        raise SettingsError(f"--max-turns {flag}: expected a number, or all") from None


def _check_threads(threads: int) -> None:
    """Raises SettingsError if it is no number of threads; more than cores are only slower."""
    from deeptalk_edge.host import num_cores
    from deeptalk_edge.runtime.settings import check_threads

    check_threads(threads)
    if threads > num_cores():
        log.warning(
            "%d threads share %d cores, which is slower than a thread a core", threads, num_cores()
        )


def _take_turn(
    talk: Conversation, question: Question, out: Path | None, turn: int, options: RunOptions
) -> Metrics:
    """Ask one question; show, write and pace the answer."""
    from deeptalk_edge.runtime.conversation import AudioChunk, TextPiece, TurnDone
    from deeptalk_edge.runtime.events import NotUnderstood, Transcript
    from deeptalk_edge.sound.wav import WavWriter

    def say(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True, file=_text_out(options))

    done: TurnDone | None = None
    transcript: Transcript | None = None
    first_sound = True
    with ExitStack() as stack:
        writer = stack.enter_context(WavWriter(out, talk.rate_hz)) if out else None
        say(f"you: {question.shown}\n")
        if isinstance(question.content, str):
            say("deeptalk: ")
        player = _Pace(talk.rate_hz) if options.realtime else None
        events: Iterator[Any] = talk.ask(question.content)
        try:
            for event in events:
                if isinstance(event, TextPiece):
                    say(event.text)
                elif isinstance(event, AudioChunk):
                    if writer:
                        writer.write(event.pcm)
                    if first_sound:
                        log.info("turn %d: first sound", turn)
                        first_sound = False
                    if player:
                        player.play(len(event.pcm))
                elif isinstance(event, Transcript):
                    transcript = event
                    if event.text:
                        say(f"you said: {event.text} ({event.confidence:.0%})\n")
                    say("deeptalk: ")
                elif isinstance(event, NotUnderstood):
                    say("(not understood)")
                elif isinstance(event, TurnDone):
                    done = event
        except BaseException:
            say("\n")
            if writer and writer.num_samples:
                seconds = writer.num_samples / talk.rate_hz
                print(f"{out}: kept the {seconds:.1f} s that were said", file=sys.stderr)
            raise
    assert done is not None  # `ask` ends with it or raises
    say("\n")
    if done.metrics.stopped not in ("end", "not_understood"):
        log.warning(
            "turn %d: cut off after %d rows (%s)", turn, done.metrics.num_rows, done.metrics.stopped
        )
    if player and player.late_s:
        log.warning("turn %d: the sound would have stuttered for %.2f s", turn, player.late_s)
    if options.json:
        line = _as_json(turn, question, out, done, transcript, talk.setup, player)
        print(json.dumps(line), flush=True)
    return done.metrics


class _Pace:
    """Waits as a loudspeaker would, and counts how long it would have had nothing to play."""

    def __init__(self, rate_hz: int) -> None:
        self._rate_hz = rate_hz
        self._played_until_s: float | None = None
        self.late_s = 0.0

    def play(self, num_samples: int) -> None:
        now_s = time.monotonic()
        if self._played_until_s is None:
            self._played_until_s = now_s
        self.late_s += max(now_s - self._played_until_s, 0.0)
        self._played_until_s = max(now_s, self._played_until_s) + num_samples / self._rate_hz
        time.sleep(max(self._played_until_s - now_s - _AHEAD_S, 0.0))


def _as_json(
    turn: int,
    question: Question,
    out: Path | None,
    done: TurnDone,
    transcript: Transcript | None,
    setup: Setup,
    player: _Pace | None,
) -> dict[str, Any]:
    from deeptalk_edge.runtime.measure import record, transcript_record

    return {
        "turn": turn,
        "question": question.source,
        "utterance": question.utterance,
        "speech_s": question.speech_s,
        "out": str(out) if out and done.metrics.audio_s else None,
        **record(done, setup),
        **transcript_record(transcript),
        **({"late_s": player.late_s} if player else {}),
    }


def _table(turns: list[Metrics]) -> str:
    """One line a figure, one column a turn."""

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f} ms"

    def steps(turn: Metrics) -> str:
        if turn.step_ms_p50 is None:
            return "-"
        return f"{turn.step_ms_p50:.2f} / {turn.step_ms_p95:.2f} ms"

    def factor(turn: Metrics) -> str:
        return "-" if turn.real_time_factor is None else f"{turn.real_time_factor:.3f}"

    figures: list[tuple[str, Callable[[Metrics], str]]] = [
        ("end of speech to first sample", lambda turn: ms(turn.first_sample_ms)),
        ("  encoder", lambda turn: ms(turn.encoder_ms)),
        ("  prefill", lambda turn: f"{turn.num_prompt_rows} rows, {ms(turn.prefill_ms)}"),
        ("  first frame at", lambda turn: ms(turn.first_frame_ms)),
        ("step, median / 95 %", steps),
        ("sound", lambda turn: f"{turn.audio_s:.1f} s"),
        ("compute per second of sound", factor),
    ]
    lines = [""]
    if len(turns) > 1:
        lines.append(" " * 30 + "".join(f"{f'turn {i}':>20}" for i in range(1, len(turns) + 1)))
    for name, show in figures:
        lines.append(f"{name:30}" + "".join(f"{show(turn):>20}" for turn in turns))
    return "\n".join(lines)


def _text_out(options: RunOptions) -> TextIO:
    """Where text goes: to stdout, unless that is the sound's."""
    return sys.stderr if options.out == STDOUT else sys.stdout
