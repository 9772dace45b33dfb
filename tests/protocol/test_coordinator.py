"""The coordinator's decisions, one story per test."""

from __future__ import annotations

import pytest

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.between import RollCall
from checkpointless_elastic.protocol.coordinator import Coordinator, State
from checkpointless_elastic.protocol.events import (
    Action,
    AllFrozen,
    Broadcast,
    Chosen,
    Deadline,
    End,
    Event,
    ExitedEarly,
    LeftEarly,
    Lost,
    Overdue,
    Replace,
    Restart,
    Stop,
    Succeed,
    Tally,
    Unfit,
)
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Message,
    Phase,
    Replicas,
    Resume,
    Stage,
)


def running(ranks: int = 3, steps: int = 5) -> Coordinator:
    coordinator = Coordinator(frozenset(range(ranks)), max_faults_per_step=3)
    for rank in range(ranks):
        coordinator.protect(rank)
    for step in range(steps):
        coordinator.handle(ready(coordinator, step))
    return coordinator


def ready(coordinator: Coordinator, step: int, ranks: list[int] | None = None) -> Tally:
    some = sorted(coordinator.ranks) if ranks is None else ranks
    return Tally(Stage.READY, coordinator.generation, step, dict.fromkeys(some, b""))


def holding(*claims: list[int], **digests: int) -> Replicas:
    """What a rank holds: each piece on the ranks of its claim, in order; on all where no claim is given."""
    pieces = {key: (min(number, len(claims) - 1) if claims else 0, digest)
              for number, (key, digest) in enumerate(digests.items())}  # fmt: skip
    return Replicas(list(claims) or [[]], pieces)


def messages(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Broadcast)]


def only(actions: list[Action], kind: type[Action]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def frozen(coordinator: Coordinator, **places: tuple[int, Phase]) -> Event:
    reports = {
        int(name[1:]): Frozen(coordinator.generation, step, phase, True, True)
        for name, (step, phase) in places.items()
    }
    return AllFrozen(coordinator.generation, reports)


def present(coordinator: Coordinator, number: int, here: set[int], of: tuple[int, ...] = (0, 1, 2)) -> Tally:
    """Agents answer roll call ``number``."""
    said = {rank: b"here" if rank in here else b"" for rank in {*of, *here}}
    return Tally(Stage.PRESENT, coordinator.generation, number, said)


def test_a_step_is_committed_when_every_rank_is_ready_and_not_before() -> None:
    coordinator = running(steps=0)
    assert messages(coordinator.handle(ready(coordinator, 0, [0, 1]))) == []
    assert messages(coordinator.handle(ready(coordinator, 0, [2]))) == [Commit(0, 0)]
    assert coordinator.step == 1


def test_a_lost_rank_is_replaced_at_once_and_the_step_is_void() -> None:
    coordinator = running()
    assert only(coordinator.handle(Lost(1, "was lost")), Replace) == [Replace(1)]
    actions = coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(5, Phase.READY)))
    assert messages(actions) == [Decision(1, 5, [0, 2], [1])]


def test_a_committed_step_rolls_forward_on_a_rank_that_had_not_heard_of_it() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    actions = coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(4, Phase.READY)))
    assert messages(actions) == [Decision(1, 5, [0, 2], [1])]


def test_a_rank_that_was_not_ready_for_a_committed_step_ends_live_recovery() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    actions = coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(4, Phase.COMPUTING)))
    assert "rank 2 is at step 4" in only(actions, Restart)[0].reason  # type: ignore[attr-defined]


def test_a_whole_recovery_ends_in_running_with_the_replacement_as_a_source_of_the_next() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(5, Phase.COMPUTING)))
    coordinator.handle(Tally(Stage.PUBLISHED, 1, 5, {0: b"", 2: b""}))
    coordinator.handle(Tally(Stage.ARRIVED, 1, 0, {1: b""}))
    coordinator.handle(Tally(Stage.RESTORED, 1, 5, {1: b""}))
    actions = coordinator.handle(Tally(Stage.REBUILT, 1, 5, {0: b"", 1: b"", 2: b""}))
    assert messages(actions) == [Resume(1)]
    assert coordinator.state is State.RUNNING
    assert coordinator.whole == {0, 1, 2}


def test_reports_of_an_older_generation_change_nothing() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    assert coordinator.handle(Tally(Stage.READY, 0, 5, {0: b"", 1: b"", 2: b""})) == []
    assert coordinator.step == 5


def test_what_a_rank_left_counts_in_the_next_generation_too_until_the_job_runs_again() -> None:
    coordinator = running(ranks=4)
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Lost(3, "was lost"))
    assert messages(coordinator.handle(LeftEarly(0, 1))) == [Freeze(2, [1, 3], [0])]
    assert coordinator.handle(LeftEarly(0, 2)) == []
    assert coordinator.handle(LeftEarly(2, 0)) == []


def test_a_loss_before_the_first_step_runs_the_script_again() -> None:
    coordinator = running(steps=0)
    (action,) = coordinator.handle(Lost(1, "was killed by SIGKILL"))
    assert action == Restart(3, "rank 1 was killed by SIGKILL before the first step was committed")


def test_a_script_without_a_run_is_run_again() -> None:
    coordinator = Coordinator(frozenset({0, 1}), max_faults_per_step=3)
    (action,) = coordinator.handle(Lost(1, "exited with code 1"))
    assert isinstance(action, Restart) and "made no Run" in action.reason


def test_the_loss_of_all_ranks_runs_the_script_again() -> None:
    coordinator = running(ranks=2)
    coordinator.handle(Lost(0, "was lost"))
    (action,) = coordinator.handle(Lost(1, "was lost"))
    assert isinstance(action, Restart) and "no survivor holds the state" in action.reason


def test_the_same_error_twice_at_one_step_stops_the_job() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "failed", "ValueError: bad"))
    recover(coordinator, {0, 2}, {1})
    (action,) = coordinator.handle(Lost(1, "failed", "ValueError: bad"))
    assert isinstance(action, Stop) and "ValueError: bad" in action.reason


def test_the_same_error_at_another_step_is_a_fault_like_any_other() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "failed", "ValueError: bad"))
    recover(coordinator, {0, 2}, {1})
    coordinator.handle(ready(coordinator, 5))
    assert only(coordinator.handle(Lost(1, "failed", "ValueError: bad")), Replace)


def test_after_too_many_faults_without_a_committed_step_the_script_is_run_again() -> None:
    coordinator = running()
    actions = [coordinator.handle(Lost(1, "was lost")) for _ in range(4)]
    assert [[action.rung for action in some if isinstance(action, Restart)] for some in actions] == [
        *[[], [], []],
        [3],
    ]


def test_a_committed_step_ends_the_count_of_faults() -> None:
    coordinator = running()
    for _ in range(3):
        coordinator.handle(Lost(1, "was lost"))
    recover(coordinator, {0, 2}, {1})
    assert list(coordinator.blamed) == [1]
    coordinator.handle(ready(coordinator, 5))
    assert list(coordinator.blamed) == []
    assert only(coordinator.handle(Lost(1, "was lost")), Replace)


def test_the_first_rank_that_was_lost_is_the_first_to_blame() -> None:
    coordinator = running()
    coordinator.handle(Lost(2, "was lost"))
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Lost(2, "was lost"))
    assert list(coordinator.blamed) == [2, 1]


def test_a_run_that_began_by_rung_3_and_commits_nothing_is_restarted_by_rung_4() -> None:
    coordinator = Coordinator(frozenset({0, 1}), max_faults_per_step=3, began=3)
    (action,) = coordinator.handle(Lost(1, "exited with code 1"))
    assert isinstance(action, Restart) and action.rung == 4


def test_a_rank_that_does_not_answer_a_freeze_in_time_is_ended_and_replaced() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING)))
    assert coordinator.handle(Overdue(1, "freezing")) == [
        Broadcast(RollCall(1, 1, "freezing")),
        Deadline(1, "freezing", "settle_timeout"),
    ]
    chosen, *actions = coordinator.handle(present(coordinator, 1, here={0}))
    assert isinstance(chosen, Chosen) and (chosen.rung, chosen.ends) == (1, {2})
    assert chosen.what == "ranks [2] did not come out of state freezing in time"
    assert actions == [End(2, "was ended"), Deadline(1, "freezing", "settle_timeout")]
    assert only(coordinator.handle(Lost(2, "was killed by SIGKILL")), Replace) == [Replace(2)]
    recover(coordinator, {0}, {1, 2})
    assert coordinator.state is State.RUNNING
    assert list(coordinator.blamed) == [1, 2]


@pytest.mark.parametrize("gone", [True, False], ids=["which was replaced", "which cannot be ended"])
def test_a_second_deadline_restarts_all(gone: bool) -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING)))
    coordinator.handle(Overdue(1, "freezing"))
    assert only(coordinator.handle(present(coordinator, 1, here={0})), End) == [End(2, "was ended")]
    if gone:
        coordinator.handle(Lost(2, "was killed by SIGKILL"))
        coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING)))
    (action,) = coordinator.handle(Overdue(coordinator.generation, coordinator.state.value))
    assert isinstance(action, Restart) and action.rung == 4 and "did not come out" in action.reason


def test_a_rank_that_waits_for_another_one_of_its_node_is_not_ended() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Overdue(1, "freezing"))
    assert only(coordinator.handle(present(coordinator, 1, here={0})), End) == [End(2, "was ended")]
    assert coordinator.handle(present(coordinator, 1, here=set())) == []  # said twice


def test_agents_that_do_not_answer_a_roll_call_have_nobody_present() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Overdue(1, "freezing"))
    assert coordinator.handle(present(coordinator, 1, here={0}, of=(0,))) == []
    (action,) = coordinator.handle(Overdue(1, "freezing"))
    assert isinstance(action, Restart) and action.rung == 4 and "ranks [0, 2] did not" in action.reason


def test_the_answer_to_a_roll_call_of_a_state_that_was_left_changes_nothing() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Overdue(1, "freezing"))
    recover(coordinator, {0, 2}, {1})
    assert coordinator.state is State.RUNNING
    assert coordinator.handle(present(coordinator, 1, here=set())) == []


def test_when_all_are_present_after_all_the_deadline_is_given_once_more() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(Overdue(1, "freezing"))
    assert coordinator.handle(present(coordinator, 1, here={0, 2})) == []
    assert only(coordinator.handle(Overdue(1, "freezing")), Restart)


def test_replacements_that_do_not_arrive_in_time_are_started_once_more() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(5, Phase.COMPUTING)))
    coordinator.handle(Tally(Stage.PUBLISHED, 1, 5, {0: b"", 2: b""}))
    coordinator.handle(Overdue(1, "settling"))
    assert only(coordinator.handle(present(coordinator, 1, here={0, 2})), End) == [End(1, "was ended")]
    assert only(coordinator.handle(Lost(1, "was killed by SIGKILL")), Replace) == [Replace(1)]


def test_without_a_twin_a_deadline_restarts_all() -> None:
    coordinator = sharded(replicas=2)
    coordinator.handle(Lost(0, "was lost"))
    reports = {r: Frozen(coordinator.generation, 5, Phase.COMPUTING, True, True) for r in (1, 3)}
    coordinator.handle(AllFrozen(1, reports))
    coordinator.handle(Overdue(1, "freezing"))
    (action,) = coordinator.handle(present(coordinator, 1, here={1, 3}))
    assert isinstance(action, Restart) and (action.rung, action.reason[:9]) == (4, "ranks [2]")
    assert action.reason.endswith("and no other holds the state of rank 0")


def test_a_choice_is_said_with_its_reason_and_again_when_all_have_answered() -> None:
    coordinator = running()
    what, reason = "rank 1 was lost", "every piece of state has a replica in a survivor"
    said = Chosen(1, 5, what, 1, reason)
    assert only(coordinator.handle(Lost(1, "was lost")), Chosen) == [said]
    answers = frozen(coordinator, r0=(5, Phase.COMPUTING), r2=(5, Phase.COMPUTING))
    assert only(coordinator.handle(answers), Chosen) == [said]


def test_who_left_early_is_named_also_when_a_further_loss_came_first() -> None:
    coordinator = running(ranks=4)
    coordinator.handle(Lost(2, "was killed"))
    coordinator.handle(Lost(3, "was killed"))
    (freeze,) = messages(coordinator.handle(LeftEarly(1, generation=1)))
    assert freeze == Freeze(2, [2, 3], [1])
    assert coordinator.handle(LeftEarly(1, generation=2)) == []


def test_a_deadline_of_a_state_that_was_left_changes_nothing() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    assert coordinator.handle(Overdue(0, "freezing")) == []


def test_a_rank_that_is_unfit_ends_live_recovery_with_its_reason() -> None:
    coordinator = running()
    coordinator.handle(Lost(1, "was lost"))
    (action,) = coordinator.handle(Unfit(1, "the scripts part"))
    assert action == Restart(3, "rank 1 cannot recover live: the scripts part")


def test_replicas_that_differ_are_never_used() -> None:
    coordinator = running()
    assert coordinator.holdings.compare(0, holding(w=1, b=2)) == ""
    assert coordinator.holdings.compare(1, holding(w=1, b=2)) == ""
    assert "b differs between ranks 0 and 2" in coordinator.holdings.compare(2, holding(w=1, b=3))
    (action,) = coordinator.handle(Lost(1, "was lost"))
    assert isinstance(action, Restart) and "b differs" in action.reason


def sharded(*, replicas: int) -> Coordinator:
    """Four ranks, of which 0 and 2, and 1 and 3, hold the same shard if there are two replicas."""
    coordinator = running(ranks=4)
    for rank in range(4):
        claim = [rank % 2, rank % 2 + 2] if replicas == 2 else [rank]
        assert coordinator.holdings.compare(rank, holding(claim, [], shard=claim[0], ema=7)) == ""
    return coordinator


def test_a_lost_shard_is_recovered_live_while_a_replica_of_it_lives() -> None:
    coordinator = sharded(replicas=2)
    assert coordinator.holdings.exposed() == []
    assert coordinator.holdings.survivable() == 1
    assert only(coordinator.handle(Lost(0, "was lost")), Replace) == [Replace(0)]
    assert only(coordinator.handle(Lost(3, "was lost")), Replace) == [Replace(3)]
    (action,) = coordinator.handle(Lost(2, "was lost"))
    assert action == Restart(3, "no survivor holds the state of rank 0")


def test_all_go_back_to_an_older_mirror_and_the_reason_is_said_until_the_end() -> None:
    coordinator = Coordinator(frozenset({0, 1}), 3, mirror_every=2)
    for rank in range(2):
        coordinator.protect(rank)
        coordinator.holdings.compare(rank, holding([rank], shard=rank))
    for step in range(5):
        coordinator.handle(ready(coordinator, step))
    coordinator.handle(Lost(1, "was lost", mirrored=4))
    actions = coordinator.handle(frozen(coordinator, r0=(5, Phase.COMPUTING)))
    assert only(actions, End) == [End(0, "was ended")]
    _, decided = only(coordinator.handle(Lost(0, "was ended", mirrored=4)), Chosen)
    assert isinstance(decided, Chosen)
    assert (decided.what, decided.rung, decided.ends) == ("rank 0 was ended", 2, frozenset())
    assert decided.reason.endswith("so every rank goes on from its mirror of step 4")
    assert coordinator.decision == Decision(2, 4, [], [0, 1], mirrors=[0, 1])
    assert list(coordinator.blamed) == [1]


def test_a_shard_without_a_replica_is_known_before_it_is_lost() -> None:
    coordinator = sharded(replicas=1)
    assert coordinator.holdings.exposed() == [0, 1, 2, 3]
    assert coordinator.holdings.survivable() == 0
    (action,) = coordinator.handle(Lost(1, "was lost"))
    assert action == Restart(3, "no survivor holds the state of rank 1")


def test_the_smallest_replica_set_says_how_many_faults_the_other_ranks_survive() -> None:
    coordinator = running(ranks=6)
    for rank, claim in enumerate([[0], [1, 2], [1, 2], [3, 4, 5], [3, 4, 5], [3, 4, 5]]):
        coordinator.holdings.compare(rank, holding(claim, shard=claim[0]))
    assert coordinator.holdings.exposed() == [0]
    assert coordinator.holdings.survivable() == 1


def test_a_piece_that_a_claimed_replica_does_not_have_is_named() -> None:
    coordinator = running(ranks=2)
    assert coordinator.holdings.compare(0, holding(stage0=1)) == ""
    assert "stage0 of rank 0 should be the same on rank 1" in coordinator.holdings.compare(
        1, holding(stage1=1)
    )


def test_a_rank_that_ended_well_is_replaced_with_a_lost_one() -> None:
    coordinator = running()
    coordinator.handle(ExitedEarly(0))
    assert only(coordinator.handle(Lost(1, "was lost")), Replace) == [Replace(0), Replace(1)]


def test_the_job_succeeds_when_all_ranks_have_finished_or_ended_well() -> None:
    coordinator = running()
    coordinator.handle(ExitedEarly(0))
    assert only(coordinator.handle(Tally(Stage.FINISHED, 0, 5, {1: b"", 2: b""})), Succeed)


def test_ranks_that_are_ready_for_another_step_are_an_error_that_names_both() -> None:
    coordinator = running()
    with pytest.raises(ProtocolError, match="ready for step 7, not 5"):
        coordinator.handle(ready(coordinator, 7))


def recover(coordinator: Coordinator, whole: set[int], pending: set[int]) -> None:
    generation, step = coordinator.generation, coordinator.step
    reports = {rank: Frozen(generation, step, Phase.COMPUTING, True, True) for rank in whole}
    coordinator.handle(AllFrozen(generation, reports))
    coordinator.handle(Tally(Stage.PUBLISHED, generation, step, dict.fromkeys(whole, b"")))
    coordinator.handle(Tally(Stage.ARRIVED, generation, step, dict.fromkeys(pending, b"")))
    coordinator.handle(Tally(Stage.RESTORED, generation, step, dict.fromkeys(pending, b"")))
    coordinator.handle(Tally(Stage.REBUILT, generation, step, dict.fromkeys(coordinator.ranks, b"")))
