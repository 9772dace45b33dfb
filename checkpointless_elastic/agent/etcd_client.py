"""Calls to an etcd v3 cluster that last at most a limit and go on when a member, a connection or a login is lost.

Built on the messages and stubs of etcd-sdk-python 0.0.7 and not on its client, which sends a call to one member only,
refuses all calls for 300 s after a failure, lets a watch die with its connection and never logs in again.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from checkpointless_elastic.errors import ConfigError, DirectoryError

try:
    import grpc
    from pyetcd import etcdrpc as rpc
except ImportError as error:
    raise ConfigError(
        f"The etcd store needs packages that are not installed ({error}): run "
        f"pip install checkpointless_elastic[etcd]."
    ) from error

__all__ = ["Access", "EtcdClient", "Refusal"]

T = TypeVar("T")

TRIES_PER_LIMIT = 6
"""A member that is stopped or cut off gets this part of the limit before the next one is asked."""

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_STALE_LOGIN = ("invalid auth token", "revision of auth store is old")


class Refusal(DirectoryError):
    """etcd answered, and will answer the same again. ``code``: gRPC's status."""

    def __init__(self, sentence: str, code: grpc.StatusCode) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class Access:
    """How to be let in.

    Attributes:
        ca: file of certificates to trust; empty: no TLS.
        cert, key: files with the client's certificate and its key; empty: none.
        user, password: for etcd's own login; empty: none.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password: str = field(default="", repr=False)


class _Member:
    """One endpoint and the stubs of its connection, which is made at the first call."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None) -> None:
        if credentials is None:
            self.channel = grpc.insecure_channel(target, options=_OPTIONS)
        else:
            self.channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
        self.kv = rpc.KVStub(self.channel)
        self.lease = rpc.LeaseStub(self.channel)
        self.watch = rpc.WatchStub(self.channel)
        self.auth = rpc.AuthStub(self.channel)


class EtcdClient:
    """See the module. ``endpoints``: "host:port" each; ``limit``: seconds for one call, over all its tries."""

    def __init__(self, endpoints: Sequence[str], access: Access, limit: float) -> None:
        self.endpoint = ",".join(endpoints)
        self._access = access
        self._limit = limit
        credentials = _credentials(access)
        self._members = [_Member(target, credentials) for target in endpoints]
        self._at = 0
        self._token = ""
        self._closed = threading.Event()
        self.begin(limit)

    def begin(self, limit: float | None = None) -> None:
        """From now on calls have, all together, the limit (or that many seconds) until the next `begin`."""
        self._given = self._limit if limit is None else limit
        self._deadline = time.monotonic() + self._given

    def close(self) -> None:
        """From any thread; ends a call in progress."""
        self._closed.set()
        for member in self._members:
            member.channel.close()

    def get(self, key: str) -> tuple[str, int, int]:
        """Value ('' if there is none), the revision that wrote it (0), and the store's. Linearizable."""
        answer = self._call(lambda m, how: m.kv.Range(rpc.RangeRequest(key=key.encode()), **how))
        found = answer.kvs[0] if answer.kvs else None
        value, modified = (found.value.decode(), found.mod_revision) if found else ("", 0)
        return value, modified, answer.header.revision

    def write_if(self, key: str, modified: int, values: dict[str, str], lease: int) -> bool:
        """Write all values under the lease if the key's last write has that revision (0: the key does not exist).

        May answer False though an earlier try of the same call wrote: the caller looks.
        """
        test = rpc.Compare(
            key=key.encode(), target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=modified
        )
        return self._write([test], values, lease)

    def write_if_equal(self, key: str, value: str, values: dict[str, str], lease: int) -> bool:
        """Write all values under the lease if the key has this value."""
        test = rpc.Compare(
            key=key.encode(), target=rpc.Compare.VALUE, result=rpc.Compare.EQUAL, value=value.encode()
        )
        return self._write([test], values, lease)

    def grant(self, lease: int, seconds: int) -> None:
        """Make the lease, unless it exists."""
        request = rpc.LeaseGrantRequest(ID=lease, TTL=seconds)
        try:
            self._call(lambda m, how: m.lease.LeaseGrant(request, **how))
        except Refusal as refusal:
            if refusal.code is not grpc.StatusCode.FAILED_PRECONDITION:
                raise

    def keep_alive(self, lease: int) -> bool:
        """Begin the lease's time anew; False: it has expired."""
        request = rpc.LeaseKeepAliveRequest(ID=lease)
        answer = self._call(lambda m, how: next(m.lease.LeaseKeepAlive(iter([request]), **how), None))
        return answer is not None and answer.TTL > 0

    def wait_change(self, key: str, revision: int, seconds: float) -> None:
        """Return as soon as the key was written in that revision or later, after `seconds`, or when the watch broke.

        A broken watch loses nothing: the caller reads the key again and waits from the revision of what it read.
        """
        member, ended = self._members[self._at], threading.Event()
        create = rpc.WatchCreateRequest(key=key.encode(), start_revision=revision)

        def requests() -> Iterator[Any]:
            yield rpc.WatchRequest(create_request=create)
            ended.wait(seconds)  # the end of the requests would be the end of the watch

        try:
            how = self._how(seconds, ("hasleader", "true"))  # a member cut off from the others ends the watch
            for answer in member.watch.Watch(requests(), **how):
                if answer.canceled:
                    break
                if answer.events:
                    return
            self._closed.wait(min(seconds, 0.1))
        except (grpc.RpcError, ValueError) as error:
            if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return
            self._next_member()
            self._closed.wait(min(seconds, 0.1))
        finally:
            ended.set()

    def _write(self, tests: list[Any], values: dict[str, str], lease: int) -> bool:
        puts = [
            rpc.RequestOp(request_put=rpc.PutRequest(key=key.encode(), value=value.encode(), lease=lease))
            for key, value in values.items()
        ]
        request = rpc.TxnRequest(compare=tests, success=puts)
        return bool(self._call(lambda m, how: m.kv.Txn(request, **how)).succeeded)

    def _call(self, work: Callable[[_Member, dict[str, Any]], T]) -> T:
        """The answer of the first member that gives one in time."""
        failure = "no answer"
        for tries in itertools.count(1):
            left = self._deadline - time.monotonic()
            if left <= 0 or self._closed.is_set():
                break
            try:
                return self._try(work, min(left, max(self._limit / TRIES_PER_LIMIT, 0.1)))
            except grpc.RpcError as error:
                failure = self._judge(error)
            except ValueError:  # gRPC's answer to a call on a closed connection
                break
            if tries % len(self._members) == 0:
                self._closed.wait(min(0.02 * 2 ** min(tries, 4), max(self._deadline - time.monotonic(), 0)))
        if self._closed.is_set():
            raise DirectoryError(f"The connection to etcd at {self.endpoint} is closed.")
        raise DirectoryError(
            f"etcd at {self.endpoint} did not answer within {self._given:g} s (last: {failure}); check that most of "
            f"its members run, that --rdzv-endpoint names their client addresses, and etcd_ca, etcd_cert and etcd_key."
        )

    def _try(self, work: Callable[[_Member, dict[str, Any]], T], seconds: float) -> T:
        member, until = self._members[self._at], time.monotonic() + seconds
        if self._access.user and not self._token:
            request = rpc.AuthenticateRequest(name=self._access.user, password=self._access.password)
            self._token = member.auth.Authenticate(request, timeout=seconds).token
        return work(member, self._how(max(until - time.monotonic(), 0.001)))

    def _how(self, seconds: float, *metadata: tuple[str, str]) -> dict[str, Any]:
        token = (("token", self._token),) if self._token else ()
        return {"timeout": seconds, "metadata": (*token, *metadata)}

    def _next_member(self) -> None:
        self._at = (self._at + 1) % len(self._members)

    def _judge(self, error: grpc.RpcError) -> str:
        """What went wrong, when another try may help; else raises Refusal."""
        code, details = error.code(), str(error.details()).split("\n")[0]
        if code is grpc.StatusCode.UNAUTHENTICATED or any(words in details for words in _STALE_LOGIN):
            self._token = ""
        elif code in _GONE:
            self._next_member()
        else:
            raise Refusal(self._refused(details), code) from error
        return details

    def _refused(self, details: str) -> str:
        who = f"user {self._access.user!r}" if self._access.user else "a client without a user"
        return (
            f"etcd at {self.endpoint} refuses {who} ({details}); check etcd_user and its password, and that this "
            f"user may read and write keys under /checkpointless/."
        )


def _credentials(access: Access) -> grpc.ChannelCredentials | None:
    if not access.ca:
        return None
    return grpc.ssl_channel_credentials(_read(access.ca), _read(access.key), _read(access.cert))


def _read(path: str) -> bytes | None:
    try:
        return Path(path).read_bytes() if path else None
    except OSError as error:
        raise ConfigError(f"The file {path} for TLS to etcd cannot be read ({error.strerror}).") from error
