"""Tests a bundle on new sounds: does it refuse other sounds, answer questions, recognise the words,
and estimate its confidence?

good        questions and voices that training never has, at -28 to 0 dB
noisy       the same with a fan, rain, a television or music at 10 to 20 dB
unlike      the same in voices of another kind: formant, robot and nervous variants of espeak-ng,
            and festival's diphone voice ked where the packages festival and festvox-kdlpc16k are
            installed
near        questions that such a kiosk might get and cannot answer
noise       the twelve kinds of `bench noise_hour`
foreign     four languages that the fit never has
english     sentences about something else

`training.tiny.understanding`, which fits the thresholds, uses none of these sounds. The bench needs
espeak-ng and flite.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import BUNDLE, arguments, measured
from deeptalk_edge.bench.noise import KINDS, make_noise
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.understanding.recordings import framed
from deeptalk_edge.calibration.word_errors import word_errors
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.events import NotUnderstood, Transcript
from deeptalk_edge.runtime.understanding import ANSWER_ALL
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.domain import Question, questions
from deeptalk_edge.training.tiny.voices import Voice, held_out_voice, need_synthesisers, speak

Array = NDArray[np.float32]

QUESTION_SETS = ("good", "noisy", "unlike")
OTHER_SETS = ("noise", "foreign", "english")
SURE = 0.9
_BACKGROUNDS = ("fan", "rain", "tv", "music")
_UNLIKE = ("klatt3", "klatt6", "edward2", "AnxiousAndy", "anikaRobot", "UniRobot", "Mr")


def _sentences(text: str) -> list[str]:
    return text.strip().replace("\n", "|").split("|")


NEAR = _sentences("""
two tickets to tokyo|where is platform ninety nine|how do i get to the swimming pool
when is the next bus to london|is the museum open today|my name is alexander
which gate for the flight to rome|where is the nearest hospital|how much is a ticket to paris
twelve tickets to chicago please|cancel my ticket to madrid|where can i buy a newspaper
when does the last train leave|can i rent a bicycle here|where do i collect my suitcase
is there a train to moscow tonight|call my brother|where is the swimming hall|do you sell stamps
which floor has the cinema|can i bring my dog|where may i park my car|i need a doctor
does the lift go to the roof|who is the manager|is the cafe any good|what does a coffee cost
where is the lost property office|turn off the lights in room two|is the train to vienna late
""")
ENGLISH = _sentences("""
a grey heron waited at the edge of the pond|why is the sky blue in the morning
my cousin collects stamps from iceland|fold the blanket and put it in the cupboard
the violin needs two new strings|did you ever climb a volcano|the judge asked for silence
peel the potatoes before you boil them|the ferry was late because of fog|what makes a good teacher
her grandson studies chemistry abroad|the wheel squeaks again|i dreamed that i could fly
rain is expected over the hills tonight|how long do elephants live
the dentist moved to another street|play the next song louder|a fox stole one of the chickens
they painted the fence dark green|which river flows through cairo|my watch is five minutes slow
write that down for me|the choir sings on thursday evenings|nobody reads the instructions
the farmer mended his tractor|can plants feel pain|the soup is far too salty
we met at a concert in july|the keyboard is missing a key|set an alarm for half past six
who discovered penicillin|the tent has a hole in the roof|his jokes are always the same
the candle burned all night|lemons grow in the south|when did the romans leave britain
please hold my umbrella|the printer is out of ink|a storm broke the old oak tree
what rhymes with orange|the kettle is boiling over|our team lost on penalties
she knits socks for everybody|the desert is cold at night|explain how a camera works
the hedge needs cutting|my bicycle was stolen last week|they sell honey at the market
the novel ends with a wedding|count backwards from fifty
""")
FOREIGN = {
    "pt": "O comboio partiu há dez minutos.|Gosto muito de música antiga.|A janela está aberta."
    "|Onde deixaste as chaves?|O meu avô era pescador.|Hoje está muito calor.",
    "nl": "De fiets staat in de schuur.|Heb je de krant al gelezen?|Het regent al de hele dag."
    "|Mijn zus woont in een klein dorp.|Wil je nog een kopje thee?|De winkel is gesloten.",
    "pl": "Książka leży na stole.|Czy widziałeś mojego brata?|Dzisiaj pada deszcz."
    "|Lubię chodzić po górach.|Sklep jest już zamknięty.|Kupiłem nowy rower.",
    "sv": "Boken ligger på bordet.|Har du sett min bror?|Det regnar hela dagen."
    "|Jag tycker om att simma.|Affären är redan stängd.|Vi äter middag klockan sju.",
}


@dataclass(frozen=True, slots=True)
class Clip:
    """One sound as the loop would cut it."""

    set_name: str
    kind: str
    pcm: Array
    """PCM (N,) at 16 kHz."""
    text: str = ""
    """Words of the question; "" for other sounds."""
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The bundle's results for a clip."""

    set_name: str
    kind: str
    text: str
    transcript: str | None
    is_refused: bool
    understood_p: float
    right_p: float
    is_right: bool
    """Whether the answer is right; also known for refused questions."""


def clips(rng: random.Random, scale: float) -> Iterator[Clip]:
    """Make all clips; `scale` 1 gives 200 good, 120 noisy, 120 unlike, 30 near and 220 others."""
    fresh = [question for question in questions() if question.is_held_out]
    for _ in range(int(200 * scale)):
        question, voice = rng.choice(fresh), held_out_voice(rng)
        yield _asked("good", voice.name, question, _said(question.text, voice), rng)
    for number in range(int(120 * scale)):
        question, kind = rng.choice(fresh), _BACKGROUNDS[number % len(_BACKGROUNDS)]
        pcm = _said(question.text, held_out_voice(rng))
        yield _asked("noisy", kind, question, _with_noise(pcm, kind, rng), rng)
    speakers = [*_UNLIKE, *["ked"] * 5 * bool(shutil.which("text2wave"))]
    for number in range(int(120 * scale)):
        question, speaker = rng.choice(fresh), speakers[number % len(speakers)]
        yield _asked("unlike", speaker, question, _unlike(question.text, speaker, rng), rng)
    for text in NEAR[: int(len(NEAR) * scale)]:
        yield Clip("near", "near", framed(_said(text, held_out_voice(rng))))
    for number in range(int(96 * scale)):
        kind = list(KINDS)[number % len(KINDS)]
        sound = make_noise(kind, rng.randrange(1 << 30), rng.uniform(1, 4))
        yield Clip("noise", kind, framed(_loud(sound, rng)))
    for number in range(int(64 * scale)):
        language = list(FOREIGN)[number % len(FOREIGN)]
        voice = Voice(
            program="espeak-ng", name=f"{language}+{rng.choice(['m2', 'm8', 'f1', 'f5'])}"
        )
        text = rng.choice(FOREIGN[language].split("|"))
        yield Clip("foreign", language, framed(_loud(_said(text, voice), rng)))
    for number in range(int(60 * scale)):
        text = ENGLISH[number % len(ENGLISH)]
        yield Clip("english", "english", framed(_loud(_said(text, held_out_voice(rng)), rng)))


def _asked(set_name: str, kind: str, question: Question, pcm: Array, rng: random.Random) -> Clip:
    return Clip(set_name, kind, framed(_loud(pcm, rng)), question.text, question.answer)


def _said(text: str, voice: Voice) -> Array:
    return as_samples(speak(text, voice, rate_hz=RATE_HZ))


def _loud(pcm: Array, rng: random.Random) -> Array:
    return pcm * np.float32(10 ** rng.uniform(-1.4, 0) / max(float(np.abs(pcm).max()), 1e-9))


def _with_noise(pcm: Array, kind: str, rng: random.Random) -> Array:
    """Add noise at 10 to 20 dB below the question, by power."""
    noise = make_noise(kind, rng.randrange(1 << 30), len(pcm) / RATE_HZ + 0.1)[: len(pcm)]
    wanted = float(np.square(pcm).mean()) / 10 ** (rng.uniform(10, 20) / 10)
    return pcm + noise * np.float32(np.sqrt(wanted / max(float(np.square(noise).mean()), 1e-12)))


def _unlike(text: str, speaker: str, rng: random.Random) -> Array:
    if speaker != "ked":
        accent = rng.choice(("en-us", "en-gb"))
        rate, pitch = round(rng.uniform(0.75, 1), 3), rng.randint(30, 70)
        name = f"{accent}+{speaker}"
        return _said(text, Voice(program="espeak-ng", name=name, rate=rate, pitch=pitch))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        command = ["text2wave", "-eval", "(voice_ked_diphone)", "-o", str(path)]
        subprocess.run(command, input=text, text=True, check=True, capture_output=True)
        return resample(read_wav(path), RATE_HZ).pcm


class Asker:
    """Two conversations: one can refuse, the other answers every question."""

    def __init__(self, refusing: Conversation, answering: Conversation) -> None:
        self._refusing, self._answering = refusing, answering

    def ask(self, clip: Clip) -> Outcome:
        """Ask a clip. Raises SettingsError if the bundle has no files of understanding."""
        transcript, is_refused = None, False
        answer = self._refusing.begin(clip.pcm)
        while not is_refused and (pieces := answer.advance()) is not None:
            for piece in pieces:
                transcript = piece.text if isinstance(piece, Transcript) else transcript
                is_refused |= isinstance(piece, NotUnderstood)
        answer.discard()
        answer = self._answering.begin(clip.pcm)
        while answer.advance() is not None:
            pass
        metrics, said = answer.metrics(), answer.text.strip()
        answer.discard()
        if metrics.understood_p is None or metrics.right_p is None:
            raise SettingsError("the bundle has no understanding: calibrate --understanding")
        return Outcome(
            clip.set_name,
            clip.kind,
            clip.text,
            transcript,
            is_refused,
            metrics.understood_p,
            metrics.right_p,
            bool(clip.answer) and said == clip.answer,
        )


def report(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Tables of refusals, words and certainty."""
    yield f"{'set':10}{'clips':>8}{'right':>8}{'refused':>9}{'of right':>10}{'word errors':>13}"
    for name in (*QUESTION_SETS, "near", *OTHER_SETS):
        own = [one for one in outcomes if one.set_name == name]
        right = [one for one in own if one.is_right]
        errors = f"{_word_errors(own):13.1%}" if name in QUESTION_SETS else ""
        of_right = f"{_refused(right):10.1%}" if right else ""
        yield f"{name:10}{len(own):8}{len(right):8}{_refused(own):9.1%}{of_right}{errors}"
    others = [one for one in outcomes if one.set_name in OTHER_SETS]
    asked = [one for one in outcomes if one.set_name in QUESTION_SETS]
    wrong = [one for one in asked if not one.is_right]
    yield f"\nothers accepted: {1 - _refused(others):.1%} of {len(others)}"
    yield f"wrong answers accepted: {1 - _refused(wrong):.1%} of {len(wrong)}"
    sure_wrong = sum(one.right_p >= SURE for one in wrong)
    yield f"sure ({SURE}) and wrong: {sure_wrong / len(asked):.1%} of {len(asked)} questions"
    judged = [one for one in outcomes if one.set_name != "near"]
    for name in ("understood_p", "right_p"):
        yield f"\n{name:14}{'clips':>8}{'mean':>8}{'right':>8}"
        pairs = [(getattr(one, name), one.is_right) for one in judged]
        for low, high, count, mean, share in reliability(pairs):
            yield f"{low:.2f} to {high:.2f}  {count:8}{mean:8.2f}{share:8.2f}"


def reliability(
    pairs: Sequence[tuple[float, bool]],
) -> Iterator[tuple[float, float, int, float, float]]:
    """Return bins of a probability: bounds, clips, mean, and share of right ones."""
    edges = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.97, 1.001)
    for low, high in itertools.pairwise(edges):
        own = [pair for pair in pairs if low <= pair[0] < high]
        if own:
            mean, share = np.mean(own, axis=0)
            yield low, high, len(own), float(mean), float(share)


def _refused(outcomes: Sequence[Outcome]) -> float:
    return float(np.mean([one.is_refused for one in outcomes]))


def _word_errors(outcomes: Sequence[Outcome]) -> float:
    """Word errors of the transcripts, as a share of the spoken words."""
    pairs = [(one.text.split(), (one.transcript or "").split()) for one in outcomes]
    return sum(word_errors(*pair) for pair in pairs) / sum(len(wanted) for wanted, _ in pairs)


def main(argv: list[str] | None = None) -> int:
    """Ask all clips and print tables."""
    parser = arguments("understanding", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of clips")
    args = parser.parse_args(argv)
    with measured(args) as figures:
        need_synthesisers()
        bundle = Bundle.open(args.bundle)
        settings = ConversationSettings.of(bundle, mode="text")
        all_of_it = replace(settings, understanding=ANSWER_ALL)
        with Conversation(bundle, settings) as talk, Conversation(bundle, all_of_it) as every:
            asker = Asker(talk, every)
            outcomes = [asker.ask(clip) for clip in clips(random.Random(args.seed), args.scale)]
        print(*report(outcomes), sep="\n")
        figures["heard"] = [asdict(one) for one in outcomes]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
