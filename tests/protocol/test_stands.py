"""A job in which all ranks stand and nobody was lost comes to an end."""

from __future__ import annotations

from msgspec.structs import replace

from checkpointless_elastic.protocol.coordinator import State
from checkpointless_elastic.protocol.events import (
    End,
    ExitedEarly,
    Late,
    NodeLost,
    Opened,
    Reopened,
    Replace,
    Restart,
    Warn,
)
from checkpointless_elastic.protocol.hangs import Activity, Where
from tests.protocol.test_coordinator import running


def test_where_votes_are_lost_the_step_is_done_again() -> None:
    coordinator = running()
    ready = Where(Activity.GATE, True, 11, {}, 61.0)
    assert coordinator.handle(Late(0, 5, {0: ready, 1: ready})) == []
    assert coordinator.handle(Late(0, 5, {2: replace(ready, seconds=59.0)})) == []
    actions = coordinator.handle(Late(0, 5, dict.fromkeys(range(3), ready)))
    assert any(isinstance(action, Opened) for action in actions)
    assert (coordinator.generation, coordinator.lost) == (1, set())
    assert coordinator.handle(Late(0, 5, dict.fromkeys(range(3), ready))) == []


def test_a_rank_that_had_ended_well_comes_back_when_a_generation_is_opened_without_a_loss() -> None:
    coordinator = running()
    coordinator.handle(ExitedEarly(2))
    actions = coordinator.handle(Reopened("the coordinator is another one"))
    assert Replace(2) in actions
    assert (coordinator.whole, coordinator.pending) == ({0, 1}, {2})


def test_votes_that_are_lost_again_and_again_lead_to_rung_3() -> None:
    coordinator = running()
    ready = Where(Activity.GATE, True, 11, {}, 61.0)
    ended = []
    for _ in range(4):  # one more than the faults that are allowed
        assert ended == []
        actions = coordinator.handle(Late(coordinator.generation, 5, dict.fromkeys(range(3), ready)))
        ended = [action for action in actions if isinstance(action, Restart)]
        coordinator.state = State.RUNNING
    assert [action.rung for action in ended] == [3]


def test_where_all_stand_for_too_long_and_nobody_is_to_blame_workers_are_restarted() -> None:
    coordinator = running()
    loads = Where(Activity.DATA, True, 10, {}, 1801.0, overlong=True)
    shorter = replace(loads, overlong=False)
    assert coordinator.handle(Late(0, 5, {0: loads, 1: loads, 2: shorter})) == []
    (action,) = coordinator.handle(Late(0, 5, dict.fromkeys(range(3), loads)))
    assert isinstance(action, Restart) and action.rung == 4
    assert "none of them is known to be the cause" in action.reason


def test_a_rank_that_does_not_come_to_its_first_call_is_among_those_that_stand() -> None:
    coordinator = running(steps=0)
    call = Where(Activity.CALL, True, 1, {}, 1801.0, overlong=True)
    prepares = replace(call, activity=Activity.SETUP, late=False, stretch=0)
    assert coordinator.handle(Late(0, 0, {0: prepares, 1: prepares, 2: prepares})) == []
    assert coordinator.handle(Late(0, 0, {0: call, 1: replace(prepares, overlong=False), 2: call})) == []
    (action,) = coordinator.handle(Late(0, 0, {0: call, 1: prepares, 2: call}))
    assert isinstance(action, Restart) and action.rung == 4


def test_ranks_that_wait_for_one_that_has_ended_are_named_once_and_in_the_reason_of_the_restart() -> None:
    coordinator = running()
    waits = Where(Activity.CALL, True, 11, {7: 1}, 2.0)
    ended = replace(waits, activity=Activity.GATE, stretch=10, issued={})
    (action,) = coordinator.handle(Late(0, 5, {0: waits, 1: ended, 2: waits}))
    assert isinstance(action, Warn) and "rank 1, which has ended its script" in action.sentence
    assert coordinator.handle(Late(0, 5, {0: waits, 1: ended, 2: waits})) == []
    late = {rank: replace(where, overlong=True) for rank, where in enumerate((waits, ended, waits))}
    (action,) = coordinator.handle(Late(0, 5, late))
    assert isinstance(action, Restart) and "rank 1, which has ended its script" in action.reason


def test_survivors_that_wait_for_a_node_to_come_do_not_stand() -> None:
    coordinator = running()
    coordinator.handle(NodeLost(1, frozenset({2}), "was lost"))
    waits = Where(Activity.RECOVERY, True, 10, {}, 1801.0, overlong=True)
    assert coordinator.handle(Late(1, 5, {0: waits, 1: waits})) == []


def test_hangs_are_looked_for_where_replicas_differ_and_ranks_that_have_ended_are_not_waited_for() -> None:
    coordinator = running()
    coordinator.holdings.distrust = "nobody knows which bytes are right"
    coordinator.handle(ExitedEarly(2))
    ready, stuck = (
        Where(Activity.GATE, True, 11, {}, 2.0),
        Where(Activity.CALL, True, 11, {}, 2.0, answers=False),
    )
    (action,) = coordinator.handle(Late(0, 5, {0: ready, 1: stuck}))
    assert isinstance(action, End) and action.rank == 1
