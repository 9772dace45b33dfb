"""What a void attempt must put back: everything in the inventory that changes before the gate.

Nothing is copied that is not written. Which tensors a replayable function writes before its gate is learned at its
first calls, when all of them are copied (up to `first_copy_bytes`) and compared bit by bit: version counters alone
miss what native batch_norm, fused optimizers and `.data` write. Later calls copy only what was seen to change, and
compare version counters to find what was not seen before. A first write of that kind through `.data`, or by a kernel
that does not count, in a later call than the second one is not noticed. Optimizers that step before the gate are
heard through a hook, whatever kernel they use.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.arguments import ArgumentGuard
from checkpointless_elastic.state.gradients import GradientNote
from checkpointless_elastic.state.inventory import Inventory, Scan
from checkpointless_elastic.state.pieces import (
    BUFFER,
    GRADIENT,
    OBJECT,
    OPTIMIZER,
    Piece,
    carrier,
    gradient_key,
    piece_of,
)

__all__ = ["ArgumentGuard", "AttemptSnapshot"]

_version = attrgetter("_version")
_note, _stale = methodcaller("note"), methodcaller("stale")
_LEARNING_CALLS = 2


@dataclass
class _Function:
    """What is known of one replayable function.

    Attributes:
        name: how `begin` called it.
        written: keys of the pieces that it writes before its gate.
        checked: how often each piece was compared bit by bit.
        scan: the scan that the lists below belong to; None if they must be made anew.
        indices: pieces that are copied at its next call.
        learning: positions in `indices` of those that are compared at the gate.
        sources: their memory.
        copies: where it is copied to.
    """

    name: object
    written: set[str] = field(default_factory=set)
    checked: dict[str, int] = field(default_factory=dict)
    scan: Scan | None = None
    indices: list[int] = field(default_factory=list)
    learning: list[int] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)


class _View:
    """Lists made from one scan, so that each step only runs over them."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.pieces = scan.pieces
        self.params = [param for _, param in scan.params]
        self.number = {id(piece.outer): number for number, piece in enumerate(self.pieces)}
        # Either a DTensor or its local part may be written, and each has its own version.
        watched = [
            (number, tensor)
            for number, piece in enumerate(self.pieces)
            if piece.info.role != OPTIMIZER
            for tensor in dict.fromkeys([piece.tensor, piece.outer])
        ]
        self.watched_numbers = [number for number, _ in watched]
        self.watched = [tensor for _, tensor in watched]
        self.keys = [tuple(content) for content in scan.containers]
        self.values = self.contents()
        self.lists = [position for position, value in enumerate(self.values) if isinstance(value, list)]

    def contents(self) -> list[Any]:
        """The values that the containers hold now."""
        return list(chain.from_iterable(map(dict.values, self.scan.containers)))


class AttemptSnapshot:
    """Undoes attempts of replayable functions. Main thread only; blocks for the copies.

    The order of calls for each attempt: `begin`, the function, `gate`, and `restore` if the attempt is void. After
    `restore` the snapshot is as after `begin`, so that the next attempt may follow with or without another `begin`.
    """

    def __init__(self, inventory: Inventory, first_copy_bytes: int = 256 << 20) -> None:
        self._inventory = inventory
        self._limit = first_copy_bytes
        self._functions: dict[object, _Function] = {}
        self._told: set[str] = set()
        self._known_elsewhere: set[object] = set()
        self._gradients = GradientNote()
        self._own: list[Piece] | None = None  # what `written_before_gate` gives, without gradients
        self._view = self._look()
        self._function = _Function(None)
        self._values: list[Any] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._versions: list[int] = []
        self._notes: list[Any] = []
        self._unprepared: list[str] = []
        self._compared: list[str] = []  # by the present attempt, bit by bit
        self._open = False

    @property
    def unprepared(self) -> list[str]:
        """Keys of what the attempt changed without a copy: it can be undone only if there are none.

        Asked before the gate (after an exception), it looks first, as `gate` does.
        """
        if self._open:
            self.gate()
        return self._unprepared

    def begin(self, function: object = None) -> None:
        """Start of an attempt. `function` tells replayable functions apart: each learns on its own."""
        self._inventory.settle()
        self._inventory.check_start()
        if not self._is_current():
            self._view = self._look()
            self._is_current()
        known = self._functions.get(function) or self._functions.setdefault(function, _Function(function))
        if known.scan is not self._view.scan:
            self._prepare(known)
        self._function = known
        if known.copies:
            with torch.no_grad():
                torch._foreach_copy_(known.copies, known.sources)
        self._compared = []
        self._lists = [(self._values[n], list(self._values[n])) for n in self._view.lists]
        self._gradients.begin()
        self._versions = list(map(_version, self._view.watched))
        self._open = True

    def gate(self) -> bool:
        """The function is at its gate, before the update. True if the attempt could not be undone.

        Learns what was written. In the first calls of a function it compares the copies bit by bit.
        """
        if self._open:
            self._inventory.settle()
        known, pieces = self._function, self._view.pieces
        changed = self._changed()
        missed = sorted(changed.difference(known.indices)) if changed else []
        self._unprepared = []
        for number in missed:
            self._unprepared.append(pieces[number].key)
        for index in self._gradients.gate():
            self._unprepared.append(gradient_key(self._view.scan.params[index][0]))
        if self._open and (changed or known.learning):
            self._learn({pieces[number].key for number in changed} | self._replaced())
        self._open = False
        return bool(self._unprepared)

    def restore(self) -> None:
        """Put everything back in place, bit by bit; StateMismatchError names what was not copied.

        To be called while the attempt is void: at the gate, or after an exception before it.
        """
        self._inventory.settle(void=True)
        if self.gate():
            names = ", ".join(self._unprepared[:3])
            raise StateMismatchError(
                f"The void attempt changed {names} ({len(self._unprepared)} in all) for the first time, "
                "without a copy: it cannot be undone here."
            )
        self._put_structure_back()
        known = self._function
        for key in self._compared:  # the gate may move after the first call: two committed calls are compared
            known.checked[key] -= 1
        with torch.no_grad():
            if known.copies:
                torch._foreach_copy_(known.sources, known.copies)
        self._gradients.restore()
        for holder, noted in zip(self._inventory.holders, self._notes, strict=True):
            holder.put_back(noted)
        self.begin(known.name)

    def returned(self, stepped: bool) -> None:
        """The call has returned; `stepped`: it made an optimizer step."""
        if not stepped:
            self._gradients.ended()

    def learn(self, keys: Iterable[str], functions: Iterable[object]) -> None:
        """Take over from a survivor which pieces functions write before their gate (see `written`).

        `functions`: those that it has called; they need not be learned here again by copying all.
        """
        self._told, self._known_elsewhere = set(keys), set(functions)
        names = [gradient_key(key) for key, _ in self._view.scan.params]
        self._gradients.accumulated.update(index for index, key in enumerate(names) if key in self._told)
        self._own = None
        for known in self._functions.values():
            known.scan = None

    def written(self) -> list[str]:
        """Keys of all that functions write before their gate, for `learn`."""
        learned = self._told.union(*(known.written for known in self._functions.values()))
        return sorted(learned.union(piece.key for piece in self.written_before_gate()))

    def written_before_gate(self) -> list[Piece]:
        """Live pieces that the functions write before their gate, apart from parameters and optimizer state.

        They are private to the rank (running statistics of BatchNorm, gradients accumulated over several calls): no
        other rank has the bytes.
        """
        if self._own is None:
            written = self._told.union(*(known.written for known in self._functions.values()))
            own = (BUFFER, OBJECT)
            self._own = [p for p in self._view.pieces if p.key in written and p.info.role in own]
        if not self._gradients.accumulated:
            return self._own
        accumulated = self._gradients.private()
        pieces = list(self._own)
        for index in accumulated:
            key, param = self._view.scan.params[index]
            if param.grad is not None:
                pieces.append(piece_of(gradient_key(key), GRADIENT, param.grad))
        return pieces

    def _look(self) -> _View:
        """Look at all objects again: something was created, replaced or removed. Some µs per tensor."""
        view = _View(self._inventory.scan())
        self._own = None
        self._gradients.follow(view.params)
        return view

    def _is_current(self) -> bool:
        """Whether the objects still hold the tensors of the last scan; notes the values of today."""
        before = self._view.values
        self._notes = list(map(_note, self._inventory.holders))
        self._values = self._view.contents()
        if len(self._values) != len(before):
            return False
        if not all(map(is_, self._values, before)) and any(map(_matters, self._values, before)):
            return False
        return not any(map(_stale, self._inventory.holders))

    def _prepare(self, known: _Function) -> None:
        """Choose what is copied at the next call of a function: what it writes, and what is not known yet."""
        known.scan = self._view.scan
        known.indices, known.learning = [], []
        room = self._limit
        pieces = self._view.pieces
        learns = known.name not in self._known_elsewhere
        for number in sorted(range(len(pieces)), key=lambda n: pieces[n].info.role not in (BUFFER, OBJECT)):
            info = pieces[number].info
            if info.key in known.written or info.key in self._told:
                known.indices.append(number)
            elif learns and known.checked.get(info.key, 0) < _LEARNING_CALLS and info.nbytes <= room:
                room -= info.nbytes
                known.learning.append(len(known.indices))
                known.indices.append(number)
        known.sources = [carrier(pieces[number].tensor) for number in known.indices]
        known.copies = [torch.empty_like(source) for source in known.sources]

    def _changed(self) -> set[int]:
        """Numbers of the pieces that the attempt has changed so far."""
        view, known = self._view, self._function
        now = list(map(_version, view.watched))
        changed: set[int] = set()
        if now != self._versions:
            numbers = zip(view.watched_numbers, now, self._versions, strict=True)
            changed.update(number for number, version, before in numbers if version != before)
        for optimizer in self._gradients.stepped:
            params = [param for group in optimizer.param_groups for param in group["params"]]
            states = [state.values() for state in optimizer.state.values() if isinstance(state, dict)]
            held = map(id, chain(params, *states))
            changed.update(view.number[tensor] for tensor in held if tensor in view.number)
        for position in known.learning:
            if not _equal_bits(known.sources[position], known.copies[position]):
                changed.add(known.indices[position])
        return changed

    def _learn(self, keys: set[str]) -> None:
        known = self._function
        self._compared = [self._view.pieces[known.indices[position]].key for position in known.learning]
        for key in self._compared:
            known.checked[key] = known.checked.get(key, 0) + 1
        if known.learning or not keys <= known.written:
            known.written |= keys
            known.scan = None
            self._own = None

    def _replaced(self) -> set[str]:
        """Keys of tensors in whose place the attempt put others (a buffer that is assigned anew)."""
        now = self._view.contents()
        if len(now) == len(self._values) and all(map(is_, now, self._values)):
            return set()
        held = set(map(id, now))
        gone = [
            id(value) for value in self._values if isinstance(value, torch.Tensor) and id(value) not in held
        ]
        return {
            self._view.pieces[self._view.number[tensor]].key for tensor in gone if tensor in self._view.number
        }

    def _put_structure_back(self) -> None:
        """Remove tensors that the attempt created, put replaced ones back."""
        start = 0
        for content, keys in zip(self._view.scan.containers, self._view.keys, strict=True):
            values = self._values[start : start + len(keys)]
            start += len(keys)
            if len(content) != len(keys) or not all(map(is_, content.values(), values)):
                content.clear()
                content.update(zip(keys, values, strict=True))
        for held, items in self._lists:
            held[:] = items


def _matters(now: Any, before: Any) -> bool:
    """Whether a changed value can change the list of pieces; numbers cannot."""
    return now is not before and not (
        isinstance(now, (int, float, str)) and isinstance(before, (int, float, str))
    )


def _equal_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Bitwise, so that NaN equals itself and 0.0 is not -0.0."""
    left, right = left.contiguous().view(-1), right.contiguous().view(-1)
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
