"""The tree of many agents, as one of them sees it.

Every agent keeps its connection to the coordinator, for what concerns it alone: seats, losses, words of its ranks. What
concerns all (orders of a step or a recovery, the gathered answers, heartbeats) would be a message per agent there. With
more seats than `Rules.fan_out`, agents therefore hang in a tree with that many children each. The coordinator is its
root, and names each agent's parent (`Attach`); the agent connects to it (`Child`) and says so (`Attached`). From then
on the coordinator sends it nothing that all get. Orders go down the tree, answers come up merged.

A connection of the tree may break, or a parent be lost, with orders and answers on the way. The tree repairs nothing:
all children of that parent are told to hang on the coordinator again, and a generation is opened, in which all
gathers begin anew; the tree is made whole when the job runs again. Orders are numbered, so one that comes on two ways
(from the parent and, while an agent moves, from the coordinator) is obeyed once; in which order those two come does not
matter, since whatever is not answered before the next order is sent is void with it.

Who hears nothing from its parent says `Detached`; who hears nothing from a child says `Silent`, and the coordinator
takes that agent to be lost. A heartbeat of the coordinator that comes down the tree is a sign of life of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from checkpointless_elastic.protocol.between import AnswerBundle, Answers, Between, Bundle, Gathered, Ordered
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    Frozen,
    Rebuild,
    Resume,
    Stage,
)

__all__ = ["BULK", "Branch", "Merged", "unbundled"]

BULK = (Stage.READY, Stage.PUBLISHED, Stage.REBUILT)
"""Stages that all agents report, so that each waits for its children's."""

Merged = Gathered | Answers | Bundle | AnswerBundle
_Key = tuple[Stage, int, int]
_Run = tuple[int, int, "bytes | Frozen"]


class Branch:
    """One agent's part of the tree, while it follows one coordinator. ``up(message)``: sends to the parent.

    Attributes:
        parent: address of the parent; empty: the coordinator.
        link: the connection to it, 0 without one; ``open``: it is there.
        children: by connection, the agent's name.
    """

    def __init__(self, up: Callable[[Between], None]) -> None:
        self.parent, self.link, self.open = "", 0, False
        self.children: dict[int, str] = {}
        self._up = up
        self._numbers: set[tuple[int, int]] = set()
        self._generation = -1
        self._parts: dict[_Key, dict[int, Merged]] = {}  # by who said it, 0 for this agent
        self._sent: dict[_Key, list[Merged]] = {}  # whose gather is over here

    def is_new(self, term: int, number: int) -> bool:
        """Is this order the first of its number?"""
        new = (term, number) not in self._numbers
        self._numbers.add((term, number))
        return new

    def ordered(self, order: Ordered) -> None:
        """What was gathered for an order that has come is not needed any more."""
        if isinstance(order, Freeze):
            self._generation = max(self._generation, order.generation)
            over = [key for key in self._keys() if key[1] < order.generation or key[0] is Stage.FROZEN]
        else:
            over = [key for key in self._keys() if _answers(key, order)]
        for key in over:
            self._parts.pop(key, None)
            self._sent.pop(key, None)

    def _keys(self) -> set[_Key]:
        return self._parts.keys() | self._sent.keys()

    def said(self, child: int, message: Merged) -> None:
        """This agent (0) or a child has said something that all say: on with it when all here have."""
        key = _key(message)
        if key[1] < self._generation:
            return
        if key in self._sent or not self.children:
            self._on(key, message)
            return
        parts = self._parts.setdefault(key, {})
        if child in parts:
            self._up(message)
        parts[child] = message
        self._look(key)

    def _look(self, key: _Key) -> None:
        if self._parts[key].keys() >= {0, *self.children}:
            self._on(key, merged(self._parts.pop(key).values()))

    def dropped(self, child: int) -> str:
        """A child is gone: nothing waits for it any more. Its name is returned."""
        name = self.children.pop(child)
        for key in list(self._parts):
            self._look(key)
        return name

    def _on(self, key: _Key, message: Merged) -> None:
        self._sent.setdefault(key, []).append(message)
        self._up(message)

    def repeat(self) -> None:
        """There is a new parent: it waits for what others were told."""
        for messages in self._sent.values():
            for message in messages:
                self._up(message)


def _key(message: Merged) -> _Key:
    if isinstance(message, (Answers, AnswerBundle)):
        return Stage.FROZEN, message.generation, 0
    return message.stage, message.generation, message.step if message.stage is Stage.READY else 0


_ANSWERED = {Decision: Stage.FROZEN, Rebuild: Stage.PUBLISHED, Resume: Stage.REBUILT}


def _answers(key: _Key, order: Ordered) -> bool:
    """Has the coordinator sent this order because that gather was over?"""
    stage, generation, step = key
    if isinstance(order, Commit):
        return stage is Stage.READY and (generation, step) <= (order.generation, order.step)
    if not isinstance(order, (Decision, Rebuild, Resume)):
        return False
    return stage is _ANSWERED[type(order)] and generation <= order.generation


def merged(parts: Iterable[Merged]) -> Merged:
    """One message of several of one gather: equal reports of ranks that follow each other are one run."""
    parts = list(parts)
    runs: list[_Run] = []
    for first, count, report in sorted(
        (run for part in parts for run in _runs(part)), key=lambda run: run[0]
    ):
        if runs and runs[-1][0] + runs[-1][1] == first and runs[-1][2] == report:
            runs[-1] = (runs[-1][0], runs[-1][1] + count, report)
        else:
            runs.append((first, count, report))
    one = parts[0]
    if isinstance(one, (Answers, AnswerBundle)):
        kept = {rank: step for part in parts for rank, step in part.mirrored.items()}  # type: ignore[union-attr]
        return AnswerBundle(one.generation, runs, kept)  # type: ignore[arg-type]
    return Bundle(one.stage, one.generation, max(part.step for part in parts), runs)  # type: ignore[arg-type,union-attr]


def _runs(part: Merged) -> Iterable[_Run]:
    if isinstance(part, (Bundle, AnswerBundle)):
        return part.runs
    return ((rank, 1, report) for rank, report in part.reports.items())


def unbundled(message: Bundle | AnswerBundle) -> Gathered | Answers:
    """By rank, as one agent would say it."""
    reports = {first + n: report for first, count, report in message.runs for n in range(count)}
    if isinstance(message, AnswerBundle):
        return Answers(message.generation, reports, message.mirrored)  # type: ignore[arg-type]
    return Gathered(message.stage, message.generation, message.step, reports)  # type: ignore[arg-type]
