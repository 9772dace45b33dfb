"""What follows when replicas do not hold the same bytes: the comparison, and the coordinator's decisions."""

from __future__ import annotations

import msgspec
import pytest

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.checks import Finding, Published, compare, is_due, judge, pack, published
from checkpointless_elastic.protocol.coordinator import Coordinator
from checkpointless_elastic.protocol.events import (
    Action,
    AllFrozen,
    Broadcast,
    End,
    Lost,
    Restart,
    Tally,
    Warn,
)
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Message,
    Phase,
    Restore,
    Stage,
)

ALL: tuple[int, ...] = ()


def whole(**digests: int) -> bytes:
    """Of a rank whose pieces are all on all ranks."""
    return pack({ALL: digests})


GOOD, BAD = whole(w=1, b=2), whole(w=1, b=3)
CAUSE = "has other bytes than its replicas in b at step 5"


def coordinator(ranks: int = 3, steps: int = 5) -> Coordinator:
    made = Coordinator(frozenset(range(ranks)), max_faults_per_step=2)
    for rank in range(ranks):
        made.protect(rank)
    for step in range(steps):
        made.handle(Tally(Stage.READY, 0, step, dict.fromkeys(range(ranks), b"")))
    return made


def vote(it: Coordinator, *said: bytes) -> list[Action]:
    return it.handle(Tally(Stage.READY, it.generation, it.step, dict(enumerate(said))))


def messages(actions: list[Action]) -> list[Message]:
    return [action.message for action in actions if isinstance(action, Broadcast)]


def frozen(it: Coordinator, *ranks: int) -> list[Action]:
    answer = Frozen(it.generation, it.step, Phase.READY, True, True)
    return it.handle(AllFrozen(it.generation, dict.fromkeys(ranks, answer)))


# ---- the comparison


def test_equal_replicas_and_ranks_that_say_nothing_give_no_finding() -> None:
    assert compare({}) == []
    assert compare({0: GOOD, 1: GOOD, 2: b""}) == []
    assert compare({0: BAD, 1: b"", 2: b""}) == []


def test_one_of_three_is_in_the_minority() -> None:
    assert compare({0: GOOD, 1: BAD, 2: GOOD}) == [Finding("b", (0, 1, 2), (1,))]


@pytest.mark.parametrize(
    "said", [(GOOD, BAD), (GOOD, GOOD, BAD, BAD), (GOOD, BAD, whole(w=1, b=4)), (GOOD, BAD, b"")]
)
def test_without_a_majority_of_at_least_three_nobody_is_wrong(said: tuple[bytes, ...]) -> None:
    (found,) = compare(dict(enumerate(said)))
    assert (found.piece, found.wrong) == ("b", ())


def test_ranks_are_compared_with_those_only_that_should_hold_the_same() -> None:
    said = {
        rank: pack({(rank % 2, rank % 2 + 2, rank % 2 + 4): {"shard": rank % 2}, ALL: {"e": 7}})
        for rank in range(6)
    }
    assert compare(said) == []
    said[4] = pack({(0, 2, 4): {"shard": 9}, ALL: {"e": 7}})
    assert compare(said) == [Finding("shard", (0, 2, 4), (4,))]


def test_a_piece_that_a_rank_does_not_speak_of_is_compared_among_the_others() -> None:
    assert compare({0: GOOD, 1: whole(w=1), 2: GOOD}) == []
    assert compare({0: GOOD, 1: whole(w=2), 2: GOOD}) == [Finding("w", (0, 1, 2), (1,))]


def test_several_pieces_and_ranks_are_told_in_one_sentence_each() -> None:
    said = [whole(a=1, b=2, c=3)] * 3 + [whole(a=1, b=0, c=0), whole(a=0, b=2, c=3)]
    assert judge(dict(enumerate(said)), 8) == (
        {
            3: "has other bytes than its replicas in b and 1 more at step 8",
            4: "has other bytes than its replicas in a at step 8",
        },
        "",
    )


@pytest.mark.parametrize(
    "data", [b"\xc1", b"\x91\x93\x90\xc4\x01x\xc4\x08abcdefgh", msgspec.msgpack.encode([1])]
)
def test_what_cannot_be_read_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        compare({0: whole(w=1), 1: data})


def test_every_step_but_the_first_may_be_due() -> None:
    assert [step for step in range(7) if is_due(step, 3)] == [3, 6]
    assert not any(is_due(step, 0) for step in range(7))


# ---- the coordinator


def test_replicas_that_agree_are_committed() -> None:
    assert messages(vote(coordinator(), GOOD, GOOD, GOOD)) == [Commit(0, 5)]


def test_who_is_in_the_minority_is_ended_and_the_step_not_committed() -> None:
    it = coordinator()
    told, end = vote(it, GOOD, BAD, GOOD)
    assert told == Warn(f"[generation 0, step 5] Replicas differ: rank 1 {CAUSE}, and is replaced.")
    assert end == End(1, CAUSE)
    assert vote(it, GOOD, BAD, GOOD) == []  # said again on its way through the tree
    assert messages(it.handle(Lost(1, CAUSE)))
    assert messages(frozen(it, 0, 2)) == [Decision(1, 5, [0, 2], [1])]


def test_it_is_no_source_for_a_rank_that_is_lost_before_it_is_gone() -> None:
    it = coordinator(ranks=4)
    vote(it, GOOD, BAD, GOOD, GOOD)
    it.handle(Lost(3, "was lost"))
    assert messages(frozen(it, 0, 1, 2)) == []
    it.handle(Lost(1, CAUSE))
    assert messages(frozen(it, 0, 2)) == [Decision(2, 5, [0, 2], [1, 3])]


def test_two_that_differ_are_reported_committed_and_never_used_as_sources() -> None:
    it = coordinator(ranks=2)
    actions = vote(it, GOOD, BAD)
    assert messages(actions) == [Commit(0, 5)]
    (told,) = [action for action in actions if isinstance(action, Warn)]
    said = "ranks 0 and 1 hold different bytes of b at step 5, and nobody knows which are right"
    assert told.sentence.endswith(f"{said}: no lost rank can be recovered live any more.")
    (action,) = it.handle(Lost(1, "was lost"))
    assert action == Restart(3, f"rank 1 was lost, and {said}")


def test_nobody_is_ended_where_he_could_not_come_back_live() -> None:
    it = coordinator()
    it.holdings.distrust = "ema differs between ranks 0 and 1"
    actions = vote(it, GOOD, BAD, GOOD)
    assert messages(actions) == [Commit(0, 5)]
    (told,) = [action for action in actions if isinstance(action, Warn)]
    assert f"rank 1 {CAUSE}, and is left as it is" in told.sentence


def test_where_a_rank_is_wrong_again_and_again_at_one_step_the_script_is_run_again() -> None:
    it = coordinator()
    for _ in range(2):
        vote(it, GOOD, BAD, GOOD)
        it.handle(Lost(1, CAUSE))
        frozen(it, 0, 2)
        it.handle(Tally(Stage.PUBLISHED, it.generation, 5, {0: b"", 2: b""}))
        it.handle(Tally(Stage.ARRIVED, it.generation, 5, {1: b""}))
        it.handle(Tally(Stage.RESTORED, it.generation, 5, {1: b""}))
        it.handle(Tally(Stage.REBUILT, it.generation, 5, dict.fromkeys(range(3), b"")))
    (restart,) = [action for action in vote(it, GOOD, BAD, GOOD) if isinstance(action, Restart)]
    assert (restart.rung, "without a committed step between them" in restart.reason) == (3, True)


# ---- in a recovery


def recovery(*said: bytes) -> tuple[Coordinator, list[Action]]:
    """The last of these ranks and one more is lost; what follows when the others have published."""
    it = coordinator(ranks=len(said) + 1)
    it.handle(Lost(len(said), "was lost"))
    frozen(it, *range(len(said)))
    return it, publish(it, *enumerate(said))


def publish(it: Coordinator, *said: tuple[int, bytes]) -> list[Action]:
    reports = {rank: msgspec.msgpack.encode(Published(one, b"state")) for rank, one in said}
    return it.handle(Tally(Stage.PUBLISHED, it.generation, 5, reports))


def arrive(it: Coordinator, *ranks: int) -> list[Message]:
    return messages(it.handle(Tally(Stage.ARRIVED, it.generation, 5, dict.fromkeys(ranks, b""))))


def test_sources_that_agree_serve_the_replacement_which_does_not_get_their_digests() -> None:
    it, actions = recovery(GOOD, GOOD, GOOD)
    assert not messages(actions)
    assert arrive(it, 3) == [Restore(1, dict.fromkeys(range(3), b"state"))]


def test_a_source_in_the_minority_is_ended_before_a_replacement_copies_from_it() -> None:
    it, actions = recovery(GOOD, BAD, GOOD)
    assert actions == [
        Warn(f"[generation 1, step 5] Replicas differ: rank 1 {CAUSE}, and is replaced."),
        End(1, CAUSE),
    ]
    assert arrive(it, 3) == []
    assert messages(it.handle(Lost(1, CAUSE))) == [Freeze(2, [1, 3], [])]
    assert messages(frozen(it, 0, 2)) == [Decision(2, 5, [0, 2], [1, 3])]
    publish(it, (0, GOOD), (2, GOOD))
    assert arrive(it, 1, 3) == [Restore(2, {0: b"state", 2: b"state"})]


def test_two_sources_that_differ_serve_nobody() -> None:
    it, actions = recovery(GOOD, BAD)
    said = "ranks 0 and 1 hold different bytes of b at step 5, and nobody knows which are right"
    assert actions[-1] == Restart(3, f"rank 2 was lost, and {said}")
    assert arrive(it, 2) == []


def test_sources_that_say_nothing_are_not_compared() -> None:
    it, _ = recovery(GOOD, BAD, b"")
    assert it.holdings.distrust
    it, actions = recovery(b"", BAD, b"")
    assert not messages(actions)
    assert len(arrive(it, 3)) == 1


def test_what_is_no_publication_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        published(b"\xc1")
