"""Equal seeds draw equal faults, and every room gets its share."""

from __future__ import annotations

from itertools import islice

from deeptalk_edge.bench.mutants.sample import ROOMS, draws, schedule, shares
from tests.places import ROOT

CALIBRATION = tuple(room for room in ROOMS if room.name == "calibration")


def test_a_share_grows_with_the_root_of_the_lines() -> None:
    assert shares([100, 10_000, 400], 130) == [10, 100, 20]
    assert sum(shares([7, 11, 13, 5000], 200)) == 200


def test_every_room_is_drawn_from() -> None:
    rooms = schedule(ROOT, 1, 200)
    assert len(rooms) == 200
    assert set(rooms) == {room.name for room in ROOMS}
    assert rooms != sorted(rooms)


def test_a_seed_repeats_and_another_differs() -> None:
    def drawn(seed: int) -> list[str]:
        return [fault.name for fault in islice(draws(ROOT, seed, CALIBRATION)["calibration"], 20)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_faults_are_on_distinct_lines_and_of_many_kinds() -> None:
    faults = list(islice(draws(ROOT, 3, CALIBRATION)["calibration"], 20))
    assert len({(fault.path, fault.line) for fault in faults}) == 20
    assert len({fault.operator for fault in faults}) >= 5
