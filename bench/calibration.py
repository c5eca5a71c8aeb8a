"""Compares all quantisers on the tiny checkpoint by recognising their spoken answers: one table.

    python -m deeptalk_edge.bench.calibration --work build/tiny --checkpoint checkpoints/tiny

The corpus is that of `make tiny`, made in --work if it is missing: 3 minutes on two idle cores.
Questions of its training half calibrate. Float32 on ONNX Runtime and every quantised bundle on our
kernels answer all 711 held-out questions. An answer is right if the closed recogniser finds every
word of the one right answer in its waveform. KL and agreements are teacher-forced on one held-out
question in --kl-every. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertForm, RecordFormat
from deeptalk_edge.bundle.manifest import Origin
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.routing import planned_bytes
from deeptalk_edge.calibration.budget import search, usual_errors
from deeptalk_edge.calibration.calibrate import CalibrateSettings, calibrate
from deeptalk_edge.calibration.corpus import Corpus as Utterances
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.gate import compared, interval
from deeptalk_edge.calibration.layer import METHODS, Method, quantised_expert
from deeptalk_edge.calibration.observe import Observation, observe
from deeptalk_edge.calibration.precision import forms_of
from deeptalk_edge.calibration.table import record_form
from deeptalk_edge.calibration.tape import Tape, TapedEngine, replay
from deeptalk_edge.checkpoint.config import read_codec_spec, read_config, read_model_spec
from deeptalk_edge.checkpoint.expert_split import read_audio_experts
from deeptalk_edge.checkpoint.hashes import FileHashes
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import load_profile, profile_names
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.dry_run.forecast import plan_export
from deeptalk_edge.host import peak_resident_mb
from deeptalk_edge.model.rows import AnswerRows, text_rows
from deeptalk_edge.runtime.audio.vad import WebRtcDetector, find_utterance
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.lm.codec_stream import StreamingCodec
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.runtime.lm.sampler import Sampler
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.understanding import ANSWER_ALL
from deeptalk_edge.training.tiny.corpus import load_corpus, synthesise
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.evaluate import HELD_OUT
from deeptalk_edge.training.tiny.scorer import KioskRecogniser, normalise

Array = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Asked:
    """One held-out question with the float model's results."""

    wanted: str
    prompt: Tape
    """Engine calls up to the answer's first row."""
    answer: Tape | None
    """The answer's calls with logits, if they are compared; else None."""
    steps: list[list[Ids]]
    codes: Ids
    """The words of float32's answer."""


class Ear:
    """Codec and closed recogniser; equal codes are recognised once."""

    def __init__(self, bundle: Bundle) -> None:
        settings = ConversationSettings.of(bundle)
        self._codec = open_backend(bundle, "auto", settings.for_backend()).codec
        self._entry = bundle.manifest.codec
        self._hear = KioskRecogniser()
        self._known: dict[str, str] = {}

    def __call__(self, codes: Ids) -> str:
        """Return the recognised words of codec frames (A, K)."""
        key = hashlib.sha256(codes.tobytes()).hexdigest()
        if key not in self._known:
            stream = StreamingCodec(self._codec, self._entry)
            pcm = [stream.push(codes), stream.finish()] if len(codes) else []
            self._known[key] = self._hear(np.concatenate(pcm)) if pcm else ""
        return self._known[key]


class Model:
    """A bundle's engine, fed with rows that another conversation prepared."""

    def __init__(self, bundle: Bundle) -> None:
        self.settings = replace(
            ConversationSettings.of(bundle), context_rows=1024, understanding=ANSWER_ALL
        )
        self.talk = Conversation(bundle, self.settings, tap=self._tap)
        self._vocabulary = bundle.manifest.model.vocabulary
        self.step_s: list[float] = []

    def _tap(self, engine: Engine) -> Engine:
        self._experts: Any = engine.experts  # type: ignore[attr-defined]
        self._engine = TapedEngine(engine)
        return self._engine

    def prompt(self, question: Array | str) -> Tape:
        """Return the engine calls for a question, up to the answer's first row."""
        self._engine.tape = tape = Tape()
        self.talk.reset()
        answer = self.talk.begin(question)
        while not any(name == "decode_step" for name, _ in tape.calls):
            answer.advance()  # encoding and prefill are separate steps
        self._engine.tape = None
        answer.discard()
        first = next(i for i, (name, _) in enumerate(tape.calls) if name == "decode_step")
        return Tape(tape.calls[: first + 1])

    def taped_answer(self, prompt: Tape) -> tuple[Ids, Tape, list[list[Ids]]]:
        """Return codec frames, the calls with logits, and the routes of the steps."""
        self._engine.tape = tape = Tape()
        self._experts.recorder = recorder = RouteRecorder()
        codes = self.answer(prompt)
        self._engine.tape = self._experts.recorder = None
        return codes, Tape(tape.calls[:-1], tape.logits), _steps(recorder)

    def answer(self, tape: Tape) -> Ids:
        """Return codec frames (A, K) of a free-running answer to a recorded prompt."""
        engine, rows = self._engine, AnswerRows(self._vocabulary)
        sampler, frames = Sampler(self._vocabulary, self.settings.sampler), []
        logits = _prompt(tape, engine)
        while True:
            text = None if rows.is_text_done else logits.text[-1]
            codes = None if rows.is_speech_done else logits.codes[0]
            row, frame = rows.push(*sampler.sample(text, codes))
            frames += [] if frame is None else [frame]
            if rows.is_done or rows.num_rows == self.settings.max_rows:
                break
            began = time.perf_counter()
            logits = self._feed(row, rows.is_text_done)
            self.step_s.append(time.perf_counter() - began)
        engine.reset()
        return np.array(frames, np.int64).reshape(-1, self._vocabulary.num_codebooks)

    def forced(self, asked: Asked) -> tuple[list[Logits], list[list[Ids]]]:
        """Return logits and routes for the float model's rows."""
        assert asked.answer is not None
        self._experts.recorder = recorder = RouteRecorder()
        found = [Logits(x.text.copy(), x.codes.copy()) for x in replay(asked.answer, self._engine)]
        self._experts.recorder = None
        self._engine.reset()
        return found, _steps(recorder)

    def _feed(self, row: Ids, is_text_done: bool) -> Logits:
        engine = self._engine
        if engine.num_items == 1:
            said: Logits = engine.decode_step(row[None])
            return said
        quiet = text_rows(self._vocabulary, row[-1:])
        logits: Logits = engine.decode_step(np.concatenate([row[None], quiet]))
        if is_text_done:
            engine.keep(0)
        return logits


def _prompt(tape: Tape, engine: Any) -> Logits:
    for name, arguments in tape.calls:
        said: Logits = getattr(engine, name)(*arguments)
        if name == "decode_step":
            return said
    raise ValueError("a tape without a step")


def _steps(recorder: RouteRecorder) -> list[list[Ids]]:
    speaking = (each for each in recorder.passes if each.phase is Phase.SPEAKING)
    return [[call.ids for call in each.calls] for each in speaking]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="bench calibration", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"))
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--forms", nargs="+", default=["int4:32", "int8"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--every", type=int, default=1, help="ask one question in so many")
    parser.add_argument("--kl-every", type=int, default=8, help="teacher-force one in so many")
    parser.add_argument("--calibrate", type=int, default=48, help="questions to calibrate on")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--full-width", action="store_true", help="time experts of 2048 x 1408")
    parser.add_argument("--budgets", action="store_true", help="the official size within budgets")
    parser.add_argument("--typed", action="store_true", help="ask in writing, not aloud")
    args = parser.parse_args(argv)
    if args.full_width or args.budgets:
        found = full_width() if args.full_width else budgets()
        print(json.dumps(found))
        return 0
    study = Study(args)
    rows = study.run()
    print("\n".join(study.page(rows)))
    print(json.dumps({"rows": rows, "float": study.float_row, "seeds": study.seed_rows}))
    return 0


def full_width(num_tokens: int = 1024) -> dict[str, Any]:
    """Time the quantisers on random experts of the official size, two at a time: seconds, MB/s of
    bfloat16, memory.

    Results are projected to 26 layers of 64 experts; GPTQ and AWQ use `num_tokens` tokens per
    expert.
    """
    form = RecordFormat(dtype="int4", group=128, width=2048, ffn_width=1408)
    rng = np.random.default_rng(0)
    gate_up = 0.02 * rng.standard_normal((2816, 2048), np.float32)
    down = 0.02 * rng.standard_normal((2048, 1408), np.float32)
    x = rng.standard_normal((num_tokens, 2048), np.float32)
    weights = np.full(num_tokens, 0.1, np.float32)
    megabytes = 2 * (gate_up.size + down.size) / 1e6
    rows: dict[str, Any] = {}
    for method in METHODS:
        repeats = 8 if method == "rtn" else 2
        began, cpu = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(2) as pool:
            work = [
                pool.submit(quantised_expert, method, form, gate_up, down, x, weights)
                for _ in range(repeats)
            ]
            for each in work:
                each.result()
        wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        rows[method] = {
            "mb_per_s_wall": repeats * megabytes / wall_s,
            "mb_per_s_two_cores": 2 * repeats * megabytes / cpu_s,
            "cpu_s_per_expert": cpu_s / repeats,
            "hours_projected_two_cores": cpu_s / repeats * 26 * 64 / 2 / 3600,
            "peak_mb": peak_resident_mb(),
        }
        line = {name: round(value, 3) for name, value in rows[method].items()}
        print(f"{method:12} {line}", flush=True)
    return rows


_DEVICES = {"orin-nano-8gb": 13.5e9, "orin-nx-16gb": 14.5e9, "rtx-4060": 13.5e9}
"""Profiles and bundle sizes in bytes; experts that do not fit the memory are paged."""


def budgets() -> list[dict[str, Any]]:
    """Plan the official size within budgets: precision by layer, and the roofline time of a
    step."""
    spec = read_model_spec(Path("checkpoints/official-size"))
    codec = read_codec_spec(Path("checkpoints/official-size/snac"))
    forms = forms_of(spec)
    found: list[dict[str, Any]] = []
    for device, budget in _DEVICES.items():
        if device not in profile_names():
            found.append({"device": device, "skipped": "no such profile"})
            continue
        profile = load_profile(device).with_precision(["experts=int4:128"])
        plan = plan_export(spec, codec, profile)
        fixed = plan.total_bytes - next(f.bytes for f in plan.files if f.name == "experts.bin")
        fixed += planned_bytes(spec.decoder)
        chosen = search(spec, forms, usual_errors(spec, forms), fixed, int(budget))
        found.append(
            {
                "device": device,
                "budget_gb": budget / 1e9,
                "total_gb": chosen.total_bytes / 1e9,
                "unused_share": chosen.unused_share,
                "precision": {**profile.precision.spelled(), "experts": "by layer"},
                "layers": dict(Counter(map(str, chosen.forms.values()))),
                "predicted": _predicted(spec, profile, plan, chosen),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def _predicted(spec: Any, profile: Any, plan: Any, chosen: Any) -> dict[str, Any]:
    """Roofline time of a step: its bytes over the memory's bandwidth, plus paging at 42 % fewer
    hits. Computed, not measured."""
    decoder = spec.decoder
    parts = plan.memory.parts
    experts = sum(
        decoder.top_k * record_form(spec, form).record_bytes for form in chosen.forms.values()
    )
    read = parts["decoder"] + parts["head"] + experts
    bandwidth = profile.facts.memory_bandwidth_gb_per_s
    usable = profile.facts.usable_memory_bytes
    room = (usable.value if usable else 0) - sum(parts.values())
    return {
        "basis": "roofline, computed",
        "read_gb_per_step": read / 1e9,
        "step_ms_all_resident": None if bandwidth is None else read / bandwidth.value / 1e6,
        "experts_resident_share": min(1.0, max(0.0, room / chosen.expert_bytes)),
    }


class Study:
    """Compares all variants of one checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if not (args.work / "corpus" / "corpus.json").exists():
            synthesise(args.work / "corpus", seed=0, workers=2)
        self.corpus = load_corpus(args.work / "corpus")
        self.directory = args.work / "calibration"
        self.directory.mkdir(parents=True, exist_ok=True)
        config = read_config(args.checkpoint)
        self.checkpoint, self.audio = Checkpoint.of(config), read_audio_experts(config)
        self.origin = Origin(
            name=args.checkpoint.name, sha256=FileHashes().of_weights(args.checkpoint)
        )
        self.reference = self._exported("float", load_profile("cpu"), None)
        self.float_row: dict[str, Any] = {}
        self.seed_rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Run float first, then the seeds of each corpus choice in turn."""
        rows: list[dict[str, Any]] = []
        asked: list[Asked] = []
        ear: Ear | None = None
        first, *others = self.args.seeds
        for seed in (first, *others):
            seen = self._observed(seed)
            if not asked:
                asked = self._asked()
            for form_name in self.args.forms if seed == first else self.args.forms[:1]:
                for method in self.args.methods:
                    if seed != first and method not in ("rtn", "awq", "gptq"):
                        continue
                    bundle = self._quantised(seen, form_name, method, seed)
                    ear = ear or Ear(bundle)
                    if not self.float_row:
                        self.float_row = self._float_row(asked, ear)
                    model = Model(bundle)
                    row = {"form": form_name, "method": method, "seed": seed}
                    row |= self._kl(model, asked)
                    if seed == first:
                        row |= self._spoken(model, asked, ear)
                        row["expert_mb"] = (
                            sum(r.bytes for r in bundle.manifest.experts.records) / 1e6
                        )
                        row["step_ms"] = 1000 * float(np.median(model.step_s))
                        rows.append(row)
                    else:
                        self.seed_rows.append(row)
                    model.talk.close()
                    print(json.dumps({k: v for k, v in row.items() if k != "right"}), flush=True)
        for row in rows:
            row.pop("right", None)
        self.float_row.pop("right", None)
        return rows

    def _observed(self, seed: int) -> Observation:
        train = self.corpus.select(Split.TRAIN, is_test=False)
        chosen = np.random.default_rng(seed).choice(train, self.args.calibrate, replace=False)
        place = self.directory / f"tokens_{seed}"
        place.mkdir(exist_ok=True)
        return observe(self.reference, [self._utterance(int(i)) for i in chosen], place, seed=seed)

    def _utterance(self, i: int) -> Utterance:
        utterance = self.corpus.utterances[i]
        turn: Array | str = utterance.question
        if not self.args.typed:
            pcm = self.corpus.questions[i]
            start, end = find_utterance(pcm, WebRtcDetector())
            turn = pcm[start:end]
        return Utterance(
            name=str(i), modality="spoken", language="en", turns=(turn,), answers=(None,)
        )

    def _asked(self) -> list[Asked]:
        """Let the float model answer every question; the other models get its prompts."""
        held_out = [
            i
            for split in HELD_OUT
            for is_test in (False, True)
            for i in self.corpus.select(split, is_test=is_test)
        ][:: self.args.every]
        asked: list[Asked] = []
        model = Model(self.reference)
        for number, i in enumerate(held_out):
            prompt = model.prompt(self._utterance(i).turns[0])
            codes, tape, steps = model.taped_answer(prompt)
            compares = number % self.args.kl_every == 0
            wanted = normalise(self.corpus.utterances[i].answer)
            asked.append(Asked(wanted, prompt, tape if compares else None, steps, codes))
            if number % 100 == 0:
                print(f"float: {number} of {len(held_out)}", file=sys.stderr, flush=True)
        model.talk.close()
        return asked

    def _float_row(self, asked: Sequence[Asked], ear: Ear) -> dict[str, Any]:
        row = self._row([ear(each.codes) for each in asked], asked)
        row["expert_mb"] = sum(r.bytes for r in self.reference.manifest.experts.records) / 1e6
        print(json.dumps({k: v for k, v in row.items() if k != "right"}), flush=True)
        return row

    def _kl(self, model: Model, asked: Sequence[Asked]) -> dict[str, Any]:
        figures = []
        for each in asked:
            if each.answer is not None:
                found, steps = model.forced(each)
                streams = compared(each.answer, found, each.steps, steps)
                figures.append(
                    (
                        np.mean(streams.text_kl),
                        np.mean(streams.code_kl),
                        np.mean(streams.text_agrees),
                        np.mean(streams.code_agrees),
                        np.mean(streams.router),
                    )
                )
        names = ("text_kl", "code_kl", "text_agreement", "code_agreement", "router_agreement")
        return {n: float(v) for n, v in zip(names, np.mean(figures, axis=0), strict=True)}

    def _spoken(self, model: Model, asked: Sequence[Asked], ear: Ear) -> dict[str, Any]:
        return self._row([ear(model.answer(each.prompt)) for each in asked], asked)

    def _row(self, heard: Sequence[str], asked: Sequence[Asked]) -> dict[str, Any]:
        right = [float(a == each.wanted) for a, each in zip(heard, asked, strict=True)]
        row: dict[str, Any] = {"spoken": float(np.mean(right)), "n": len(right), "right": right}
        if self.float_row:
            change = [a - b for a, b in zip(right, self.float_row["right"], strict=True)]
            row["change"] = float(np.mean(change))
            row["change_interval"] = interval(change, 0)
        return row

    def _quantised(self, seen: Observation, form: str, method: Method, seed: int) -> Bundle:
        dtype, _, group = form.partition(":")
        name = f"{form.replace(':', '_')}_{method}_{seed}"
        place = self.directory / f"table_{name}"
        place.mkdir(exist_ok=True)
        profile = load_profile("cpu-int8").with_precision([f"experts={form}"])
        layers = self.checkpoint.spec.decoder.moe_layers
        expert_form = ExpertForm(dtype=dtype, group=int(group) if group else None)  # type: ignore[arg-type]
        utterances = Utterances(measured=(), held_out=(), refused={}, source="make tiny")
        calibrate(
            self.checkpoint,
            self.origin,
            self.audio,
            self.reference,
            utterances,
            profile,
            dict.fromkeys(layers, expert_form),
            place,
            CalibrateSettings(method=method, seed=seed, floor=0),
            seen=seen,
        )
        return self._exported(name, profile, place)

    def _exported(self, name: str, profile: Any, table: Path | None) -> Bundle:
        place = self.directory / f"bundle_{name}"
        settings = ExportSettings(profile=profile, table=table, replace=True)
        export_bundle(self.args.checkpoint, place, settings)
        return Bundle.open(place)

    def page(self, rows: Sequence[dict[str, Any]]) -> list[str]:
        """Return the table as Markdown."""
        lines = [
            "| experts | method | MB | text KL | code KL | text = | codes = | router = | spoken "
            "exact | change, 95 % | step ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            f"| float32 | - | {self.float_row['expert_mb']:.2f} | | | | | | "
            f"{self.float_row['spoken']:.4f} | | |",
        ]
        for r in rows:
            low, high = r["change_interval"]
            lines.append(
                f"| {r['form']} | {r['method']} | {r['expert_mb']:.2f} | {r['text_kl']:.5f} | "
                f"{r['code_kl']:.5f} | {r['text_agreement']:.4f} | {r['code_agreement']:.4f} | "
                f"{r['router_agreement']:.4f} | {r['spoken']:.4f} | {100 * r['change']:+.2f} "
                f"({100 * low:+.2f} to {100 * high:+.2f}) | {r['step_ms']:.2f} |"
            )
        return lines


if __name__ == "__main__":
    sys.exit(main())
