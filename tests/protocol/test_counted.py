"""What the coordinator makes of steps that ranks have committed among themselves."""

from __future__ import annotations

from checkpointless_elastic.protocol.events import Counted, Lost, Replace
from checkpointless_elastic.protocol.messages import Decision, Phase
from tests.protocol.test_coordinator import frozen, messages, only, recover, running


def test_it_ends_the_count_of_faults() -> None:
    coordinator = running()
    for _ in range(3):
        coordinator.handle(Lost(1, "was lost"))
    recover(coordinator, {0, 2}, {1})
    assert coordinator.handle(Counted(coordinator.generation, 9)) == []
    assert (coordinator.step, list(coordinator.blamed)) == (9, [])
    assert only(coordinator.handle(Lost(1, "was lost")), Replace)


def test_what_ranks_had_committed_when_one_was_lost_is_known_late_and_the_loss_stays() -> None:
    """Rank 1 voted last and was killed: rank 0 saw it, rank 2 was frozen before it looked."""
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    assert coordinator.handle(Counted(0, 6)) == []
    assert list(coordinator.blamed) == [1]
    actions = coordinator.handle(frozen(coordinator, r0=(6, Phase.COMPUTING), r2=(5, Phase.READY)))
    assert messages(actions) == [Decision(1, 6, [0, 2], [1])]


def test_a_step_that_all_voted_for_is_committed_though_nobody_has_seen_it() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Counted(0, 6))
    actions = coordinator.handle(frozen(coordinator, r0=(5, Phase.READY), r2=(5, Phase.READY)))
    assert messages(actions) == [Decision(1, 6, [0, 2], [1])]


def test_votes_of_an_older_generation_commit_nothing() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    recover(coordinator, {0, 2}, {1})
    coordinator.handle(Counted(0, 9))
    assert coordinator.step == 5
