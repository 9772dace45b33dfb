"""A node whose workers are lost again and again is excluded, when another one can take its place."""

from __future__ import annotations

import pytest
from simulator.world import Job as SimulatedJob
from simulator.world import World

from checkpointless_elastic.protocol.acts import Guard, Tell
from checkpointless_elastic.protocol.between import VERSION, Join, RankGone, Turned
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.coordinator import State
from checkpointless_elastic.protocol.events import Reached
from checkpointless_elastic.protocol.losses import WINDOW, Losses
from checkpointless_elastic.protocol.requests import Declined, Drain
from tests.protocol.test_overview import board

COMMITTED = Reached(0, "committed", {"step": 5})


def noted(limit: int, *agents: str, apart: int = 0) -> Losses:
    """Losses of these agents, ``apart`` committed steps after each other."""
    losses = Losses(limit)
    for agent in agents:
        losses.commits += apart
        losses.note(agent)
    return losses


@pytest.mark.parametrize(
    ("losses", "worst"),
    [
        (noted(3, *"bb"), ("", 0)),
        (noted(3, *"bbb"), ("b", 3)),
        (noted(3, *"bbbaa"), ("b", 3)),
        (noted(3, *"bababa"), ("", 0)),
        (noted(3, *"babababb"), ("b", 5)),
        (noted(0, *"bbbbbb"), ("", 0)),
        (noted(3, *"bbb", apart=WINDOW // 2), ("", 0)),
        (noted(3, *"bbb", apart=WINDOW // 2 - 1), ("b", 3)),
    ],
    ids=[
        "too few",
        "enough",
        "more than others",
        "as many as others",
        "ahead",
        "never",
        "long ago",
        "not long ago",
    ],
)
def test_the_agent_to_exclude(losses: Losses, worst: tuple[str, int]) -> None:
    assert losses.worst() == worst


def test_an_agent_that_has_left_is_forgotten() -> None:
    losses = noted(2, *"bbba")
    losses.forget("b")
    assert losses.worst() == ("", 0)


def after_losses(agents: str = "abc", lost_of: str = "bbbbb") -> Board:
    """Agents a and b have seats; the workers of these were lost, and a step is committed again."""
    made = board(agents, "1" * len(agents))
    for name in lost_of:
        made.received(name, RankGone("ab".index(name), "was killed", "", -1))
    assert made.coordinator is not None
    made.coordinator.state = State.RUNNING
    made.acts.clear()
    made._perform(COMMITTED)
    return made


def test_its_seat_goes_to_a_spare_and_it_gets_none_any_more() -> None:
    made = after_losses()
    assert made.acts[-1] == Guard()
    made.acts.clear()
    made.confirmed(1, 0.0)
    why = f"its seat 1 was excluded, since 5 of its workers were lost within {WINDOW} steps"
    assert Tell("b", Turned(why, True)) in made.acts
    assert made._seats == ["a", "c"]
    made.join(Join(VERSION, "b", "b:1", 1), 0.0)
    made.left("c", "was lost")
    made.confirmed(1, 0.0)
    assert made._seats == ["a", ""]
    for agent in "def":  # it is not counted
        made.join(Join(VERSION, agent, f"{agent}:1", 1), 0.0)
    assert made._seats == ["a", "d"]
    assert made.agents == ["a", "b", "d", "e", "f"]


def test_an_excluded_agent_is_no_spare_for_a_drain() -> None:
    made = after_losses()
    made.confirmed(1, 0.0)
    made.join(Join(VERSION, "b", "b:1", 1), 0.0)
    assert made.coordinator is not None
    made.coordinator.state = State.RUNNING
    answer = made.consult(Drain(1, "c", False))
    assert isinstance(answer, Declined) and "no spare waits" in answer.reason


@pytest.mark.parametrize(
    ("agents", "lost_of"),
    [("ab", "bbbbb"), ("abc", "bbbb"), ("abc", "babababaabbb")],
    ids=["no spare", "4", "both"],
)
def test_it_stays(agents: str, lost_of: str) -> None:
    made = after_losses(agents, lost_of)
    assert Guard() not in made.acts
    assert "b" in made.agents


def test_workers_that_went_back_to_their_mirrors_with_all_do_not_count() -> None:
    made = board()
    assert made.coordinator is not None
    for _ in range(9):
        made.coordinator.ended.add(1)
        made.received("b", RankGone(1, "was killed by SIGKILL", "", -1))
    made.coordinator.state = State.RUNNING
    made.acts.clear()
    made._perform(COMMITTED)
    assert Guard() not in made.acts


def test_its_ranks_go_on_on_a_spare() -> None:
    notes: list[str] = []
    world = World(
        SimulatedJob(agents=3, spares=1, steps=20, node_faults=3, fixed=0.001), seed=1, story=notes.append
    )
    bad = next(agent for agent in world.agents.values() if agent.name == "a1")
    for step in (3, 5, 7):
        while world.oracle.commits < step:
            world.clock.step()
        bad.kill(next(iter(bad.workers)))
    world.run()
    assert {agent.verdict for agent in world.agents.values()} == {"succeeded"}
    assert (
        f"a1 gives up its seat: its seat 1 was excluded, since 3 of its workers were lost within {WINDOW}"
        in str(notes)
    )
    assert any("takes seat 1" in note and note.split()[0] == "a3" for note in notes), notes
    assert not world.restarts
