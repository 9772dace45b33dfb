"""`--rdzv-backend checkpointless-etcd`: the rendezvous store is etcd v3, with the extra `etcd`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousHandlerCreator

__all__ = ["create", "handler"]


def create(params: RendezvousParameters) -> RendezvousHandler:
    """Puts the checkpointless agent in place and returns its rendezvous handler; called once by the launcher."""
    from checkpointless_elastic.agent.install import create_handler

    return create_handler(params)


def handler() -> RendezvousHandlerCreator:
    """Returns the creator. The same object each time: torch's registry refuses another one under the same name."""
    return create
