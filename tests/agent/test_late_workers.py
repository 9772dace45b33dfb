"""What an agent says of workers that do not go on: real pulses, read by the agent's own loop."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from checkpointless_elastic.agent.hangs import Hangs
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.between import Halted, Pace, Seated
from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.protocol.messages import Protected
from checkpointless_elastic.protocol.station import Station
from checkpointless_elastic.worker.pulse import Pulse, pulse_path

LIMIT_S = 30.0


def first_report(folder: Path) -> Halted:
    """What the coordinator is told first of the one rank in this folder, whose first call may take 0.2 s."""
    loop = EventLoop()
    heard: list[Halted] = []
    station = Station(Seated(1, 0, [0], 1, "", "", 0, 0, taken=False))
    station.said(0, Protected())

    def tell(message: Halted | Pace) -> None:
        if isinstance(message, Halted):
            heard.append(message)

    settings = Config(hang_timeout=timedelta(seconds=0.2))
    Hangs(loop, settings, {0: os.getpid()}, lambda rank, message: None, tell).begin(str(folder), station)
    try:
        assert loop.run(lambda: bool(heard), LIMIT_S), "the agent said nothing"
    finally:
        loop.close()
    return heard[0]


def test_a_worker_that_does_not_come_to_its_first_call_is_reported_though_it_is_not_late(
    tmp_path: Path,
) -> None:
    Pulse(pulse_path(str(tmp_path), 0))
    where = first_report(tmp_path).ranks[0]
    assert (where.activity, where.late, where.overlong) == (Activity.SETUP, False, True)


def test_a_worker_in_its_first_call_has_the_limit_for_what_is_not_known(tmp_path: Path) -> None:
    Pulse(pulse_path(str(tmp_path), 0)).begin(Activity.CALL, "train", 1)
    where = first_report(tmp_path).ranks[0]
    assert (where.activity, where.late, where.overlong, where.limit) == (Activity.CALL, True, True, 0.2)
