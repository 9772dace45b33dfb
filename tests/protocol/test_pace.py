"""Which ranks are called slow."""

from __future__ import annotations

from checkpointless_elastic.protocol.pace import REPORTS, Paces

ALL = frozenset(range(4))
EVEN = dict.fromkeys(ALL, (0.010, 0.050))


def test_a_rank_that_is_slow_again_and_again_is_named_once_and_when_it_is_over() -> None:
    paces, slow = Paces(), {**EVEN, 2: (0.030, 0.050)}
    said = [paces.heard(slow, ALL) for _ in range(REPORTS + 2)]
    assert [len(sentences) for sentences in said] == [0] * (REPORTS - 1) + [1, 0, 0]
    assert said[REPORTS - 1][0].startswith(
        "Rank 2 is slow: it needs 30 ms of its own in each step, the median is 10 ms"
    )
    assert paces.slow.keys() == {2}
    assert paces.heard(EVEN, ALL) == ["Rank 2 is as fast as the others again."]
    assert not paces.slow


def test_a_rank_that_is_slow_now_and_then_is_not_named() -> None:
    paces, slow = Paces(), {**EVEN, 2: (0.030, 0.050)}
    assert not any(paces.heard(ranks, ALL) for ranks in [slow, EVEN] * 5)


def test_little_in_a_long_step_does_not_count() -> None:
    paces, slow = Paces(), {**dict.fromkeys(ALL, (0.010, 0.500)), 2: (0.030, 0.500)}
    assert not any(paces.heard(slow, ALL) for _ in range(5))


def test_agents_report_one_after_the_other() -> None:
    paces = Paces()
    for _ in range(REPORTS):
        assert not paces.heard({0: (0.010, 0.050), 1: (0.010, 0.050)}, ALL)
        said = paces.heard({2: (0.030, 0.050), 3: (0.010, 0.050)}, ALL)
    assert len(said) == 1
