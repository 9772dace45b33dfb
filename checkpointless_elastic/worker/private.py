"""What only one rank knows of its step: data position, random state, tensors that forward writes.

It stands in the rank's slot, in memory of the agent's node, so that it outlives the worker. `record` says when it is
written.
"""

from __future__ import annotations

import enum
import os

import msgspec

from checkpointless_elastic.data.cursor import Cursor
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.packing import unpack
from checkpointless_elastic.worker.rng import RngState


class At(str, enum.Enum):
    """The moment that a PrivateState describes."""

    BETWEEN = "between"  # step - 1 has returned, step has not begun
    START = "start"  # step is being computed
    READY = "ready"  # step is computed, its update is not applied


class PrivateState(msgspec.Struct, frozen=True, array_like=True):
    """One rank's own state.

    Attributes:
        step: steps committed before this moment.
        at: the moment.
        cursor: where the rank is in its loops.
        rng: at the start of the step; None between steps (the cursor has those).
        tensors: raw bytes of tensors that forward writes, by key, at the start of the step.
        ready_rng, ready_tensors: the same when the rank was ready.
        issued: by group, collectives outside replayable functions since the last committed step.
    """

    step: int
    at: At
    cursor: Cursor
    rng: RngState | None = None
    tensors: dict[str, bytes] = {}
    ready_rng: RngState | None = None
    ready_tensors: dict[str, bytes] = {}
    issued: dict[str, int] = {}

    @property
    def in_loop(self) -> bool:
        """Whether the rank was inside a loop or a step."""
        return self.at is not At.BETWEEN or len(self.cursor.stack) > 1


def slot_path(run_dir: str, rank: int) -> str:
    """Where a rank's slot is."""
    return os.path.join(run_dir, f"slot-{rank}")


def lifeline_path(run_dir: str, rank: int, incarnation: int) -> str:
    """Where the lifeline of a worker is until its agent has taken it up."""
    return os.path.join(run_dir, f"lifeline-{rank}-{incarnation}")


def read_state(slot: Slot) -> PrivateState | None:
    """The private state in the slot; None if none was written. Raises ProtocolError if it is damaged."""
    content = slot.read()
    return None if content is None else unpack(content, PrivateState)


def in_loop(slot: Slot) -> bool:
    """Does the slot show its rank inside a loop or a step? Then its end, with whatever exit code, is a loss."""
    state = read_state(slot)
    return state is not None and state.in_loop
