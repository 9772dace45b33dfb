"""What the coordinator's own agent does beside: keeps deadlines, follows recoveries, warns."""

from __future__ import annotations

import logging
import time

from checkpointless_elastic.agent.membership import Membership
from checkpointless_elastic.agent.recoveries import Recoveries
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.between import Between, RankSays
from checkpointless_elastic.protocol.events import Action, Deadline, Differ, Overdue
from checkpointless_elastic.protocol.messages import Replicas
from checkpointless_elastic.protocol.rules import Rules

__all__ = ["Chair"]

logger = logging.getLogger(__name__)


class Chair:
    """Base of `control.AgentControl`; implements that part of membership.Office."""

    _settings: Config
    _rules: Rules
    _loop: EventLoop
    _membership: Membership
    _recoveries: Recoveries

    def perform(self, action: Action) -> None:
        """See Office."""
        if isinstance(action, Deadline):
            seconds = getattr(self._settings, action.limit).total_seconds()
            overdue = Overdue(action.generation, action.state)
            self._loop.call_later(seconds, lambda: self._membership.overdue(overdue))
        elif isinstance(action, Differ):
            logger.error(
                "[generation %d, step %d] Replicas differ: %s.",
                action.generation,
                action.step,
                action.sentence,
            )
        else:
            self._recoveries.perform(action, time.monotonic())

    def heard(self, message: Between) -> None:
        """See Office."""
        if isinstance(message, RankSays) and isinstance(message.said, Replicas):
            holdings = self._membership.holdings()
            warning = holdings.warning(bool(self._rules.mirror_every)) if holdings is not None else ""
            if warning:
                logger.warning("%s", warning)
        else:
            self._recoveries.heard(message, self._membership.is_pending, time.monotonic())
