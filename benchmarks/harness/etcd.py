"""Real etcd members on hosts, from Debian's etcd-server."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from harness.hosts import Host, HostsError

MEMBERS = 3
CLIENTS, PEERS = 2379, 2380


def supported() -> str:
    """Why there is no etcd here, in one sentence; empty where there is."""
    return "" if shutil.which("etcd") else "There is no program etcd; install Debian's etcd-server."


def endpoint(hosts: Sequence[Host]) -> str:
    """What torchrun's --rdzv-endpoint says: the addresses of all members."""
    return ",".join(f"{host.address}:{CLIENTS}" for host in hosts)


def start(member: Host, members: Sequence[Host], folder: Path) -> subprocess.Popen[bytes]:
    """Starts the member of this host; one that ran before goes on with its data."""
    client, peer = (f"http://{member.address}:{port}" for port in (CLIENTS, PEERS))
    everyone = ",".join(f"{host.name}=http://{host.address}:{PEERS}" for host in members)
    argv = [
        *("etcd", "--name", member.name, "--data-dir", str(folder / f"etcd-{member.name}")),
        *("--listen-client-urls", client, "--advertise-client-urls", client),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", everyone, "--initial-cluster-state", "new"),
    ]
    return member.run(argv, log=log_of(member, folder))


def log_of(member: Host, folder: Path) -> Path:
    return folder / f"etcd-{member.name}.log"


def wait_ready(member: Host, folder: Path, timeout: float = 30, since: int = 0) -> None:
    """Until the member says that it serves clients, behind so many bytes of its log."""
    end = time.monotonic() + timeout
    while b"ready to serve" not in log_of(member, folder).read_bytes()[since:]:
        if time.monotonic() > end:
            raise HostsError(
                f"etcd on {member.name} was not ready in {timeout:g} s; see {log_of(member, folder)}."
            )
        time.sleep(0.02)
