"""`deeptalk-edge bundle`: what a bundle holds, and whether all of it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `bundle`."""
    parser.add_argument(
        "action", choices=("inspect", "verify"), help="show what it holds, or read and check it all"
    )
    parser.add_argument("bundle", type=Path, help="directory made by `deeptalk-edge export`")
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Inspect or verify; returns the exit code.

    Raises ArtifactError or ExpertUnavailable, naming what is damaged.
    """
    from deeptalk_edge.runtime.bundle import Bundle

    bundle = Bundle.open(args.bundle)
    if args.action == "verify":
        num_bytes = bundle.verify()
        num_records = len(bundle.manifest.records)
        if args.json:
            report = {"path": str(args.bundle), "bytes": num_bytes, "expert_records": num_records}
            print(json.dumps({**report, "is_whole": True}))
        else:
            print(
                f"{args.bundle}: whole; {_size(num_bytes)} in {len(bundle.manifest.files)} files, "
                f"{num_records} expert records"
            )
        return 0
    content = bundle.describe()
    print(json.dumps(content, indent=2) if args.json else _page(content))
    return 0


def _page(content: dict[str, Any]) -> str:
    """A description for a person."""
    decoder, encoder = content["model"]["decoder"], content["model"]["encoder"]
    vocabulary, codec = content["model"]["vocabulary"], content["codec"]
    generation, experts = content["generation"], content["experts"]
    lines = [
        ("checkpoint", f"{content['checkpoint']['name']} ({content['checkpoint']['sha256'][:12]})"),
        ("made by", f"{content['producer']}, bundle format {content['format']}"),
        ("made for", f"{content['target']['backend']} on {content['target']['device']}"),
        ("precision", ", ".join(f"{part} {kind}" for part, kind in content["precision"].items())),
        (
            "decoder",
            f"{decoder['num_layers']} layers of width {decoder['width']}, "
            f"{decoder['num_experts']} experts in each but the first "
            f"{decoder['num_dense_layers']}, {decoder['top_k']} per token",
        ),
        (
            "encoder",
            f"{encoder['num_layers']} layers of width {encoder['width']}, hears "
            f"{encoder['max_frames'] * 0.02:.0f} s",
        ),
        (
            "codec",
            f"{vocabulary['num_codebooks']} codes a frame, {codec['spec']['sampling_rate']} Hz, "
            f"noise {codec['noise']}",
        ),
        (
            "answers",
            f"{generation['mode']}, speaker {generation['speaker']}, at most "
            f"{generation['max_rows']} rows of {generation['context_rows']}",
        ),
        ("experts", f"{experts['records']} records, {_size(experts['bytes'])}"),
        ("licences", ", ".join(f"{part}: {name}" for part, name in content["licences"].items())),
        ("size", f"{_size(content['bytes'])} in {len(content['files'])} files"),
    ]
    largest = sorted(content["files"].items(), key=lambda item: -item[1])
    lines += [("", f"{_size(num_bytes):>9}  {name}") for name, num_bytes in largest]
    return "\n".join(f"{name:12}{value}" for name, value in lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
