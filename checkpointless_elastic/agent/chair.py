"""What the coordinator's own agent does for it: it sets its deadlines, and keeps the records of recoveries."""

from __future__ import annotations

import logging
import time

from checkpointless_elastic.agent.membership import Membership
from checkpointless_elastic.agent.recoveries import Recoveries
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.between import Between, RankSays
from checkpointless_elastic.protocol.events import Action, Deadline, Overdue, Warn
from checkpointless_elastic.protocol.messages import Replicas
from checkpointless_elastic.protocol.rules import Rules

__all__ = ["Chair"]

logger = logging.getLogger(__name__)


class Chair:
    """See the module; idle in all other agents."""

    def __init__(
        self,
        loop: EventLoop,
        settings: Config,
        rules: Rules,
        recoveries: Recoveries,
        membership: Membership,
    ) -> None:
        self._loop, self._settings, self._rules = loop, settings, rules
        self._recoveries, self._membership = recoveries, membership

    def perform(self, action: Action) -> None:
        """See `membership.Office`."""
        if isinstance(action, Deadline):
            seconds = getattr(self._settings, action.limit).total_seconds()
            overdue = Overdue(action.generation, action.state)
            self._loop.call_later(seconds, lambda: self._membership.overdue(overdue))
        elif isinstance(action, Warn):
            logger.warning("%s", action.sentence)
        else:
            self._recoveries.perform(action, time.monotonic())

    def heard(self, message: Between) -> None:
        """See `membership.Office`."""
        if isinstance(message, RankSays) and isinstance(message.said, Replicas):
            holdings = self._membership.holdings()
            mirrored, nodes = bool(self._rules.mirror_every), self._membership.nodes
            warning = holdings.warning(mirrored, nodes) if holdings is not None else ""
            if warning:
                logger.warning("%s", warning)
        else:
            self._recoveries.heard(message, self._membership.is_pending, time.monotonic())
