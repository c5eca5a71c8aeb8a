"""`deeptalk-edge export CHECKPOINT -o BUNDLE`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a directory in the official layout")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="BUNDLE")
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="default: cpu")
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


def main(args: argparse.Namespace) -> int:
    """Export, show the way on stderr, and print what was written."""
    from tqdm import tqdm

    from deeptalk_edge.export.bundle import ExportSettings, export_bundle

    settings = ExportSettings(
        encoder=args.encoder, snac=args.snac, codec_noise=args.codec_noise, replace=args.force
    )
    began = time.monotonic()
    with tqdm(file=sys.stderr, leave=False, bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def show(step: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(step)

        manifest = export_bundle(args.checkpoint, args.output, settings, show)
    for name, entry in manifest.files.items():
        print(f"{name:20}{entry.bytes / 1e6:10.1f} MB")
    total_mb = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    print(f"{len(manifest.files)} files{total_mb:17.1f} MB{time.monotonic() - began:10.1f} s")
    return 0
