"""What the pure protocol must know of a job's settings. Times are seconds."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["OnLoss", "Rules"]


class OnLoss(str, enum.Enum):
    """What is done about a lost node for which there is no spare."""

    WAIT = "wait"
    SHRINK = "shrink"  # the job goes on with fewer nodes, and with more when they come; see `resize`
    FAIL = "fail"


@dataclass(frozen=True)
class Rules:
    """Settings of one job, the same on all agents; the names are those of Config where it has them.

    Attributes:
        active_nodes: how many nodes get a seat.
        max_nodes: how many agents may take part, spares among them.
        min_nodes: the job does not go on with fewer seats than that.
        timeout: limit for the first `active_nodes` agents to come.
        loss_timeout: how long a lost node's seat may be vacant.
        fan_out: with more seats than this, agents hang in a tree, each with at most this many children.
        store_patience: how long a directory that is needed may not answer.
    """

    active_nodes: int = 1
    max_nodes: int = 1
    min_nodes: int = 1
    max_restarts: int = 0
    max_faults_per_step: int = 8
    node_faults: int = 5
    mirror_every: int = 0
    on_loss: OnLoss = OnLoss.WAIT
    loss_timeout: float = 600.0
    timeout: float = 900.0
    heartbeat: float = 0.5
    heartbeat_misses: int = 4
    fan_out: int = 32
    store_patience: float = 10.0

    @property
    def detection(self) -> float:
        """After this long without a sign of life an agent is taken to be gone."""
        return self.heartbeat * self.heartbeat_misses
