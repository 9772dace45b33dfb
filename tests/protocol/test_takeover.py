"""What a new coordinator is told of what was said and decided under a coordinator that was lost."""

from __future__ import annotations

from collections.abc import Iterable

from checkpointless_elastic.protocol.acts import Act, Tell
from checkpointless_elastic.protocol.between import VERSION, Join, Order, RunAgain, Seated
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    FromWorker,
    Left,
    Message,
    Mismatch,
    Protected,
    Replicas,
    Resume,
)
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.station import Station

NODES = [(3, 1)]  # three seats with one rank each


def recovering(*said: FromWorker) -> Station:
    """The seat of rank 1, after rank 0 was lost at step 6 and rank 1 has said this."""
    station = Station(Seated(1, 1, [0, 1, 2], 3, "store:1", "", 0, 0, False))
    station.said(1, Protected())
    station.said(1, Replicas([[]], {"weight": (0, 7)}))
    station.obey(Commit(0, 5))
    station.obey(Freeze(1, [0], []))
    for message in said:
        station.said(1, message)
    return station


def successor(*stations: Station) -> Board:
    """The coordinator of the next term, in the agent of seat 2, once these agents have come over."""
    board = Board(2, "agent-2", Rules(active_nodes=3, max_nodes=4, max_restarts=1), lambda: "store:2")
    board.take_over([0, 1, 2], 3, 0, 0.0)
    other = Station(Seated(1, 2, [0, 1, 2], 3, "store:1", "", 0, 0, False))
    other.said(2, Protected())
    other.said(2, Replicas([[]], {"weight": (0, 7)}))
    other.obey(Commit(0, 5))
    other.obey(Freeze(1, [0], []))
    for station in (*stations, other):
        name = f"agent-{station.seat.seat}"
        board.join(Join(VERSION, name, f"{name}:1", 1, station.standing(), NODES), 0.0)
    return board


def orders(acts: Iterable[Act]) -> list[Message]:
    """What the agent of seat 1 is ordered."""
    told = [act.message for act in acts if isinstance(act, Tell) and act.agent == "agent-1"]
    return [message.message for message in told if isinstance(message, Order)]


def test_a_rank_that_cannot_recover_is_answered_by_the_next_coordinator_too() -> None:
    board = successor(recovering(Mismatch("groups differ")))
    (again,) = (message for message in orders(board.acts) if isinstance(message, RunAgain))
    assert "rank 1 cannot recover live: groups differ" in again.reason


def test_that_a_rank_left_early_is_told_by_the_next_coordinator_too() -> None:
    board = successor(recovering(Left(1)))
    (freeze,) = (message for message in orders(board.acts) if isinstance(message, Freeze))
    assert freeze == Freeze(2, [0], [1], store_lost=True)


def test_the_next_coordinator_goes_on_if_nothing_was_said() -> None:
    board = successor(recovering())
    assert Freeze(2, [0], [], store_lost=True) in orders(board.acts)
    assert not any(isinstance(message, RunAgain) for message in orders(board.acts))
    assert board.coordinator is not None
    assert board.coordinator.left == set()


def test_what_was_said_does_not_outlive_its_recovery_nor_the_worker() -> None:
    nothing = recovering().standing()
    station = recovering(Left(1), Mismatch("groups differ"))
    assert station.standing() != nothing
    station.lost(1, "was ended", "", -1)
    assert (station.standing().left, station.standing().unfit) == ([], {})
    station = recovering(Left(1), Mismatch("groups differ"))
    station.obey(Resume(1))
    station.said(1, Left(1))  # was on its way
    assert (station.standing().left, station.standing().unfit) == ([], {})


def test_after_all_have_gone_back_a_station_is_at_the_step_to_which_they_went() -> None:
    station = Station(Seated(1, 0, [0], 2, "", "", 0, 0, taken=False))
    station.obey(Commit(0, 13))
    station.obey(Freeze(1, [1], []))
    station.obey(Decision(1, 10, [], [0, 1]))
    station.obey(Resume(1))
    assert station.step == station.standing().step == 10
    station.obey(Commit(1, 10))
    assert station.step == 11
