"""The agent's event loop, and the seam between the process side (this package) and the control plane.

One thread, no polling: the loop sleeps in epoll until a worker dies (pidfd), a fork server or a worker writes, or a
timer is due. Callbacks must not block. An exception in a callback leaves `run` and ends the agent: nothing is
swallowed here.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from checkpointless_elastic.protocol.between import RunAgain, Seated
    from checkpointless_elastic.protocol.messages import Afresh, Message, Unwound

__all__ = [
    "ControlPlane",
    "EventLoop",
    "Timer",
    "Workforce",
]

Callback = Callable[[], None]


class Timer:
    """Handle of one `call_later`; `cancel` may be called at any time, also after it fired."""

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self._callback: Callback | None = callback

    def cancel(self) -> None:
        """Make sure that the callback is not called from now on."""
        self._callback = None

    def fire(self) -> None:
        """Call the callback, once."""
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    @property
    def active(self) -> bool:
        """Whether it has neither fired nor been cancelled."""
        return self._callback is not None


@dataclass(frozen=True)
class _Watch:
    read: Callback
    write: Callback | None
    first: bool


def _not_first(ready: tuple[int, int, _Watch]) -> bool:
    return not ready[2].first


class EventLoop:
    """Descriptors and timers of the agent. Everything happens on the thread that calls `run`."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watched: dict[int, _Watch] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def watch(self, fd: int, read: Callback, write: Callback | None = None, *, first: bool = False) -> None:
        """Call `read` whenever `fd` is readable (or closed by the peer), and `write` whenever it is writable.

        A second call for the same descriptor replaces the first one. `first`: among descriptors that are ready at the
        same time these are served before all others.
        """
        events = select.EPOLLIN | (select.EPOLLOUT if write else 0)
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = _Watch(read, write, first)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; to be called before it is closed. Not an error if it is not watched."""
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callback) -> Timer:
        """Call `callback` once, `seconds` from now."""
        timer = Timer(time.monotonic() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def run(self, until: Callable[[], bool], timeout: float | None = None) -> bool:
        """Serve descriptors and timers until `until()` is true; false if `timeout` seconds passed before it was."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not until():
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._step(deadline)
        return True

    def close(self) -> None:
        """Release what the kernel holds for the loop; watched descriptors stay open."""
        self._epoll.close()

    def _step(self, deadline: float | None) -> None:
        events = self._epoll.poll(self._wait(deadline))
        ready = [(fd, mask, self._watched[fd]) for fd, mask in events if fd in self._watched]
        self._fire_timers()
        if len(ready) > 1:
            ready.sort(key=_not_first)
        for fd, mask, entry in ready:
            self._serve(fd, mask, entry)

    def _serve(self, fd: int, mask: int, entry: _Watch) -> None:
        """An earlier callback of the same round may have taken this descriptor away, and its number be in use again."""
        if mask & select.EPOLLOUT and entry.write is not None and self._watched.get(fd) is entry:
            entry.write()
        if mask & ~select.EPOLLOUT and self._watched.get(fd) is entry:
            entry.read()

    def _wait(self, deadline: float | None) -> float | None:
        while self._timers and not self._timers[0][2].active:
            heapq.heappop(self._timers)
        due = [self._timers[0][0]] if self._timers else []
        if deadline is not None:
            due.append(deadline)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _fire_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2].fire()


class Workforce(Protocol):
    """What the control plane may do with this node's workers. Ranks are global. No call blocks.

    Attributes:
        ranks: this node's ranks.
        run_dir: private directory (0700) of this run, in memory where possible; removed at the end.
        ended: how the job has ended for this node, 'succeeded' or 'failed'; empty before.
    """

    ranks: list[int]
    run_dir: str

    @property
    def ended(self) -> str: ...

    def replace(self, rank: int) -> None:
        """Fork the next incarnation of a rank whose worker is gone; `started` follows."""

    def restart_all(self, order: RunAgain) -> None:
        """Stop all workers; when they are gone `ControlPlane.await_seat` is called again.

        With rung 3 those that can leave the script stay, and run it again as new incarnations. Nothing more is heard of
        the present ones (no `lost`, no `exited`); the next calls are `started` for the new ones.
        """

    def answered(self, rank: int, message: Unwound | Afresh) -> None:
        """A worker has left the script, or is to be replaced."""

    def give_up(self) -> None:
        """End all workers at once: this node's seat is another's. Else as `restart_all`."""

    def kill(self, rank: int) -> None:
        """SIGKILL this rank's present worker and its children; `lost` and `exited` follow. No-op if it is gone."""

    def has_ended(self, rank: int) -> bool:
        """Is the exit code known of this rank's worker, or else of the one that it replaced?"""

    def succeed(self) -> None:
        """The job is done."""

    def fail(self, ranks: list[int]) -> None:
        """The job has failed; the first of `ranks` is named as the root cause. The other workers are stopped."""

    def because(self, reason: str) -> None:
        """Why the job fails, for the summary on a node whose workers are not to blame."""

    def withdraw(self, reason: str) -> None:
        """This node leaves the job with an error; all workers are stopped. ``reason``: a sentence, for the summary."""

    def learn(self, modules: list[str]) -> None:
        """Start a successor of the fork server that has these third-party modules loaded too, in the background."""

    def when_warm(self, then: Callable[[], None]) -> None:
        """Call it once workers could be forked at once, now or in a while."""

    def log_dir(self) -> str:
        """Directory of this run's logs; empty if there is none."""


class ControlPlane(Protocol):
    """Decides what happens to the workers. All calls come from the event loop's thread.

    Attributes:
        generation: the generation in force; a worker that is forked now finds it in CHECKPOINTLESS_GENERATION.
        seat: this node's place in the job, once `await_seat` has returned True.
        serves_workers: whether workers are told (CHECKPOINTLESS_SOCKET and so on) to connect to `run_dir/agent.sock`.
    """

    serves_workers: bool

    seat: Seated

    @property
    def generation(self) -> int: ...

    def attach(self, loop: EventLoop, workers: Workforce, size: int) -> None:
        """Called once, before the first worker is started. ``size``: how many workers this node runs."""

    def await_seat(self) -> bool:
        """Serve the loop until workers are to be started, those of `seat`; False: the job has ended before."""

    def started(self, rank: int, incarnation: int, pid: int, token: str) -> None:
        """A worker was forked. Comes before anything that this worker itself sends."""

    def tell(self, rank: int, message: Message) -> bool:
        """Send a control message to a worker, if it is connected: was it sent?"""

    def lost(self, rank: int, incarnation: int) -> None:
        """The worker's process is gone (whatever the reason, also a normal exit); its status is not known yet."""

    def exited(self, rank: int, incarnation: int, status: int) -> None:
        """Always after `lost`: exit code, or the negative number of the signal that ended the worker."""

    def stuck(self, rank: int, pid: int) -> None:
        """A worker that was killed does not end, as it waits for a device: its node is of no use any more."""

    def will_end(self, cause: str) -> None:
        """This process ends by a signal: tell the other agents. ``cause`` completes "node 3 ..."."""

    def leave(self) -> None:
        """This agent was asked to end, or has failed: the job goes on without it. Its workers are stopped next."""

    def stopped(self) -> None:
        """All workers are gone and none will follow: close what is open."""
