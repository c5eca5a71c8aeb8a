"""With every expert resident, a pass makes no requests, and no expert is evicted during it."""

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


def test_all_addresses_hold_during_a_resident_pass(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, fills=True) as pager:
        filled(pager)
        with pager.all_resident() as is_all_resident:
            assert is_all_resident
            assert all(pager.addresses(layer).all() for layer in LAYERS)
        assert pager.report()["all_resident_passes"] == 1


def test_a_pass_with_a_missing_expert_is_not_resident(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=NUM_RECORDS - 1, fills=True) as pager:
        filled(pager)
        with pager.all_resident() as is_all_resident:
            assert not is_all_resident
        assert pager.report()["all_resident_passes"] == 0


def test_a_pass_with_an_expert_still_loading_is_not_resident(
    path: Path, records: list[ExpertRecord]
) -> None:
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
def test_memory_is_given_back_after_a_resident_pass_and_not_during_it(
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


def test_other_sessions_can_lease_during_a_resident_pass(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, fills=True) as pager:
        filled(pager)
        with pager.all_resident():
            pager.enter(Phase.SPEAKING)
            with pager.acquire(1, [0, 5]):
                assert pager.num_leased == 2
        assert (pager.num_leased, pager.report()["hits"]) == (0, 2)


def test_a_closed_pager_refuses_a_resident_pass(path: Path, records: list[ExpertRecord]) -> None:
    pager = open_pager(path, records, fills=True)
    filled(pager)
    pager.close()
    with pytest.raises(UsageError, match="the pager is closed"), pager.all_resident():
        pass
