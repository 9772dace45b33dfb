"""An agent that has lost its seat is named to all in the tree, so that none passes orders on to it."""

from __future__ import annotations

from checkpointless_elastic.protocol.acts import Tell
from checkpointless_elastic.protocol.between import (
    VERSION,
    Attach,
    Attached,
    Gathered,
    Join,
    Order,
    RankSays,
)
from checkpointless_elastic.protocol.board import Board
from checkpointless_elastic.protocol.messages import Freeze, Protected, Stage
from checkpointless_elastic.protocol.requests import Inquiry, Overview
from checkpointless_elastic.protocol.rules import Rules


def running() -> Board:
    """Agents a to d have seats, in a chain, and e waits; the first step is committed."""
    made = Board(1, "a", Rules(active_nodes=4, max_nodes=6, fan_out=1), lambda: "store:1")
    for name in "abcde":
        made.join(Join(VERSION, name, f"{name}:1", 1), 0.0)
    for rank, name in enumerate("abcd"):
        made.received(name, RankSays(rank, Protected()))
    for rank, name in enumerate("abcd"):
        made.received(name, Gathered(Stage.READY, 0, 0, {rank: b""}))
    return made


def frozen(made: Board) -> list[Order]:
    """Orders to freeze, by agent."""
    told = [act.message for act in made.acts if isinstance(act, Tell) and isinstance(act.message, Order)]
    return [order for order in told if isinstance(order.message, Freeze)]


def test_it_is_named_although_its_word_that_it_hangs_on_another_one_was_lost_with_it() -> None:
    made = running()
    assert Tell("c", Attach("b:1")) in made.acts
    made.acts.clear()
    made.left("c", "was lost")
    made.confirmed(1, 0.0)
    assert {tuple(order.dropped) for order in frozen(made) if order.number} == {("c",)}


def test_it_is_not_named_any_more_once_it_has_a_seat_again() -> None:
    made = running()
    for name in "ce":
        made.left(name, "was lost")
    made.confirmed(1, 0.0)
    made.join(Join(VERSION, "c", "c:1", 1), 0.0)
    made.acts.clear()
    made.left("d", "was lost")
    made.confirmed(1, 0.0)
    assert {tuple(order.dropped) for order in frozen(made) if order.number} == {("d",)}


def test_a_client_is_told_which_agents_hang_on_others() -> None:
    made = running()
    made.received("c", Attached("b:1"))
    overview = made.consult(Inquiry())
    assert isinstance(overview, Overview)
    assert {place.agent: place.parent for place in overview.agents} == dict(
        zip("abcde", (-1, -1, 1, -1, -1), strict=True)
    )
