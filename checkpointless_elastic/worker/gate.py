"""The gate: where a replayable call is committed or declared void.

It stands before the last ``optimizer.step()`` that the call is expected to make, as earlier calls of the same function
showed, so that nothing is applied that cannot be taken back; a call without an optimizer has it at its end. It is
reached through torch's global optimizer hook, which fires in every torch.optim optimizer and in subclasses that define
``step``. A step that gets a closure has its gate after the closure, before the update.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_active: Call | None = None
_hooked = False
_used: weakref.WeakSet[Any] = weakref.WeakSet()


class VoidAttempt(BaseException):
    """Unwinds a void attempt. Not an Exception, so that the user's handlers do not take it."""


class Call:
    """One attempt of one replayable call.

    ``commit()`` is called at the gate; it returns once the step is committed, or raises VoidAttempt.
    ``before_update()`` is called before each update by an optimizer, also before the gate; ``applied()`` when one has
    applied its update after the gate.

    Attributes:
        optimizer_steps: optimizer steps seen in this attempt.
        committed: the gate was passed.
    """

    def __init__(
        self,
        expected: int,
        commit: Callable[[], None],
        before_update: Callable[[], None],
        applied: Callable[[], None],
    ) -> None:
        self._expected = expected
        self._commit = commit
        self._before_update = before_update
        self.applied = applied
        self.optimizer_steps = 0
        self.committed = False

    def optimizer_step(self) -> None:
        """An optimizer is about to apply its update."""
        self.optimizer_steps += 1
        self._before_update()
        if self.optimizer_steps >= self._expected:
            self.gate()

    def gate(self) -> None:
        """Commit, once."""
        if not self.committed:
            self._commit()
            self.committed = True

    def __enter__(self) -> Call:
        global _active
        _active = self
        return self

    def __exit__(self, *exception: object) -> None:
        global _active
        _active = None


def active() -> Call | None:
    """The replayable call that is under way in this process."""
    return _active


def optimizers() -> list[Any]:
    """Those that have stepped in replayable calls of this process and still live."""
    return list(_used)


def install() -> None:
    """Put the gate into every optimizer of this process, once, and forget those that an earlier run has used."""
    global _hooked
    _used.clear()
    if not _hooked:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _hooked = True


def _before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _active
    if call is None:
        return None
    _used.add(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        call.optimizer_step()
        return None
    gated = _gated(closure, call)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": gated}
    return (args[0], gated, *args[2:]), kwargs


def _after_step(_optimizer: Any, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    call = _active
    if call is not None and call.committed:
        call.applied()


def _gated(closure: Callable[[], Any], call: Call) -> Callable[[], Any]:
    """The closure, with the gate after its first evaluation."""
    first = True

    def evaluate() -> Any:
        nonlocal first
        loss = closure()
        if first:
            first = False
            call.optimizer_step()
        return loss

    return evaluate
