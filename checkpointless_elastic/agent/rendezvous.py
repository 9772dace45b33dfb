"""The rendezvous of one node: a TCPStore inside the agent.

torch 2.13 gives workers the agent's store without a prefix per restart ("we create a new TCPStore for every retry",
says its comment, which its own handlers do not do), and gloo then meets the addresses of dead peers. So each rendezvous
here makes a new store.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ConfigError, UnsupportedTorchError

__all__ = ["BACKEND", "CheckpointlessRendezvousHandler"]

logger = logging.getLogger(__name__)

BACKEND = "checkpointless"


class CheckpointlessRendezvousHandler(RendezvousHandler):
    """Hosts the store of a job on one node. Nothing here blocks on a peer.

    Attributes:
        config: the settings of the job.
        has_agent: set by the agent that uses this handler, see `next_rendezvous`.
    """

    def __init__(self, params: RendezvousParameters) -> None:
        if params.max_nodes != 1:
            raise ConfigError(
                f"Several nodes are not supported by this version of checkpointless_elastic: give --nnodes 1 instead "
                f"of {_nodes(params)}, or use another --rdzv-backend."
            )
        self.config = Config.parse(params.config, os.environ)
        self.has_agent = False
        self._run_id = params.run_id
        self._host, self._port = _endpoint(params)
        self._store: TCPStore | None = None

    def next_rendezvous(self) -> RendezvousInfo:
        """Rank 0 of 1, with a new store. Raises UnsupportedTorchError when torch runs its own agent."""
        if not self.has_agent:
            raise UnsupportedTorchError(
                "This torch looks up LocalElasticAgent before it makes the rendezvous handler, so the checkpointless "
                "agent is not in place; use a torch version from 2.6 to 2.13."
            )
        self._store = None  # ends the earlier one
        self._store = self._open(self._port)
        self._port = 0  # the asked port may not be free at once again
        store = PrefixStore(f"torchelastic/{self._run_id}", self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(self._host, self._store.port))

    def _open(self, port: int) -> TCPStore:
        try:
            return TCPStore(
                self._host, port, is_master=True, timeout=self.config.timeout, wait_for_workers=False
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"No store can be opened at {self._host}:{port} ({str(error).splitlines()[0]}); give a free port of "
                f"this machine in --rdzv-endpoint, or leave that option out."
            ) from error

    def get_backend(self) -> str:
        """The name in `--rdzv-backend`."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """Workers are clients of this store, which outlives them."""
        return True

    def get_run_id(self) -> str:
        """The job's id, from `--rdzv-id`."""
        return self._run_id

    def is_closed(self) -> bool:
        """Never: no other node takes part."""
        return False

    def set_closed(self) -> None:
        """No other node needs to know."""

    def num_nodes_waiting(self) -> int:
        """No other node takes part."""
        return 0

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True


def _nodes(params: RendezvousParameters) -> str:
    low, high = params.min_nodes, params.max_nodes
    return str(high) if low == high else f"{low}:{high}"


def _endpoint(params: RendezvousParameters) -> tuple[str, int]:
    """Host name that workers connect to, and port (0: any)."""
    given: Any = params.endpoint
    host, port = parse_rendezvous_endpoint(str(given or "").strip(), default_port=0)
    return params.local_addr or host or "localhost", port
