"""`deeptalk-edge routes`: the recorded use of experts, and its replay.

show     how local they are
replay   what pools and policies would hit, miss and read; with a device, simulated times
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loading it takes longer than `--help` may
    from deeptalk_edge.devices.replay.simulator import SimulatedDevice


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions of `routes` and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="show how local recorded routes are")
    replay = actions.add_parser("replay", help="replay recorded routes through the paging policies")
    for action in (show, replay):
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
        "--device",
        help="simulate times too: a profile's name or TOML with a [paging] table; `list` names "
        "those that have one, `all` compares them",
    )
    replay.add_argument(
        "--experts", metavar="DTYPE", help="int4 or int8 (default: the profile's precision)"
    )
    replay.add_argument(
        "--link",
        type=float,
        metavar="GB_PER_S",
        help="rate of the link to the experts (default: the profile's usual one)",
    )


def main(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code.

    Raises ArtifactError if a file is no recording of routes, SettingsError if a flag names nothing.
    """
    from deeptalk_edge.devices.replay.study import open_routes

    if args.action == "replay":
        return _replay(args)
    from deeptalk_edge.devices.replay.locality import locality

    found = locality(open_routes(args.routes))
    print(json.dumps(found, indent=2) if args.json else _page(found))
    return 0


def _replay(args: argparse.Namespace) -> int:
    from deeptalk_edge.devices.replay.study import open_routes, replays, simulated_devices
    from deeptalk_edge.runtime.experts.routes import Routes

    if args.device == "list":
        return _list_devices()
    routes = open_routes(args.routes)
    profile = Routes.load(args.profile) if args.profile else None

    def rows_on(device: SimulatedDevice | None) -> list[dict[str, Any]]:
        return replays(
            routes,
            args.pool,
            args.policy,
            profile=profile,
            device=device,
            guesses=not args.no_guesses,
        )

    if args.device == "all":
        study = {name: rows_on(device) for name, device in simulated_devices().items()}
        if args.json:
            print(json.dumps({"routes": routes.source, "devices": study}))
        else:
            print(_comparison(routes.source, study))
        return 0
    rows = rows_on(_device(args))
    if args.json:
        print(json.dumps({"routes": routes.source, "device": args.device, "rows": rows}))
    else:
        print(_table(routes.source, rows, args.device))
    return 0


def _device(args: argparse.Namespace) -> SimulatedDevice | None:
    from deeptalk_edge.devices.profile import load_profile
    from deeptalk_edge.devices.replay.study import device_of
    from deeptalk_edge.errors import SettingsError

    if args.device is None:
        if args.experts or args.link:
            raise SettingsError("--experts and --link choose among a device's estimates: name it")
        return None
    if args.link is not None and not 0 < args.link < float("inf"):
        raise SettingsError(f"--link {args.link}: expected GB per second, more than 0")
    profile = load_profile(args.device)
    return device_of(profile, experts=args.experts, link_gb_per_s=args.link)


def _list_devices() -> int:
    from deeptalk_edge.devices.replay.study import simulated_devices

    for name, device in simulated_devices().items():
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
