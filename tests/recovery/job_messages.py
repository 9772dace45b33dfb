"""`job.py`, with a worker that dies at one message: POINT="rank:incarnation:sent|taken:message:number".

It is killed right after it has sent or taken that message for the `number`-th time (from 1) in this process. A Report
is named by its stage: "Report.published". A vote in memory is one that was sent too, "vote", or "last vote" where all
others had voted before, for which rank 0 waits; "count" is taken when all have.
"""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpointless_elastic.protocol.messages import Report
from checkpointless_elastic.worker import channel
from checkpointless_elastic.worker.ballot import Ballot

_seen: Counter[str] = Counter()
_lock = threading.Lock()  # the listener takes messages too
_me = f"{os.environ['RANK']}:{os.environ.get('CHECKPOINTLESS_INCARNATION', '0')}"


def at(direction: str, message: Any) -> None:
    report = f".{message.stage.value}" if isinstance(message, Report) else ""
    name = message if isinstance(message, str) else type(message).__name__ + report
    with _lock:
        _seen[f"{direction}:{name}"] += 1
        point = f"{_me}:{direction}:{name}:{_seen[f'{direction}:{name}']}"
    if point == os.environ.get("POINT"):
        Path(os.environ["OUT"], "point").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def send(self: channel.Connection, message: Any) -> None:
    _send(self, message)
    at("sent", message)


def decode(body: bytes | memoryview) -> Any:
    message = _decode(body)
    at("taken", message)
    return message


def cast(self: Ballot, step: int) -> bool:
    if _me.startswith("0:") and "last vote" in os.environ.get("POINT", ""):
        time.sleep(0.1)
    counts = _cast(self, step)
    if counts:
        at("sent", "vote")
        if min(self._cells) > step:
            at("sent", "last vote")
    return counts


def wait(self: Ballot, step: int, given_up: Callable[[], bool]) -> bool:
    counted = _wait(self, step, given_up)
    if counted:
        at("taken", "count")
    return counted


_cast, _wait, Ballot.cast, Ballot.wait = Ballot.cast, Ballot.wait, cast, wait  # type: ignore[method-assign]
_send, _decode = channel.Connection.send, channel.decode_to_worker
channel.Connection.send = send  # type: ignore[method-assign]
channel.decode_to_worker = decode
runpy.run_path(str(Path(__file__).with_name("job.py")), run_name="__main__")
