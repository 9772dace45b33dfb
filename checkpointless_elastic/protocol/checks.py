"""Do replicas still hold the same bytes? What ranks say of it with their vote, and what follows.

At a step that is due (`verify_every`) each rank votes with the digests of the state from which it computes the step. So
the coordinator has those of all ranks, of one step and one generation, before it commits; what a void attempt said is
dropped with its votes. Most votes are the same bytes, and are only compared; they are decoded where some differ.

In a recovery between two such steps, each source says the same of the state that it publishes, before a replacement
copies it: else what has changed in one rank would come to two, and be the majority at the next comparison.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from checkpointless_elastic.errors import ProtocolError

__all__ = [
    "Finding",
    "Judgement",
    "Published",
    "compare",
    "is_due",
    "judge",
    "next_due",
    "pack",
    "published",
    "sentences",
]

MIN_REPLICAS = 3
"""With two that differ nobody knows which one is right."""
MAX_NAMES = 64 << 20
_DIGEST = 8  # bytes


class _Part(msgspec.Struct, frozen=True, array_like=True):
    """Pieces that the same ranks should hold.

    Attributes:
        ranks: those, none for all.
        names: keys of the pieces, compressed.
        digests: of the pieces in the order of their names, 8 bytes each.
    """

    ranks: list[int]
    names: bytes
    digests: bytes


class Published(msgspec.Struct, frozen=True, array_like=True):
    """Payload of Stage.PUBLISHED.

    Attributes:
        said: what the source says of its state, see `pack`.
        publication: what replacements get; opaque to the protocol.
    """

    said: bytes = b""
    publication: bytes = b""


class Finding(NamedTuple):
    """A piece that is not the same on all ranks that should hold the same bytes of it.

    Attributes:
        piece: its key.
        ranks: that hold it.
        wrong: those in the minority; empty if that is not known.
    """

    piece: str
    ranks: tuple[int, ...]
    wrong: tuple[int, ...]


class Judgement(NamedTuple):
    """What follows from a comparison.

    Attributes:
        wrong: by rank that is in the minority for some piece, what it did, as the end of a sentence.
        unknown: that pieces differ of which no majority is equal; empty if there are none.
    """

    wrong: dict[int, str]
    unknown: str


def is_due(step: int, every: int) -> bool:
    """Is the state of this step compared? That of step 0 never is: optimizers have made none yet."""
    return every > 0 and step > 0 and step % every == 0


def next_due(step: int, every: int) -> int:
    """The first step after this one whose state is compared."""
    return (step // every + 1) * every if every > 0 else sys.maxsize


def pack(pieces: Mapping[tuple[int, ...], Mapping[str, int]]) -> bytes:
    """What a rank says: by the ranks that should hold the same bytes, digests by key."""
    parts = []
    for ranks, digests in sorted(pieces.items()):
        keys = sorted(digests)
        packed = b"".join(digests[key].to_bytes(_DIGEST, "little") for key in keys)
        parts.append(_Part(list(ranks), zlib.compress("\0".join(keys).encode(), 1), packed))
    return msgspec.msgpack.encode(parts)


def published(payload: bytes) -> Published:
    """What a source has reported. Raises ProtocolError."""
    try:
        return msgspec.msgpack.decode(payload, type=Published) if payload else Published()
    except msgspec.DecodeError as error:
        raise ProtocolError(f"What a rank has published cannot be read: {error}.") from error


def compare(said: Mapping[int, bytes]) -> list[Finding]:
    """The pieces that differ, by key. ``said``: by rank; a rank that says nothing, or not of a piece, is left out."""
    same: dict[bytes, list[int]] = {}
    for rank, data in said.items():
        if data:
            same.setdefault(data, []).append(rank)
    if len(same) < 2:
        return []
    claims: dict[tuple[int, ...], dict[tuple[bytes, bytes], list[int]]] = {}
    for data, ranks in same.items():
        for part in _decode(data):
            holders = claims.setdefault(tuple(part.ranks), {})
            holders.setdefault((part.names, part.digests), []).extend(ranks)
    return sorted(
        finding for holders in claims.values() if len(holders) > 1 for finding in _differing(holders)
    )


def judge(said: Mapping[int, bytes], step: int) -> Judgement:
    """Compare, and say who is wrong. Raises ProtocolError if a rank's digests cannot be read."""
    wrong: dict[int, list[str]] = {}
    unknown: list[Finding] = []
    for finding in compare(said):
        for rank in finding.wrong:
            wrong.setdefault(rank, []).append(finding.piece)
        if not finding.wrong:
            unknown.append(finding)
    return Judgement(
        {
            rank: f"has other bytes than its replicas in {_list(wrong[rank])} at step {step}"
            for rank in sorted(wrong)
        },
        _disagreement(unknown, step) if unknown else "",
    )


def sentences(found: Judgement, protected: bool) -> list[str]:
    """What is said of it, without full stops. ``protected``: lost ranks can be recovered live."""
    then = "is replaced" if protected else "is left as it is, since no lost rank can be recovered live"
    said = [f"rank {rank} {cause}, and {then}" for rank, cause in found.wrong.items()]
    if found.unknown:
        said.append(f"{found.unknown}: no lost rank can be recovered live any more")
    return said


def _disagreement(findings: list[Finding], step: int) -> str:
    ranks = " and ".join(map(str, findings[0].ranks))
    pieces = _list([finding.piece for finding in findings])
    return f"ranks {ranks} hold different bytes of {pieces} at step {step}, and nobody knows which are right"


def _list(keys: list[str]) -> str:
    return keys[0] + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def _differing(holders: Mapping[tuple[bytes, bytes], list[int]]) -> Iterator[Finding]:
    by_piece: dict[str, dict[bytes, list[int]]] = {}
    for (names, digests), ranks in holders.items():
        for key, digest in _by_name(names, digests):
            by_piece.setdefault(key, {}).setdefault(digest, []).extend(ranks)
    for key, found in by_piece.items():
        if len(found) > 1:
            yield _finding(key, list(found.values()))


def _finding(piece: str, groups: list[list[int]]) -> Finding:
    most = max(groups, key=len)
    ranks = sorted(rank for group in groups for rank in group)
    known = len(ranks) >= MIN_REPLICAS and 2 * len(most) > len(ranks)
    return Finding(piece, tuple(ranks), tuple(sorted(set(ranks) - set(most))) if known else ())


def _decode(data: bytes) -> list[_Part]:
    try:
        return msgspec.msgpack.decode(data, type=list[_Part])
    except msgspec.DecodeError as error:
        raise ProtocolError(f"The digests of a rank cannot be read: {error}.") from error


def _names(data: bytes) -> list[str]:
    reader = zlib.decompressobj()
    try:
        names = reader.decompress(data, MAX_NAMES).decode().split("\0")
    except (zlib.error, UnicodeDecodeError) as error:
        raise ProtocolError(f"The names of a rank's pieces cannot be read: {error}.") from error
    if not reader.eof:
        raise ProtocolError(f"The names of a rank's pieces are cut short, or over {MAX_NAMES} bytes.")
    return names


def _by_name(names: bytes, digests: bytes) -> Iterator[tuple[str, bytes]]:
    keys = _names(names)
    if len(digests) != len(keys) * _DIGEST:
        raise ProtocolError(f"A rank named {len(keys)} pieces and sent {len(digests)} bytes of digests.")
    return zip(keys, (digests[at : at + _DIGEST] for at in range(0, len(digests), _DIGEST)), strict=True)
