"""Log lines that others can cause: so many per while, then the number of those held back."""

from __future__ import annotations

import logging

from checkpointless_elastic.agent.runtime import EventLoop, Timer

__all__ = ["SparseLog"]


class SparseLog:
    """Passes on `burst` warnings per `window` seconds, then says how many more there were."""

    def __init__(
        self, loop: EventLoop, logger: logging.Logger, burst: int = 10, window: float = 10.0
    ) -> None:
        self._loop = loop
        self._logger = logger
        self._burst = burst
        self._window = window
        self._passed = 0
        self._held = 0
        self._timer: Timer | None = None

    def warning(self, text: str, *values: object) -> None:
        """Log one line, or count it."""
        if self._timer is None:
            self._timer = self._loop.call_later(self._window, self.flush)
        if self._passed < self._burst:
            self._passed += 1
            self._logger.warning(text, *values)
        else:
            self._held += 1

    def flush(self) -> None:
        """Say how many lines were held back, if any, and begin anew."""
        if self._held:
            self._logger.warning(
                "%d more connections were not accepted in the last %g s; their log lines are left out.",
                self._held,
                self._window,
            )
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._passed, self._held = None, 0, 0
