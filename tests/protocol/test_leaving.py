"""Members of a job of which one leaves: who is told, and who coordinates then."""

from __future__ import annotations

from checkpointless_elastic.protocol.acts import Ask, HangUp, Obey, Query, Transmit
from checkpointless_elastic.protocol.between import Attach, Beat, Child, Spare
from checkpointless_elastic.protocol.member import Me, Member, State
from checkpointless_elastic.protocol.requests import Declined, Dismissed, Inquiry, Leaving
from checkpointless_elastic.protocol.rules import Rules


def follower() -> Member:
    """Of agent a, the coordinator of term 4."""
    made = Member(Me("b", "b:1", 1), Rules(active_nodes=2, max_nodes=3), lambda: None, lambda: "store:1")
    made.begin(0.0)
    made.found(4, "a:1", "", 0.0)
    made.opened(1, "a", 0.0)
    made.received(1, Spare(4, [0, 1], 2), 0.0)
    return made


def test_who_leaves_tells_the_coordinator_and_is_out() -> None:
    made = follower()
    told, hung_up = made.leave("was drained (SIGTERM)", 1.0)
    assert told == Transmit(1, Leaving("b", "was drained (SIGTERM)"))
    assert isinstance(hung_up, HangUp)
    assert made.state is State.OUT
    assert made.tick(9.0) == []


def test_who_hears_that_the_coordinator_leaves_claims_the_next_term_at_once() -> None:
    made = follower()
    acts = made.received(1, Leaving("a", "was drained"), 1.0)
    assert Ask(Query.CLAIM, 5) in acts
    assert made.state is State.SEEKING


def test_who_is_dismissed_obeys_and_is_out() -> None:
    made = follower()
    acts = made.received(1, Dismissed("was drained"), 1.0)
    assert acts[-1] == Obey(Dismissed("was drained"))
    assert made.state is State.OUT


def test_who_does_not_coordinate_sends_a_client_elsewhere() -> None:
    answer, acts = follower().consult(Inquiry(), 1.0)
    assert answer == Declined("this agent does not coordinate the job", True)
    assert acts == []


def test_who_has_dialled_the_coordinator_in_its_last_term_learns_the_next_one_from_its_first_beat() -> None:
    made = follower()
    made.received(1, Beat(5, 1, 0), 1.0)
    assert made.term == 5
    made.received(1, Attach("c:1"), 1.0)
    assert Transmit(2, Child(5, "b")) in made.opened(2, "c", 1.0)
