"""`deeptalk-edge profile`: what a bundle costs on this machine, and what recorded routes say of
paging.

run      medians and 95th percentiles over many answers
routes   how local they are
replay   what pools and policies would hit, miss and read; with a device, simulated times
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.target import backend_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions of `profile` and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_run_arguments(actions.add_parser("run", help="measure how a bundle answers here"))
    routes = actions.add_parser("routes", help="show how local recorded routes are")
    replay = actions.add_parser("replay", help="replay recorded routes through the paging policies")
    for action in (routes, replay):
        action.add_argument(
            "routes",
            help="a file of `run --record-routes`, or synthetic:PRESET[:WALL] (flat, mid, local)",
        )
        action.add_argument("--json", action="store_true", help="a JSON object on stdout")
    replay.add_argument(
        "--pool",
        nargs="+",
        metavar="N",
        help="experts that fit, or their share (default: 25%% 42%% 65%% 100%%, or the device's)",
    )
    replay.add_argument(
        "--policy",
        nargs="+",
        default=["lru", "phased"],
        metavar="NAME",
        help="lru, decayed or phased (default: lru phased)",
    )
    replay.add_argument(
        "--no-guesses", action="store_true", help="without look-ahead and sweep, only on demand"
    )
    replay.add_argument("--profile", type=Path, metavar="ROUTES", help="what phased knows before")
    replay.add_argument(
        "--device", help="simulate times too; `list` names the devices, `all` compares them"
    )


def _add_run_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--bundle", type=Path, required=True, help="directory made by `deeptalk-edge export`"
    )
    run.add_argument(
        "--wav", type=Path, nargs="+", default=[], metavar="WAV", help="spoken questions"
    )
    run.add_argument("--text", action="append", default=[], help="a written question")
    run.add_argument("--repeat", type=int, default=5, help="times each is asked (default 5)")
    run.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    run.add_argument("--mode", choices=("batch-parallel", "single", "text"))
    run.add_argument(
        "--backend", type=backend_name, choices=("auto", "cpu", "ort", "fake"), default="auto"
    )
    run.add_argument("--encoder-window", choices=("whole", "near"), default="whole")
    run.add_argument("--pool", metavar="N", help="experts in memory, or their share such as 42%%")
    run.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code.

    Raises ArtifactError if a file is no recording of routes, SettingsError if a flag names nothing;
    `run` raises AudioError if a file is no question, else what `measure` raises.
    """
    if args.action == "run":
        return _run(args)
    from deeptalk_edge.devices.replay.study import open_routes

    if args.action == "replay" and args.device == "list":
        return _list_devices()
    routes = open_routes(args.routes)
    if args.action == "routes":
        from deeptalk_edge.devices.replay.locality import locality

        found = locality(routes)
        print(json.dumps(found, indent=2) if args.json else _page(found))
        return 0
    from deeptalk_edge.devices.replay.study import DEVICES, replays
    from deeptalk_edge.runtime.experts.routes import Routes

    profile = Routes.load(args.profile) if args.profile else None

    def rows_on(device: str | None) -> list[dict[str, Any]]:
        return replays(
            routes,
            args.pool,
            args.policy,
            profile=profile,
            device=device,
            guesses=not args.no_guesses,
        )

    if args.device == "all":
        study = {device: rows_on(device) for device in DEVICES}
        if args.json:
            print(json.dumps({"routes": routes.source, "devices": study}))
        else:
            print(_comparison(routes.source, study))
        return 0
    rows = rows_on(args.device)
    if args.json:
        print(json.dumps({"routes": routes.source, "device": args.device, "rows": rows}))
    else:
        print(_table(routes.source, rows, args.device))
    return 0


def _run(args: argparse.Namespace) -> int:
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


def _list_devices() -> int:
    from deeptalk_edge.devices.replay.study import DEVICES

    for name, device in DEVICES.items():
        slots = device.pool_bytes // device.record_bytes
        print(f"{name:34}{slots:6} experts, {device.record_bytes / 1e6:.1f} MB each")
    return 0


def _page(found: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for name, value in found.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            lines += [label, _page(value, indent + "  ")]
        elif value is None:
            lines.append(f"{label:40} -")
        else:
            lines.append(f"{label:40} {f'{value:.3f}' if isinstance(value, float) else value}")
    return "\n".join(lines)


def _table(source: str, rows: list[dict[str, Any]], device: str | None) -> str:
    """One line a pool and policy."""
    lines = [f"routes: {source}"]
    head = f"{'pool':>5}  {'policy':18}{'hits':>8}{'demanded':>11}{'guessed':>10}{'of use':>8}"
    if device:
        lines.append(f"times: simulated, {device}")
        head += f"{'step / p95 ms':>17}{'stall':>8}{'> 85 ms':>9}{'first audio, cold ms':>22}"
    lines.append(head)
    for row in rows:
        guessed = row["hint_bytes"] + row["sweep_bytes"]
        hits = "-" if row["hit_share"] is None else f"{row['hit_share']:.1%}"
        line = f"{row['slots']:>5}  {row['policy']:18}{hits:>8}"
        line += f"{row['demand_bytes'] / 1e9:8.2f} GB{guessed / 1e9:7.2f} GB{row['guesses_used']:8}"
        if simulated := row.get("simulated"):
            cold = simulated["cold_first_audio_ms"]
            line += f"{simulated['step_ms']:9.1f} /{simulated['step_ms_p95']:6.1f}"
            line += f"{simulated['stall_ms_per_step']:8.1f}{simulated['over_budget_share']:9.0%}"
            line += (
                f"{simulated['first_audio_ms']:14.0f}{'-' if cold is None else f'{cold:.0f}':>8}"
            )
        lines.append(line)
    return "\n".join(lines)


def _comparison(source: str, study: Mapping[str, list[dict[str, Any]]]) -> str:
    """One line a device and pool, one column a way to page."""
    ways = list(dict.fromkeys(row["policy"] for rows in study.values() for row in rows))
    lines = [
        f"routes: {source}",
        "simulated: mean step in ms, share of steps over 85 ms, first audio in ms",
        f"{'device':28}{'pool':>5}" + "".join(f"{way:>22}" for way in ways),
    ]
    for device, rows in study.items():
        for pool in dict.fromkeys(row["slots"] for row in rows):
            found = {row["policy"]: row.get("simulated") for row in rows if row["slots"] == pool}
            line = f"{device:28}{pool:>5}"
            for way in ways:
                each = found.get(way)
                line += (
                    f"{each['step_ms']:9.1f}{each['over_budget_share']:6.0%}"
                    f"{each['first_audio_ms']:7.0f}"
                    if each
                    else f"{'-':>22}"
                )
            lines.append(line)
    return "\n".join(lines)
