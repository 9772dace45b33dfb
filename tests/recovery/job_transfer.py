"""job.py, in which a rank dies as it sends or receives state over the network: DIES is "rank:send" or so."""

from __future__ import annotations

import os
import runpy
import signal
from pathlib import Path
from typing import Any

from checkpointless_elastic.worker import network

OUT = Path(os.environ["OUT"])


def die_at(rank: int, doing: str) -> None:
    """The rank dies, once, where it would have begun the first operation of a transfer."""
    original = getattr(network._Peers, doing)

    def dying(*arguments: Any) -> None:
        mark = OUT / f"died-{rank}-{doing}"
        if rank == int(os.environ["RANK"]) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        original(*arguments)

    setattr(network._Peers, doing, dying)


for death in filter(None, os.environ["DIES"].split(",")):
    number, _, moment = death.partition(":")
    die_at(int(number), moment)
runpy.run_path(str(Path(__file__).with_name("job.py")), run_name="__main__")
