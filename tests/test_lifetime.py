"""A lifetime refuses uses that come too late, from a second thread, or from another process."""

from __future__ import annotations

import os
import threading

import pytest

from deeptalk_edge.errors import UsageError
from deeptalk_edge.lifetime import Lifetime


def test_a_closed_lifetime_refuses_uses_and_releases_once() -> None:
    given_back: list[str] = []
    lifetime = Lifetime("the lamp", lambda: given_back.append("it"))
    with lifetime:
        pass
    lifetime.close()
    lifetime.close()
    assert given_back == ["it"]
    assert not lifetime.is_open
    with pytest.raises(UsageError, match="the lamp is closed; open another one"):
        lifetime.check()
    with pytest.raises(UsageError, match="the lamp is closed"), lifetime:
        pass


def test_a_close_during_a_use_releases_when_the_use_ends() -> None:
    given_back: list[str] = []
    lifetime = Lifetime("the lamp", lambda: given_back.append("it"))
    with lifetime:
        lifetime.close()
        assert given_back == []
        with pytest.raises(UsageError, match="the lamp is closed"), lifetime:
            pass
        assert given_back == []
    assert given_back == ["it"]


def test_a_second_thread_is_refused_without_waiting() -> None:
    lifetime, caught = Lifetime("the lamp"), list[UsageError]()

    def use_it() -> None:
        try:
            with lifetime:
                pass
        except UsageError as error:
            caught.append(error)

    with lifetime:
        thread = threading.Thread(target=use_it)
        thread.start()
        thread.join(20)
    assert "the lamp is busy" in str(caught[0])
    use_it()
    assert len(caught) == 1


def test_a_forked_child_is_refused_and_releases_nothing_of_its_parent() -> None:
    given_back: list[str] = []
    lifetime = Lifetime("the lamp", lambda: given_back.append("it"))
    child = os.fork()
    if child == 0:
        try:
            lifetime.check()
        except UsageError as error:
            lifetime.close()
            is_right = f"belongs to process {os.getppid()}" in str(error) and not given_back
            os._exit(0 if is_right else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    lifetime.close()
    assert given_back == ["it"]
