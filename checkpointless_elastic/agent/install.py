"""Puts the checkpointless agent in the place of torch's own.

torchrun has no hook for the agent, but `torch.distributed.launcher.api.launch_agent` makes the rendezvous handler just
before it looks up `LocalElasticAgent` by name in its module. Read in torch 2.6 and 2.13.
"""

from __future__ import annotations

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.launcher import api

from checkpointless_elastic.agent.agent import CheckpointlessAgent
from checkpointless_elastic.agent.rendezvous import CheckpointlessRendezvousHandler
from checkpointless_elastic.errors import UnsupportedTorchError

__all__ = ["create_handler", "install_agent"]


def install_agent() -> None:
    """Replace the name; harmless when done before. With another rendezvous backend our agent behaves as torch's."""
    present = getattr(api, "LocalElasticAgent", None)
    if present is not LocalElasticAgent and present is not CheckpointlessAgent:
        raise UnsupportedTorchError(
            f"torch.distributed.launcher.api.LocalElasticAgent is {present!r} and not torch's agent, so the "
            f"checkpointless agent cannot take its place; use torch 2.6 to 2.13 and no other replacement of the agent."
        )
    api.LocalElasticAgent = CheckpointlessAgent  # type: ignore[attr-defined]


def create_handler(params: RendezvousParameters) -> RendezvousHandler:
    """What the entry point leads to: checks the settings, installs the agent, returns the rendezvous handler."""
    handler = CheckpointlessRendezvousHandler(params)
    install_agent()
    return handler
