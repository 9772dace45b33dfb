"""What a client is told of the job, and whether a node may be drained: pure functions of what the board knows."""

from __future__ import annotations

from dataclasses import dataclass

from checkpointless_elastic.protocol import resize
from checkpointless_elastic.protocol.coordinator import Coordinator, State
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.protocol.requests import Declined, Drain, Overview, Place

__all__ = ["DRAINED", "View", "has_spare", "obstacle", "overview"]

DRAINED = "was drained"


@dataclass(frozen=True)
class View:
    """What the board knows.

    Attributes:
        me: the coordinator's agent.
        agents: all that take part, those with a seat and spares.
        vacant: seats without an agent, also those whose loss is not confirmed yet.
        coordinator: None before the job has begun, or while it is taken over.
        over: the job has ended.
        excluded: agents that are no spares although they have no seat.
        wanted, resizes: see Overview.
        shrinks: the job may go on with one node less, as far as their number counts.
    """

    term: int
    me: str
    agents: list[Place]
    bases: list[int]
    world: int
    vacant: list[int]
    restarts: int
    coordinator: Coordinator | None
    over: bool
    excluded: frozenset[str] = frozenset()
    wanted: int = 0
    resizes: int = 0
    shrinks: bool = False

    def ranks(self, seat: int) -> frozenset[int]:
        """Of this seat."""
        return frozenset(ranks(seat, self.bases, self.world))


def overview(view: View) -> Overview:
    """The job as it is now."""
    coordinator = view.coordinator
    return Overview(
        view.term,
        view.me,
        _state(view),
        coordinator.generation if coordinator is not None else 0,
        coordinator.step if coordinator is not None else 0,
        view.restarts,
        view.bases,
        view.world,
        sorted(view.agents, key=lambda place: (place.seat < 0, place.seat, place.agent)),
        sorted(coordinator.pending) if coordinator is not None else [],
        exposed(coordinator) if coordinator is not None else "",
        dict(coordinator.paces.slow) if coordinator is not None else {},
        view.wanted if view.bases else 0,
        view.resizes,
    )


def _state(view: View) -> str:
    if view.over:
        return State.ENDED.value
    if view.coordinator is not None:
        return view.coordinator.state.value
    return "taking over" if view.bases else "gathering"


def exposed(coordinator: Coordinator) -> str:
    """Why a loss would run the script again from its top, as part of a sentence; empty: it would not."""
    if coordinator.protected:
        return ""
    if coordinator.holdings.distrust:
        return coordinator.holdings.distrust
    return (
        "no step is committed yet"
        if coordinator.step == coordinator.first
        else "the script of some rank has made no Run"
    )


def obstacle(view: View, drain: Drain) -> Declined | None:
    """Why this node cannot be drained now; None if it can."""
    place = next((place for place in view.agents if place.agent == drain.agent), None)
    coordinator = view.coordinator
    if view.over or (coordinator is not None and coordinator.state is State.ENDED):
        return _never("the job has ended, or all its ranks have finished")
    if place is None or place.seat != drain.seat:
        return _never(f"agent {drain.agent} has left, or its seat is another one by now; look at the status")
    if drain.keep and place.seat < 0:
        return _never(f"agent {drain.agent} is a spare, and --keep would leave it one")
    if place.seat < 0 and place.agent != view.me:
        return None
    if coordinator is None:
        return _later("the job has not begun, or has no coordinator yet that knows all its nodes")
    if coordinator.state is not State.RUNNING or view.vacant:
        return _later("a recovery goes on, or a seat is vacant")
    if reason := exposed(coordinator):
        again = coordinator.step == coordinator.first
        return Declined(f"all ranks would run the script again from its top: {reason}", again)
    return _irreplaceable(view, place, coordinator) if place.seat >= 0 else None


def has_spare(view: View, size: int) -> bool:
    """Does an agent wait that may take a seat with so many ranks?"""
    waiting = (other for other in view.agents if other.seat < 0 and other.agent not in view.excluded)
    return any(spare.size == size for spare in waiting)


def _irreplaceable(view: View, place: Place, coordinator: Coordinator) -> Declined | None:
    spare = has_spare(view, place.size)
    if not spare and not view.shrinks:
        return _never(
            f"no spare waits that runs {place.size} workers; start torchrun on one more node with the options of the "
            f"others (--nnodes MIN:MAX must allow it), and drain again"
        )
    holdings = coordinator.holdings
    if holdings.held.keys() != coordinator.ranks:
        return _later("not all ranks have said what state they hold, which they do after the first step")
    own = view.ranks(place.seat)
    if not spare and (why := resize.obstacle(coordinator, coordinator.ranks - own)):
        return _never(
            f"no spare waits that runs {place.size} workers, and the job cannot go on with fewer nodes: {why}"
        )
    alone = [rank for rank in sorted(own) if not holdings.twins(rank) & coordinator.whole - own]
    if alone:
        return _never(
            f"rank {alone[0]} holds state that no rank on another node holds; train with a replica of each shard on "
            f"another node"
        )
    return None


def _never(reason: str) -> Declined:
    return Declined(reason, False)


def _later(reason: str) -> Declined:
    return Declined(reason, True)
