"""Mirrors go to a guardian and come back over real connections: whole, or not at all."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpointless_elastic.agent.mirrors import Line
from checkpointless_elastic.agent.wire import Wire
from checkpointless_elastic.protocol.between import decode
from checkpointless_elastic.protocol.guarding import Done, Put, Sent
from checkpointless_elastic.protocol.messages import Decision, Replicas, Report, Stage
from checkpointless_elastic.worker.mirror import entries, find
from tests.agent.guarding import RANK, Guardian, Scene, Ward, scene
from tests.agent.test_peers_tls import Authority

LARGE = random.Random(1).randbytes(9_000_001)


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


def wire_to(it: Scene, ward: Ward, guardian: Guardian) -> Wire:
    """A connection for mirrors, in the hands of a test."""
    got: list[Wire] = []
    line = Line(ward.peers, guardian.address, got.append, pytest.fail)
    opened, take = ward.peers._opened, ward.peers.take
    ward.peers._opened = lambda peer: line.opened() if line.owns(peer) else opened(peer)
    ward.peers.take = lambda peer, body: line.received(decode(body)) if line.owns(peer) else take(peer, body)
    it.until(lambda: bool(got), "a connection for mirrors")
    return got[0]


def content(guardian: Guardian, step: int) -> list[bytes]:
    with guardian.keeper._keeping.shelf.reading([RANK], step) as books:
        return [bytes(memory) for book in books for memory in book.memory()]


def test_a_rank_is_ready_for_its_guardian_only_when_the_mirror_is_there_too(it: Scene) -> None:
    guardian = it.guardian()
    ward = it.ward(guardian)
    ward.write(4, LARGE)
    assert not ward.ready(4)
    it.until(lambda: bool(guardian.copied), "the copy")
    assert guardian.copied == [(RANK, 1, 4)]
    assert guardian.keeper.mirrored([1, RANK]) == {RANK: 4}
    assert content(guardian, 4) == [LARGE]


def test_a_mirror_that_its_worker_has_given_up_is_waited_for_by_nobody(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    ward.write(4, LARGE)
    ward.list({})
    ward.ready(4)
    plain.until(lambda: bool(guardian.copied), "the copy")
    assert guardian.keeper.mirrored([RANK]) == {}


def test_a_new_guardian_gets_the_newest_mirror_before_the_next_step_is_ready(plain: Scene) -> None:
    first, second = plain.guardian(), plain.guardian()
    ward = plain.ward(first)
    ward.write(4, LARGE)
    ward.ready(4)
    plain.until(lambda: bool(first.copied), "the copy")
    ward.wards.move(second.address)
    ward.ready(5)
    plain.until(lambda: (RANK, 1, 5) in second.copied, "the copy of the next step")
    assert content(second, 4) == [LARGE]


def test_who_takes_the_seat_gets_the_mirror_of_the_decision_before_its_ranks_have_arrived(it: Scene) -> None:
    guardian = it.guardian()
    ward = it.ward(guardian)
    ward.write(4, LARGE)
    ward.ready(4)
    it.until(lambda: bool(guardian.copied), "the copy")
    held = Replicas([[RANK]], {"weight": (0, 7)})
    ward.wards.heard(RANK, held)
    it.until(lambda: guardian.keeper._held == {RANK: held}, "what the rank holds")
    heir = it.ward(guardian, taken=True)
    heir.wards.decided(Decision(2, 4, [0, 1], [RANK], mirrors=[RANK]))
    arrived = Report(Stage.ARRIVED, 2, 0)
    assert heir.wards.heard(RANK, arrived)
    assert heir.said == []
    it.until(lambda: bool(heir.said), "the rank has arrived")
    assert heir.said == [(RANK, arrived)]
    assert heir.fetched is not None
    assert heir.fetched.held == {RANK: held}
    assert [copy.rank for copy in heir.fetched.copies] == [RANK]
    entry = find(heir.run_dir, RANK, 4)
    (stripe,) = entry.stripes
    assert Path(stripe.path).parent == Path(heir.run_dir)
    assert Path(stripe.path).read_bytes() == LARGE


def test_where_the_guardian_has_no_mirror_the_rank_arrives_and_finds_none(plain: Scene) -> None:
    guardian = plain.guardian()
    heir = plain.ward(guardian, taken=True)
    heir.wards.decided(Decision(2, 4, [0, 1], [RANK], mirrors=[RANK]))
    heir.wards.heard(RANK, Report(Stage.ARRIVED, 2, 0))
    plain.until(lambda: bool(heir.said), "the rank has arrived")
    assert entries(heir.run_dir, RANK) == {}


def test_what_arrives_for_an_older_decision_is_not_waited_for(plain: Scene) -> None:
    guardian = plain.guardian()
    heir = plain.ward(guardian, taken=True)
    heir.wards.decided(Decision(2, 4, [0, 1], [RANK], mirrors=[RANK]))
    assert heir.wards.heard(RANK, Report(Stage.ARRIVED, 2, 0))
    heir.wards.decided(Decision(3, 4, [0, 1], [RANK]))
    plain.until(lambda: heir.fetched is not None, "what the guardian has")
    assert not heir.wards.heard(RANK, Report(Stage.ARRIVED, 3, 0))
    assert heir.said == []


@pytest.mark.parametrize("how", ["cut", "given up"])
def test_a_torn_mirror_does_not_count_and_the_one_before_it_stays(how: str, it: Scene) -> None:
    guardian = it.guardian()
    ward = it.ward(guardian)
    ward.write(4, LARGE)
    ward.ready(4)
    it.until(lambda: bool(guardian.copied), "the copy")
    wires = guardian.keeper._keeping._wires
    (own,) = wires
    wire = wire_to(it, ward, guardian)
    wire.send(Put(RANK, 1, (5, 1), b"", [len(LARGE)]))
    assert wire.receive() == Done()
    wire.send_memory(memoryview(LARGE)[: len(LARGE) if how == "given up" else 100_000])
    if how == "given up":
        wire.send(Sent(False))
    wire.end()
    wire.close()
    it.until(lambda: wires == {own}, "the end of the connection")
    assert guardian.keeper.mirrored([RANK]) == {RANK: 4}
    assert content(guardian, 4) == [LARGE]


def test_a_guardian_without_room_says_so(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    wire = wire_to(plain, ward, guardian)
    wire.send(Put(RANK, 1, (5, 1), b"", [1 << 62]))
    answer = wire.receive()
    assert isinstance(answer, Done)
    assert "enlarge the shared memory" in answer.reason
    wire.close()


def test_a_mirror_that_is_there_is_not_sent_again(plain: Scene) -> None:
    guardian = plain.guardian()
    ward = plain.ward(guardian)
    ward.write(4, LARGE)
    ward.ready(4)
    plain.until(lambda: bool(guardian.copied), "the copy")
    wire = wire_to(plain, ward, guardian)
    wire.send(Put(RANK, 1, (4, 1), b"", [len(LARGE)]))
    assert wire.receive() == Done(here=True)
    wire.close()
