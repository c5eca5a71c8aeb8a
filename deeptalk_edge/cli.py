"""The command `deeptalk-edge`: one module a verb, loaded only when it is used."""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Sequence

from deeptalk_edge import __version__
from deeptalk_edge.program import as_program

__all__ = ["as_program", "main"]

# verb: (its module, which offers `add_arguments` and `main`; its line in the help)
_VERBS = {
    "train": ("deeptalk_edge.training.command", "make and adapt checkpoints"),
    "calibrate": (
        "deeptalk_edge.calibration.command",
        "quantise a checkpoint's experts and measure the accuracy",
    ),
    "export": ("deeptalk_edge.export.command", "turn a checkpoint into a bundle"),
    "run": ("deeptalk_edge.runtime.commands.run", "answer questions aloud"),
    "bundle": ("deeptalk_edge.runtime.commands.bundle", "inspect, verify or sign a bundle"),
    "probe": ("deeptalk_edge.devices.probe_command", "identify and measure this machine"),
    "plan": ("deeptalk_edge.devices.plan_command", "will a model run on a device, and how fast"),
    "profile": ("deeptalk_edge.devices.profile_command", "measure a bundle on this machine"),
    "doctor": ("deeptalk_edge.devices.doctor_command", "find what is set up wrong here"),
    "routes": ("deeptalk_edge.devices.routes_command", "show and replay the use of experts"),
    "sound": ("deeptalk_edge.runtime.commands.sound", "list microphones and loudspeakers"),
}

# What two words were once, and what says the same today.
_OLD_SPELLINGS = {
    ("devices", "audio"): ["sound"],
    ("profile", "run"): ["profile", "--offline"],
    ("profile", "routes"): ["routes", "show"],
    ("profile", "replay"): ["routes", "replay"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return as_program(lambda: _run_verb(words))


def _run_verb(argv: list[str]) -> int:
    import logging

    argv = _in_todays_words(argv)
    verb = next((word for word in argv if word in _VERBS), None)
    args = _parser(verb).parse_args(argv)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(message)s")
    return int(importlib.import_module(_VERBS[args.verb][0]).main(args))


def _in_todays_words(argv: list[str]) -> list[str]:
    """The same command; an old spelling is replaced, and stderr says by what."""
    for place, old in enumerate(itertools.pairwise(argv)):
        if new := _OLD_SPELLINGS.get(old):
            print(f"`{' '.join(old)}` is `{' '.join(new)}` now", file=sys.stderr)
            return [*argv[:place], *new, *argv[place + 2 :]]
    return argv


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with the flags of one verb; naming the others only keeps `--help` fast."""
    parser = argparse.ArgumentParser(
        prog="deeptalk-edge", description="Run the speech LLM DeepTalk on an edge device."
    )
    parser.add_argument("--version", action="version", version=f"deeptalk-edge {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (module, summary) in _VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary)
        sub.add_argument(
            "-v", "--verbose", action="count", default=0, help="say more on stderr; -vv: all"
        )
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


if __name__ == "__main__":
    sys.exit(main())
