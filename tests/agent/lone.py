"""An agent in a process of its own, for tests that kill or stop it: prints its port, takes messages, sends nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpointless_elastic.agent.runtime import EventLoop
from tests.agent.meeting import Agent

ROOT = Path(__file__).parents[2]


@contextmanager
def lone_agent() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address where it listens."""
    command = [sys.executable, "-m", "tests.agent.lone"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, f"127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


def main() -> None:
    signal.alarm(60)  # nothing outlives its test for long
    loop = EventLoop()
    agent = Agent(loop)
    print(agent.peers.port, flush=True)
    loop.run(lambda: False)


if __name__ == "__main__":
    main()
