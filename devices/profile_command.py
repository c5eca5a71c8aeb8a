"""`deeptalk-edge profile`: what a bundle costs on this machine, medians and 95th percentiles over
many answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from deeptalk_edge.bundle.target import backend_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `profile`."""
    parser.add_argument(
        "--bundle", type=Path, required=True, help="directory made by `deeptalk-edge export`"
    )
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=[], metavar="WAV", help="spoken questions"
    )
    parser.add_argument("--text", action="append", default=[], help="a written question")
    parser.add_argument("--repeat", type=int, default=5, help="times each is asked (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--mode", choices=("batch-parallel", "single", "text"))
    parser.add_argument(
        "--backend", type=backend_name, choices=("auto", "cpu", "ort", "fake"), default="auto"
    )
    parser.add_argument("--encoder-window", choices=("whole", "near"), default="whole")
    parser.add_argument("--pool", metavar="N", help="experts in memory, or their share: 42%%")
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Measure a bundle; returns the exit code.

    Raises AudioError if a file is no question, SettingsError if a flag names nothing, else what
    `measure` raises.
    """
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.runtime.audio.vad import read_utterance
    from deeptalk_edge.runtime.experts.open import PagingSettings
    from deeptalk_edge.runtime.measure import measure, page
    from deeptalk_edge.runtime.settings import ConversationSettings

    def choose(bundle: Bundle) -> ConversationSettings:
        return dataclasses.replace(
            ConversationSettings.of(bundle, mode=args.mode, threads=args.threads),
            backend=args.backend,
            encoder_window=args.encoder_window,
            paging=PagingSettings(pool=args.pool),
        )

    questions = [*map(read_utterance, args.wav), *args.text]
    report = measure(args.bundle, questions, choose=choose, repeat=args.repeat)
    print(json.dumps(report) if args.json else page(report))
    return 0
