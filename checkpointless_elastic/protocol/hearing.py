"""What an agent's message is to the coordinator of ranks: its events."""

from __future__ import annotations

from checkpointless_elastic.protocol.between import (
    Among,
    Answers,
    Between,
    Gathered,
    Halted,
    RankExited,
    RankGone,
    RankSays,
)
from checkpointless_elastic.protocol.events import (
    AllFrozen,
    Counted,
    Event,
    ExitedEarly,
    Late,
    LeftEarly,
    Lost,
    Tally,
    Unfit,
)
from checkpointless_elastic.protocol.messages import Left, Mismatch

__all__ = ["event_of"]


def event_of(message: Between) -> Event | None:
    """The event that it is; None: the coordinator of ranks need not decide about it."""
    if isinstance(message, Gathered):
        return Tally(message.stage, message.generation, message.step, message.reports)
    if isinstance(message, Among):
        return Counted(message.generation, message.step)
    if isinstance(message, Answers):
        return AllFrozen(message.generation, message.reports, message.mirrored)
    if isinstance(message, RankGone):
        return Lost(message.rank, message.cause, message.error, message.mirrored)
    if isinstance(message, RankExited):
        return ExitedEarly(message.rank)
    if isinstance(message, Halted):
        return Late(message.generation, message.step, message.ranks)
    if isinstance(message, RankSays) and isinstance(message.said, Left):
        return LeftEarly(message.rank, message.said.generation)
    if isinstance(message, RankSays) and isinstance(message.said, Mismatch):
        return Unfit(message.rank, message.said.reason)
    return None
