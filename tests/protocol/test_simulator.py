"""Jobs of several agents under seeded faults, in virtual time; and that a broken rule is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from simulator.oracle import Violation
from simulator.schedule import Sizes, play
from simulator.world import Job as SimulatedJob
from simulator.world import Mutations, World

from checkpointless_elastic.protocol.between import Standing
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.branch import Branch
from checkpointless_elastic.protocol.coordinator import Coordinator, State
from checkpointless_elastic.protocol.member import Closed, Member
from checkpointless_elastic.protocol.node import Node
from checkpointless_elastic.protocol.station import Station

SMALL = Sizes(3, 8)


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_any_schedule_of_faults_keeps_all_invariants_and_ends(first: int) -> None:
    for seed in range(first, first + 50):
        result = play(seed, SMALL)
        assert not result.violation, (
            f"scripts/simulate --agents 3-8 --seed {seed} --trace: {result.violation}"
        )


def test_a_seed_gives_the_same_schedule_again() -> None:
    told: list[list[str]] = [[], []]
    for lines in told:
        play(11, SMALL, lines.append)
    assert told[0] == told[1] and len(told[0]) > 100


def test_a_hundred_agents_go_on_after_faults() -> None:
    results = [play(seed, Sizes(100, 100)) for seed in range(4)]
    assert not any(result.violation for result in results) and sum(result.faults for result in results)


def test_nodes_that_are_drained_or_terminated_leave_jobs_that_keep_all_invariants() -> None:
    results = [play(seed, SMALL, only=("drain", "terminate"), shrinks=seed % 2 == 0) for seed in range(40)]
    assert [result.violation for result in results if result.violation] == []
    assert sum(result.drains for result in results) > 10
    assert any(result.drains and result.resizes for result in results)


def test_without_a_fault_every_agent_ends_well() -> None:
    world = World(SimulatedJob(agents=5, spares=1), seed=1)
    world.run()
    assert world.oracle.runs[0].steps == [0] * world.steps
    assert {agent.verdict for agent in world.agents.values()} == {"succeeded"}


@pytest.mark.parametrize("fan_out", [2, 32])
def test_a_worker_that_hears_nothing_any_more_is_ended_in_the_next_recovery_and_no_other(
    fan_out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(SimulatedJob(agents=6, spares=0, size=2, fan_out=fan_out), seed=1)
    while world.oracle.commits < 3:
        world.clock.step()
    workers = {rank: worker for agent in world.live() for rank, worker in agent.workers.items()}
    monkeypatch.setattr(workers[9], "send", lambda message: None)
    next(agent for agent in world.live() if 2 in agent.workers).kill(2)
    world.run()
    assert world.late == ["step 3: ranks [9] did not come out of state freezing in time"]
    assert {agent.verdict for agent in world.agents.values()} == {"succeeded"}
    assert not world.restarts


# ---- rules broken on purpose


def _without_asking(board: Board, seats: set[int], why: str) -> None:
    board._suspects.extend((seat, why) for seat in sorted(seats))
    board.confirmed(len(seats), 0.0)


def _not_again(board: Board, standings: list[Standing], missing: list[int]) -> None:
    assert board.coordinator is not None
    board.coordinator.state = State.ENDED


_closed = Member._closed


def _deaf_to_silence(member: Member, link: int, why: Closed, reason: str, now: float) -> None:
    if why is not Closed.SILENT:
        _closed(member, link, why, reason, now)


RULES: dict[str, tuple[type, str, Callable[..., Any], tuple[str, ...]]] = {
    "seats are given away without asking the directory": (
        Board,
        "_suspect",
        _without_asking,
        ("partition", "store cut", "coordinator pause", "coordinator silent"),
    ),
    "a step is ready without copies of private state": (
        Node,
        "_kept",
        lambda node: True,
        ("slow", "crash", "coordinator"),
    ),
    "a step is committed without rank 0": (
        Coordinator,
        "_expected",
        lambda coordinator, stage: coordinator.ranks - {0},
        (),
    ),
    "what follows of a silent connection is dropped": (
        Member,
        "_closed",
        _deaf_to_silence,
        ("silent", "pause"),
    ),
    "a new coordinator does not release again": (Board, "_release", _not_again, ("coordinator",)),
    "a parent waits for children that are gone": (
        Branch,
        "dropped",
        lambda branch, child: branch.children.pop(child),
        ("cut", "crash", "pause"),
    ),
    "a replacement may come without its private state": (
        Station,
        "copied",
        lambda station, rank, generation, step: None,
        (),
    ),
}


def _first_violation(only: tuple[str, ...], mutations: Mutations | None = None) -> str:
    results = (play(seed, Sizes(3, 6), None, mutations, only) for seed in range(400))
    return next((result.violation for result in results if result.violation), "")


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, broken, only = RULES[rule]
    monkeypatch.setattr(owner, name, broken)
    assert _first_violation(only)


def test_a_worker_that_does_not_answer_freeze_is_noticed() -> None:
    assert _first_violation((), Mutations(deaf=True))


def test_a_worker_that_applies_a_step_twice_is_noticed() -> None:
    world = World(SimulatedJob(agents=3, spares=0), seed=1)
    while world.oracle.commits < 3:
        world.clock.step()
    worker = next(iter(world.live()[0].workers.values()))
    worker.weights.append(worker.generation)
    with pytest.raises(Violation):
        worker._apply(worker.generation)
