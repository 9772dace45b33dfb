"""Which steps are mirrored: the same rule on the coordinator and on every worker.

A mirror of step m holds the state from which step m is computed. A rank that is ready for a step has finished the
mirror of it, if that is due; so once a step is committed, every rank has the newest mirror that is due up to it.
"""

from __future__ import annotations

__all__ = ["is_due", "last_due"]

_FIRST = 2
"""At step 1 DDP has not yet put its buckets in order: what is computed again from there could differ."""


def is_due(step: int, every: int) -> bool:
    """Is this step mirrored? Never with ``every`` = 0."""
    return every > 0 and step >= _FIRST and step % every == 0


def last_due(step: int, every: int) -> int | None:
    """The newest mirrored step up to this one; None if there is none."""
    newest = step - step % every if every else 0
    return newest if is_due(newest, every) else None
