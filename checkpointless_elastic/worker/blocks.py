"""Blocks: pieces with the same replicas, which travel together, and what is said beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from checkpointless_elastic.state.pieces import Manifest, Piece
from checkpointless_elastic.state.sharding import EVERYBODY, Ranks
from checkpointless_elastic.state.transfer import ChunkDigest

__all__ = ["Shared", "Stripe", "block_name", "blocks", "holds", "twins"]


class Shared(msgspec.Struct, frozen=True):
    """What is the same on all twins; the lowest of them that lives publishes it.

    Attributes:
        twins: the ranks that it is for.
        manifest: description of all pieces, and state that is not a tensor.
        steps: committed training steps.
        last_value: encoded return value of the last committed call.
        gates: optimizer steps that each replayable function makes.
        written: keys of pieces that replayable functions write before their gate.
    """

    twins: Ranks
    manifest: Manifest
    steps: int
    last_value: bytes | None
    gates: dict[str, int]
    written: list[str]


class Stripe(msgspec.Struct, frozen=True):
    """One survivor's part of a block: of which block, in which segment, and the digests of its chunks."""

    replicas: Ranks
    path: str
    digests: list[ChunkDigest]


def blocks(pieces: Sequence[Piece]) -> dict[Ranks, list[Piece]]:
    """The pieces by the ranks that hold them, in an order that is the same on all these ranks."""
    found: dict[Ranks, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.info.replicas, []).append(piece)
    return found


def twins(pieces: Sequence[Piece]) -> Ranks:
    """The ranks that hold all of these pieces."""
    limited = [set(ranks) for ranks in blocks(pieces) if ranks]
    return tuple(sorted(set.intersection(*limited))) if limited else EVERYBODY


def holds(ranks: Ranks, rank: int) -> bool:
    """Is this rank among these?"""
    return ranks == EVERYBODY or rank in ranks


def block_name(ranks: Ranks) -> str:
    """A file name for a block."""
    if ranks == EVERYBODY:
        return "state"
    return f"state-{hashlib.blake2s(repr(ranks).encode(), digest_size=8).hexdigest()}"
