"""Runs the programs that measure the figures of the docs: `python -m deeptalk_edge.bench NAME
[flags]`."""

from __future__ import annotations

import sys
from importlib import import_module

from deeptalk_edge.program import as_program

BENCHES = {
    "answers": ("answers", "how fast a bundle answers here, and full-size SNAC"),
    "calibration": ("calibration", "compare all quantisers on the tiny checkpoint"),
    "calibration_memory": ("calibration_memory", "a calibration's memory at official width"),
    "cpu": ("cpu.main", "our kernels at full width, compared with the roofline and peers"),
    "end_of_turn": ("end_of_turn", "what the end-of-turn cues say of whole and broken questions"),
    "expert_split": ("expert_split", "the cost of choosing modality experts by hits or by mass"),
    "export_full": ("export_full", "the official size's step as an engine for RTX cards"),
    "export_memory": ("export_memory", "an export's memory by number of layers"),
    "forecast": ("forecast", "the planner's figures compared with measured ones on this machine"),
    "forecast_tables": ("forecast_tables", "the planner compared with two hand-made tables"),
    "full_size": ("full_size", "spoken questions to a model of the official size"),
    "gpu_check": ("gpu.backend", "check the TensorRT backend on this machine, in three tiers"),
    "gpu_plans": ("gpu.plans", "small TensorRT-RTX plans for the GPU check, built without a GPU"),
    "mutants": ("mutants.main", "plant seeded one-line faults, and count those that tests catch"),
    "noise_hour": ("noise_hour", "the loop's reactions to an hour of noise, simulated"),
    "paging": ("paging.main", "expert paging at full size from this machine's disk"),
    "parity": ("parity", "compare a bundle's graphs with the torch reference"),
    "preference": ("preference", "word errors before and after DPO, on an undertrained checkpoint"),
    "same_as": ("same_as", "compare this checkout's answers and graphs with another commit's"),
    "skewed_router": (
        "skewed_router",
        "what calibration tools do with experts that no token reaches",
    ),
    "soak": ("soak", "hours of simulated conversation"),
    "stop_words": ("stop_words", "stop words over our own voice, after the echo canceller"),
    "tiny_scores": ("tiny_scores", "score the tiny checkpoint on its held-out questions"),
    "understanding": ("understanding", "what a bundle refuses, hears and is sure of"),
    "vad": ("vad", "the voice detectors on speech in noise"),
    "voice_wait": ("voice_wait", "how long a listener waits, live"),
    "wide_checkpoint": ("wide_checkpoint", "train a 256-wide checkpoint for int4 groups up to 128"),
}
"""By name: the module, which has `main(argv)`, and its line in the list."""


def main(argv: list[str] | None = None) -> int:
    """Run one bench; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    name, *flags = words or ["--help"]
    if name in ("-h", "--help"):
        print(f"{__doc__}\n")
        print("\n".join(f"  {name:17}{summary}" for name, (_, summary) in BENCHES.items()))
        return 0
    if name not in BENCHES:
        print(f"bench: no {name}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    module = import_module(f"deeptalk_edge.bench.{BENCHES[name][0]}")
    return int(module.main(flags) or 0)


if __name__ == "__main__":
    sys.exit(as_program(main))
