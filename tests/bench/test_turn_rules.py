"""The costs of rules for the end of a turn are computed correctly."""

from __future__ import annotations

import pytest

from deeptalk_edge.bench.turn_rules import Pause, Rule, Table, best_rule, runtime_ms, swept
from deeptalk_edge.runtime.audio.end_of_turn import HangoverSettings


def pause(
    number: int, lasts_ms: float | None, whole: float, *, melody: float = 0.5, known_ms: float = 150
) -> Pause:
    cues = {"melody": melody, "log p": -1.0, "whole": whole}
    return Pause(
        set_name="some",
        kind="whole" if lasts_ms is None else "broken",
        number=number,
        lasts_ms=lasts_ms,
        cues=cues,
        known_ms=dict.fromkeys(cues, known_ms),
        is_whole=whole >= 0.5,
    )


PAUSES = [
    *[pause(i, None, 0.9) for i in range(20)],
    *[pause(i, 300.0 + 30 * i, 0.1) for i in range(20)],  # up to 870 ms
]


def test_a_fixed_wait_cuts_the_pauses_that_last_longer() -> None:
    table = Table.of(PAUSES)
    cost = table.cost(table.hangovers_ms(Rule(600)))
    assert cost.waits_ms.tolist() == [600.0] * 20
    assert cost.cutoff_share == 9 / 20  # 630 to 870 ms


def test_a_cue_for_whole_questions_shortens_only_their_wait() -> None:
    table = Table.of(PAUSES)
    cost = table.cost(table.hangovers_ms(Rule(900, "whole", 0.5, 200)))
    assert cost.waits_ms.tolist() == [200.0] * 20
    assert cost.cutoff_share == 0


def test_a_cue_shortens_no_wait_before_it_is_known() -> None:
    late = Table.of([pause(0, None, 0.9, known_ms=420)])
    assert late.hangovers_ms(Rule(900, "whole", 0.5, 200)).tolist() == [420]


def test_a_melody_that_says_more_comes_lengthens_the_wait() -> None:
    table = Table.of([pause(0, 800, 0.1, melody=0.05), pause(1, 800, 0.1)])
    rule = Rule(500, "whole", 0.5, 200, incomplete_p=0.1, incomplete_ms=1200)
    assert table.hangovers_ms(rule).tolist() == [1200, 500]


@pytest.mark.parametrize(("share", "long_ms"), [(0.05, 850), (0.5, 600), (1.0, 300)])
def test_the_sweep_finds_the_shortest_wait_of_a_share(share: float, long_ms: int) -> None:
    assert best_rule(PAUSES, None, share, late=False).long_ms == long_ms


def test_a_rule_is_judged_on_the_half_that_it_was_not_chosen_on() -> None:
    # Even questions pause for 400 ms, odd ones for 800: chosen on one half, wrong on the other.
    pauses = [
        *[pause(i, None, 0.9) for i in range(20)],
        *[pause(i, 800.0 if i % 2 else 400.0, 0.1) for i in range(20)],
    ]
    cost = swept(pauses, None, 0.05, late=False)
    assert cost.cutoff_share == 0.5
    assert sorted(set(cost.waits_ms)) == [400, 800]


def test_the_shipped_rule_is_the_runtimes() -> None:
    pauses = [pause(0, None, 0.9), pause(1, 700, 0.1), pause(2, None, 0.9, known_ms=320)]
    settings = HangoverSettings()
    assert runtime_ms(pauses).tolist() == [200, settings.not_whole_ms, 320]
    assert runtime_ms(pauses, speculates=False).tolist() == [settings.unsure_ms] * 3
    assert runtime_ms(pauses, kind="fixed").tolist() == [500] * 3
