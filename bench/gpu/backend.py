"""`make gpu-check`, backend part: does the TensorRT backend work on this machine?

    python -m deeptalk_edge.bench.gpu.backend [--tier 1|2|3] [--questions N] [--report FILE]

Run it from a checkout. The first line names the tier, the last is one JSON object:

    tier 1  emulated      no GPU: CUDA and TensorRT are emulated, ONNX Runtime computes on the CPU
    tier 2  our CUDA      a GPU without TensorRT: our CUDA calls, memory, streams, graphs and plugin
                          kernels run on the GPU; torch computes the engines. It does not test
                          TensorRT
    tier 3  TensorRT      engines that `export` builds here; only this is "runs on TensorRT"

    contract   tests of the emulator's assumptions about CUDA and TensorRT
    spoken     the tiny checkpoint in float32, 24 spoken questions, half of them interrupted: the
               tokens equal the CPU's, logits agree within 1e-3
    drill      float16 with int8 experts in the plugin: forks, keeps, recalls, trims and sound give
               the same bits with and without graphs
    parts      encoder, embed, step, head and codec against the golden values; a codec that decodes
               while a step runs
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.errors import EdgeError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.backends.tensorrt.flavour import FLAVOURS
from deeptalk_edge.runtime.cuda import Cudart
from deeptalk_edge.runtime.settings import ConversationSettings

ROOT = Path(__file__).resolve().parents[2]
TIERS = {
    1: "tier 1: emulated CUDA and TensorRT on the CPU; nothing here ran on a GPU",
    2: "tier 2: our CUDA on a real GPU, engines computed by torch; nothing here ran on TensorRT",
    3: "tier 3: TensorRT itself",
}
LOGITS = 1e-3
HALF_LOGITS = 6e-2  # tolerance of float16 with int8 experts against float32, random weights
CHECKS = ("contract", "spoken", "drill", "parts")


def find_tier() -> tuple[int, str]:
    """Return the highest tier that this machine can check, and the reason against a higher one."""
    try:
        capability = Cudart().compute_capability
    except EdgeError as error:
        return 1, str(error)
    for name, flavour in FLAVOURS.items():
        if importlib.util.find_spec(flavour.module) is None:
            continue
        if name == "tensorrt_rtx" and capability == "sm_90":
            continue  # TensorRT-RTX 1.7 has no kernels for it
        return 3, f"{name} on {capability}"
    return 2, f"{capability}, no TensorRT for it is installed"


class Course:
    """The checks of one tier."""

    def __init__(self, tier: int, work: Path, num_questions: int) -> None:
        self.tier, self._work, self._num_questions = tier, work, num_questions

    def run(self) -> dict[str, Any]:
        """Run every check; returns for each name whether it passed, its figures and its seconds."""
        found: dict[str, Any] = {}
        for name in CHECKS:
            began = time.monotonic()
            try:
                result = getattr(self, f"_{name}")()
            except Exception as error:  # a failed check is a result, and the others still run
                result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
            found[name] = {**result, "seconds": round(time.monotonic() - began, 1)}
            print(f"{name}: {json.dumps(found[name])}", flush=True)
        return found

    def _contract(self) -> dict[str, Any]:
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*pytest, "tests/runtime/backends/tensorrt/contract/test_behaviour.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return {"passed": done.returncode == 0, "said": done.stdout.splitlines()[-1:]}

    def _spoken(self) -> dict[str, Any]:
        from tests.runtime.backends.tensorrt.spoken import QUESTIONS, ask, largest_error

        with self._engines("operators", "float32", ROOT / "checkpoints/tiny") as bundle:
            cpu = self._cpu_bundle(ROOT / "checkpoints/tiny")
            questions = QUESTIONS[: self._num_questions]
            right = ask(cpu, questions, interrupt=True, backend="ort")
            said = ask(bundle, questions, interrupt=True)
        equal = said.tokens == right.tokens and said.texts == right.texts
        error = largest_error(said, right) if equal else None
        return {
            "passed": equal and error is not None and error < LOGITS,
            "questions": len(questions),
            "steps": len(said.tokens),
            "tokens_equal": equal,
            "largest_logit_error": error,
        }

    def _drill(self) -> dict[str, Any]:
        checkpoint = self._drill_checkpoint()
        with self._engines("plugin", "float16", checkpoint) as bundle:
            with_graphs, without = (self._drilled(bundle, graphs=on) for on in (True, False))
        right = self._drilled(self._cpu_bundle(checkpoint), graphs=True)
        pairs = list(zip(with_graphs, without, right, strict=True))
        error = max(float(np.abs(a - c).max() / (np.abs(c).max() or 1)) for a, _, c in pairs)
        same = all(np.array_equal(a, b) for a, b, _ in pairs)
        return {
            "passed": same and error < HALF_LOGITS,
            "graphs_change_no_bit": same,
            "error_beside_float32": error,
        }

    def _parts(self) -> dict[str, Any]:
        """Open the backend, which runs the golden check; that names the part that differs."""
        passed: dict[str, Any] = {}
        for moe, precision in (("operators", "float32"), ("plugin", "float16")):
            with self._engines(moe, precision, self._drill_checkpoint()) as bundle:
                self._drilled(bundle, graphs=True)
                passed[f"{precision}, {moe}"] = True
        return {"passed": all(passed.values()), "forms": passed}

    def _drilled(self, bundle: Bundle, *, graphs: bool) -> list[Any]:
        from tests.runtime.backends.tensorrt.drill import Drill

        settings = replace(ConversationSettings.of(bundle), cuda_graphs=graphs)
        backend = open_backend(bundle, "auto", settings.for_backend())
        try:
            return Drill(backend, state_size=bundle.manifest.codec.state_size).run()
        finally:
            backend.close()

    def _drill_checkpoint(self) -> Path:
        from tests.runtime.backends.tensorrt.drill import write_drill_checkpoint

        place = self._work / "drill"
        if not place.exists():
            write_drill_checkpoint(place)
        return place

    def _cpu_bundle(self, checkpoint: Path) -> Bundle:
        place = self._work / f"{checkpoint.name}-cpu"
        if not place.exists():
            export_bundle(checkpoint, place, ExportSettings())
        return Bundle.open(place)

    @contextmanager
    def _engines(self, moe: Any, precision: str, checkpoint: Path) -> Iterator[Bundle]:
        """Context of a bundle with engines for this machine."""
        open_tier = {1: self._emulated, 2: self._by_torch, 3: self._by_tensorrt}[self.tier]
        place = self._work / f"{checkpoint.name}-{moe}-{precision}"
        with open_tier(moe, precision, place, checkpoint) as bundle:
            yield bundle

    @contextmanager
    def _emulated(
        self, moe: Any, precision: str, place: Path, checkpoint: Path
    ) -> Iterator[Bundle]:
        from deeptalk_edge.bench.gpu.moe_library import MoeLibrary, build_host
        from tests.runtime.backends.tensorrt import emulated_tensorrt, emulation

        if emulated_tensorrt.moe_library is None:
            emulated_tensorrt.moe_library = MoeLibrary(build_host(self._work))
        bundle = _emulated_bundle(moe, precision, place, checkpoint, sm="87")
        with emulation.tensorrt_module(place), emulation.gpu():
            yield bundle

    @contextmanager
    def _by_torch(
        self, moe: Any, precision: str, place: Path, checkpoint: Path
    ) -> Iterator[Bundle]:
        from deeptalk_edge.bench.gpu.torch_engines import TorchEngines
        from tests.runtime.backends.tensorrt import emulated_tensorrt, emulation

        capability = Cudart().compute_capability
        sm = capability.removeprefix("sm_")
        bundle = _emulated_bundle(moe, precision, place, checkpoint, sm=sm)
        emulated_tensorrt.compute = TorchEngines(self._work, int(sm))
        try:
            with emulation.tensorrt_module(place):
                yield bundle
        finally:
            emulated_tensorrt.compute = None

    @contextmanager
    def _by_tensorrt(
        self, moe: Any, precision: str, place: Path, checkpoint: Path
    ) -> Iterator[Bundle]:
        capability = Cudart().compute_capability
        found = [n for n, f in FLAVOURS.items() if importlib.util.find_spec(f.module)]
        if not place.exists():
            plugin = _built_plugin(capability) if moe == "plugin" else None
            form = _profile(found[0], moe, precision, capability)
            export_bundle(checkpoint, place, ExportSettings(profile=form, plugin=plugin))
        yield Bundle.open(place)


def _emulated_bundle(moe: Any, precision: str, place: Path, checkpoint: Path, *, sm: str) -> Bundle:
    from tests.runtime.backends.tensorrt.emulation import build_plugin, export_engines

    if (place / "bundle").exists():
        return Bundle.open(place / "bundle")
    plugin = build_plugin(place / "plugin", sm=sm, ptx=sm) if moe == "plugin" else None
    form = _profile("tensorrt", moe, precision, f"sm_{sm}")
    return export_engines(place, form, plugin, checkpoint=checkpoint)


def _profile(backend: Any, moe: Any, precision: str, capability: str) -> DeviceProfile:
    """Profile of this machine's GPU, with every part in one precision."""
    base = load_profile("agx-orin-64gb" if backend == "tensorrt" else "rtx-4090")
    changes: dict[str, Any] = dict.fromkeys(
        ("encoder", "decoder", "head", "codec", "kv_cache"), precision
    )
    changes |= {"experts": "int8" if moe == "plugin" else precision, "expert_group": None}
    capabilities = base.facts.compute_capabilities
    assert capabilities is not None
    facts = replace(base.facts, compute_capabilities=replace(capabilities, value=(capability,)))
    if (
        backend == "tensorrt"
        and facts.tensorrt is not None
        and importlib.util.find_spec("tensorrt")
    ):
        import tensorrt  # type: ignore[import-not-found, unused-ignore]

        series = ".".join(str(tensorrt.__version__).split(".")[:2])
        facts = replace(facts, tensorrt=replace(facts.tensorrt, value=series))
    return replace(base, moe=moe, precision=replace(base.precision, **changes), facts=facts)


def _built_plugin(capability: str) -> Path:
    """Build libdt_moe_plugin.so for this GPU, by CMake and nvcc."""
    folder = ROOT / "build/gpu_check_plugin"
    sm = capability.removeprefix("sm_")
    source = ROOT / "native/tensorrt_plugin"
    configure = ["cmake", "-S", str(source), "-B", str(folder), f"-DDT_ARCHITECTURES={sm}"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder / "libdt_moe_plugin.so"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tier", type=int, choices=sorted(TIERS), help="not above what is here")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--report", type=Path, help="write the JSON there as well")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(ROOT))  # the emulator belongs to the tests and is not installed
    highest, why = find_tier()
    tier = args.tier or highest
    if tier > highest:
        parser.error(f"tier {tier} cannot be had here, only {highest}: {why}")
    print(f"{TIERS[tier]} ({why})", flush=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        checks = Course(tier, Path(work), args.questions).run()
    report = {"tier": tier, "tier_says": TIERS[tier], "found": why, "checks": checks}
    text = json.dumps(report)
    if args.report:
        args.report.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
