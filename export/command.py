"""`deeptalk-edge export CHECKPOINT --device DEVICE -o BUNDLE`, and its plan by `--dry-run`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeptalk_edge.bundle.target import backend_name

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.devices.profile import DeviceProfile
    from deeptalk_edge.export.dry_run.forecast import ExportPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `export`."""
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="a directory in the official layout; on a device, the bundle whose engines to build",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--device", default="cpu", metavar="DEVICE", help="a profile's name or TOML (default: cpu)"
    )
    parser.add_argument("--list-devices", action=_ListDevices, help="show the profiles and exit")
    parser.add_argument(
        "--backend",
        type=backend_name,
        choices=["ort", "cpu", "tensorrt_rtx", "tensorrt"],
        help="ONNX Runtime, our CPU kernels, TensorRT-RTX or TensorRT, instead of the device's own",
    )
    parser.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="PART=DTYPE",
        help="instead of the device's: experts=int8, experts=int4:128, decoder=float16; repeatable",
    )
    parser.add_argument(
        "--table", type=Path, help="a calibration table of this checkpoint, by `calibrate`"
    )
    parser.add_argument(
        "--plugin", type=Path, metavar="SO", help="our TensorRT plugin, as `make plugin` built it"
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="Whisper's config.json, if not in the checkpoint",
    )
    parser.add_argument("--snac", type=Path, metavar="DIR", help="SNAC, if not in the checkpoint")
    parser.add_argument(
        "--codec-noise",
        choices=["off", "tape"],
        default="off",
        help="SNAC's noise: left out, or an input of the graph (default: off)",
    )
    parser.add_argument("--force", action="store_true", help="replace a bundle that exists")
    parser.add_argument(
        "--if-changed",
        action="store_true",
        help="leave a bundle that was made of the same checkpoint, settings and exporter; replace "
        "any other one",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be written and whether it fits"
    )
    parser.add_argument("--json", action="store_true", help="the plan as a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Export or plan; returns the exit code.

    Raises EdgeError if the checkpoint, the device or the place cannot be used.
    """
    from deeptalk_edge.devices.profile import load_profile
    from deeptalk_edge.errors import SettingsError

    profile = load_profile(args.device)
    if args.backend:
        profile = profile.on_backend(args.backend)
    if args.precision:
        profile = profile.with_precision(args.precision)
    if args.dry_run:
        return _show_plan(args, profile)
    if args.output is None:
        raise SettingsError("name the bundle's place with -o, or see the plan alone with --dry-run")
    return _export(args, profile)


def _export(args: argparse.Namespace, profile: DeviceProfile) -> int:
    """Export, show the way on stderr, and print what was written."""
    from tqdm import tqdm

    from deeptalk_edge.export.bundle import ExportSettings, export_bundle

    settings = ExportSettings(
        encoder=args.encoder,
        snac=args.snac,
        codec_noise=args.codec_noise,
        profile=profile,
        table=args.table,
        plugin=args.plugin,
        replace=args.force,
        if_changed=args.if_changed,
    )
    began = time.monotonic()
    # disable=None: no bar where stderr is no terminal
    form = {"leave": False, "disable": None, "bar_format": "{l_bar}{bar}| {elapsed}"}
    with tqdm(file=sys.stderr, **form) as bar:

        def show(step: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(step)

        manifest = export_bundle(args.checkpoint, args.output, settings, show)
    for name, entry in manifest.files.items():
        print(f"{name:20}{entry.bytes / 1e6:10.1f} MB")
    total_mb = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    print(f"{len(manifest.files)} files{total_mb:17.1f} MB{time.monotonic() - began:10.1f} s")
    return 0


def _show_plan(args: argparse.Namespace, profile: DeviceProfile) -> int:
    """Plan from the config files; no weight is opened. 0 even if it does not fit: it is said."""
    from deeptalk_edge.checkpoint.config import read_codec_spec, read_config
    from deeptalk_edge.export.dry_run.files import copied_files
    from deeptalk_edge.export.dry_run.forecast import plan_export
    from deeptalk_edge.export.dry_run.page import plan_page
    from deeptalk_edge.export.generation import read_generation

    config = read_config(args.checkpoint, args.encoder)
    plan = plan_export(
        config.model,
        read_codec_spec(args.snac or args.checkpoint / "snac"),
        profile,
        codec_noise=args.codec_noise,
        context_rows=read_generation(config).context_rows,
        copied=copied_files(args.checkpoint),
    )
    print(json.dumps(_as_json(plan), indent=2) if args.json else plan_page(plan, args.checkpoint))
    return 0


def _as_json(plan: ExportPlan) -> dict[str, Any]:
    content = dataclasses.asdict(plan)
    content["total_bytes"] = plan.total_bytes
    content["memory"] |= {"needed_bytes": plan.memory.needed_bytes, "fits": plan.memory.fits}
    return content


class _ListDevices(argparse.Action):
    """Shows the profiles that come with the package, as --version shows the version."""

    def __init__(self, option_strings: list[str], dest: str, **others: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **others)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from deeptalk_edge.devices.profile import load_profile, profile_names

        for name in profile_names():
            profile = load_profile(name)
            print(f"{name:16}{profile.backend:14}{profile.summary}")
        parser.exit()
