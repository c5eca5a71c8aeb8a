"""Checks the files that a user names for `run` before the bundle is loaded.

An output must not be an input, a file of the bundle or another output, whatever name or link it
has.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import STDOUT, check_directory, check_inputs_stay, check_output
from deeptalk_edge.runtime.commands.live import is_wav_file
from deeptalk_edge.runtime.commands.run_options import RunOptions
from deeptalk_edge.runtime.loop.recorder import is_recording


def check_files(options: RunOptions, num_turns: int) -> None:
    """Refuse outputs that cannot be written or that would overwrite a file of the user; `num_turns`
    is the number of questions.

    Raises SettingsError naming the place, DoesNotFit if its disk is full.
    """
    outputs = list(_outputs(options, num_turns))
    check_inputs_stay(_inputs(options), outputs)
    for place in outputs:
        check_output(place)
    if options.record:
        _check_apart(options.record, outputs)
        check_directory(options.record)


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


def _inputs(options: RunOptions) -> Iterator[Path]:
    yield from options.wav
    yield from (path for path in (options.require_signature, options.turn_model) if path)
    if isinstance(options.not_understood, Path):
        yield options.not_understood
    if options.input_device:
        yield Path(options.input_device)
    if options.bundle.is_dir():
        yield from options.bundle.iterdir()


def _outputs(options: RunOptions, num_turns: int) -> Iterator[Path]:
    if options.out == STDOUT and (num_turns > 1 or options.json):
        raise SettingsError("--out - is one WAV on stdout: ask one question, and without --json")
    for turn in range(1, num_turns + 1):
        if place := answer_place(options.out, turn, num_turns):
            yield place
    sides = ("trace", "record_routes", "kernel_cache")
    for name, place in ((side.replace("_", "-"), getattr(options, side)) for side in sides):
        if place == STDOUT:
            raise SettingsError(f"--{name} -: stdout is the conversation's; name a file, or ./-")
        if place:
            yield place
    if is_wav_file(options.output_device) or is_wav_file(options.input_device):
        yield from (Path(name) for name in (options.output_device,) if name)
