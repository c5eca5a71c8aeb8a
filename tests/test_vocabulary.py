"""One word, one fact: words with one meaning, and retired names."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.places import ROOT


@dataclass(frozen=True, slots=True)
class Word:
    """The meaning of a word, and every class outside of tests with the word in its name."""

    meaning: str
    classes: frozenset[str]


def word(meaning: str, *classes: str) -> Word:
    return Word(meaning, frozenset(classes))


VOCABULARY = {
    "profile": word(
        "the facts of a device, each with its source, and the verb that measures a device; "
        "TensorRT's optimisation profiles keep its own word, privately",
        *("DeviceProfile", "_Profiles"),
    ),
    "plan": word(
        "what is worked out before anything runs: memory, time, batches; never a file of TensorRT",
        *("BatchPlan", "BudgetPlan", "DevicePlan", "ExportPlan", "HearingPlan", "MakePlan"),
        *("MemoryPlan", "TrainingPlan"),
    ),
    "device": word(
        "the machine that a bundle runs on; a GPU and a sound device say so in their names, but "
        "for the public DeviceLost and DeviceSettings, which are of sound",
        *("Device", "DeviceCache", "DeviceFacts", "DevicePlan", "DeviceProfile", "GpuDevice"),
        *("SimulatedDevice", "SoundDevice", "DeviceLost", "DeviceSettings", "_ListDevices"),
    ),
    "native": word(
        "our C++ and CUDA sources in native/ and the bundle's files of their weights; the backend "
        "that runs them is `cpu`, and experts without the plugin are `operators`",
    ),
    "bundle": word("the folder that export writes and run reads", "Bundle", "BundleUsed"),
    "heard": word(
        "sound that has reached a listener: the user's question, the answer's samples",
        *("AnswerHeard", "Heard", "HeardMemory", "StopWordHeard"),
    ),
    "record": word(
        "the packed bytes of one expert; sound is recorded by a recorder",
        *("ExpertRecord", "Record", "RecordFile", "RecordFormat", "RecordLayout"),
        *("RecordReader", "RecordSource"),
    ),
}

RETIRED = {
    r"Mind|_mind": "ModelWorker",
    r"Ears": "InputStream",
    r"Mouth": "OutputStream",
    r"Reply": "Playback",
    r"(?i:on trial)|was_on_trial": "speculative",
    r"Settle|Settled|KeepAnswer": "FinishAnswer",
    r"CutAnswer": "InterruptAnswer",
    r"BargedIn": "Interrupted",
    r"HoldAnswer|ResumeAnswer": "PausePlayback, ResumePlayback",
    r"PAUSED_FALSE": "FALSE_INTERRUPTION",
    r"OpenUtterance|expect_question": "UserStartedSpeaking",
    r"MakeRoom|Rest": "Idle, trim_history",
    r"StartAnew": "Reset",
    r"Gauged": "ConfidenceKnown",
    r"HangoverCapped": "HangoverShortened",
    r"sure_log_p": "confident_log_p",
    r"HUSHED|hushed": "STOPPED_BY_WORD",
    r"untake|owed": "rollback, pending_rows",
    r"expected_worth|Worths|worths": "score",
    r"call_off|_call_off": "cancel_guesses",
    r"num_whole|whole_passes": "all_resident",
    r"Native[A-Z]\w*": "Cpu...",
    r"soften|ask_ahead|undeal": "softmax_block, prefetch, interleave",
    r"Plan(?:Tensor|Operation|Graph)": "Engine...",
}
"""Retired names and their replacements."""

_ALIASES = re.compile(r"old_(classes|fields|method|property)\(|OldKeys\(")
_MAY_TELL = {
    "CHANGELOG.md",
    "deeptalk_edge/deprecation.py",
    "tests/runtime/test_old_names.py",
    "tests/test_deprecation.py",
    "tests/test_vocabulary.py",
}
"""Files that may mention old names."""

_WRITTEN = ("*.py", "*.md", "*.cpp", "*.h", "*.cu", "*.cuh", "*.toml", "Makefile")


@cache
def tracked() -> tuple[str, ...]:
    command = ["git", "-C", str(ROOT), "ls-files", "--", *_WRITTEN]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return tuple(name for name in listed if name and (ROOT / name).is_file())


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def class_names() -> tuple[str, ...]:
    """Names of all classes outside of tests, with repetitions."""
    return tuple(
        node.name
        for name in tracked()
        if name.endswith(".py") and not name.startswith("tests/")
        for node in ast.walk(ast.parse(text_of(name)))
        if isinstance(node, ast.ClassDef)
    )


def words_of(class_name: str) -> set[str]:
    found = {part.lower() for part in re.findall(r"[A-Z][a-z0-9]*", class_name)}
    return found | {part.removesuffix("s") for part in found}


@pytest.mark.parametrize("taken", VOCABULARY)
def test_only_classes_of_its_one_meaning_have_a_word(taken: str) -> None:
    bearers = {name for name in class_names() if taken in words_of(name)}
    assert bearers == VOCABULARY[taken].classes, f"{taken} means {VOCABULARY[taken].meaning}"


@pytest.mark.parametrize("taken", VOCABULARY)
def test_no_class_name_with_a_word_is_defined_twice(taken: str) -> None:
    often = Counter(name for name in class_names() if taken in words_of(name))
    assert not {name for name, count in often.items() if count > 1}


def uses(retired: str, name: str, text: str) -> list[str]:
    """Lines of a file that use a retired name, without aliases."""
    pattern = re.compile(rf"\b(?:{retired})\b")
    if not pattern.search(text):
        return []
    return [
        f"{name}:{number}: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line) and not _ALIASES.search(line)
    ]


@pytest.mark.parametrize("retired", RETIRED)
def test_no_retired_name_is_used(retired: str) -> None:
    found = [
        line
        for name in tracked()
        if name not in _MAY_TELL
        for line in uses(retired, name, text_of(name))
    ]
    assert not found, f"say {RETIRED[retired]}"


def test_a_retired_name_is_found_where_it_is_used() -> None:
    assert uses("Mind|_mind", "a.py", "class Mind:\n    ...\nreminder\n") == ["a.py:1: class Mind:"]
    assert not uses("sure_log_p", "a.py", '@old_fields(sure_log_p="confident_log_p")')


@pytest.mark.parametrize("place", sorted(_MAY_TELL))
def test_a_file_that_may_tell_of_old_names_exists(place: str) -> None:
    assert Path(ROOT, place).is_file()
