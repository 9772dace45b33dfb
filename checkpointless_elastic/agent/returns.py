"""How the ranks of a lost node get their mirrors back, in the agent that has taken its seat.

The decision of a recovery names the ranks that go on from their mirrors. Those that are not on this node come from the
guardian, while the workers start and load the script. That these have arrived is said only when their mirrors have, or
cannot be had: then the worker says so itself, when it finds none.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.mirrors import AGAIN_S, Line, get
from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.runtime import Timer
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.protocol.messages import Decision, Report, Stage
from checkpointless_elastic.worker.mirror_files import has

__all__ = ["Returns"]

logger = logging.getLogger(__name__)


class Returns:
    """See the module. ``say(rank, report)``: gives a report back that was held."""

    def __init__(
        self,
        bell: Bell,
        peers: Peers,
        run_dir: str,
        ranks: frozenset[int],
        say: Callable[[int, Report], None],
    ) -> None:
        self._bell, self._peers, self._run_dir, self._ranks, self._say = bell, peers, run_dir, ranks, say
        self._wanted: Decision | None = None  # whose mirrors are not all here
        self._held: list[tuple[int, Report]] = []
        self._address = ""
        self._line: Line | None = None
        self._wire: Wire | None = None
        self._again: Timer | None = None
        self._may = False

    def line(self, peer: Peer) -> Line | None:
        """See Sender."""
        return self._line if self._line is not None and self._line.owns(peer) else None

    def move(self, address: str) -> None:
        """The guardian is this one now; empty: there is none."""
        self._address = address
        self._ask()

    def allow(self) -> None:
        """This node's files are laid out: mirrors may come."""
        self._may = True
        self._ask()

    def decided(self, decision: Decision) -> None:
        """What was asked for before does not count any more."""
        self.close()
        self._wanted, self._held = decision, []
        self._ask()

    def holds(self, rank: int, report: Report) -> bool:
        """Is this report to be kept back until the mirrors are here?"""
        wanted = self._wanted
        if report.stage is not Stage.ARRIVED or wanted is None or report.generation != wanted.generation:
            return False
        self._held.append((rank, report))
        return True

    def close(self) -> None:
        """Nothing is waited for."""
        if self._again is not None:
            self._again.cancel()
        if self._line is not None:
            self._line.close()
        if self._wire is not None:
            self._wire.end()
        self._again = self._line = self._wire = None

    def _missing(self, decision: Decision) -> list[int]:
        here = self._ranks.intersection(decision.mirrors)
        return [rank for rank in here if not has(self._run_dir, rank, decision.step)]

    def _ask(self) -> None:
        if self._wanted is None or not self._may:
            return
        self.close()
        if not self._missing(self._wanted):
            self._release()
        elif self._address:
            self._line = Line(self._peers, self._address, self._connected, self._failed)

    def _connected(self, wire: Wire) -> None:
        assert self._wanted is not None
        self._line, self._wire = None, wire
        threading.Thread(
            target=self._get,
            args=(wire, self._missing(self._wanted), self._wanted.step),
            name="checkpointless-returns",
            daemon=True,
        ).start()

    def _get(self, wire: Wire, ranks: list[int], step: int) -> None:
        """On a thread."""
        try:
            get(wire, self._run_dir, ranks, step)
            ended = functools.partial(self._got, wire)
        except (OSError, CheckpointlessError) as error:
            ended = functools.partial(self._broken, wire, str(error))
        finally:
            wire.close()
        self._bell.ring(ended)

    def _got(self, wire: Wire) -> None:
        if wire is self._wire:
            self._wire = None
            self._release()

    def _broken(self, wire: Wire, reason: str) -> None:
        if wire is self._wire:
            self._wire = None
            self._failed(reason)

    def _failed(self, reason: str) -> None:
        """Until the guardian is another one, a newer decision comes, or the coordinator's limit has passed."""
        logger.warning("The mirrors of this node's ranks cannot be got from its guardian: %s.", reason)
        self._line = None
        self._again = self._peers.loop.call_later(AGAIN_S, self._ask)

    def _release(self) -> None:
        self._wanted, held = None, self._held
        self._held = []
        for rank, report in held:
            self._say(rank, report)
