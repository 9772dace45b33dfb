"""What mirrors on another node mean for the decisions of a recovery, and what a guardian keeps of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpointless_elastic.agent.shelf import Book, Shelf
from checkpointless_elastic.protocol.between import AnswerBundle, Answers, Seated
from checkpointless_elastic.protocol.branch import merged, unbundled
from checkpointless_elastic.protocol.coordinator import Coordinator
from checkpointless_elastic.protocol.events import AllFrozen, Chosen, Lost, NodeLost, Tally
from checkpointless_elastic.protocol.guarding import Put
from checkpointless_elastic.protocol.hearing import event_of
from checkpointless_elastic.protocol.holdings import Holdings
from checkpointless_elastic.protocol.messages import Commit, Decision, Freeze, Frozen, Phase, Replicas, Stage
from checkpointless_elastic.protocol.station import Station


def sharded(steps: int = 5, every: int = 1) -> Coordinator:
    """Two nodes with two ranks each; every rank has a shard of its own."""
    coordinator = Coordinator(frozenset(range(4)), 3, mirror_every=every)
    for rank in range(4):
        coordinator.protect(rank)
        coordinator.holdings.compare(rank, Replicas([[rank]], {"shard": (0, rank)}))
    for step in range(steps):
        coordinator.handle(Tally(Stage.READY, 0, step, dict.fromkeys(range(4), b"")))
    return coordinator


def survivors(coordinator: Coordinator, mirrored: dict[int, int]) -> AllFrozen:
    """Ranks 0 and 1 compute the step that is next, and their agent keeps these mirrors."""
    answer = Frozen(coordinator.generation, coordinator.step, Phase.COMPUTING, True, True)
    return AllFrozen(coordinator.generation, {0: answer, 1: answer}, mirrored)


def test_the_ranks_of_a_lost_node_go_on_from_the_mirrors_that_their_guardian_has_of_this_very_step() -> None:
    coordinator = sharded()
    coordinator.handle(NodeLost(1, frozenset({2, 3}), "was lost"))
    coordinator.handle(survivors(coordinator, {2: 5, 3: 5}))
    assert coordinator.decision == Decision(1, 5, [0, 1], [2, 3], mirrors=[2, 3])


@pytest.mark.parametrize("mirrored", [{2: 5, 3: 4}, {2: 5}, {}])
def test_all_go_back_one_step_when_the_newest_mirror_of_a_lost_node_had_not_come_whole(
    mirrored: dict[int, int],
) -> None:
    coordinator = sharded()
    coordinator.handle(NodeLost(1, frozenset({2, 3}), "was lost"))
    actions = coordinator.handle(survivors(coordinator, mirrored))
    (chosen,) = (action for action in actions if isinstance(action, Chosen))
    assert chosen.reason.endswith("so every rank goes on from its mirror of step 4")
    for rank in (0, 1):
        coordinator.handle(Lost(rank, "was ended", mirrored=5))
    assert coordinator.decision is not None
    assert (coordinator.decision.step, coordinator.decision.mirrors) == (4, [0, 1, 2, 3])


def test_a_mirror_on_the_ranks_own_node_counts_if_its_guardian_has_only_an_older_one() -> None:
    coordinator = sharded()
    coordinator.handle(Lost(2, "was lost", mirrored=5))
    answer = Frozen(1, 5, Phase.COMPUTING, True, True)
    coordinator.handle(AllFrozen(1, {0: answer, 1: answer, 3: answer}, {2: 4}))
    assert coordinator.decision == Decision(1, 5, [0, 1, 3], [2], mirrors=[2])


def test_a_rank_with_a_replica_takes_no_mirror() -> None:
    coordinator = Coordinator(frozenset(range(2)), 3, mirror_every=1)
    for rank in range(2):
        coordinator.protect(rank)
        coordinator.holdings.compare(rank, Replicas([[]], {"weight": (0, 7)}))
    for step in range(5):
        coordinator.handle(Tally(Stage.READY, 0, step, {0: b"", 1: b""}))
    coordinator.handle(NodeLost(1, frozenset({1}), "was lost"))
    coordinator.handle(AllFrozen(1, {0: Frozen(1, 5, Phase.COMPUTING, True, True)}, {1: 5}))
    assert coordinator.decision == Decision(1, 5, [0], [1])


def test_what_guardians_keep_comes_up_the_tree_with_the_answers() -> None:
    answer = Frozen(3, 5, Phase.COMPUTING, True, True)
    bundle = merged([Answers(3, {0: answer}, {6: 5}), AnswerBundle(3, [(1, 1, answer)], {7: 4})])
    assert bundle == AnswerBundle(3, [(0, 2, answer)], {6: 5, 7: 4})
    assert isinstance(bundle, AnswerBundle)
    event = event_of(unbundled(bundle))
    assert event == AllFrozen(3, {0: answer, 1: answer}, {6: 5, 7: 4})


def test_a_seat_knows_that_all_have_gone_back() -> None:
    station = Station(Seated(1, 0, [0, 1], 2, "", "", 0, 0, False))
    station.obey(Commit(0, 6))
    station.obey(Freeze(1, [1], []))
    station.obey(Decision(1, 4, [], [0, 1]))
    assert station.standing().step == 4


@pytest.mark.parametrize(
    ("mirrored", "nodes", "says"), [(True, 1, "on one node"), (True, 2, ""), (False, 2, "set mirror_every")]
)
def test_what_mirrors_do_not_protect_from_is_said_once_all_have_said_what_they_hold(
    mirrored: bool, nodes: int, says: str
) -> None:
    holdings = Holdings(frozenset({0, 1}))
    holdings.compare(0, Replicas([[0]], {"shard": (0, 1)}))
    assert holdings.warning(mirrored, nodes) == ""
    holdings.compare(1, Replicas([[1]], {"shard": (0, 2)}))
    warning = holdings.warning(mirrored, nodes)
    assert says in warning and bool(says) is bool(warning)


# ---- what a guardian keeps


def come(shelf: Shelf, step: int, begun: int = 0, content: bytes = b"x") -> Book:
    """A whole mirror of rank 2."""
    book = shelf.begin(Put(2, begun, (step, begun), b"entry", [len(content)]))
    for memory in book.memory():
        memory[:] = content
    shelf.keep(book)
    return book


def test_a_guardian_keeps_the_two_newest_mirrors_of_a_rank(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    for step in (3, 4, 5):
        come(shelf, step)
    assert [shelf.has(2, (step, 0)) for step in (3, 4, 5)] == [False, True, True]
    assert shelf.newest([1, 2]) == {2: 5}
    assert list(tmp_path.iterdir()) == []  # its memory has no names


def test_a_mirror_that_did_not_come_whole_leaves_the_one_before_it(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    come(shelf, 3)
    come(shelf, 4, content=b"4")
    torn = shelf.begin(Put(2, 0, (5, 0), b"entry", [1]))
    assert shelf.newest([2]) == {2: 4}
    shelf.drop(torn)
    with shelf.reading([2], 4) as (book,):
        assert [bytes(memory) for memory in book.memory()] == [b"4"]
    with shelf.reading([2], 5) as books:
        assert books == []


def test_memory_is_used_again_but_not_while_it_is_sent(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    first, second = come(shelf, 3), come(shelf, 4)
    third = come(shelf, 5)
    assert third.files == first.files
    with shelf.reading([2], 4) as (book,):
        fourth = come(shelf, 6)
        assert book is second
        assert fourth.files != second.files


def test_mirrors_of_steps_that_are_done_again_do_not_count(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    come(shelf, 4, begun=1)
    come(shelf, 5, begun=1)
    shelf.decided(2, 4)
    assert shelf.newest([2]) == {2: 4}
    come(shelf, 5, begun=1)  # was on its way
    assert shelf.newest([2]) == {2: 4}
    come(shelf, 5, begun=2)
    assert shelf.has(2, (5, 2))
    shelf.decided(3, 6)
    assert shelf.newest([2]) == {2: 5}


def test_nothing_is_kept_for_the_next_run_of_the_script(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    come(shelf, 5, begun=1)
    shelf.forget(3)
    come(shelf, 5, begun=2)
    assert shelf.newest([2]) == {}
    come(shelf, 2, begun=3)
    assert shelf.newest([2]) == {2: 2}


def test_a_mirror_for_which_there_is_no_room_is_an_error(tmp_path: Path) -> None:
    shelf = Shelf(str(tmp_path))
    come(shelf, 5)
    with pytest.raises(OSError, match="large|space"):
        shelf.begin(Put(2, 0, (6, 0), b"entry", [1 << 62]))
    assert shelf.newest([2]) == {2: 5}
