"""Puts the checkpointless agent in the place of torch's own.

torchrun has no hook for the agent, but `torch.distributed.launcher.api.launch_agent` makes the rendezvous handler just
before it looks up `LocalElasticAgent` by name in its module. Read in torch 2.6 and 2.13.
"""

from __future__ import annotations

import logging
import os

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
    _log_to_stderr()
    handler = CheckpointlessRendezvousHandler(params)
    install_agent()
    return handler


def _log_to_stderr() -> None:
    """torchrun sets up torch's loggers only. LOGLEVEL is its variable; whoever has set up logging keeps that."""
    ours = logging.getLogger("checkpointless_elastic")
    if ours.handlers or logging.getLogger().handlers:
        return
    shown = logging.StreamHandler()
    shown.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s checkpointless: %(message)s"))
    ours.addHandler(shown)
    ours.setLevel(os.environ.get("LOGLEVEL", "WARNING"))
    ours.propagate = False
