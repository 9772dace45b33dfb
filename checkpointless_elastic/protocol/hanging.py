"""How an agent hangs in the tree of many agents: the part of `member` that has a parent and children. See `branch`."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from checkpointless_elastic.protocol.acts import Act, Dial, HangUp, Tell
from checkpointless_elastic.protocol.between import (
    Answers,
    Attached,
    Beat,
    Between,
    Child,
    Detached,
    Gathered,
    Order,
    Ordered,
    Standing,
)
from checkpointless_elastic.protocol.branch import Branch
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.protocol.messages import Decision, Freeze, Stage
from checkpointless_elastic.protocol.requests import Leaving
from checkpointless_elastic.protocol.rules import Rules
from checkpointless_elastic.protocol.seeker import Me, Seeker, State

__all__ = ["Hanging", "Link", "whole"]


@dataclass
class Link:
    """One connection. ``agent``: whose it is; '' until that is known."""

    heard: float
    agent: str = ""


def whole(order: Ordered, world: int) -> Ordered:
    """See Order."""
    if not isinstance(order, Decision) or order.sources:
        return order
    return msgspec.structs.replace(order, sources=_all_but(tuple(order.pending), world))


@functools.lru_cache(maxsize=2)
def _all_but(ranks: tuple[int, ...], world: int) -> list[int]:
    return sorted(set(range(world)) - set(ranks))


class Hanging(Seeker):
    """Base of `member.Member`."""

    def __init__(
        self, me: Me, rules: Rules, standing: Callable[[], Standing | None], open_store: Callable[[], str]
    ) -> None:
        super().__init__(me, rules, standing, open_store)
        self._links: dict[int, Link] = {}
        self._branch = Branch(self._up)
        self._farewell = 0, ""  # the term whose coordinator has said that it leaves, and why

    @abstractmethod
    def _tell(self, act: Tell, now: float) -> None:
        """As the coordinator, to an agent."""

    @abstractmethod
    def _follow(self, message: Between, now: float) -> None:
        """A word of the coordinator."""

    def _up(self, message: Between) -> None:
        self._send(self._branch.link if self._branch.open else self._uplink, message)

    def _attach(self, parent: str) -> None:
        branch = self._branch
        if parent == branch.parent:
            return
        if branch.link:
            self._acts.append(HangUp(branch.link, "this agent has another parent"))
            self._links.pop(branch.link, None)
        branch.parent, branch.link, branch.open = parent, 0, False
        if parent:
            self._dialled += 1
            branch.link = self._dialled
            self._acts.append(Dial(branch.link, parent))

    def _attached(self) -> None:
        branch = self._branch
        self._send(branch.link, Child(self._leader.term, self._me.name))
        branch.open = True
        branch.repeat()
        self._send(self._uplink, Attached(branch.parent))

    def _detached(self, now: float) -> None:
        """The coordinator hears of it, and is given its time to show that it lives."""
        branch, parent = self._branch, self._branch.parent
        was_open = branch.open
        branch.parent, branch.link, branch.open = "", 0, False
        self._links[self._uplink].heard = now
        if was_open:
            self._send(self._uplink, Detached(parent))

    def _takes(self, child: Child) -> bool:
        return self.state is State.FOLLOWING and child.term == self._leader.term

    def _from_parent(self, message: Between, now: float) -> None:
        if isinstance(message, (Beat, Order)) and message.term == self._leader.term:
            if isinstance(message, Order) or message.count > self._leader.count:
                self._links[self._uplink].heard = now
            self._follow(message, now)

    def _pass_on(self, order: Order) -> bool:
        """To the children. False: this order came before, on another way."""
        branch = self._branch
        if not branch.is_new(order.term, order.number):
            return False
        for child in [link for link, agent in branch.children.items() if agent in order.dropped]:
            self._acts.append(HangUp(child, "its seat was given up"))
            self._links.pop(child, None)
            branch.dropped(child)
        for child in branch.children:
            self._send(child, order)
        branch.ordered(order.message)
        nothing = self._nothing_to_say(order.message)
        if nothing is not None and self.state is State.FOLLOWING:
            branch.said(0, nothing)
        return True

    def _nothing_to_say(self, order: Ordered) -> Answers | Gathered | None:
        """If all ranks here are replacements, nobody here answers, and the parent waits for this agent all the same."""
        if not isinstance(order, (Freeze, Decision)):
            return None
        standing = self._standing()
        if standing is None:
            return None
        own = ranks(standing.seat, self._bases, self._world)
        new = set(order.lost if isinstance(order, Freeze) else order.pending)
        if not new.issuperset(own):
            return None
        if isinstance(order, Freeze):
            return Answers(order.generation, {})
        return Gathered(Stage.PUBLISHED, order.generation, order.step, {})

    def _leave_tree(self) -> None:
        branch = self._branch
        for link in [branch.link, *branch.children]:
            if link:
                self._acts.append(HangUp(link, "this agent leaves the tree"))
                self._links.pop(link, None)
        self._branch = Branch(self._up)

    # ---- an agent leaves

    def leave(self, cause: str, now: float) -> list[Act]:
        """This agent's process ends soon: others are told at once. ``cause`` completes "node 3 ..."."""
        self._leave(cause, now)
        return self._flush()

    def _leave(self, cause: str, now: float) -> None:
        leaving, board = Leaving(self._me.name, cause), self.board
        if board is not None:
            for name in board.agents:
                if name != self._me.name:
                    self._tell(Tell(name, leaving), now)
            self.board = None
            self._guards = self._guarded = 0
        elif self.state is State.FOLLOWING:
            self._send(self._uplink, leaving)
        self._hang_up_uplink("this agent leaves")
        self.state = State.OUT

    def _left_alone(self, message: Leaving, now: float) -> None:
        """The coordinator leaves: this agent may be the next one."""
        self._farewell = self._leader.term, message.cause
        self._hang_up_uplink("the coordinator leaves")
        self.state = State.SEEKING
        self._hold()
        self._succeed(now)

    def _hang_up_uplink(self, reason: str) -> None:
        self._leave_tree()
        if self._uplink:
            self._acts.append(HangUp(self._uplink, reason))
            self._links.pop(self._uplink, None)
            self._uplink = 0
