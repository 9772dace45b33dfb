"""Real etcd members as child processes: alone or as a cluster, with TLS and logins when asked."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import grpc
import pytest
import trustme
from pyetcd import etcdrpc as rpc

from tests.conftest import wait_until


def has_etcd() -> bool:
    return shutil.which("etcd") is not None


def skip_without_etcd() -> NoReturn:
    pytest.skip("there is no etcd program; install Debian's etcd-server, which scripts/setup does as root")


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, each another one."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


@dataclass
class Member:
    """One etcd process; `start` again after `kill` finds its data."""

    command: list[str]
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)

    def expect_answer(self) -> None:
        process = self.process
        assert process is not None
        wait_until(lambda: answers(self.port) or process.poll() is not None, f"etcd listens on {self.port}")
        assert process.poll() is None, self.log.read_text()[-2000:]

    def send(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@dataclass
class Cluster:
    """Members that know each other."""

    members: list[Member]
    folder: Path
    options: list[str] = field(default_factory=list)

    @property
    def endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def stop(self) -> None:
        for member in self.members:
            member.kill()

    def leader(self) -> Member:
        """The member that leads the others."""
        for member in self.members:
            with grpc.insecure_channel(member.endpoint) as channel:
                status = rpc.MaintenanceStub(channel).Status(rpc.StatusRequest(), timeout=5)
            if status.leader == status.header.member_id:
                return member
        raise AssertionError("no member leads")


def start_etcd(
    folder: Path, members: int = 1, scheme: str = "http", options: list[str] | None = None
) -> Cluster:
    """Start the members; they listen when this returns."""
    ports, peers = free_ports(members), free_ports(members)
    all_peers = ",".join(f"m{i}=http://127.0.0.1:{port}" for i, port in enumerate(peers))
    cluster = Cluster([], folder)
    for i, (port, peer) in enumerate(zip(ports, peers, strict=True)):
        command = ["etcd", "--name", f"m{i}", "--data-dir", str(folder / f"m{i}"), *(options or [])]
        for role, url in (("client", f"{scheme}://127.0.0.1:{port}"), ("peer", f"http://127.0.0.1:{peer}")):
            advertise = "advertise-client-urls" if role == "client" else "initial-advertise-peer-urls"
            command += [f"--listen-{role}-urls", url, f"--{advertise}", url]
        command += ["--initial-cluster", all_peers]
        cluster.members.append(Member(command, port, folder / f"m{i}.log"))
        cluster.members[-1].start()
    try:
        for member in cluster.members:
            member.expect_answer()
    except BaseException:
        cluster.stop()
        raise
    return cluster


@dataclass(frozen=True)
class Certificates:
    """Files of an authority, a server on 127.0.0.1 and a client."""

    ca: Path
    server_cert: Path
    server_key: Path
    cert: Path
    key: Path


def write_certificates(folder: Path) -> Certificates:
    authority = trustme.CA()
    files = Certificates(
        *(folder / f"{name}.pem" for name in ("ca", "server", "server-key", "client", "client-key"))
    )
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("agent.example")
    authority.cert_pem.write_to_path(files.ca)
    for made, cert, key in ((server, files.server_cert, files.server_key), (client, files.cert, files.key)):
        made.cert_chain_pems[0].write_to_path(cert)
        made.private_key_pem.write_to_path(key)
    return files


def require_login(channel: grpc.Channel, user: str, password: str) -> None:
    """Make `root` and a user that may use /checkpointless/ only, and switch logins on."""
    auth = rpc.AuthStub(channel)
    for name, secret, role in (("root", "root secret", "root"), (user, password, "jobs")):
        auth.UserAdd(rpc.AuthUserAddRequest(name=name, password=secret), timeout=10)
        auth.RoleAdd(rpc.AuthRoleAddRequest(name=role), timeout=10)
        auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=role), timeout=10)
    allowed = rpc.Permission(permType="READWRITE", key=b"/checkpointless/", range_end=b"/checkpointless0")
    auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="jobs", perm=allowed), timeout=10)
    auth.AuthEnable(rpc.AuthEnableRequest(), timeout=10)
