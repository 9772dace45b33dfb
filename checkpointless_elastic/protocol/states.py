"""The states of the coordinator; the transitions stand in `coordinator.TABLE`."""

from __future__ import annotations

import enum

__all__ = ["State"]


class State(str, enum.Enum):
    """States of the coordinator."""

    RUNNING = "running"  # steps are committed
    FREEZING = "freezing"  # a generation is open, survivors say where they stand
    SETTLING = "settling"  # survivors publish, replacements start
    RESTORING = "restoring"  # replacements copy the state and go to the survivors' step
    REBUILDING = "rebuilding"  # all ranks rebuild affected groups
    ENDED = "ended"  # released, to be run again, or stopped
