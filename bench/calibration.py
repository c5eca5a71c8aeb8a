"""Every quantiser on the tiny checkpoint, by ear: one table.

    python -m deeptalk_edge.bench.calibration --work build/tiny --checkpoint checkpoints/tiny

The corpus is `make tiny`'s (made in --work where it is missing: 3 minutes on two idle cores).
Questions of its training half calibrate; all 711 held-out ones are answered by float32 on ONNX
Runtime and by every quantised bundle on our kernels. An answer is right if the closed recogniser
hears every word of the one right answer in its waveform. KL and agreements are teacher-forced on
one held-out question in --kl-every. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.bundle.manifest import Origin
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.calibrate import CalibrateSettings, calibrate
from deeptalk_edge.calibration.corpus import Corpus as Utterances
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.gate import compared, interval
from deeptalk_edge.calibration.layer import METHODS, Method
from deeptalk_edge.calibration.observe import Observation, observe
from deeptalk_edge.calibration.tape import Tape, TapedEngine, replay
from deeptalk_edge.checkpoint.expert_split import read_audio_experts
from deeptalk_edge.checkpoint.hashes import FileHashes
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
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
from deeptalk_edge.training.tiny.corpus import load_corpus, synthesise
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.evaluate import HELD_OUT
from deeptalk_edge.training.tiny.scorer import GrammarRecogniser, normalise

Array = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Asked:
    """One held-out question as the float model met it."""

    wanted: str
    prompt: Tape
    """The calls up to the answer's first row."""
    answer: Tape | None
    """All of the answer, with its logits, where they are compared."""
    steps: list[list[Ids]]
    codes: Ids
    """What float32 said."""


class Ear:
    """Codec and closed recogniser; hears the same codes once."""

    def __init__(self, bundle: Bundle) -> None:
        settings = ConversationSettings.of(bundle)
        self._codec = open_backend(bundle, "auto", settings.for_backend()).codec
        self._entry = bundle.manifest.codec
        self._hear = GrammarRecogniser()
        self._known: dict[str, str] = {}

    def __call__(self, codes: Ids) -> str:
        """What is heard in codec frames (A, K)."""
        key = hashlib.sha256(codes.tobytes()).hexdigest()
        if key not in self._known:
            stream = StreamingCodec(self._codec, self._entry)
            pcm = [stream.push(codes), stream.finish()] if len(codes) else []
            self._known[key] = self._hear(np.concatenate(pcm)) if pcm else ""
        return self._known[key]


class Model:
    """A bundle's engine, asked with rows that another conversation prepared."""

    def __init__(self, bundle: Bundle) -> None:
        self.settings = replace(ConversationSettings.of(bundle), context_rows=1024)
        self.talk = Conversation(bundle, self.settings, tap=self._tap)
        self._vocabulary = bundle.manifest.model.vocabulary
        self.step_s: list[float] = []

    def _tap(self, engine: Engine) -> Engine:
        self._experts: Any = engine.experts  # type: ignore[attr-defined]
        self._engine = TapedEngine(engine)
        return self._engine

    def prompt(self, question: Array | str) -> Tape:
        """The calls for a question, up to the answer's first row."""
        self._engine.tape = tape = Tape()
        self.talk.reset()
        answer = self.talk.begin(question)
        while not any(name == "decode_step" for name, _ in tape.calls):
            answer.advance()  # hearing and prefill are steps of their own
        self._engine.tape = None
        answer.discard()
        first = next(i for i, (name, _) in enumerate(tape.calls) if name == "decode_step")
        return Tape(tape.calls[: first + 1])

    def taped_answer(self, prompt: Tape) -> tuple[Ids, Tape, list[list[Ids]]]:
        """Codec frames, the calls and logits, and the routes of its steps."""
        self._engine.tape = tape = Tape()
        self._experts.recorder = recorder = RouteRecorder()
        codes = self.answer(prompt)
        self._engine.tape = self._experts.recorder = None
        return codes, Tape(tape.calls[:-1], tape.logits), _steps(recorder)

    def answer(self, tape: Tape) -> Ids:
        """Codec frames (A, K) of a free-running answer to a taped prompt."""
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
        """Logits and routes for the float model's own rows."""
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
    parser.add_argument("--typed", action="store_true", help="ask in writing, not aloud")
    args = parser.parse_args(argv)
    study = Study(args)
    rows = study.run()
    print("\n".join(study.page(rows)))
    print(json.dumps({"rows": rows, "float": study.float_row, "seeds": study.seed_rows}))
    return 0


class Study:
    """One checkpoint, every variant."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if not (args.work / "corpus" / "corpus.json").exists():
            synthesise(args.work / "corpus", seed=0, workers=2)
        self.corpus = load_corpus(args.work / "corpus")
        self.directory = args.work / "calibration"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpoint = Checkpoint.open(args.checkpoint)
        self.audio = read_audio_experts(args.checkpoint, self.checkpoint.spec.decoder)
        self.origin = Origin(
            name=args.checkpoint.name, sha256=FileHashes().of_weights(args.checkpoint)
        )
        self.reference = self._exported("float", load_profile("cpu"), None)
        self.float_row: dict[str, Any] = {}
        self.seed_rows: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Float first, then the seeds of one corpus choice after the other."""
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
        """The float model answers every question; its prompts serve all others."""
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
        """The table, as Markdown."""
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
