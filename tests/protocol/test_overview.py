"""What the board answers to clients, and what it does with agents that leave."""

from __future__ import annotations

from checkpointless_elastic.protocol.acts import Act, Guard, Tell
from checkpointless_elastic.protocol.between import (
    VERSION,
    Gathered,
    Join,
    Order,
    RankGone,
    RankSays,
    Seated,
    Turned,
)
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.messages import Freeze, Hold, Protected, Replicas, Stage
from checkpointless_elastic.protocol.requests import (
    Declined,
    Dismissed,
    Drain,
    Drained,
    Inquiry,
    Overview,
    Place,
)
from checkpointless_elastic.protocol.rules import Rules

RULES = Rules(active_nodes=2, max_nodes=4)


def board(
    agents: str = "abc", sizes: str = "111", running: bool = True, claims: list[list[int]] | None = None
) -> Board:
    """Agents a (which coordinates) and b have seats, c is a spare; the first step is committed if it is running."""
    made = Board(1, "a", RULES, lambda: "store:1")
    for name, size in zip(agents, sizes, strict=True):
        made.join(Join(VERSION, name, f"{name}:1", int(size)), 0.0)
    if running:
        for rank, name in enumerate("ab"):
            made.received(name, RankSays(rank, Protected()))
            made.received(name, Gathered(Stage.READY, 0, 0, {rank: b""}))
        for rank, name in enumerate("ab"):
            made.received(
                name, RankSays(rank, Replicas(claims or [[]], {"model": (rank if claims else 0, 7)}))
            )
    made.acts.clear()
    return made


def told(acts: list[Act]) -> list[tuple[str, object]]:
    return [(act.agent, act.message) for act in acts if isinstance(act, Tell)]


def declined(made: Board, drain: Drain) -> Declined:
    answer = made.consult(drain)
    assert isinstance(answer, Declined)
    assert made.acts == []  # nothing was done
    return answer


def test_an_overview_names_seats_spares_and_the_coordinator() -> None:
    answer = board().consult(Inquiry())
    places = [Place(0, "a", "a:1", 1), Place(1, "b", "b:1", 1), Place(-1, "c", "c:1", 1)]
    assert answer == Overview(1, "a", "running", 0, 1, 0, [0, 1], 2, places, [], "", {}, 2)


def test_an_overview_of_a_job_that_has_not_begun_says_so() -> None:
    answer = board("a", "1", running=False).consult(Inquiry())
    assert isinstance(answer, Overview)
    assert (answer.state, answer.bases, answer.agents) == ("gathering", [], [Place(-1, "a", "a:1", 1)])


def test_a_drained_node_is_lost_to_the_job_when_the_term_is_confirmed() -> None:
    made = board()
    assert made.consult(Drain(1, "b", False)) == Drained()
    assert made.acts == [Tell("a", Order(1, Hold(0))), Guard()]  # nobody loses anything before
    made.acts.clear()
    made.confirmed(1, 0.0)
    messages = told(made.acts)
    assert ("b", Dismissed("was drained")) in messages
    assert ("a", Freeze(1, [1], [])) in [(name, getattr(said, "message", None)) for name, said in messages]
    (seated,) = [message for name, message in messages if name == "c" and isinstance(message, Seated)]
    assert (seated.seat, seated.taken) == (1, True)


def test_what_a_drained_agent_still_says_changes_nothing() -> None:
    made = board()
    made.consult(Drain(1, "b", False))
    made.acts.clear()
    made.received("b", RankGone(1, "was killed", "", -1))
    made.left("b", "was lost")
    assert made.acts == []


def test_a_node_that_is_kept_comes_back_as_a_spare() -> None:
    made = board()
    made.consult(Drain(1, "b", True))
    made.confirmed(1, 0.0)
    assert ("b", Turned("its seat 1 was drained", True)) in told(made.acts)


def test_the_coordinators_own_agent_is_told_at_once_and_keeps_its_seat_until_then() -> None:
    made = board()
    assert made.consult(Drain(0, "a", False)) == Drained()
    assert told(made.acts) == [("a", Dismissed("was drained"))]


def test_a_spare_leaves_without_a_recovery() -> None:
    made = board()
    assert made.consult(Drain(-1, "c", False)) == Drained()
    assert told(made.acts) == [("c", Dismissed("was drained"))]
    assert made.agents == ["a", "b"]


def test_a_drain_without_a_fitting_spare_is_declined() -> None:
    for made in (board("ab", "11"), board("abc", "112")):
        answer = declined(made, Drain(1, "b", False))
        assert "no spare waits that runs 1 workers" in answer.reason
        assert not answer.again


def test_a_drain_that_would_restart_the_script_is_declined() -> None:
    answer = declined(board(running=False), Drain(1, "b", False))
    assert answer.reason.endswith("no step is committed yet")
    assert answer.again
    made = board()
    made.received("b", RankSays(1, Replicas([[]], {"model": (0, 8)})))
    made.acts.clear()
    answer = declined(made, Drain(1, "b", False))
    assert "differs between ranks 0 and 1" in answer.reason


def test_a_node_with_state_of_its_own_is_not_drained() -> None:
    answer = declined(board(claims=[[0], [1]]), Drain(1, "b", False))
    assert answer.reason.startswith("rank 1 holds state that no rank on another node holds")


def test_a_drain_waits_for_a_recovery_to_end() -> None:
    made = board()
    made.received("a", RankGone(0, "was killed", "", -1))
    made.acts.clear()
    assert declined(made, Drain(1, "b", False)).again


def test_a_drain_of_an_agent_without_that_seat_is_declined() -> None:
    for drain in (Drain(0, "b", False), Drain(1, "x", False), Drain(-7, "b", False), Drain(9, "b", True)):
        assert "its seat is another one by now" in declined(board(), drain).reason
    assert "is a spare" in declined(board(), Drain(-1, "c", True)).reason


def test_a_new_coordinator_says_why_the_last_one_has_gone() -> None:
    made = Board(2, "b", RULES, lambda: "store:2")
    made.explain(0, "was drained (SIGTERM)")
    made.take_over([0, 1], 2, 0, 0.0)
    assert isinstance(answer := made.consult(Inquiry()), Overview)
    assert answer.state == "taking over"
    assert declined(made, Drain(1, "b", False)).reason  # its agent has not come over


def test_an_agent_of_another_version_is_turned_away_and_changes_nothing() -> None:
    made = board()
    made.join(Join(VERSION + 1, "d", "d:1", 1), 0.0)
    assert told(made.acts) == [
        ("d", Turned(f"it speaks version {VERSION + 1}, the coordinator {VERSION}", False))
    ]
    assert made.agents == ["a", "b", "c"]
