"""The mirrors of a rank as files: what another node is sent of them, and how a node gets them back.

For the agent's threads. The worker that owns a mirror may give it up at any moment, and write another one into the same
files; it says so first (`worker.mirror`), so whoever has read the bytes asks afterwards whether the mirror is still
there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from checkpointless_elastic.errors import ProtocolError
from checkpointless_elastic.protocol.guarding import Put, Version
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.mirror import Entry, decode, encode, entries, path_of

__all__ = ["has", "install", "is_whole", "outgoing", "room"]


def outgoing(run_dir: str, rank: int, version: Version, generation: int) -> tuple[Put, list[str]] | None:
    """What announces a mirror, and the paths of its files; None if it was given up. ``generation``: see Put."""
    step, begun = version
    data = entries(run_dir, rank).get(step)
    entry = decode(data) if data is not None else None
    if data is None or entry is None or entry.begun != begun:
        return None
    paths = [stripe.path for stripe in entry.stripes]
    try:
        sizes = [os.stat(path).st_size for path in paths]
    except FileNotFoundError:  # the script is run again
        return None
    return Put(rank, generation, version, data, sizes), paths


def is_whole(run_dir: str, put: Put) -> bool:
    """Is the mirror still the one that was announced?"""
    return entries(run_dir, put.rank).get(put.version[0]) == put.entry


def has(run_dir: str, rank: int, step: int) -> bool:
    """Is there a whole mirror of this step?"""
    return step in entries(run_dir, rank)


def room(run_dir: str, put: Put) -> list[Segment]:
    """Files of this node for a mirror that comes from another one. Raises OSError where there is no room."""
    names = [os.path.basename(stripe.path) for stripe in _entry(put).stripes]
    if len(names) != len(put.sizes) or not all(name.startswith(f"mirror-{put.rank}-") for name in names):
        raise ProtocolError(f"The files {names} are not those of a mirror of rank {put.rank}.")
    return [
        Segment.share(Path(run_dir), name, nbytes, 0, nbytes)
        for name, nbytes in zip(names, put.sizes, strict=True)
    ]


def _entry(put: Put) -> Entry:
    try:
        return decode(put.entry)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A mirror of rank {put.rank} cannot be read: {error}.") from error


def install(run_dir: str, put: Put, files: Iterable[Segment]) -> None:
    """All bytes are there: from now on this is the rank's only mirror. Its worker must not have begun with its own."""
    entry = _entry(put)
    stripes = [
        msgspec.structs.replace(stripe, path=str(segment.path))
        for stripe, segment in zip(entry.stripes, files, strict=True)
    ]
    path = path_of(run_dir, put.rank)
    with Slot.open(path) if os.path.exists(path) else Slot.create(path) as slot:
        slot.write(b"", {entry.step: encode(msgspec.structs.replace(entry, stripes=stripes))})
