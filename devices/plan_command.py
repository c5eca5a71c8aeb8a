"""`deeptalk-edge plan --device D [D ...] (--checkpoint C | --bundle B)`: will it run there, how
fast, and where does the time go; computed, without the device."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.devices.plan.device import DevicePlan, Model
    from deeptalk_edge.devices.profile import DeviceProfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `plan`."""
    parser.add_argument(
        "--device",
        nargs="+",
        required=True,
        metavar="DEVICE",
        help="profiles' names or TOML files; `all` for every profile",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="in the official layout")
    what.add_argument("--bundle", type=Path, metavar="DIR", help="made by `deeptalk-edge export`")
    parser.add_argument("--question", type=float, default=5.0, metavar="S", help="seconds (5)")
    parser.add_argument(
        "--hangover", type=float, metavar="MS", help="silence that ends a turn (default: 300)"
    )
    parser.add_argument(
        "--items", type=int, choices=(1, 2), default=2, help="2: batch-parallel (default)"
    )
    parser.add_argument("--context", type=int, metavar="ROWS", help="rows of conversation")
    parser.add_argument("--encoder-window", choices=("whole", "near"), default="whole")
    parser.add_argument("--power-mode", metavar="NAME", help="of nvpmodel (default: the best)")
    parser.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="PART=DTYPE",
        help="instead of the device's: experts=int4:128, decoder=int8; repeatable",
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="a picture of all devices")
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Plan; returns the exit code, 0 even if a device refuses: it is said.

    Raises EdgeError if the checkpoint, the bundle or a device cannot be used.
    """
    from deeptalk_edge.devices.plan.device import near_window, plan_device
    from deeptalk_edge.devices.plan.page import page
    from deeptalk_edge.devices.plan.picture import svg
    from deeptalk_edge.devices.plan.times import Question

    _check(args)
    model, profiles = _model_and_profiles(args)
    question = Question(seconds=args.question, num_items=args.items)
    if args.encoder_window == "near":
        question = near_window(question, model.spec)
    plans = [
        plan_device(model, profile, question, power_mode=args.power_mode, hangover_ms=args.hangover)
        for profile in profiles
    ]
    name = str(args.checkpoint or args.bundle)
    if args.svg is not None:
        args.svg.write_text(svg(plans, name), encoding="utf-8")
    print(json.dumps(_as_json(plans), indent=2) if args.json else page(plans, name))
    return 0


def _check(args: argparse.Namespace) -> None:
    from deeptalk_edge.errors import SettingsError

    for flag, value, most in (
        ("--question", args.question, 600),
        ("--hangover", args.hangover, 60_000),
        ("--context", args.context, 1 << 24),
    ):
        if value is not None and not 0 < value <= most:
            raise SettingsError(f"{flag} {value}: expected more than 0 and at most {most}")


def _model_and_profiles(args: argparse.Namespace) -> tuple[Model, list[DeviceProfile]]:
    from deeptalk_edge.devices.measured import planning_profile
    from deeptalk_edge.devices.plan.source import model_of_bundle, model_of_checkpoint, of_bundle
    from deeptalk_edge.devices.profile import profile_names

    names = profile_names() if args.device == ["all"] else args.device
    profiles = [planning_profile(name) for name in names]
    if args.bundle is not None:
        model, manifest = model_of_bundle(args.bundle)
        profiles = [of_bundle(profile, manifest) for profile in profiles]
    else:
        model = model_of_checkpoint(args.checkpoint)
    if args.precision:
        profiles = [profile.with_precision(args.precision) for profile in profiles]
    if args.context is not None:
        model = dataclasses.replace(model, context_rows=args.context)
    return model, profiles


def _as_json(plans: list[DevicePlan]) -> dict[str, Any]:
    contents = []
    for plan in plans:
        content = dataclasses.asdict(plan)
        memory = plan.memory
        content["memory"] |= {
            "needed_bytes": memory.needed_bytes,
            "fits": memory.fits,
            "resident_share": memory.resident_share,
        }
        contents.append(content)
    return {"schema": "deeptalk-edge.plan/1", "source": "computed", "plans": contents}
