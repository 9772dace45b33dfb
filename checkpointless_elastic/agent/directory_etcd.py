"""The directory in etcd v3: it survives the loss of any agent, and of etcd's members while most of them live.

Four keys under /checkpointless/RUN_ID/ hang on one lease, whose number follows from the run id and which the calls of
every agent keep alive, so that nothing is left a minute after the last agent. When all agents pause for longer, the
keys are gone while the job is not: whoever is back first writes down again the newest coordinator that it knows, in a
transaction that needs the key to be absent. Should an agent that knew of none have begun again with term 1 in between,
those who knew a newer term raise DirectoryError and never act on a smaller one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
import msgspec
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from checkpointless_elastic.agent.directory import Directory, Leader
from checkpointless_elastic.agent.etcd_client import Access, EtcdClient, Refusal
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ConfigError, DirectoryError

__all__ = ["EtcdDirectory", "etcd_opener"]

DEFAULT_PORT = 2379
OPEN_S = 30.0
"""Longest wait for etcd's first answer. No agent starts it, so one that does not answer is rather a wrong address."""
PROBE_S = 2.0
"""How often a waiting agent reads and watches anew: a watch at a member that is stopped says nothing."""
LEASE_S = 60
"""The lease's time to live; a quarter of it between two renewals."""
PASSWORD = "CHECKPOINTLESS_ETCD_PASSWORD"


def etcd_opener(params: RendezvousParameters, config: Config) -> Callable[[], EtcdDirectory]:
    """Opens the directory at `--rdzv-endpoint` (``host:port,host:port``): it is there after its first answer.

    Raises ConfigError at once where the settings cannot be used.
    """
    endpoints = parse_endpoints(str(params.endpoint or ""))
    limit, timeout = config.store_timeout.total_seconds(), min(config.timeout.total_seconds(), OPEN_S)
    access = read_access(config)
    return lambda: EtcdDirectory.open(endpoints, params.run_id, limit, timeout=timeout, access=access)


def parse_endpoints(given: str) -> list[str]:
    """``host:port`` of each member. Raises ConfigError."""
    try:
        pairs = [parse_rendezvous_endpoint(part, DEFAULT_PORT) for part in given.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"--rdzv-endpoint {given!r} is not HOST:PORT[,HOST:PORT...]: {error}") from error
    if not pairs:
        raise ConfigError(
            "The etcd store needs --rdzv-endpoint HOST:PORT[,HOST:PORT...], etcd's client addresses."
        )
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in pairs]


def read_access(config: Config, env: Mapping[str, str] = os.environ) -> Access:
    """User, password and certificates from the settings. Raises ConfigError."""
    password = env.get(PASSWORD, "")
    if config.etcd_password_file:
        try:
            password = Path(config.etcd_password_file).read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"etcd_password_file {config.etcd_password_file} cannot be read: {error}."
            ) from error
    if config.etcd_user and not password:
        raise ConfigError(
            f"etcd_user {config.etcd_user!r} needs a password: give etcd_password_file or set {PASSWORD}."
        )
    return Access(config.etcd_ca, config.etcd_cert, config.etcd_key, config.etcd_user, password)


class EtcdDirectory(Directory):
    """See the module. ``endpoint``: the members' addresses, as given."""

    def __init__(self, client: EtcdClient, run_id: str, lease_s: int) -> None:
        prefix = f"/checkpointless/{run_id}/"
        self.endpoint = client.endpoint
        self._client = client
        self._leader, self._term = prefix + "leader", prefix + "term"
        self._beat, self._verdict = prefix + "beat", prefix + "verdict"
        self._lease = int.from_bytes(hashlib.sha256(prefix.encode()).digest()[:8], "big") >> 1 or 1
        self._lease_s = lease_s
        self._renewed = -float("inf")
        self._known: Leader | None = None

    @classmethod
    def open(
        cls,
        endpoints: Sequence[str],
        run_id: str,
        limit: float,
        *,
        timeout: float,
        access: Access | None = None,
        lease_s: int = LEASE_S,
    ) -> EtcdDirectory:
        """Connect within `timeout` seconds. ``lease_s``: how long keys outlive the last agent, in seconds."""
        client = EtcdClient(endpoints, access or Access(), limit)
        directory = cls(client, run_id, lease_s)
        try:
            client.begin(timeout)
            client.get(directory._term)  # shows a login that is missing, which a lease does not need
            directory._renew()
        except DirectoryError:
            client.close()
            raise
        return directory

    def newest(self) -> Leader | None:
        self._client.begin()
        return self._look()[0]

    def claim(self, leader: Leader) -> bool:
        if leader.term < 1:
            raise ValueError(f"Terms begin at 1, not {leader.term}.")
        self._client.begin()
        while True:
            newest, modified, _ = self._look()
            if (newest.term if newest else 0) != leader.term - 1:
                return newest == leader  # perhaps by an earlier try whose answer was lost
            if self._write(self._leader, modified, _record(self._leader, self._term, leader)):
                self._known = leader
                return True

    def beat(self, term: int, count: int) -> bool:
        self._client.begin()
        values = {self._beat: f"{term} {count}"}
        while True:
            self._renew()
            try:
                if self._client.write_if_equal(self._term, str(term), values, self._lease):
                    return True
            except Refusal as refusal:
                self._grant_again(refusal)
            newest = self._look()[0]  # puts the term back if it expired
            if newest is None or newest.term != term:
                return False

    def last_beat(self, term: int) -> int:
        self._client.begin()
        self._renew()
        value = self._client.get(self._beat)[0]
        of, _, count = value.partition(" ")
        return int(count) if of == str(term) else -1

    def wait_newer(self, term: int, timeout: float) -> Leader | None:
        deadline = time.monotonic() + timeout
        while True:
            self._client.begin()
            newest, _, revision = self._look()
            if newest is not None and newest.term > term:
                return newest
            left = min(deadline - time.monotonic(), PROBE_S)
            if left <= 0:
                return None
            self._client.wait_change(self._leader, revision + 1, left)

    def end(self, verdict: str) -> None:
        if not verdict:
            raise ValueError("A verdict says how the job ended; it cannot be empty.")
        self._client.begin()
        self._write(self._verdict, 0, {self._verdict: verdict})

    def verdict(self) -> str:
        self._client.begin()
        self._renew()
        return self._client.get(self._verdict)[0]

    def close(self) -> None:
        self._client.close()

    def _look(self) -> tuple[Leader | None, int, int]:
        """The newest coordinator, the revision that wrote it, and the store's."""
        while True:
            self._renew()
            value, modified, revision = self._client.get(self._leader)
            if not value and self._known is not None:
                self._write(self._leader, 0, _record(self._leader, self._term, self._known))
                continue
            newest = _decode(value, self.endpoint) if value else None
            if self._known is not None and (newest is None or newest.term < self._known.term):
                raise DirectoryError(
                    f"etcd at {self.endpoint} went back from term {self._known.term} to {newest}: this job's keys "
                    f"expired while its agents were paused, and others began anew; end it and start it again."
                )
            self._known = newest
            return newest, modified, revision

    def _write(self, key: str, modified: int, values: dict[str, str]) -> bool:
        self._renew()
        try:
            return self._client.write_if(key, modified, values, self._lease)
        except Refusal as refusal:
            self._grant_again(refusal)
            return self._client.write_if(key, modified, values, self._lease)

    def _renew(self) -> None:
        """Keep the lease alive, at most four times in its life."""
        if time.monotonic() - self._renewed < self._lease_s / 4:
            return
        if not self._client.keep_alive(self._lease):
            self._client.grant(self._lease, self._lease_s)
        self._renewed = time.monotonic()

    def _grant_again(self, refusal: Refusal) -> None:
        if refusal.code is not grpc.StatusCode.NOT_FOUND:
            raise refusal
        self._client.grant(self._lease, self._lease_s)


def _record(leader_key: str, term_key: str, leader: Leader) -> dict[str, str]:
    return {leader_key: msgspec.json.encode(leader).decode(), term_key: str(leader.term)}


def _decode(value: str, endpoint: str) -> Leader:
    try:
        return msgspec.json.decode(value, type=Leader)
    except msgspec.DecodeError as error:
        raise DirectoryError(
            f"etcd at {endpoint} holds {value!r} where a coordinator should stand: {error}."
        ) from error
