"""Room for the connections of many agents: by default a process may have 1024 descriptors open on most systems."""

from __future__ import annotations

import logging
import resource

__all__ = ["make_room"]

logger = logging.getLogger(__name__)

RESERVE = 512
"""Descriptors for everything but the connections with other agents."""


def make_room(connections: int) -> None:
    """Raise this process' limit, as far as it may be raised, if so many connections would not fit.

    Any agent may coordinate, and who does has a connection to each other one. Processes that are started from here on
    have the higher limit too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVE
    if wanted <= soft or soft == resource.RLIM_INFINITY:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < wanted:
        logger.warning(
            "This process may open %d files (ulimit -Hn), and %d agents may connect to it if it coordinates: "
            "raise that limit to %d, or give fewer nodes in --nnodes.",
            hard,
            connections,
            wanted,
        )
