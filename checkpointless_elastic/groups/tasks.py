"""What a thread of the script does with groups: one task that asks for several collectives must not outlive a loss.

A checkpoint in a thread plans with its peers, writes for seconds, and tells them that it has finished. If a rank is
lost meanwhile its replacement knows nothing of that checkpoint, and the last collective would pair with the first
one of the next. What an executor of `concurrent.futures` runs is one task (that is how torch's asynchronous
checkpoints run); of another thread nobody knows where one task of it ends.
"""

from __future__ import annotations

import concurrent.futures.thread
import sys
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from checkpointless_elastic.groups.elastic import ElasticProcessGroup
    from checkpointless_elastic.groups.link import Link

__all__ = ["Tasks"]

_runs = getattr(getattr(concurrent.futures.thread, "_WorkItem", None), "run", None)


class Tasks:
    """The native groups that running tasks have met."""

    def __init__(self) -> None:
        self._met: weakref.WeakKeyDictionary[Any, dict[str, Link]] = weakref.WeakKeyDictionary()

    def link_at_first(self, group: ElasticProcessGroup) -> Link:
        """What was inside of this group when the present task first used it."""
        task = _present()
        if task is None:
            return group.link
        return self._met.setdefault(task, {}).setdefault(group.spec.name, group.link)


def _present() -> Any:
    """The task that runs on this thread, None if it is not known."""
    frame = sys._getframe(1)
    while frame is not None and (_runs is None or frame.f_code is not _runs.__code__):
        frame = frame.f_back  # type: ignore[assignment]
    return None if frame is None else frame.f_locals["self"]
