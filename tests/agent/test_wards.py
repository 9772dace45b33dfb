"""What a guardian keeps of another node's ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpointless_elastic.agent.wards import Keeper
from checkpointless_elastic.protocol.between import decode
from checkpointless_elastic.protocol.guarding import Copy, Lacking, Ward


class Sender:
    """The agent whose ranks are kept: what the guardian sends it."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def send(self, body: bytes) -> None:
        self.got.append(decode(body))


def test_a_copy_that_builds_on_a_refused_one_is_asked_for_whole(tmp_path: Path) -> None:
    copied: list[tuple[int, int, int]] = []
    sender: Any = Sender()
    keeper = Keeper(str(tmp_path), lambda rank, generation: generation >= 82, lambda *one: copied.append(one))
    keeper.received(sender, Ward(1, [2], False))
    keeper.received(sender, Copy(2, 76, 158, b"old", [1], {1: b"a"}))
    keeper.received(sender, Copy(2, 82, 159, b"new", [1, 2], {2: b"b"}))
    assert copied == []
    assert sender.got == [Lacking(2)]
    keeper.received(sender, Copy(2, 82, 159, b"new", [1, 2], {1: b"a", 2: b"b"}))
    assert copied == [(2, 82, 159)]
    keeper.received(sender, Copy(2, 82, 160, b"newer", [2, 3], {3: b"c"}))
    assert copied[1:] == [(2, 82, 160)]
    assert sender.got == [Lacking(2)]
