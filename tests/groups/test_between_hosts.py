"""Groups between hosts, which are network namespaces here: the published addresses are those that peers reach."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import pytest

BODY = """
import sys
from datetime import timedelta
import torch
from torch.distributed import TCPStore
from checkpointless_elastic.groups.native import Attempt, connect
from checkpointless_elastic.groups.sockets import shut_down
from checkpointless_elastic.groups.spec import GroupSpec

rank = int(sys.argv[1])
store = TCPStore("10.77.0.1", 29077, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=60))
spec = GroupSpec("hosts", "a test", (0, 1), rank, "gloo", (("cpu", "gloo"),), timedelta(seconds=60))
link = connect(spec, store, Attempt(1, 60.0))
assert {host for host, _ in link.own} == {f"10.77.0.{rank + 1}"}, link.own
assert {host for host, _ in link.peers} == {f"10.77.0.{2 - rank}"}, link.peers
number = torch.tensor([float(rank + 1)])
link.native.allreduce([number]).wait()
assert number.item() == 3.0
store.set(f"added/{rank}", "")
store.wait([f"added/{other}" for other in range(2)])
if rank == 0:
    assert shut_down(link.own, link.peers) >= 1
try:
    link.native.allreduce([number]).wait()
except RuntimeError:
    print("ended", flush=True)
store.set(f"ended/{rank}", "")
store.wait([f"ended/{other}" for other in range(2)])
if rank == 0:  # it has the store
    store.wait(["left"])
else:
    store.set("left", "")
sys.stdout.flush()
import os
os._exit(0)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a wire between them: 10.77.0.1 and 10.77.0.2."""
    mark = uuid.uuid4().hex[:6]
    names = [f"ce-{mark}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    try:
        ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{number + 1}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def test_a_group_between_two_hosts_is_connected_and_its_sockets_are_found(hosts: list[str]) -> None:
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", BODY, str(rank)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, name in enumerate(hosts)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], texts
    assert all("ended" in text for text in texts), texts
