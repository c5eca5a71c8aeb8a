"""The kiosk domain: what can be asked at a small station, and the one answer to each question.

Every answer is a function of (intent, slots): a combination that training never saw still has one.

held out   of tickets and rooms one slot combination in six, else one (phrasing, slot) pair in six
test       half of everything held out: scored once, at the end, and never looked at before that
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

# fmt: off
UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)
CITIES = (
    "london", "paris", "berlin", "madrid", "vienna", "oslo", "dublin", "lisbon", "geneva", "prague",
    "milan", "boston",
)
NAMES = (
    "anna", "peter", "maria", "john", "lucy", "david", "emma", "thomas", "julia", "robert", "sarah",
    "daniel",
)
# fmt: on
TENS = {
    30: "thirty",
    40: "forty",
    50: "fifty",
    60: "sixty",
    70: "seventy",
    80: "eighty",
    90: "ninety",
    100: "one hundred",
}
DIGITS = UNITS[:10]
NUMBERS = (*UNITS[1:], *TENS.values())
MINUTES = ("", "fifteen", "thirty", "forty five")
FLOORS = ("first", "second", "third")
PLACES = {
    "toilet": "next to gate four",
    "cafe": "on the second floor",
    "lift": "behind the ticket office",
    "ticket office": "near the main entrance",
    "taxi stand": "outside on the left",
    "information desk": "in the main hall",
    "waiting room": "next to platform two",
    "exit": "at the end of the hall",
    "bank": "on the first floor",
    "pharmacy": "opposite the cafe",
}
OPEN_UNTIL = {
    "cafe": "nine",
    "ticket office": "ten",
    "pharmacy": "eight",
    "information desk": "eleven",
    "waiting room": "twelve",
}
CLOSED_TODAY = ("bank", "lift", "taxi stand")
GREETING = "how can i help you"
FIXED = {
    "hello": f"hello {GREETING}",
    "good morning": f"good morning {GREETING}",
    "thank you": "you are welcome",
    "goodbye": "goodbye and have a good trip",
    "help": "you can ask me about trains gates and tickets",
    "what can you do": "you can ask me about trains gates and tickets",
    "is there wifi here": "yes the wifi is free",
    "can i pay by card": "yes you can pay by card or cash",
    "can i smoke here": "no you can not smoke in the station",
    "i lost my bag": "please go to the information desk in the main hall",
}

Pattern = tuple[str | tuple[str, ...], ...]
"""An answer as literals and slots; a slot lists its fillings, "" among them makes it optional."""

ANSWER_PATTERNS: tuple[Pattern, ...] = (
    ("calling room", DIGITS, DIGITS, DIGITS),
    (NUMBERS, ("ticket", "tickets"), "to", CITIES, "that will be", NUMBERS, "pounds"),
    ("the next train to", CITIES, "leaves at", NUMBERS, MINUTES, "from platform", NUMBERS),
    ("gate", NUMBERS, "is on the", FLOORS, "floor turn", ("left", "right")),
    ("gate", NUMBERS, "opens at", NUMBERS, MINUTES),
    ("for platform", NUMBERS, "go", ("up", "down"), "the stairs and turn", ("left", "right")),
    ("the", tuple(PLACES), "is", tuple(PLACES.values())),
    ("yes the", tuple(PLACES), "is open until", NUMBERS),
    ("no the", tuple(PLACES), "is closed today"),
    ("hello", NAMES, GREETING),
    (tuple(sorted(set(FIXED.values()))),),
)

COMBINATION_INTENTS = frozenset({"ticket", "room"})
"""Here a whole slot combination is held out, in all its phrasings."""

PHRASING_INTENTS = frozenset({"train", "gate", "gateopen", "platform", "place", "name"})
"""Here a (phrasing, slot) pair is held out; the answer itself is heard in training."""


class Split(str, Enum):
    """How far an utterance is from what training heard."""

    TRAIN = "train"
    NEW_VOICE = "new_voice"
    NEW_COMBINATION = "new_combination"
    BOTH_NEW = "both_new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One way to ask for one answer."""

    intent: str
    key: str
    """The slots, as one word: with the intent it names the answer."""

    text: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        """Is this wording, or its slot combination, kept out of training?"""
        if self.intent not in COMBINATION_INTENTS | PHRASING_INTENTS:
            return False
        return _hash(*self._unit_of_holding_out) % 6 == 0

    @property
    def is_test(self) -> bool:
        """If anything about it is held out: does it belong to the test half or to validation?"""
        return _hash("test", *self._unit_of_holding_out) % 2 == 0

    @property
    def _unit_of_holding_out(self) -> tuple[str, ...]:
        if self.intent in COMBINATION_INTENTS:
            return self.intent, self.key
        return self.intent, self.key, self.text


def questions() -> list[Question]:
    """All 1,612 questions, in a fixed order."""
    return [
        Question(intent=intent, key=key, text=text, answer=answer)
        for intent, key, texts, answer in _answered()
        for text in texts
    ]


def answers() -> list[str]:
    """All 1,223 different answers, sorted."""
    return sorted({question.answer for question in questions()})


def vocabulary() -> list[str]:
    """Every word that is asked or answered, sorted."""
    return sorted({word for q in questions() for word in f"{q.text} {q.answer}".split()})


def answers_never_trained() -> frozenset[str]:
    """Answers that no training question has; speech-only batches must not speak them either."""
    trained = {q.answer for q in questions() if not q.is_held_out}
    return frozenset(q.answer for q in questions() if q.answer not in trained)


def number(value: int) -> str:
    """A number as the kiosk says it: 1 to 20, and the tens up to one hundred."""
    return UNITS[value] if value <= 20 else TENS[value]


def random_answer(rng: random.Random) -> str:
    """An answer's sentence with every slot drawn at random: well formed, often untrue."""
    filled = (
        part if isinstance(part, str) else rng.choice(part) for part in rng.choice(ANSWER_PATTERNS)
    )
    return " ".join(part for part in filled if part)


def random_words(rng: random.Random, words: list[str]) -> str:
    """Three to nine words in no order at all, so that nothing but the words predicts the sound."""
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 9)))


def answer_grammar() -> str:
    """The JSGF grammar of every sentence that `random_answer` can make, for a closed recogniser."""
    sentences = (" ".join(map(_jsgf, pattern)) for pattern in ANSWER_PATTERNS)
    return f"#JSGF V1.0; grammar answers; public <answer> = {' | '.join(sentences)};"


def _jsgf(part: str | tuple[str, ...]) -> str:
    if isinstance(part, str):
        return part
    choice = " | ".join(filling for filling in part if filling)
    return f"[{choice}]" if "" in part else f"({choice})"


def _hash(*parts: str) -> int:
    return int(hashlib.sha1("|".join(parts).encode()).hexdigest(), 16)


def _clock(hour: int, quarter: int) -> str:
    return f"{number(1 + hour % 12)} {MINUTES[quarter % 4]}".strip()


def _answered() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    """(intent, key, phrasings, answer) for every answer of the kiosk."""
    yield from _tickets_and_trains()
    yield from _ways()
    yield from _opening_hours()
    for name in NAMES:
        yield "name", name, (f"my name is {name}", f"hello i am {name}"), f"hello {name} {GREETING}"
    for room in range(1000):
        digits = " ".join(DIGITS[int(digit)] for digit in f"{room:03d}")
        asked = ("call room", "please call room", "connect me to room")[_hash("q", str(room)) % 3]
        yield "room", str(room), (f"{asked} {digits}",), f"calling room {digits}"
    for text, answer in FIXED.items():
        yield "fixed", text, (text,), answer


def _tickets_and_trains() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    for count in range(1, 11):
        for city in CITIES:
            tickets = f"{number(count)} {'ticket' if count == 1 else 'tickets'}"
            phrasings = (
                f"{tickets} to {city} please",
                f"i would like {tickets} to {city}",
                f"can i have {tickets} for {city}",
            )
            price = f"that will be {number(10 * count)} pounds"
            yield "ticket", f"{count}-{city}", phrasings, f"{tickets} to {city} {price}"
    for i, city in enumerate(CITIES):
        phrasings = (
            f"when is the next train to {city}",
            f"what time does the train to {city} leave",
            f"which platform for the train to {city}",
        )
        departure = f"leaves at {_clock(7 * i, i)} from platform {number(1 + (5 * i) % 9)}"
        yield "train", city, phrasings, f"the next train to {city} {departure}"


def _ways() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    for gate in range(1, 21):
        side = "left" if gate % 2 else "right"
        floor = FLOORS[(gate - 1) // 7]
        way = f"gate {number(gate)} is on the {floor} floor turn {side}"
        yield "gate", str(gate), _asking_the_way(f"gate {number(gate)}"), way
    for platform in range(1, 13):
        side, direction = ("left", "down") if platform % 2 else ("right", "up")
        way = f"for platform {number(platform)} go {direction} the stairs and turn {side}"
        yield "platform", str(platform), _asking_the_way(f"platform {number(platform)}"), way
    for place, where in PLACES.items():
        phrasings = (
            f"where is the {place}",
            f"how do i find the {place}",
            f"i am looking for the {place}",
        )
        yield "place", place, phrasings, f"the {place} is {where}"


def _asking_the_way(target: str) -> tuple[str, ...]:
    return f"where is {target}", f"how do i get to {target}", f"which way to {target}"


def _opening_hours() -> Iterator[tuple[str, str, tuple[str, ...], str]]:
    for gate in range(1, 21):
        name = f"gate {number(gate)}"
        phrasings = (f"what time does {name} open", f"when does {name} open")
        yield "gateopen", str(gate), phrasings, f"{name} opens at {_clock(5 * gate, gate)}"
    for place, hour in OPEN_UNTIL.items():
        yield "open", place, _asking_if_open(place), f"yes the {place} is open until {hour}"
    for place in CLOSED_TODAY:
        yield "open", place, _asking_if_open(place), f"no the {place} is closed today"


def _asking_if_open(place: str) -> tuple[str, ...]:
    return f"is the {place} open", f"is the {place} open now"
