"""With every expert there a pass asks for none, and none leaves under it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import UsageError
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.policy import Phase
from tests.runtime.experts.records import (
    LAYERS,
    NUM_EXPERTS,
    NUM_RECORDS,
    Gate,
    open_pager,
    shrink,
)


def filled(pager: ExpertPager) -> None:
    pager.idle()
    pager.drain()


def test_all_addresses_hold_while_a_pass_is_whole(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, fills=True) as pager:
        filled(pager)
        with pager.all_resident() as is_all_resident:
            assert is_all_resident
            assert all(pager.addresses(layer).all() for layer in LAYERS)
        assert pager.report()["all_resident_passes"] == 1


def test_an_expert_that_is_missing_makes_no_pass_whole(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=NUM_RECORDS - 1, fills=True) as pager:
        filled(pager)
        with pager.all_resident() as is_all_resident:
            assert not is_all_resident
        assert pager.report()["all_resident_passes"] == 0


def test_an_expert_on_its_way_makes_no_pass_whole(path: Path, records: list[ExpertRecord]) -> None:
    last = NUM_RECORDS - 1
    gate = Gate(last)
    with open_pager(path, records, fault=gate, fills=True) as pager:
        pager.idle()
        assert gate.held.wait(20)
        with pager.all_resident() as is_all_resident:
            assert not is_all_resident
        gate.opened.set()
        pager.drain()
        with pager.all_resident() as is_all_resident:
            assert is_all_resident


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_given_back_behind_a_whole_pass_and_not_under_it(
    path: Path, records: list[ExpertRecord], fails: bool
) -> None:
    with open_pager(path, records, fills=True, least_slots=NUM_EXPERTS) as pager:
        filled(pager)
        try:
            with pager.all_resident():
                assert shrink(pager, 0) == 0
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        assert shrink(pager, 100) == NUM_RECORDS - NUM_EXPERTS
        with pager.all_resident() as is_all_resident:
            assert not is_all_resident


def test_other_sessions_lease_as_ever(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, fills=True) as pager:
        filled(pager)
        with pager.all_resident():
            pager.enter(Phase.SPEAKING)
            with pager.acquire(1, [0, 5]):
                assert pager.num_leased == 2
        assert (pager.num_leased, pager.report()["hits"]) == (0, 2)


def test_a_closed_pager_has_no_whole_pass(path: Path, records: list[ExpertRecord]) -> None:
    pager = open_pager(path, records, fills=True)
    filled(pager)
    pager.close()
    with pytest.raises(UsageError, match="the pager is closed"), pager.all_resident():
        pass
