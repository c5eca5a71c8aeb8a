"""A forked child gets an error at once and can end, whatever its parent had open."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.bundle.reader import Bundle
from tests.native.cpu import built
from tests.shims import run_child

CHILD = """
import dataclasses, os, signal, sys
from pathlib import Path
from deeptalk_edge.errors import UsageError
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.backends.cpu import library as native_library
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.live import LiveConversation
import numpy as np

native_library.LIBRARY = Path(sys.argv[2])
bundle = Bundle.open(Path(sys.argv[1]))
settings = dataclasses.replace(
    ConversationSettings.of(bundle), backend=sys.argv[3], max_rows=12, threads=int(sys.argv[4]),
    paging=PagingSettings(pool=sys.argv[5] if sys.argv[5] != "all" else None),
)


def is_refused(use):
    try:
        use()
    except UsageError as error:
        return f"belongs to process {os.getppid()}" in str(error)
    return False


live = LiveConversation(FakeTalker(), VirtualPort(recording(np.zeros(16000, np.float32))))
with Conversation(bundle, settings) as talk, live:
    events = talk.ask("Why?")
    next(events)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that hangs
        refused = [
            is_refused(lambda: next(events)),
            is_refused(lambda: list(talk.ask("Why?"))),
            is_refused(talk.idle),
            is_refused(lambda: next(iter(live))),
            is_refused(live.press),
        ]
        events.close()
        sys.exit(7 if all(refused) else 1)  # out of both contexts, and through every destructor
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("child", code, "parent", type(list(events)[-1]).__name__)
"""


@pytest.mark.parametrize(
    ("backend", "threads", "pool"),
    [
        ("cpu", 2, "all"),
        ("ort", 2, "8"),
        pytest.param("cpu", 1, "8", marks=pytest.mark.slow),
        pytest.param("ort", 1, "all", marks=pytest.mark.slow),
    ],
)
def test_a_forked_child_gets_an_error_and_can_end(
    int8_bundle: Bundle, backend: str, threads: int, pool: str
) -> None:
    library: Path = built.library_place()
    done = run_child(CHILD, int8_bundle.path, library, backend, threads, pool)
    assert done.stdout == "child 7 parent TurnDone\n", done.stderr
