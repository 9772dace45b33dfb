"""What torchrun knows as the rendezvous handler: a job's settings, and where its agents and workers meet.

Agents take their seats through `protocol.member`, not through `next_rendezvous`. Workers meet in a TCPStore inside the
coordinator's agent. torch 2.13 gives workers the agent's store without a prefix per restart ("we create a new TCPStore
for every retry", says its comment, which its own handlers do not do), and gloo then meets the addresses of dead peers.
So each run of the script here has a new store.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from checkpointless_elastic.agent.credentials import read_tls, read_token
from checkpointless_elastic.agent.directory import directory_opener, process_name
from checkpointless_elastic.agent.membership import Network
from checkpointless_elastic.agent.peers import Identity
from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ConfigError, UnsupportedTorchError
from checkpointless_elastic.protocol.rules import OnLoss, Rules

__all__ = ["BACKEND", "ETCD_BACKEND", "CheckpointlessRendezvousHandler"]

logger = logging.getLogger(__name__)

BACKEND = "checkpointless"
ETCD_BACKEND = "checkpointless-etcd"
_TORCHRUNS_TIMEOUT_S = 900
_ETCD_PATIENCE_S = 15.0  # longer than an election inside etcd, and a call that meets it
_STORE_LIMIT = timedelta(seconds=30)
_LOOPBACK = "127.0.0.1"


class CheckpointlessRendezvousHandler(RendezvousHandler):
    """Nothing here blocks on a peer, but the calls of a directory.

    Attributes:
        config: the settings of the job.
        max_nodes: how many agents may take part.
        has_agent: set by our agent, see `next_rendezvous`.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        self.config = Config.parse(_given(params.config), os.environ)
        self.max_nodes = params.max_nodes
        self.has_agent = False
        self._params = params
        self._active = self.config.active_nodes or params.min_nodes
        if not params.min_nodes <= self._active <= params.max_nodes:
            raise ConfigError(
                f"active_nodes is {self._active}; it must be in the range of --nnodes, from {params.min_nodes} to "
                f"{params.max_nodes}."
            )
        if self.config.on_loss == "shrink" and self._active == params.min_nodes:
            logger.warning(
                "on_loss=shrink has no effect: the job begins with %d nodes, and --nnodes allows no fewer. Give a "
                "smaller MIN in --nnodes MIN:MAX, and set active_nodes.",
                self._active,
            )
        self._run_id = params.run_id
        several = self.max_nodes > 1
        self._host = _own_address(params) if several else ""
        host, self._port = ("", 0) if several else _endpoint(params)
        self._host = self._host or host
        self._store: TCPStore | None = None

    def rules(self, max_restarts: int) -> Rules:
        """The settings as the protocol needs them."""
        config = self.config
        heartbeat = config.heartbeat.total_seconds()
        embedded = self._params.backend == BACKEND
        return Rules(
            active_nodes=self._active,
            max_nodes=self.max_nodes,
            min_nodes=self._params.min_nodes,
            max_restarts=max_restarts,
            max_faults_per_step=config.max_faults_per_step,
            node_faults=config.node_faults,
            mirror_every=config.mirror_every,
            on_loss=OnLoss(config.on_loss),
            loss_timeout=config.on_loss_timeout.total_seconds(),
            timeout=config.timeout.total_seconds(),
            heartbeat=heartbeat,
            heartbeat_misses=config.heartbeat_misses,
            store_patience=heartbeat * config.heartbeat_misses if embedded else _ETCD_PATIENCE_S,
        )

    def network(self) -> Network:
        """What several nodes need. Raises ConfigError where the settings name what cannot be read."""
        name = f"{process_name()}-{secrets.token_hex(4)}"
        token = read_token(self.config, os.environ, self._run_id)
        identity = Identity(self._run_id, name, token, read_tls(self.config))
        directory = directory_opener(self._params.backend, self._params, self.config)
        return Network(identity, self._host, directory)

    def open_store(self) -> str:
        """A new store for one run of the script, or of one coordinator; its address. The one before it ends."""
        self._store = None
        self._store = self._open(self._port)
        self._port = 0  # the asked port may not be free at once again
        return f"{self._host}:{self._store.port}"

    def _open(self, port: int) -> TCPStore:
        """Blocks until this process has connected to its own store.

        With several nodes that goes over loopback: heartbeats wait for it, so no name server and no route may.
        """
        own = _LOOPBACK if self.max_nodes > 1 else self._host
        try:
            socket.getaddrinfo(own, port)  # the store would try for the whole limit
            store = TCPStore(own, port, is_master=True, timeout=_STORE_LIMIT, wait_for_workers=False)
            store.set_timeout(self.config.timeout)
            return store
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(
                f"No store can be opened at {self._host}:{port} ({str(error).splitlines()[0]}); give this machine and "
                f"a free port of it in --rdzv-endpoint, or leave that option out."
            ) from error

    # ---- RendezvousHandler

    def next_rendezvous(self) -> RendezvousInfo:
        """For a function in place of a command, which torch's own code runs on one node: rank 0 of 1, with a new store.

        Raises UnsupportedTorchError when our agent is not in place, ConfigError with several nodes.
        """
        if not self.has_agent:
            raise UnsupportedTorchError(
                "This torch looks up LocalElasticAgent before it makes the rendezvous handler, so the checkpointless "
                "agent is not in place; use a torch version from 2.6 to 2.13."
            )
        if self.max_nodes > 1:
            raise ConfigError("A function runs on one node only: give a command, or --nnodes 1.")
        host, _, port = self.open_store().rpartition(":")
        assert self._store is not None
        store = PrefixStore(f"torchelastic/{self._run_id}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(host, int(port)))

    def get_backend(self) -> str:
        """The name in `--rdzv-backend`."""
        return self._params.backend

    @property
    def use_agent_store(self) -> bool:
        """Workers are clients of this store, which outlives them."""
        return True

    def get_run_id(self) -> str:
        """The job's id, from `--rdzv-id`."""
        return self._run_id

    def is_closed(self) -> bool:
        """Never: the agents decide together how the job ends."""
        return False

    def set_closed(self) -> None:
        """The agents decide together how the job ends."""

    def num_nodes_waiting(self) -> int:
        """Nobody is restarted because a node waits."""
        return 0

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options of --rdzv-conf. Without `timeout` torchrun adds one, as a number: the variable must count then."""
    added = options.get("timeout") == _TORCHRUNS_TIMEOUT_S
    return {name: value for name, value in options.items() if not (added and name == "timeout")}


def _endpoint(params: RendezvousParameters) -> tuple[str, int]:
    """With one node: host name that workers connect to, and port (0: any)."""
    given: Any = params.endpoint
    host, port = parse_rendezvous_endpoint(str(given or "").strip(), default_port=0)
    return params.local_addr or host or "localhost", port


def _own_address(params: RendezvousParameters) -> str:
    """The address at which other nodes reach this one: given, or that of the interface towards the endpoint."""
    if params.local_addr:
        return params.local_addr
    if not str(params.endpoint or "").strip():
        raise ConfigError(
            "Several nodes need an endpoint that all of them can reach: give --rdzv-endpoint HOST:PORT."
        )
    reasons = []
    for endpoint in str(params.endpoint or "").split(","):
        host, port = parse_rendezvous_endpoint(endpoint.strip(), default_port=1)
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(where)  # sends nothing
                return str(probe.getsockname()[0])
        except OSError as error:
            reasons.append(f"{endpoint or 'none given'}: {error.strerror or error}")
    raise ConfigError(
        f"This node's address cannot be found from --rdzv-endpoint ({'; '.join(reasons)}); give an endpoint that all "
        f"nodes can reach, or this node's address in --local-addr."
    )
