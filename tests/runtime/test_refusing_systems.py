"""Refused memory advice is not an error; refused threads give one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deeptalk_edge.bundle.reader import Bundle
from tests import shims
from tests.native.cpu import built

ANSWERS = """
import dataclasses, sys
from pathlib import Path
import numpy as np
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.live import LiveConversation

native_library.LIBRARY = Path(sys.argv[1])
bundle = Bundle.open(Path(sys.argv[2]))
for backend in ("cpu", "ort"):
    changes = {"backend": backend, "max_rows": 12, "paging": PagingSettings(pool="8")}
    settings = dataclasses.replace(ConversationSettings.of(bundle), **changes)
    with Conversation(bundle, settings) as talk:
        print(list(talk.ask("Why?"))[-1].text.encode())
with LiveConversation(FakeTalker(), VirtualPort(recording(np.zeros(320, np.float32)))):
    print("listened")
"""


def test_a_kernel_that_refuses_advice_changes_no_answer(
    int8_bundle: Bundle, tmp_path: Path
) -> None:
    shim = shims.build(shims.REFUSED_ADVICE, tmp_path)
    plain, refused = (
        shims.run_child(ANSWERS, built.library_place(), int8_bundle.path, shim=each)
        for each in (None, shim)
    )
    assert (refused.returncode, refused.stderr) == (0, "")
    assert refused.stdout == plain.stdout
    assert plain.stdout.endswith("listened\n")


REFUSALS = """
import ctypes, dataclasses, logging, os, sys
from pathlib import Path
from deeptalk_edge.errors import EdgeError
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings

native_library.LIBRARY = Path(sys.argv[1])
bundle, folder, backend, numbers = Bundle.open(Path(sys.argv[2])), Path(sys.argv[3]), *sys.argv[4:]
changes = {"backend": backend, "max_rows": 4, "threads": 4}
settings = dataclasses.replace(ConversationSettings.of(bundle), **changes)


def talk(number):
    said = os.open(folder / number, os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1), os.dup2(said, 2)
    logging.basicConfig(format="%(message)s")
    ctypes.CDLL(None).refuse_threads_after(int(number))
    try:
        with Conversation(bundle, settings) as talk:
            list(talk.ask("Why?"))
    except EdgeError as error:
        print(error, flush=True)
        return 1
    return 0


children = {}
for number in numbers.split():
    child = children[number] = os.fork()
    if child == 0:
        os._exit(talk(number))
for number, child in children.items():
    print(number, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(
    ("backend", "numbers", "enough"),
    [
        ("cpu", "0 1 3 5 8 10 11 12 16", 11),  # an encoder's 4, two pools of 3, a reader
        ("ort", "0 1 2 9 33 34 48", 33),  # eight sessions of 4, a reader
        pytest.param("cpu", " ".join(map(str, range(18))), 11, marks=pytest.mark.slow),
        pytest.param("ort", " ".join(map(str, range(48))), 33, marks=pytest.mark.slow),
    ],
    ids=["cpu", "ort", "cpu, all", "ort, all"],
)
def test_refused_threads_give_one_line_or_fewer_threads(
    int8_bundle: Bundle, backend: str, numbers: str, enough: int, tmp_path: Path
) -> None:
    shim = shims.build(shims.REFUSED_THREADS, tmp_path)
    where = built.library_place(), int8_bundle.path, tmp_path
    done = shims.run_child(REFUSALS, *where, backend, numbers, shim=shim)
    codes = {int(number): int(code) for number, code in map(str.split, done.stdout.splitlines())}
    assert list(codes) == [int(number) for number in numbers.split()], done.stderr
    said = {number: (tmp_path / str(number)).read_text() for number in codes}
    assert not any("Traceback" in text for text in said.values())
    # A math library may start a thread in a child, which counts, too.
    first = min(number for number, code in codes.items() if code == 0)
    assert enough <= first <= enough + 1, said
    for number, code in codes.items():
        assert code == (0 if number >= first else 1), said
        assert code == 0 or "system refuses" in said[number].splitlines()[-1]
    assert re.search(r"[12] of 4 threads read experts", said[first])
