"""Private state that is too large for a message is kept on another node like any other, over real connections."""

from __future__ import annotations

import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkpointless_elastic.protocol.guarding import Copy, Done, Large
from checkpointless_elastic.protocol.guarding import Ward as WardOf
from checkpointless_elastic.protocol.messages import MAX_MESSAGE, Mismatch
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker.private import slot_path
from tests.agent.guarding import RANK, Guardian, Scene, Ward, scene
from tests.agent.test_guardian import wire_to
from tests.agent.test_peers_tls import Authority

BLOB = random.Random(1).randbytes(MAX_MESSAGE + 1)
PARTS = {1: random.Random(2).randbytes(9_000_001), 2: b""}
LOG = [b"first", b"", random.Random(3).randbytes(9_000_002)]


@pytest.fixture(params=["plain", "tls"])
def it(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    secure = request.param == "tls"
    authority = Authority(tmp_path / "authority")
    with scene(tmp_path, [authority.tls(name) for name in "abc"] if secure else [None]) as made:
        yield made


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Scene]:
    with scene(tmp_path, [None]) as made:
        yield made


def write(ward: Ward, blob: bytes, parts: dict[int, bytes], log: list[bytes] | None = None) -> None:
    """As the rank's worker does."""
    with Slot.open(slot_path(ward.run_dir, RANK)) as slot:
        slot.write(blob, parts)
        for entry in log or []:
            slot.append(entry)


def kept(guardian: Guardian) -> tuple[bytes, dict[int, bytes], list[bytes] | None]:
    copy = guardian.keeper._kept[RANK]
    return copy.blob, dict(copy.parts), copy.log


@contextmanager
def no_more_memory_than(more: int) -> Iterator[None]:
    """This process may map so many bytes more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_private_state_of_any_size_goes_to_the_guardian_and_back(it: Scene) -> None:
    guardian = it.guardian()
    ward = it.ward(guardian)
    write(ward, BLOB, PARTS, LOG)
    ward.ready(4)
    it.until(lambda: guardian.copied == [(RANK, 1, 4)], "the copy")
    assert kept(guardian) == (BLOB, PARTS, LOG)
    heir = it.ward(guardian, taken=True)
    it.until(lambda: heir.fetched is not None, "what the guardian has")
    assert heir.fetched is not None
    (copy,) = heir.fetched.copies
    assert (copy.blob, dict(copy.parts), copy.log) == (BLOB, PARTS, LOG)


def test_what_the_guardian_has_of_large_private_state_is_not_sent_again(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    write(ward, BLOB, PARTS, LOG)
    ward.ready(4)
    plain.until(lambda: (RANK, 1, 4) in guardian.copied, "the copy")
    first = guardian.keeper._kept[RANK]
    new = {**PARTS, 3: b"3"}
    write(ward, b"next", new)
    plain.until(lambda: bool(ward.wards._sent[RANK].numbers), "the guardian's answer")
    ward.ready(5)
    plain.until(lambda: (RANK, 1, 5) in guardian.copied, "the copy of the next step")
    assert kept(guardian) == (b"next", new, LOG)
    second = guardian.keeper._kept[RANK]
    assert (second.parts[1] is first.parts[1]) and second.log is first.log


def test_large_private_state_is_sent_anew_when_its_connection_is_lost_or_the_guardian_is_another_one(
    plain: Scene,
) -> None:
    first, second = plain.guardian(), plain.guardian()
    ward = plain.ward(first)
    write(ward, BLOB, PARTS, LOG)
    ward.ready(4)
    plain.until(lambda: (RANK, 1, 4) in first.copied, "the copy")
    for wire in first.keeper._keeping._wires:
        wire.end()
    ward.ready(5)
    plain.until(lambda: (RANK, 1, 5) in first.copied, "the copy over a new connection")
    ward.wards.move(second.address)
    plain.until(lambda: (RANK, 1, 5) in second.copied, "the copy for the new guardian")
    assert kept(second) == (BLOB, PARTS, LOG)


def test_a_guardian_without_memory_for_a_copy_says_so(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    wire = wire_to(plain, ward, guardian)
    wire.send(Large(Copy(RANK, 1, 5, b"", [], {}), 1 << 61, {}, None))
    answer = wire.receive()
    assert isinstance(answer, Done)
    assert answer.reason == f"there is no memory for the {1 << 61} bytes of private state of rank {RANK}"
    wire.close()


def test_private_state_that_cannot_be_kept_is_said_to_the_coordinator_once(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    write(ward, BLOB[:9_000_000], {})
    ward.ready(4)
    plain.until(lambda: bool(guardian.copied), "the connection")
    write(ward, bytes(300 << 20), {})
    with no_more_memory_than(200 << 20):
        ward.ready(5)
        plain.until(lambda: bool(ward.said), "the rank's word")
    ((rank, said),) = ward.said
    assert rank == RANK
    assert said == Mismatch(
        "its private state cannot be kept on another node: this node has no memory to send the private state of "
        f"rank {RANK}"
    )


def test_a_copy_that_a_later_one_has_overtaken_does_not_count(plain: Scene) -> None:
    guardian = plain.guardian()
    peer: Any = object()
    guardian.keeper.received(peer, WardOf(1, [RANK], False))
    guardian.keeper.received(peer, Copy(RANK, 2, 5, b"later", [], {}))
    guardian.keeper.received(peer, Copy(RANK, 1, 6, b"older", [], {}))
    assert guardian.copied == [(RANK, 2, 5)]
    assert kept(guardian)[0] == b"later"
