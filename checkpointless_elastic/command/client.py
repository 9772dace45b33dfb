"""A client of one job: finds the coordinator through the job's directory and asks it over a connection of its own."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from torch.distributed.elastic.rendezvous import RendezvousParameters

from checkpointless_elastic.agent.credentials import read_tls, read_token
from checkpointless_elastic.agent.directory import Directory, directory_opener
from checkpointless_elastic.agent.peers import Closed, Identity, Peer, Peers
from checkpointless_elastic.agent.runtime import EventLoop
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import CheckpointlessError
from checkpointless_elastic.protocol.between import Between, decode
from checkpointless_elastic.protocol.messages import Message, encode_body
from checkpointless_elastic.protocol.requests import Declined, Drain, Drained, Inquiry, Overview

__all__ = ["Client", "CommandError", "JobEndedError", "open_client"]

ANSWER_S = 5.0
"""Limit for one connection and its answer."""
PAUSE_S = 0.1
"""Between two attempts."""
ONE_NODE = "A job of one node (--nnodes 1) has no network through which it could be asked"


class CommandError(CheckpointlessError):
    """Raised when the command cannot do what it was asked for; the sentence says why."""


class JobEndedError(CommandError):
    """Raised when the job has ended. ``verdict``: 'succeeded', or 'failed' with a reason."""

    def __init__(self, verdict: str) -> None:
        super().__init__(f"The job has {verdict.rstrip('.')}.")
        self.verdict = verdict


def open_client(backend: str, endpoint: str, run_id: str, options: dict[str, Any], seconds: float) -> Client:
    """A client of the job that was started with these options of torchrun; its store answers within ``seconds``.

    Raises ConfigError, DirectoryError, CommandError.
    """
    if not endpoint.strip():
        raise CommandError(f"{ONE_NODE}; of another job, give the --rdzv-endpoint that its nodes were given.")
    config = replace(
        Config.parse(options, os.environ), is_host="false", timeout=timedelta(seconds=max(seconds, 1.0))
    )
    name = f"client-{os.getpid()}-{secrets.token_hex(4)}"
    identity = Identity(run_id, name, read_token(config, os.environ, run_id), read_tls(config))
    params = RendezvousParameters(backend, endpoint, run_id, 1, 1)
    return Client(identity, directory_opener(backend, params, config)())


class Client:
    """Blocks in each call until the coordinator has answered or the time is over.

    Attributes:
        directory: of the job; the client closes it.
    """

    def __init__(self, identity: Identity, directory: Directory) -> None:
        self.directory = directory
        self._loop = EventLoop()
        self._answer: Between | None = None
        self._failure: tuple[Closed, str] | None = None
        self._peers = Peers(
            self._loop,
            identity,
            ("127.0.0.1", 0),  # nobody connects to a client
            opened=lambda peer: None,
            take=self._take,
            closed=self._closed,
            limit=ANSWER_S,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._peers.close()
        self._loop.close()
        self.directory.close()

    def overview(self, seconds: float) -> Overview:
        """How the job is. Raises JobEndedError, CommandError, DirectoryError."""
        answer = self._ask(Inquiry(), seconds)
        assert isinstance(answer, Overview)
        return answer

    def drain(self, drain: Drain, seconds: float) -> None:
        """Have a node's ranks moved; returns when that has begun. What stands in the way may pass meanwhile."""
        self._ask(drain, seconds)

    def until(self, holds: Callable[[Overview], bool], seconds: float) -> Overview:
        """The first overview for which it holds. Raises CommandError when the time is over."""
        end = time.monotonic() + seconds
        while not holds(seen := self.overview(max(end - time.monotonic(), PAUSE_S))):
            if time.monotonic() > end:
                raise CommandError(
                    f"The job is not back in order after {seconds:g} s: it is {seen.state}, ranks {seen.pending} have "
                    f"not joined; look at the status and at the agents' logs."
                )
            self._pause()
        return seen

    def _ask(self, question: Inquiry | Drain, seconds: float) -> Overview | Drained:
        end = time.monotonic() + seconds
        while True:
            answer = self._once(question)
            if isinstance(answer, (Overview, Drained)):
                return answer
            reason = answer.reason if isinstance(answer, Declined) else answer
            if time.monotonic() > end or (isinstance(answer, Declined) and not answer.again):
                raise CommandError(f"Refused: {reason}." if isinstance(answer, Declined) else reason)
            self._pause()

    def _once(self, question: Message) -> Overview | Drained | Declined | str:
        """The answer of who coordinates now, or why there is none."""
        if verdict := self.directory.verdict():
            raise JobEndedError(verdict)
        leader = self.directory.newest()
        if leader is None:
            return f"No agent coordinates a job of this --rdzv-id: none has come, or the id is wrong. {ONE_NODE}."
        self._answer = self._failure = None
        peer = self._peers.connect(leader.address)
        peer.send(encode_body(question))
        self._loop.run(lambda: self._answer is not None or self._failure is not None, ANSWER_S)
        peer.close("asked")
        if isinstance(self._answer, (Overview, Drained, Declined)):
            return self._answer
        how, reason = self._failure or (Closed.TIMEOUT, "it does not answer")
        sentence = f"The coordinator of term {leader.term} at {leader.address} cannot be asked: {reason}."
        if how is Closed.REJECTED:
            raise CommandError(sentence)
        return sentence

    def _pause(self) -> None:
        self._loop.run(lambda: False, PAUSE_S)

    def _take(self, peer: Peer, body: bytes) -> None:
        self._answer = decode(body)

    def _closed(self, peer: Peer, reason: str) -> None:
        assert peer.how is not None
        self._failure = peer.how, reason
