"""An agent that may coordinate many others raises its limit of open files, where it may."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import logging, resource, sys
from checkpointless_elastic.agent.descriptors import make_room
logging.basicConfig(format="%(message)s")
soft, hard, connections = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
make_room(connections)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "connections", "limits", "warning"),
    [
        (1024, 4096, 100, "(1024, 4096)", ""),
        (1024, 4096, 2000, "(2512, 4096)", ""),
        (1024, 2048, 2000, "(2048, 2048)", "raise that limit to 2512, or give fewer nodes in --nnodes"),
    ],
    ids=["enough", "raised", "as far as it may be"],
)
def test_the_limit_is_raised_if_the_connections_would_not_fit(
    soft: int, hard: int, connections: int, limits: str, warning: str
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(connections)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == limits
    assert warning in done.stderr and bool(done.stderr) is bool(warning)
