"""Real torchruns lose workers and nodes: the others stay, and no bit differs from a run without the fault."""

from __future__ import annotations

from collections.abc import Callable

from tests.nodes.cluster import Nodes


def test_a_worker_lost_on_another_node_than_the_coordinators_is_replaced_there(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2", 2, "3:5:forward:kill")
    it.start(2)
    ended = it.finish()
    check(ended, 3)
    assert [len(ended.pids(rank)) for rank in range(4)] == [1, 1, 1, 2]


def test_the_ranks_of_a_lost_node_move_to_a_spare_and_all_others_stay(
    job: Callable[..., Nodes], check: Callable[..., None]
) -> None:
    it = job("2:3", 2, "2:5:backward:node")
    it.start(3)
    ended = it.finish()
    check(ended, 2, 3)
    assert [len(ended.pids(rank)) for rank in range(4)] == [1, 1, 2, 2]
    assert sorted(it.codes) == [-9, 0, 0]
