"""Memory that goes bad when `checkpointless chaos` asks for it: one bit of a parameter of this worker flips.

Nobody else can reach the memory of a device, and from outside nobody sees the only moment that is fair: the start of a
step, when a flip stands for one since the last comparison of replicas. One that comes later in a step spoils a gradient
before replicas are compared again (`protocol.checks`).

The request is a file in the run directory, which only this user can write to; it is looked for only if the variable
ASKED is in the environment. There the worker also says whether a flip would be found and put right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from checkpointless_elastic.protocol.checks import MIN_REPLICAS
from checkpointless_elastic.state.pieces import PARAMETER, Piece, byte_view

__all__ = ["ASKED", "Damage", "obstacle_path", "request_path"]

ASKED = "CHECKPOINTLESS_CHAOS"


def request_path(run_dir: str, rank: int) -> str:
    """A file here makes a bit of the rank's memory flip at its next step; it is gone then."""
    return os.path.join(run_dir, f"flip-{rank}")


def obstacle_path(run_dir: str, rank: int) -> str:
    """Here the rank says in a sentence why a flip would not be put right; empty if it would."""
    return os.path.join(run_dir, f"flips-{rank}")


class Damage:
    """For a rank that compares its replicas at every ``every``-th step."""

    def __init__(self, run_dir: str, rank: int, every: int) -> None:
        self._request, self._obstacle = (Path(p(run_dir, rank)) for p in (request_path, obstacle_path))
        self._asked, self._told, self._every = ASKED in os.environ, False, every

    def begin(self, step: int, pieces: Callable[[], Sequence[Piece]]) -> None:
        """A step begins. ``pieces()``: what replicas must agree on."""
        if not self._asked or step == 0:
            return
        if not self._told:
            self._told = True
            self._tell(_target(pieces()))
        if self._request.exists():
            found = _target(pieces())
            if found is not None:
                _flip(found)
            self._request.unlink(missing_ok=True)

    def _tell(self, target: Piece | None) -> None:
        partial = self._obstacle.with_suffix(".partial")
        partial.write_text(_why_not(target, self._every))
        partial.replace(self._obstacle)


def _why_not(target: Piece | None, every: int) -> str:
    if every != 1:
        return (
            "the job does not compare its replicas at each step, so that a spoilt gradient may count before the flip "
            "is found: give it verify_every=1 (in --rdzv-conf, or CHECKPOINTLESS_VERIFY_EVERY=1)"
        )
    if target is None:
        return f"no parameter is held by {MIN_REPLICAS} ranks or more, so that nobody could say which bytes are right"
    return ""


def _target(pieces: Sequence[Piece]) -> Piece | None:
    """The largest parameter of floating point numbers that has a majority to be compared with."""
    world = int(os.environ["WORLD_SIZE"])
    found = [
        piece
        for piece in pieces
        if piece.info.role == PARAMETER
        and piece.tensor.is_floating_point()
        and piece.info.nbytes
        and len(piece.info.replicas or range(world)) >= MIN_REPLICAS
        and byte_view(piece.tensor) is not None
    ]
    return max(found, key=lambda piece: piece.info.nbytes, default=None)


def _flip(piece: Piece) -> None:
    """A low bit of the number in the middle, behind autograd's back, as memory does it."""
    data = byte_view(piece.tensor.data)
    assert data is not None
    size = piece.tensor.element_size()
    at = data.numel() // size // 2 * size
    with torch.no_grad():
        data[at] ^= 1 << 6
