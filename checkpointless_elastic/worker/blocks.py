"""Blocks: pieces with the same replicas, which travel together, and what is said beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.device import DeviceMemory
from checkpointless_elastic.state.pieces import Manifest, Piece
from checkpointless_elastic.state.plan import PieceSize, Plan, plan
from checkpointless_elastic.state.sharding import EVERYBODY, Ranks
from checkpointless_elastic.state.transfer import ChunkDigest

__all__ = [
    "Block",
    "Shared",
    "Stripe",
    "block_name",
    "blocks",
    "holds",
    "layout_of",
    "stripe_of",
    "twins",
]


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


class Block(NamedTuple):
    """What pieces of a block have in common: the ranks that hold them, and the type of their device."""

    ranks: Ranks
    device: str


class Stripe(msgspec.Struct, frozen=True):
    """One survivor's part of a block.

    Attributes:
        block: which one.
        path: the segment that it is in; empty: it is read where it is, or comes over the network.
        digests: of its chunks.
        memory: where the pieces of the block are, if they are read there.
        node: for which it is; -1 in a mirror.
    """

    block: Block
    path: str
    digests: list[ChunkDigest]
    memory: list[DeviceMemory] = []
    node: int = -1


def blocks(pieces: Sequence[Piece]) -> dict[Block, list[Piece]]:
    """The pieces by block, in an order that is the same on all ranks that hold them."""
    found: dict[Block, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(Block(piece.info.replicas, piece.info.device), []).append(piece)
    return found


def layout_of(pieces: Sequence[Piece], ranks: Sequence[int]) -> Plan:
    """How a block is shared among these ranks, which all hold it."""
    return plan([PieceSize(piece.info.nbytes) for piece in pieces], ranks)


def stripe_of(stripes: Sequence[Stripe], block: Block, whose: str, node: int = -1) -> Stripe:
    """The part of a block that `whose` gives to a node; StateMismatchError if it has none."""
    for stripe in stripes:
        if stripe.block == block and stripe.node == node:
            return stripe
    raise StateMismatchError(f"{whose} does not hold what ranks {list(block.ranks)} should share")


def twins(pieces: Sequence[Piece]) -> Ranks:
    """The ranks that hold all of these pieces."""
    limited = [set(block.ranks) for block in blocks(pieces) if block.ranks]
    return tuple(sorted(set.intersection(*limited))) if limited else EVERYBODY


def holds(ranks: Ranks, rank: int) -> bool:
    """Is this rank among these?"""
    return ranks == EVERYBODY or rank in ranks


def block_name(block: Block) -> str:
    """A file name for a block."""
    if block.ranks == EVERYBODY:
        return f"state-{block.device}"
    return f"state-{block.device}-{hashlib.blake2s(repr(block.ranks).encode(), digest_size=8).hexdigest()}"
