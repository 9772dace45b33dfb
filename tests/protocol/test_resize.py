"""The number of ranks changes: when, what agents are told, and what the job does where it cannot."""

from __future__ import annotations

import pytest
from simulator.schedule import Sizes, play
from simulator.world import Job as SimulatedJob
from simulator.world import World

from checkpointless_elastic.protocol.acts import Act, Perform, Tell
from checkpointless_elastic.protocol.between import (
    VERSION,
    Answers,
    Gathered,
    Join,
    Order,
    RankGone,
    RankSays,
    Seated,
    Turned,
)
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.coordinator import Coordinator
from checkpointless_elastic.protocol.events import Resized, Stop, Warn
from checkpointless_elastic.protocol.messages import (
    Decision,
    Frozen,
    Mismatch,
    Phase,
    Protected,
    Replicas,
    Stage,
)
from checkpointless_elastic.protocol.requests import Declined, Dismissed, Drain, Drained, Took, Warm
from checkpointless_elastic.protocol.resize import obstacle
from checkpointless_elastic.protocol.rules import OnLoss, Rules
from checkpointless_elastic.protocol.states import State

RULES = Rules(active_nodes=3, max_nodes=4, min_nodes=2, on_loss=OnLoss.SHRINK, loss_timeout=60.0)


def committed(made: Board, step: int, agents: str, claims: list[list[int]] | None = None) -> None:
    """One rank on each of these agents; they are ready, and say what they hold."""
    assert made.coordinator is not None
    generation = made.coordinator.generation
    for rank, name in enumerate(agents):
        made.received(name, RankSays(rank, Protected()))
    for rank, name in enumerate(agents):
        made.received(name, Gathered(Stage.READY, generation, step, {rank: b""}))
    for rank, name in enumerate(agents):
        claim = [claims[rank]] if claims else [[]]
        made.received(name, RankSays(rank, Replicas(claim, {"model": (0, 7)})))


def board(agents: str = "abc", claims: list[list[int]] | None = None, rules: Rules = RULES) -> Board:
    """The first ones have seats, and the first step is committed; others are warm spares."""
    made = Board(1, "a", rules, lambda: "store:1")
    for name in agents:
        made.join(Join(VERSION, name, f"{name}:1", 1), 0.0)
        made.received(name, Warm())
    committed(made, 0, agents[:3], claims)
    made.acts.clear()
    return made


def lose(made: Board, name: str) -> None:
    made.left(name, "was lost")
    made.confirmed(1, 1.0)


def answer(made: Board, agents: dict[str, int], step: int = 1) -> None:
    """Survivors say where they stand, and leave their state behind."""
    assert made.coordinator is not None
    generation = made.coordinator.generation
    for name, rank in agents.items():
        frozen = Frozen(generation, step, Phase.COMPUTING, True, True)
        made.received(name, Answers(generation, {rank: frozen}))
    for name, rank in agents.items():
        made.received(name, Gathered(Stage.PUBLISHED, generation, step, {rank: b""}))


def seats(acts: list[Act]) -> dict[str, Seated]:
    return {
        act.agent: act.message for act in acts if isinstance(act, Tell) and isinstance(act.message, Seated)
    }


def decisions(acts: list[Act]) -> list[Decision]:
    orders = [act.message for act in acts if isinstance(act, Tell) and isinstance(act.message, Order)]
    return [order.message for order in orders if isinstance(order.message, Decision)]


def of_kind(acts: list[Act], kind: type) -> list[object]:
    return [act.action for act in acts if isinstance(act, Perform) and isinstance(act.action, kind)]


def shrunk() -> Board:
    """b was lost; a and c go on."""
    made = board()
    lose(made, "b")
    answer(made, {"a": 0, "c": 2})
    return made


def test_survivors_leave_their_state_behind_and_get_seats_without_a_hole() -> None:
    made = board()
    lose(made, "b")
    made.acts.clear()
    answer(made, {"a": 0, "c": 2})
    assert decisions(made.acts)[0].resizes
    given = seats(made.acts)
    assert {name: (seat.seat, seat.bases, seat.world) for name, seat in given.items()} == {
        "a": (0, [0, 1], 2),
        "c": (1, [0, 1], 2),
    }
    assert {(seat.kept, seat.restarts, seat.resizes, seat.taken) for seat in given.values()} == {
        (1, 1, 1, False)
    }
    (resized,) = of_kind(made.acts, Resized)
    assert isinstance(resized, Resized)
    assert (resized.before, resized.after, resized.step) == (3, 2, 1)
    assert resized.reason == "no spare takes the place of node 1, and the job goes on with 2 of 3 nodes"


def test_a_change_is_no_restart() -> None:
    made = shrunk()
    assert not of_kind(made.acts, Stop)  # --max-restarts is 0
    assert made.coordinator is not None and made.coordinator.state is State.SETTLING


def test_the_new_run_goes_on_at_the_step_that_was_void_once_all_have_their_state() -> None:
    made = shrunk()
    it = made.coordinator
    assert it is not None
    for rank, name in enumerate("ac"):
        made.received(name, Took(it.generation))
        made.received(name, RankSays(rank, Protected()))
        made.received(name, Gathered(Stage.PUBLISHED, it.generation, 1, {rank: b""}))
    for rank, name in enumerate("ac"):
        made.received(name, Gathered(Stage.REBUILT, it.generation, 1, {rank: b""}))
    assert it.state is State.RUNNING and not it.protected
    committed(made, 1, "ac")
    assert it.step == 2 and it.protected


def test_what_an_agent_says_before_it_has_taken_its_new_seat_does_not_count() -> None:
    made = shrunk()
    it = made.coordinator
    assert it is not None
    made.received("c", RankGone(1, "was lost", "", -1))  # of the old rank 1, or an error
    assert made.coordinator is it and it.state is State.SETTLING


def test_a_loss_before_the_first_step_of_the_new_run_leads_to_another_one_with_the_same_state() -> None:
    made = shrunk()
    it = made.coordinator
    assert it is not None
    for name in "ac":
        made.received(name, Took(it.generation))
    lose(made, "c")  # below min_nodes: a restart, which --max-restarts does not allow
    assert of_kind(made.acts, Stop)

    made = board(rules=Rules(active_nodes=3, max_nodes=4, on_loss=OnLoss.SHRINK))
    lose(made, "b")
    answer(made, {"a": 0, "c": 2})
    lose(made, "c")
    assert seats(made.acts)["a"].world == 1 and seats(made.acts)["a"].kept == 1
    assert len(of_kind(made.acts, Resized)) == 2 and not of_kind(made.acts, Stop)


def test_state_that_a_rank_cannot_take_up_is_given_up() -> None:
    made = shrunk()
    it = made.coordinator
    assert it is not None
    made.received("c", Took(it.generation))
    made.received("c", RankSays(1, Mismatch("its state is of another script")))
    assert of_kind(made.acts, Stop)  # run again from its top, without the state: this is a restart


def test_a_job_grows_by_a_warm_spare_when_it_runs_and_not_before() -> None:
    made = shrunk()
    it = made.coordinator
    assert it is not None
    for name in "ac":
        made.received(name, Took(it.generation))
    made.join(Join(VERSION, "d", "d:1", 1), 2.0)
    for stage in (Stage.PUBLISHED, Stage.REBUILT):
        for rank, name in enumerate("ac"):
            made.received(name, Gathered(stage, it.generation, 1, {rank: b""}))
    made.received("d", Warm())
    made.tick(2.5)
    assert made.coordinator is not None and not made.coordinator.resizing  # no step is committed yet
    committed(made, 1, "ac")
    made.acts.clear()
    made.tick(3.0)
    answer(made, {"a": 0, "c": 1}, 2)
    given = seats(made.acts)
    assert [given[name].seat for name in "acd"] == [0, 1, 2] and given["d"].kept == 2
    (decision,) = {str(one): one for one in decisions(made.acts) if not one.resizes}.values()
    assert (decision.step, decision.pending) == (2, [2])
    assert made.coordinator is not None and made.coordinator.pending == {2}


def goes_on(made: Board) -> Coordinator:
    """The agents a and c, which are left, take their ranks and commit a step."""
    it = made.coordinator
    assert it is not None
    for stage in (Stage.PUBLISHED, Stage.REBUILT):
        for rank, name in enumerate("ac"):
            made.received(name, Took(it.generation))
            made.received(name, Gathered(stage, it.generation, 1, {rank: b""}))
    committed(made, 1, "ac")
    return it


def test_a_cold_spare_is_waited_for_while_the_job_runs() -> None:
    made = shrunk()
    it = goes_on(made)
    made.join(Join(VERSION, "d", "d:1", 1), 2.0)
    made.tick(3.0)
    assert it.state is State.RUNNING
    made.received("d", Warm())
    made.tick(3.5)
    assert it.state is State.FREEZING


def test_a_spare_takes_the_seat_as_ever() -> None:
    made = board("abcd")
    lose(made, "b")
    assert seats(made.acts)["d"].taken and made.world == 3
    assert made.coordinator is not None and not made.coordinator.resizing


@pytest.mark.parametrize("on_loss", [OnLoss.WAIT, OnLoss.SHRINK])
def test_below_the_smallest_number_the_job_waits_and_then_ends(on_loss: OnLoss) -> None:
    rules = Rules(active_nodes=3, max_nodes=4, min_nodes=3, on_loss=on_loss, loss_timeout=60.0)
    made = board(rules=rules)
    lose(made, "b")
    made.tick(60.0)
    assert made.coordinator is not None and not made.coordinator.resizing
    made.tick(61.5)
    (stop,) = of_kind(made.acts, Stop)
    assert isinstance(stop, Stop) and stop.reason == "no node has come for the lost node 1 within 60 s"


def test_a_job_in_which_not_every_rank_holds_everything_waits_and_says_why() -> None:
    made = board(claims=[[0, 1], [0, 1], [2]])
    lose(made, "b")
    made.tick(2.0)
    made.tick(2.5)
    (warning,) = of_kind(made.acts, Warn)
    assert warning == Warn(
        "[generation 1, step 1] The job waits for a node in place of node 1, and does not go on without it: "
        "rank 0 holds a part of the state, and no whole replicas of it would be left."
    )
    assert not of_kind(made.acts, Resized)


@pytest.mark.parametrize(
    ("world", "every", "lost", "more", "fine"),
    [
        (6, 1, {2, 3}, 0, True),
        (6, 2, {2, 3}, 0, True),
        (6, 2, {0, 1}, 2, True),
        (6, 2, {2}, 0, False),
        (6, 2, {3, 4}, 0, True),  # shards of two replicas make a whole one
        (6, 2, {2, 4}, 0, False),
        (6, 2, set(), 1, False),
        (8, 4, {4, 5, 6, 7}, 0, True),
        (8, 4, {4, 5}, 0, False),
        (4, 4, {3}, 0, False),
    ],
)
def test_whole_replicas_must_be_left(world: int, every: int, lost: set[int], more: int, fine: bool) -> None:
    """Each rank shares a piece with every k-th one, and another one with all."""
    it = Coordinator(frozenset(range(world)), 8)
    it.whole -= lost
    for rank in it.whole:
        claim = list(range(rank % every, world, every))
        it.holdings.held[rank] = Replicas([[], claim], {"model": (1, 7), "count": (0, 7)})
    assert (obstacle(it, it.whole, more) == "") is fine


def test_a_job_whose_state_is_lost_is_run_again_from_its_top_by_all_nodes() -> None:
    rules = Rules(active_nodes=3, max_nodes=4, on_loss=OnLoss.SHRINK, max_restarts=1)
    made = board(claims=[[0], [1], [2]], rules=rules)
    lose(made, "b")
    (warning,) = of_kind(made.acts, Warn)
    assert isinstance(warning, Warn) and "waits for a node in place of node 1" in warning.sentence
    assert not of_kind(made.acts, Resized) and made.world == 3


# ---- drained nodes


def declined(made: Board, drain: Drain) -> str:
    """The reason; nothing is done."""
    answer = made.consult(drain)
    assert isinstance(answer, Declined) and made.acts == []
    return answer.reason


def test_a_node_that_is_drained_without_a_spare_leaves_and_the_others_go_on_with_the_state() -> None:
    made = board()
    assert made.consult(Drain(1, "b", False)) == Drained()
    made.confirmed(1, 1.0)
    assert Tell("b", Dismissed("was drained")) in made.acts
    answer(made, {"a": 0, "c": 2})
    given = seats(made.acts)
    assert {name: (seat.seat, seat.world, seat.kept) for name, seat in given.items()} == {
        "a": (0, 2, 1),
        "c": (1, 2, 1),
    }
    assert not of_kind(made.acts, Stop)  # --max-restarts is 0


def test_a_drained_node_goes_to_a_spare_first() -> None:
    made = board("abcd")
    assert made.consult(Drain(1, "b", False)) == Drained()
    made.confirmed(1, 1.0)
    assert seats(made.acts)["d"].taken and made.coordinator is not None and not made.coordinator.resizing


def test_a_job_does_not_grow_back_by_a_node_that_was_drained_and_stays() -> None:
    made = board()
    made.consult(Drain(1, "b", True))
    made.confirmed(1, 1.0)
    assert Tell("b", Turned("its seat 1 was drained", True)) in made.acts
    answer(made, {"a": 0, "c": 2})
    made.join(Join(VERSION, "b", "b:1", 1), 2.0)
    made.received("b", Warm())
    it = goes_on(made)
    made.tick(3.0)
    assert it.state is State.RUNNING and made.world == 2
    made.join(Join(VERSION, "d", "d:1", 1), 4.0)
    made.received("d", Warm())
    made.tick(5.0)
    assert it.state is State.FREEZING and it.resizing


def test_a_drain_is_declined_where_the_job_cannot_go_on_with_fewer() -> None:
    made = board(rules=Rules(active_nodes=3, max_nodes=4, min_nodes=3, on_loss=OnLoss.SHRINK))
    assert "no spare waits that runs 1 workers; start torchrun" in declined(made, Drain(1, "b", False))
    made = board(claims=[[0, 1], [0, 1], [2]])
    reason = declined(made, Drain(1, "b", False))
    assert reason.startswith(
        "no spare waits that runs 1 workers, and the job cannot go on with fewer nodes: "
    )
    assert reason.endswith("no whole replicas of it would be left")


# ---- in virtual time


def test_jobs_that_shrink_and_grow_keep_all_invariants_under_faults() -> None:
    results = [play(seed, Sizes(3, 8), shrinks=True) for seed in range(20)]
    assert [result.violation for result in results if result.violation] == []
    assert sum(result.resizes for result in results) > 10


def test_a_job_that_loses_a_node_for_good_ends_with_the_others() -> None:
    world = World(SimulatedJob(agents=4, spares=0, shrinks=True, size=2), seed=3)
    while world.oracle.commits < 3:
        world.clock.step()
    world.crash(next(agent for agent in world.live() if agent.seat == 2), silent=False, back=None)
    world.run()
    assert [(before, after) for before, after, _ in world.resizes] == [(8, 6)]
    assert not world.restarts
