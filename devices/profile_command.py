"""`deeptalk-edge profile --bundle B --wav q.wav`: spoken turns through the real voice loop on this
machine, and where their time went; `--offline` answers as fast as it can, without sound."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deeptalk_edge.bundle.target import backend_name

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.runtime.audio.ports import SoundPort
    from deeptalk_edge.runtime.settings import ConversationSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `profile`."""
    parser.add_argument(
        "--bundle", type=Path, required=True, help="directory made by `deeptalk-edge export`"
    )
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=[], metavar="WAV", help="spoken questions"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--mode", choices=("batch-parallel", "single", "text"))
    parser.add_argument(
        "--backend", type=backend_name, choices=("auto", "cpu", "ort", "fake"), default="auto"
    )
    parser.add_argument("--encoder-window", choices=("whole", "near"), default="whole")
    parser.add_argument("--pool", metavar="N", help="experts in memory, or their share: 42%%")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    live = parser.add_argument_group("by voice")
    live.add_argument("--turns", type=int, default=20, metavar="N", help="(default 20)")
    live.add_argument("--warmup", type=int, default=1, metavar="N", help="not counted (default 1)")
    live.add_argument(
        "--cut", type=float, metavar="S", help="interrupt each answer after S seconds of sound"
    )
    live.add_argument("--mic", action="store_true", help="you ask, through the microphone")
    live.add_argument("--input-device", metavar="NAME")
    live.add_argument("--output-device", metavar="NAME")
    live.add_argument(
        "--power-mode", metavar="NAME", help="a Jetson's, set before and read back; needs root"
    )
    live.add_argument("-o", "--output", type=Path, metavar="FILE", help="the report")
    live.add_argument(
        "--samples", type=Path, metavar="FILE", help="every turn, a JSON object a line"
    )
    offline = parser.add_argument_group("offline")
    offline.add_argument(
        "--offline", action="store_true", help="no sound and no waiting; answers one by one"
    )
    offline.add_argument("--text", action="append", default=[], help="a written question")
    offline.add_argument("--repeat", type=int, default=5, help="times each is asked (default 5)")


def main(args: argparse.Namespace) -> int:
    """Measure a bundle; returns the exit code.

    Raises AudioError if a file is no question, SettingsError if a flag names nothing, else what
    `profile_bundle` and `measure` raise.
    """
    if args.offline:
        return _offline(args)
    return _by_voice(args)


def _by_voice(args: argparse.Namespace) -> int:
    from deeptalk_edge.devices.report import report_json
    from deeptalk_edge.devices.report_page import page
    from deeptalk_edge.devices.session import Script, profile_bundle
    from deeptalk_edge.errors import SettingsError
    from deeptalk_edge.files import check_output, write_file

    if args.text:
        raise SettingsError("--text: the voice loop takes only sound; add --offline")
    for place in (args.output, args.samples):
        if place is not None:
            check_output(place)
    if args.cut is not None and not 0 < args.cut < 3600:
        raise SettingsError(f"--cut {args.cut}: expected seconds of sound, more than 0")
    if args.power_mode is not None:
        from deeptalk_edge.devices.nvpmodel import set_mode

        set_mode(args.power_mode)
    script = Script(questions=args.wav, turns=args.turns, warmup_turns=args.warmup, cut_s=args.cut)
    report = profile_bundle(
        args.bundle,
        script,
        choose=lambda bundle: _settings(args, bundle),
        port=_microphone(args),
        samples=args.samples,
        show=_progress,
    )
    text = report_json(report)
    if args.output is not None:
        write_file(args.output, text.encode())
    print(text if args.json else page(report), end="" if args.json else "\n")
    return 0


def _microphone(args: argparse.Namespace) -> SoundPort | None:
    from deeptalk_edge.errors import SettingsError

    if not args.mic:
        if args.input_device or args.output_device:
            raise SettingsError("--input-device and --output-device need --mic; add it")
        return None
    if args.wav:
        raise SettingsError("--wav does not go with --mic; leave one out")
    from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort

    names = args.input_device, args.output_device
    return PyAudioPort(DeviceSettings(input_name=names[0], output_name=names[1]))


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} turns", end="" if done < total else "\n", file=sys.stderr)


def _settings(args: argparse.Namespace, bundle: Bundle) -> ConversationSettings:
    from deeptalk_edge.runtime.experts.open import PagingSettings
    from deeptalk_edge.runtime.settings import ConversationSettings

    return dataclasses.replace(
        ConversationSettings.of(bundle, mode=args.mode, threads=args.threads),
        backend=args.backend,
        encoder_window=args.encoder_window,
        paging=PagingSettings(pool=args.pool),
    )


def _offline(args: argparse.Namespace) -> int:
    from deeptalk_edge.runtime.audio.vad import read_utterance
    from deeptalk_edge.runtime.measure import measure, page

    questions = [*map(read_utterance, args.wav), *args.text]
    report = measure(
        args.bundle,
        questions,
        choose=lambda bundle: _settings(args, bundle),
        repeat=args.repeat,
    )
    print(json.dumps(report) if args.json else page(report))
    return 0
