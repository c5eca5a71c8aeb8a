"""The command `deeptalk-edge`: one verb a module, loaded only when it is asked for.

exit codes   0 done, 1 an error that the user can act on (one line on stderr), 2 a wrong flag,
             130 interrupted
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from deeptalk_edge import __version__

# verb: (its module, which offers `add_arguments` and `main`; its line in the help)
_VERBS = {
    "export": ("deeptalk_edge.export.command", "checkpoint to bundle"),
    "run": ("deeptalk_edge.runtime.command", "ask a bundle and hear its answer"),
    "bundle": ("deeptalk_edge.runtime.bundle_command", "inspect, verify or sign a bundle"),
    "profile": ("deeptalk_edge.runtime.profile_command", "what recorded routes say of paging"),
    "devices": ("deeptalk_edge.runtime.devices_command", "list microphones and loudspeakers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in argv if word in _VERBS), None)
    parser = _parser(verb)
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has said why, or has shown the help
        return int(stop.code or 0)
    return _run(args)


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


def _run(args: argparse.Namespace) -> int:
    import logging

    from deeptalk_edge.errors import EdgeError

    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(message)s")
    try:
        return int(importlib.import_module(_VERBS[args.verb][0]).main(args))
    except EdgeError as error:
        print(f"deeptalk-edge: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
