"""The options of `run` are its flags, read once."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.commands.run import add_arguments
from deeptalk_edge.runtime.commands.run_options import RunOptions


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--bundle", "b", *words])


def test_every_flag_is_an_option_and_every_option_a_flag() -> None:
    fields = {field.name for field in dataclasses.fields(RunOptions)}
    assert fields == vars(parsed()).keys()


def test_options_do_not_change_after_they_are_read() -> None:
    args = parsed("--text", "Why?", "--wav", "a.wav", "b.wav")
    options = RunOptions.of(args)
    args.wav.clear()
    assert options.num_named == 3
    assert hash(options) == hash(RunOptions.of(parsed("--text", "Why?", "--wav", "a.wav", "b.wav")))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to ask: name a recording with --wav"),
        (["--mic", "--wav", "a.wav"], "--wav does not go with --mic; leave one out"),
        (["--text", "x", "--stop-word", "halt"], "--stop-word needs --mic; add it"),
    ],
)
def test_flags_that_say_no_single_way_to_ask_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        RunOptions.of(parsed(*flags))
