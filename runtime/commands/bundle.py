"""`deeptalk-edge bundle`: what a bundle holds, whether all of it is whole, and who made it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions of `bundle` and their flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="show what a bundle holds")
    verify = actions.add_parser("verify", help="read and check every byte of a bundle")
    verify.add_argument(
        "--key", type=Path, metavar="PUB", help="it must be signed with this key; refuse it else"
    )
    sign = actions.add_parser("sign", help="read and check a bundle, then sign it")
    sign.add_argument("--key", type=Path, metavar="KEY", required=True, help="the secret key")
    for action in (inspect, verify, sign):
        action.add_argument("bundle", type=Path, help="directory made by `deeptalk-edge export`")
    for action in (inspect, verify):
        action.add_argument("--json", action="store_true", help="a JSON object on stdout")
    keygen = actions.add_parser("keygen", help="make a pair of keys: PLACE.key and PLACE.pub")
    keygen.add_argument("place", type=Path, metavar="PLACE")


def main(args: argparse.Namespace) -> int:
    """Run one action; returns the exit code.

    Raises ArtifactError or ExpertUnavailable, naming what is damaged, SettingsError naming a key
    that cannot be used.
    """
    actions = {"inspect": _inspect, "verify": _verify, "sign": _sign, "keygen": _make_keys}
    actions[args.action](args)
    return 0


def _inspect(args: argparse.Namespace) -> None:
    from deeptalk_edge.bundle.reader import Bundle

    content = Bundle.open(args.bundle).describe()
    print(json.dumps(content, indent=2) if args.json else _page(content))


def _verify(args: argparse.Namespace) -> None:
    import dataclasses

    from deeptalk_edge.bundle.manifest import MANIFEST
    from deeptalk_edge.bundle.reader import Bundle, check_signature
    from deeptalk_edge.bundle.signature import PublicKey, note_signature

    # The signature first: until it holds, the manifest is anyone's.
    signed = check_signature(args.bundle, PublicKey.read(args.key)) if args.key else None
    bundle = Bundle.open(args.bundle)
    num_bytes = bundle.verify()
    num_records, num_files = len(bundle.manifest.experts.records), len(bundle.manifest.files)
    signature = dataclasses.asdict(note_signature(args.bundle / MANIFEST))
    if signed is not None:
        signature["state"] = "valid"
    if args.json:
        report = {"path": str(args.bundle), "bytes": num_bytes, "expert_records": num_records}
        checked = {"is_whole": True} if signed is None else {"is_whole": True, "signed": signed}
        print(json.dumps(report | checked | {"signature": signature}))
        return
    print(
        f"{args.bundle}: whole; {_size(num_bytes)} in {num_files} files, "
        f"{num_records} expert records; {_signature(signature)}"
    )


def _signature(note: dict[str, Any]) -> str:
    """What is known of a signature, for a person."""
    by = f"by key {note['key_id']}: {note['comment']}"
    return {
        "absent": "not signed",
        "unreadable": "signature not readable; sign it again",
        "stale": f"signature is stale, made for another manifest {by}; sign it again",
        "unchecked": f"signed {by}; not checked, name the key with `bundle verify --key`",
        "valid": f"signed {by}",
    }[note["state"]]


def _sign(args: argparse.Namespace) -> None:
    from deeptalk_edge.bundle.manifest import MANIFEST
    from deeptalk_edge.bundle.reader import Bundle, check_nothing_else
    from deeptalk_edge.bundle.signature import check_signable, content_mark, sign_file

    bundle = Bundle.open(args.bundle)
    check_nothing_else(args.bundle, bundle.manifest)
    check_signable(args.bundle / MANIFEST, args.key)
    bundle.verify()
    origin, target = bundle.manifest.checkpoint, bundle.manifest.target
    manifest = args.bundle / MANIFEST
    what = f"{origin.name} {origin.sha256[:12]} {content_mark(manifest)}"
    comment = f"{what} for {target.backend} on {target.device}"
    print(sign_file(manifest, args.key, comment))


def _make_keys(args: argparse.Namespace) -> None:
    from deeptalk_edge.bundle.signature import generate_keys

    secret, public = generate_keys(args.place)
    print(f"{secret}  signs; keep it off devices and in a backup")
    print(f"{public}  goes to every device: deeptalk-edge run --require-signature {public}")


def _page(content: dict[str, Any]) -> str:
    """A description for a person."""
    decoder, encoder = content["model"]["decoder"], content["model"]["encoder"]
    vocabulary, codec = content["model"]["vocabulary"], content["codec"]
    generation, experts = content["generation"], content["experts"]
    lines = [
        ("checkpoint", f"{content['checkpoint']['name']} ({content['checkpoint']['sha256'][:12]})"),
        ("manifest", f"SHA-256 {content['sha256']}"),
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
            f"{generation['max_rows']} rows of {generation['context_rows']}, "
            f"{generation['max_turns'] or 'all'} turns in sight",
        ),
        ("experts", f"{experts['records']} records, {_size(experts['bytes'])}"),
        *_calibration(content["calibration"]),
        ("signature", _signature(content["signature"])),
        ("licences", ", ".join(f"{part}: {name}" for part, name in content["licences"].items())),
        ("size", f"{_size(content['bytes'])} in {len(content['files'])} files"),
    ]
    largest = sorted(content["files"].items(), key=lambda item: -item[1])
    lines += [("", f"{_size(num_bytes):>9}  {name}") for name, num_bytes in largest]
    return "\n".join(f"{name:12}{value}" for name, value in lines)


def _calibration(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How the experts were quantised and what the accuracy gate found."""
    if found is None:
        return [("calibration", "none: experts are rounded to nearest")]
    lines = [
        (
            "calibration",
            f"{found['method']}, {found['utterances']} utterances of {found['corpus']}; "
            f"{found['forced']} of {found['experts']} experts topped up, {found['below_floor']} "
            f"below the default floor of routed tokens; relative error {found['error']:.4f}",
        )
    ]
    if paging := found["paging"]:
        gains = ", ".join(
            f"{pool:.0%}: {plain:.1%} to {measured:.1%}"
            for pool, plain, measured in zip(
                paging["pools"], paging["phased"], paging["measured"], strict=True
            )
        )
        used = "used" if paging["used"] else "not used"
        lines.append(("paging", f"hits by replay with measured routes, {gains}; {used}"))
    if routers := found["routers"]:
        agreement = f"{routers['trained']:.1%} to {routers['fitted']:.1%}"
        lines.append(("routers", f"{len(routers['layers'])} fitted, agreement {agreement}"))
    gate = found["gate"]
    if gate is None:
        return [*lines, ("gate", "not run")]
    said = [
        f"{name} {measure['value']:.4g}"
        for name, measure in gate["measures"].items()
        if measure["value"] is not None and measure["limit"] is not None
    ]
    return [*lines, ("gate", f"passed on {gate['utterances']} utterances: {', '.join(said)}")]


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
