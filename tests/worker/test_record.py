"""Slot and pulse together always say where a rank is, whatever its script does between steps."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpointless_elastic.data.cursor import Cursor, Frame, Outside
from checkpointless_elastic.state.slot import Slot
from checkpointless_elastic.worker import rng
from checkpointless_elastic.worker.packing import pack
from checkpointless_elastic.worker.private import At, read_state
from checkpointless_elastic.worker.pulse import Pulse
from checkpointless_elastic.worker.record import Record, follow


class Script:
    """Does to a cursor and a record what loops, calls and collectives of a script do."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.slot = Slot.create(str(folder / "slot"))
        self.path = str(folder / "pulse")
        self._random = random.Random(seed)
        self._issued: dict[str, int] = {}
        self._loops: list[Frame] = []
        self.session: Any = SimpleNamespace(
            slot=self.slot,
            pulse=Pulse(self.path),
            cursor=Cursor.new(),
            step=0,
            in_call=False,
            committed=False,
            registry=SimpleNamespace(issued=lambda: dict(self._issued)),
        )
        self.run: Any = SimpleNamespace(private={}, read_private=dict)
        self.record = Record(self.session, self.run)
        self.enter(), self.go_on()

    def do(self) -> str:
        """Something, by chance."""
        names = ["step", "go_on", "enter", "leave", "collective", "issue", "draw"]
        name = self._random.choices(names, [9, 9, 2, 2, 1, 1, 1])[0]
        getattr(self, name)()
        return name

    def step(self) -> None:
        session, record = self.session, self.record
        record.begin(rng.capture())
        session.in_call, session.committed = True, False
        self._sometimes(torch.rand, 1)
        record.ready()
        session.committed, session.step, self._issued = True, session.step + 1, {}
        self._sometimes(self.collective)
        self._sometimes(torch.rand, 1)
        session.in_call = False
        record.end(self._random.choice([None, 1.5, "x" * 300, object()]))

    def go_on(self) -> None:
        """The innermost loop goes to its next iteration."""
        if not self._loops:
            return
        cursor, frame = self.session.cursor, self._loops[-1]
        source = (self._random.choice([b"7", b"7", b"8"]),) if frame.kind == "batches" else ()
        before = rng.capture(), source, len(frame.outside)
        if frame.kind == "batches":
            self._sometimes(torch.rand, 1)
        cursor.start(frame, *before)
        self.record.between()

    def enter(self) -> None:
        self.record.loop_entered()
        kind = self._random.choice(["steps", "batches"])
        self._loops.append(self.session.cursor.enter(kind, rng.capture()))
        if self._random.random() < 0.8:
            self.go_on()

    def leave(self) -> None:
        if len(self._loops) > 1:
            self.session.cursor.leave(self._loops.pop(), rng.capture())
            self.go_on()

    def collective(self) -> None:
        self.issue()
        self.session.cursor.issued(Outside("world", "all_reduce", b"sum"))
        self.record.between()

    def issue(self) -> None:
        """A collective that is not awaited yet."""
        self._issued["world"] = self._issued.get("world", 0) + 1

    def draw(self) -> None:
        torch.rand(1)

    def _sometimes(self, action: Any, *arguments: Any) -> None:
        if self._random.random() < 0.2:
            action(*arguments)

    def found(self) -> tuple[bytes, dict[str, int]]:
        """Where a replacement would be, and what it would have issued."""
        state = read_state(self.slot)
        assert state is not None
        if state.step == self.session.step - 1:
            assert state.at is At.READY
            follow(state, self.slot.sequence, Pulse(self.path))
            return pack(state.cursor).blob, {}
        assert state.step == self.session.step
        return pack(state.cursor).blob, state.issued

    def true(self) -> tuple[bytes, dict[str, int]]:
        return pack(self.session.cursor).blob, self._issued


@pytest.mark.parametrize("seed", range(40))
def test_a_replacement_is_where_the_rank_was(seed: int, tmp_path: Path) -> None:
    script, done = Script(tmp_path, seed), []
    for _ in range(60):
        done.append(script.do())
        if done[-1] in ("step", "go_on", "collective"):  # the others change what nobody needs to know
            assert script.found() == script.true(), done


@pytest.mark.parametrize("kind", ["steps", "batches"])
def test_most_steps_of_a_plain_loop_write_the_slot_once(kind: str, tmp_path: Path) -> None:
    script = Script(tmp_path, 1)
    script._sometimes = lambda *_: None  # type: ignore[method-assign]
    script._random = SimpleNamespace(choice=lambda options: options[0])  # type: ignore[assignment]
    loop = script._loops[0]
    loop.kind = kind
    script.go_on(), script.step(), script.go_on()
    before = script.slot.sequence
    for _ in range(10):
        script.record.begin(rng.capture())
        script.record.ready()
        script.session.step += 1
        script.record.end(0.5)
        script.go_on()
    assert script.slot.sequence - before == 10
