"""Who is to blame when the job does not go on."""

from __future__ import annotations

from msgspec.structs import replace

from checkpointless_elastic.protocol.hangs import QUIET, Activity, Verdicts, Where, culprits, parted

GROUP, OTHER = 11, 12
CALL = Where(Activity.CALL, True, 9, {GROUP: 4}, 2.0)
GATE = Where(Activity.GATE, True, 9, {GROUP: 4}, 2.0)


def blamed(*wheres: Where, running: bool = True) -> set[int]:
    return set(culprits(dict(enumerate(wheres)), running))


def test_a_rank_that_is_not_ready_while_the_others_are_is_to_blame() -> None:
    assert blamed(GATE, CALL, GATE) == {1}


def test_a_rank_that_has_issued_fewer_collectives_is_to_blame() -> None:
    assert blamed(CALL, replace(CALL, issued={GROUP: 3}), CALL) == {1}


def test_a_rank_that_waits_for_another_one_is_not_to_blame_though_a_third_waits_for_it() -> None:
    first = replace(CALL, issued={GROUP: 5})
    second = replace(CALL, issued={GROUP: 4, OTHER: 2})
    third = replace(CALL, issued={OTHER: 1})
    assert blamed(first, second, third) == {2}


def test_a_rank_that_has_not_begun_the_call_is_to_blame() -> None:
    assert blamed(CALL, replace(CALL, activity=Activity.DATA, stretch=8, issued={})) == {1}


def test_a_rank_that_may_take_longer_is_not_to_blame_and_those_that_wait_for_it_neither() -> None:
    saving = replace(CALL, activity=Activity.OUTSIDE, late=False, stretch=8, issued={})
    assert blamed(CALL, saving) == set()


def test_a_process_that_is_stopped_is_to_blame_wherever_it_is() -> None:
    assert blamed(CALL, replace(CALL, stopped=True), CALL) == {1}
    assert blamed(GATE, replace(GATE, stopped=True)) == {1}


def test_a_process_that_does_not_answer_is_to_blame() -> None:
    assert blamed(CALL, replace(CALL, answers=False), CALL) == {1}


def test_of_ranks_in_the_same_collective_those_that_do_not_wait_are_to_blame() -> None:
    waiting = replace(CALL, waits=True)
    assert blamed(waiting, CALL, waiting) == {1}


def test_where_all_wait_in_the_same_collective_one_is_ended_so_that_it_is_made_anew() -> None:
    waiting = replace(CALL, waits=True)
    assert blamed(waiting, waiting, waiting) == {0}


def test_in_a_recovery_whoever_is_still_in_its_call_is_to_blame() -> None:
    recovering = replace(CALL, activity=Activity.RECOVERY, issued={})
    assert blamed(recovering, CALL, running=False) == {1}
    assert blamed(recovering, recovering, running=False) == set()


def test_in_a_recovery_survivors_may_wait_for_each_other_in_groups_that_lost_nobody() -> None:
    """Ranks 0 to 4 on a mesh of 2 x 3; rank 5 is lost, and rank 0 does not come out of a group that it was in."""
    shard, other_shard, pair, other_pair = 11, 12, 13, 14
    stuck = replace(CALL, issued={shard: 10, pair: 1})
    ahead = replace(CALL, issued={shard: 12, other_pair: 3})
    waits = replace(CALL, issued={other_shard: 10, pair: 2})
    behind = replace(CALL, issued={other_shard: 11, other_pair: 2})
    replacement = replace(CALL, activity=Activity.SETUP, late=False, issued={shard: 0})
    assert blamed(stuck, ahead, waits, behind, behind, replacement, running=False) == {0}
    slow = replace(stuck, late=False)
    assert blamed(slow, ahead, waits, behind, behind, replacement, running=False) == set()


def test_ranks_that_issue_different_collectives_are_named_and_not_blamed() -> None:
    ready, ended = replace(GATE, issued={GROUP: 3}), replace(GATE, stretch=8, issued={})
    call = replace(CALL, at="train.py:7 in step")
    assert blamed(call, ready) == blamed(call, ended) == set()
    assert parted({0: call, 1: ready}) == (
        "rank 0 waits in a collective (train.py:7 in step) for rank 1, which is ready to commit without it: let all "
        "ranks issue the same collectives in a call"
    )
    assert "which has ended its script: let all ranks make the same number" in parted({0: call, 1: ended})


def test_ranks_that_may_still_go_on_are_not_said_to_have_parted() -> None:
    assert parted({0: CALL, 1: GATE}) == parted({0: CALL, 1: CALL}) == ""
    assert parted({0: CALL, 1: replace(GATE, stretch=8, issued={}, late=False)}) == ""
    assert parted({0: replace(CALL, issued={}), 1: replace(GATE, stretch=8, issued={})}) == ""


def test_nobody_is_to_blame_while_all_wait_at_the_gate() -> None:
    assert blamed(GATE, GATE) == set()


def test_the_sentence_says_where_and_how_long() -> None:
    there = replace(CALL, at="train.py:7 in step", limit=1.5, issued={GROUP: 1})
    (sentence,) = culprits({0: CALL, 1: there}, running=True).values()
    assert sentence == (
        "was stuck for 2.0 s (its limit is 1.5 s) in a call, train.py:7 in step: the others wait for it"
    )


def test_what_holds_most_ranks_up_is_no_ranks_fault() -> None:
    loading = replace(CALL, activity=Activity.DATA, stretch=8, issued={})
    assert blamed(loading, loading, loading) == set()
    assert blamed(loading, loading, replace(loading, late=False)) == set()
    assert blamed(loading, CALL, CALL) == {0}
    assert blamed(loading, loading, replace(CALL, activity=Activity.RECOVERY), running=False) == set()


def test_when_all_processes_are_stopped_somebody_meant_it() -> None:
    stopped = replace(CALL, stopped=True, answers=False)
    assert blamed(stopped, stopped, stopped) == set()
    assert blamed(stopped, CALL, CALL) == {0}
    assert blamed(stopped, stopped, CALL) == {0, 1}  # a signal is no suspicion


HERE, THERE = replace(CALL, at="train.py:7 in step"), replace(CALL, at="train.py:9 in step")


def test_a_worker_that_was_ended_gives_longer_at_its_step_and_at_its_place_for_a_while() -> None:
    known = Verdicts()
    known.ended(20, HERE)
    assert known.doublings(20) == known.doublings(20, THERE.at) == 1  # in the replay
    assert known.doublings(21) == known.doublings(21, THERE.at) == 0
    assert known.doublings(20 + QUIET, HERE.at) == 1
    assert known.doublings(21 + QUIET, HERE.at) == 0


def test_each_verdict_at_the_same_place_gives_longer_and_each_is_forgotten_after_quiet_steps() -> None:
    known = Verdicts()
    known.ended(20, HERE)
    known.ended(60, HERE)
    known.ended(60, THERE)
    assert known.doublings(70, HERE.at) == 2
    assert known.doublings(60, HERE.at) == 3
    assert known.doublings(21 + QUIET, HERE.at) == 1


def test_many_hangs_at_other_places_leave_the_limit_as_it_is() -> None:
    known = Verdicts()
    for step in range(1, 10):
        known.ended(step, replace(CALL, at=f"other.py:{step} in step"))
    assert known.doublings(10, HERE.at) == 0


def test_a_process_that_was_stopped_was_not_slow() -> None:
    known = Verdicts()
    known.ended(20, replace(HERE, stopped=True))
    assert known.doublings(20, HERE.at) == 0


def test_workers_of_which_nobody_knows_where_they_were_count_as_at_one_place() -> None:
    known = Verdicts()
    known.ended(20, None)
    known.ended(30, replace(CALL, at=""))
    assert known.doublings(40, "") == 2
    assert known.doublings(40, HERE.at) == 0


def test_a_run_that_begins_anew_forgets_what_came_later() -> None:
    known = Verdicts()
    known.ended(500, HERE)
    assert known.doublings(3, HERE.at) == 0


def test_the_limit_grows_up_to_a_bound() -> None:
    known = Verdicts()
    for _ in range(50):
        known.ended(20, HERE)
    assert known.doublings(20, HERE.at) == 8
