"""Checks the files that a user names for `run` before the bundle is loaded.

An output must not be an input, a file of the bundle or another output, whatever name or link it
has.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import STDOUT, check_directory, check_inputs_stay, check_output
from deeptalk_edge.runtime.commands.live import is_wav_file
from deeptalk_edge.runtime.loop.recorder import is_recording


def check_files(args: argparse.Namespace, num_turns: int) -> None:
    """Refuse outputs that cannot be written or that would overwrite a file of the user; `num_turns`
    is the number of questions.

    Raises SettingsError naming the place, DoesNotFit if its disk is full.
    """
    outputs = list(_outputs(args, num_turns))
    check_inputs_stay(_inputs(args), outputs)
    for place in outputs:
        check_output(place)
    if args.record:
        _check_apart(args.record, outputs)
        check_directory(args.record)


def _check_apart(record: Path, outputs: Iterable[Path]) -> None:
    """Refuse an output with the name of a recording, which it would replace."""
    directory = os.path.realpath(record)
    for place in outputs:
        if is_recording(place.name) and os.path.realpath(place.parent) == directory:
            raise SettingsError(f"{place}: --record writes there; name another place")


def answer_place(out: Path | None, turn: int, num_turns: int) -> Path | None:
    """Return the file of an answer; with several turns, its name has the turn's number."""
    if out is None or num_turns == 1 or not out.name:  # "." has no name, and is refused
        return out
    return out.with_name(f"{out.stem}-{turn}{out.suffix}")


def _inputs(args: argparse.Namespace) -> Iterator[Path]:
    yield from args.wav
    yield from (path for path in (args.require_signature, args.turn_model) if path)
    if args.input_device:
        yield Path(args.input_device)
    if args.bundle.is_dir():
        yield from args.bundle.iterdir()


def _outputs(args: argparse.Namespace, num_turns: int) -> Iterator[Path]:
    if args.out == STDOUT and (num_turns > 1 or args.json):
        raise SettingsError("--out - is one WAV on stdout: ask one question, and without --json")
    for turn in range(1, num_turns + 1):
        if place := answer_place(args.out, turn, num_turns):
            yield place
    for name, place in (("trace", args.trace), ("record-routes", args.record_routes)):
        if place == STDOUT:
            raise SettingsError(f"--{name} -: stdout is the conversation's; name a file, or ./-")
        if place:
            yield place
    if is_wav_file(args.output_device) or is_wav_file(args.input_device):
        yield from (Path(name) for name in (args.output_device,) if name)
