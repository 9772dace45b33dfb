"""How the agent that has taken a seat gets private state from its guardian that is too large for a message."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable

from checkpointless_elastic.agent.bell import Bell
from checkpointless_elastic.agent.copies import fetch
from checkpointless_elastic.agent.mirrors import AGAIN_S, Line
from checkpointless_elastic.agent.peers import Peer, Peers
from checkpointless_elastic.agent.runtime import Timer
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.protocol.guarding import Kept

__all__ = ["Fetching"]

logger = logging.getLogger(__name__)


class Fetching:
    """See the module. After `begin`, ``came(kept)`` or, in a while, ``failed()`` comes on the loop."""

    def __init__(
        self, bell: Bell, peers: Peers, came: Callable[[Kept], None], failed: Callable[[], None]
    ) -> None:
        self._bell, self._peers, self._came, self._failed = bell, peers, came, failed
        self._line: Line | None = None
        self._wire: Wire | None = None
        self._again: Timer | None = None

    def line(self, peer: Peer) -> Line | None:
        """See Sender."""
        return self._line if self._line is not None and self._line.owns(peer) else None

    def begin(self, address: str, kept: Kept) -> None:
        """Get what the guardian has named as large."""
        self.close()
        self._line = Line(self._peers, address, lambda wire: self._connected(wire, kept), self._lost)

    def close(self) -> None:
        """Nothing is waited for."""
        if self._again is not None:
            self._again.cancel()
        if self._line is not None:
            self._line.close()
        if self._wire is not None:
            self._wire.end()
        self._again = self._line = self._wire = None

    def _connected(self, wire: Wire, kept: Kept) -> None:
        self._line, self._wire = None, wire
        threading.Thread(
            target=self._get, args=(wire, kept), name="checkpointless-copies", daemon=True
        ).start()

    def _get(self, wire: Wire, kept: Kept) -> None:
        """On a thread."""
        try:
            whole = Kept([*kept.copies, *fetch(wire, kept.large)], kept.held)
            ended = functools.partial(self._got, wire, whole)
        except (OSError, CheckpointlessError) as error:
            ended = functools.partial(self._broken, wire, str(error))
        finally:
            wire.close()
        self._bell.ring(ended)

    def _got(self, wire: Wire, kept: Kept) -> None:
        if wire is self._wire:
            self._wire = None
            self._came(kept)

    def _broken(self, wire: Wire, reason: str) -> None:
        if wire is self._wire:
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        logger.warning("The private state of this seat's ranks cannot be got from its guardian: %s.", reason)
        self._line = self._wire = None
        self._again = self._peers.loop.call_later(AGAIN_S, self._failed)
