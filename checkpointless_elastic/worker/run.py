"""Run: what a script says of itself: what must survive, what is done again when a peer is lost, where to resume."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.data import carried, loops
from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.groups import ddp
from checkpointless_elastic.groups.spec import GroupSignature
from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.state.digest import digest
from checkpointless_elastic.state.inventory import Inventory, flatten
from checkpointless_elastic.state.pieces import GRADIENT, Piece
from checkpointless_elastic.state.segment import Segment
from checkpointless_elastic.state.sharding import Ranks, group_ranks
from checkpointless_elastic.state.snapshot import ArgumentGuard, AttemptSnapshot
from checkpointless_elastic.worker import gate, private_tensors, rng, session, unnamed
from checkpointless_elastic.worker.blocks import Shared
from checkpointless_elastic.worker.channel import AgentGone
from checkpointless_elastic.worker.damage import Damage
from checkpointless_elastic.worker.generators import is_generator
from checkpointless_elastic.worker.recovery import Recovery
from checkpointless_elastic.worker.unwind import Unwinding
from checkpointless_elastic.worker.verifier import Verifier

__all__ = ["Run", "is_replacement"]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

_VOID = object()
_run: Run | None = None


def forget() -> None:
    """The script is run again: it may make its Run again."""
    global _run
    carried.forget()
    _run = None


def is_replacement() -> bool:
    """True before this rank has got its state from others, or back: a script can skip loading its checkpoint then.

    That is in a replacement before it has joined, and on all ranks when the number of ranks has changed.
    """
    found = session.current()
    return found is not None and (found.shadow or found.returns)


class Run:
    """Protects the objects that it is given, by name: modules, optimizers, and anything with ``state_dict()``.

    Random generators too (torch.Generator, random.Random, NumPy's), of which each rank has a state of its own. Lists,
    tuples and dicts of such objects may be given. One Run per process. Without the checkpointless backend the same
    script runs, unprotected. Raises ConfigError for an object that is none of these.

    Attributes:
        step: training steps (replayable calls with an optimizer step) that have returned.
        attempt: which try of the present replayable call this is, from 1; 0 outside.
    """

    def __init__(self, **objects: Any) -> None:
        global _run
        if _run is not None:
            raise ConfigError("This process has a Run already; name everything that must survive in one Run.")
        if not objects:
            raise ConfigError(
                "Run() protects nothing: name what must survive, as in Run(model=model, optimizer=optimizer)."
            )
        self.step = 0
        self.attempt = 0
        self._left = (
            False  # the last attempt was left through an exception, perhaps in the middle of a backward
        )
        self._at_start = False  # this rank recovers, and its state is that from which a call begins
        self._introduced = False  # others know what this rank holds
        self._communicates = False  # an optimizer used collectives in its step, after the gate
        named = [pair for name, value in objects.items() for pair in flatten(name, value)]
        flat = dict(named)
        if len(flat) < len(named):
            raise ConfigError(
                "Two objects of the Run have one name, with those in lists and dicts: rename one."
            )
        drawn = {name: value for name, value in flat.items() if is_generator(value)}
        rng.include(drawn)
        self.inventory = Inventory({name: value for name, value in flat.items() if name not in drawn})
        self.private: dict[str, bytes] = {}
        self.reserved: dict[
            str, Segment
        ] = {}  # shared memory for recoveries, mapped beforehand, by file name
        self._snapshot = AttemptSnapshot(self.inventory)
        self._gates: dict[str, int] = {}
        self._looked_into: set[str] = set()  # functions with an optimizer step: see `unnamed`
        self._looking = ""  # such a function, of which the next call is looked into once more
        self._numbers: dict[str, float] = {}  # before that
        self._guards: dict[str, ArgumentGuard] = {}
        gate.install()
        self._session = session.current()
        self._recovery: Recovery | None = None
        if self._session is not None:
            rank, every = self._session.rank, self._session.channel.welcome.verify_every
            self._verifier, self._damage = Verifier(rank, every), Damage(self._session.run_dir, rank, every)
            self._recovery = Recovery(self._session, self)
            carried.watch()
            self._hooks = (
                functools.partial(self._commit, self._session, self._recovery),
                functools.partial(self._before_update, self._recovery),
                functools.partial(self._applied, self._session),
            )
            self._session.protect(self._recovery)
        _run = self

    def declare_replicas(self, **groups: Any) -> None:
        """Say which ranks hold the same bytes, where torch does not: ``run.declare_replicas(model=group)``.

        Each argument names an object of the Run, or a part of it (``**{"model.experts": group}``), and gives a process
        group, a device mesh or a sequence of global ranks; this rank must be among them. What an optimizer keeps for a
        parameter follows the parameter. To be called before the first step, on every rank. Without it DTensors (FSDP2,
        tensor parallel) and DDP's groups say it, and what they do not reach is taken to be equal on all ranks. Raises
        ConfigError for a name that nothing has, or ranks without this one.
        """
        rank = dist.get_rank() if dist.is_initialized() else 0
        for name, group in groups.items():
            ranks = group_ranks(group)
            if ranks and rank not in ranks:
                raise ConfigError(f"declare_replicas({name}=...): rank {rank} is not among {list(ranks)}.")
            self.inventory.declare(name, ranks)

    # ---- loops

    def epochs(self, n: int) -> Iterator[int]:
        """Yield 0 to n - 1; a replacement resumes in the epoch of the rank it replaces."""
        return loops.epochs(n, self._session)

    def steps(self, n: int) -> Iterator[int]:
        """Yield 0 to n - 1; a replacement resumes at the step of the rank it replaces."""
        return loops.steps(n, self._session)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """One pass over ``loader``; a replacement resumes at the batch of the rank it replaces."""
        return loops.batches(loader, self._session)

    def numbered(self, loader: Iterable[T]) -> Iterator[tuple[int, T]]:
        """As ``enumerate(run.batches(loader))``, with numbers that a replacement gets right too."""
        return loops.numbered(loader, self._session)

    # ---- replayable functions

    def replayable(self, function: F) -> F:
        """Decorate a function that is done again when a peer is lost inside it.

        It returns once it is committed on every rank: at its (last) ``optimizer.step()``, or at its end if it has none.
        What it changes outside torch and the Run's objects must be safe to do twice.
        """
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if gate.active() is not None:
                return function(*args, **kwargs)
            if self._session is None or self._recovery is None:
                return self._plain(function, args, kwargs)
            return self._protected(self._session, self._recovery, name, function, args, kwargs)

        return call  # type: ignore[return-value]

    def _plain(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.attempt = 1
        try:
            with gate.Call(1, _nothing, _nothing, _nothing) as call:
                value = function(*args, **kwargs)
        finally:
            self.attempt = 0
        self.step += call.optimizer_steps > 0
        return value

    def _protected(
        self,
        host: session.Session,
        recovery: Recovery,
        name: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        if host.shadow or host.returns or host.resume is not None:
            skipped, value = recovery.enter_call()
            if skipped:
                return value
        if not host.step:
            unnamed.refuse_uneven_inputs(self._ddp_modules())
        guard = self._guards.get(name) or self._guards.setdefault(name, ArgumentGuard(name))
        guard.begin(args, kwargs)
        try:
            while True:
                if host.is_frozen():
                    if not self.attempt:
                        host.left_early()  # peers may be in the attempt that this rank does not begin
                    self._at_start = True
                    recovery.settle()
                    self._at_start = False
                self.attempt += 1
                value = self._try(host, recovery, name, function, *guard.arguments())
                if value is not _VOID:
                    return value
        except StateMismatchError as error:
            host.unfit(str(error))
        finally:
            self.attempt = 0
            guard.end()

    def _try(
        self,
        host: session.Session,
        recovery: Recovery,
        name: str,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
    ) -> Any:
        self._damage.begin(host.step, self._shared_pieces)
        start = rng.capture()
        self._snapshot.begin(name)
        self.private = self.read_private()
        recovery.mirror.begin(recovery.record.begin(start), recovery.record.last_value)
        self._verifier.begin(host.step, self._shared_pieces)
        if self._looking == name:
            self._numbers = self.inventory.numbers()
        self._communicates = False
        call = gate.Call(self._gates.get(name, 1), *self._hooks)
        host.in_call, host.committed, host.late, host.void_memory = True, False, False, set()
        host.pulse.begin(Activity.CALL, name, host.stretch)
        as_usual = False
        try:
            with call:
                value = function(*args, **kwargs)
                call.gate()
            as_usual = not host.is_frozen()
        except gate.VoidAttempt:
            return self._undo(host, start)
        except (AgentGone, Unwinding):
            raise
        except BaseException as error:
            hold = isinstance(error, Exception)  # else it is asked to end, perhaps by a signal
            if host.committed or not (
                host.is_frozen() or host.wait_for_loss(host.freeze_seen.is_set, hold=hold)
            ):
                host.failed = True
                raise
            self._left = True
            host.left_early()
            return self._undo(host, start)
        finally:
            host.in_call = False
            host.pulse.end(host.stretch, learn=as_usual)
        return self._returned(host, recovery, name, call, value)

    def _commit(self, host: session.Session, recovery: Recovery) -> None:
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()  # what follows may read what any stream has written
        self._snapshot.gate()
        recovery.mirror.wait()
        recovery.record.ready()
        host.pulse.turn(Activity.GATE)
        if not host.vote(self._verifier.said()):
            raise gate.VoidAttempt
        host.pulse.turn(Activity.CALL)
        host.committed = True
        host.registry.committed(host.step)

    def _before_update(self, recovery: Recovery) -> None:
        recovery.mirror.wait()
        self._verifier.wait()

    def _applied(self, host: session.Session) -> None:
        """An optimizer that needs its peers for its update (Muon on DTensors) has its gate at the end of the call."""
        self._communicates = self._communicates or host.late

    def _undo(self, host: session.Session, start: rng.RngState) -> object:
        self._verifier.wait()
        self._snapshot.restore()
        rng.restore(start)
        return _VOID

    def _returned(
        self, host: session.Session, recovery: Recovery, name: str, call: gate.Call, value: Any
    ) -> Any:
        expected = call.optimizer_steps + self._communicates
        if host.void_memory:
            self._check_after_gate(host, name, expected)
        first, self._introduced = not self._introduced, True
        if self._looking == name:
            self._looking = ""
            _warn(host, unnamed.moving_number(self._numbers, self.inventory.numbers(), name))
        if call.optimizer_steps and name not in self._looked_into:
            self._check_complete(host, name)
        self._gates[name] = max(expected, self._gates.get(name, 1))
        self.step += call.optimizer_steps > 0
        self._snapshot.returned(call.optimizer_steps > 0)
        self.private = self.read_private()
        recovery.record.end(value)
        if first:
            host.learned()
            host.replicas(*self._held())
            recovery.reserve()
        return value

    def _check_complete(self, host: session.Session, name: str) -> None:
        self._looked_into.add(name)
        self._looking = name  # the first call may only have filled caches
        used = gate.optimizers()
        unnamed.check_optimizers(used, self.inventory, name)
        unnamed.check_accumulation(self.inventory)
        _warn(host, unnamed.unnamed_scheduler(used, self.inventory, name))
        _warn(host, unnamed.hook_with_state(self._ddp_modules()))

    def _check_after_gate(self, host: session.Session, name: str, expected: int) -> None:
        """Collectives after the gate have lost a rank: no live recovery if what they should have given is state."""
        if expected > self._gates.get(name, 1):
            host.unfit(f"{name} used collectives inside or between its optimizer steps, after its gate")
        for piece in self.inventory.pieces():
            if piece.tensor.untyped_storage().data_ptr() in host.void_memory:
                host.unfit(f"a collective after the gate of {name} wrote into {piece.key} and lost a rank")

    # ---- what recovery asks

    def read_private(self) -> dict[str, bytes]:
        """Raw bytes of the pieces that forward writes, by key."""
        pieces = self._snapshot.written_before_gate()
        return private_tensors.read(pieces) if pieces else {}

    def restore_private(self, tensors: dict[str, bytes]) -> None:
        """Put a lost rank's own tensors back."""
        private_tensors.write(self.inventory.pieces(), tensors)
        self.private = dict(tensors)

    def _shared_pieces(self) -> list[Piece]:
        """What replicas must agree on; gradients may be each rank's own until they are reduced."""
        return [p for p in self.inventory.pieces() if p.info.role != GRADIENT and p.key not in self.private]

    def said(self) -> bytes:
        """In a recovery: what replicas must agree on, see `protocol.checks`; empty if it is not compared.

        Only at the start of a call: between calls, a script may change it on one rank earlier than on another one.
        """
        return self._verifier.at_rest(self._shared_pieces) if self._at_start else b""

    def _held(self) -> tuple[list[list[int]], dict[str, tuple[int, int]]]:
        """The ranks and the digest of each piece, as `Replicas` has them."""
        pieces = self._shared_pieces()
        claims = {
            ranks: number for number, ranks in enumerate(dict.fromkeys(p.info.replicas for p in pieces))
        }
        return [list(ranks) for ranks in claims], {
            piece.key: (claims[piece.info.replicas], digest(piece.tensor)) for piece in pieces
        }

    def signature(self) -> list[GroupSignature]:
        """The process groups of this rank."""
        assert self._session is not None
        return self._session.registry.signature()

    def bucket_orders(self) -> list[bytes | None]:
        """Bucket order of each DDP module, made now where it is not; a reducer left in mid-backward is put right."""
        orders = []
        for module in self._ddp_modules():
            known = ddp.bucket_order(module)
            order = known or ddp.force_bucket_order(module)
            if order is None or (known and self._left):
                ddp.reset(module)
            orders.append(order)
        self._left = False
        return orders

    def known_bucket_orders(self) -> list[bytes | None]:
        """Bucket order of each DDP module, as it is now."""
        return [ddp.bucket_order(module) for module in self._ddp_modules()]

    def shared(self, twins: Ranks, last_value: bytes | None) -> Shared:
        """What is the same on all twins of this rank."""
        return Shared(
            twins,
            self.inventory.manifest(),
            self.step,
            last_value,
            dict(self._gates),
            self._snapshot.written(),
        )

    def adopt(self, common: Shared, buckets: list[bytes | None]) -> None:
        """In a replacement: take over what is the same on its twins."""
        self._introduced = True
        self.go_on_from(common)
        for module, order in zip(self._ddp_modules(), buckets, strict=True):
            if order is not None:
                ddp.adopt_bucket_order(module, order)

    def go_on_from(self, common: Shared) -> None:
        """Take over what is the same on all ranks, in a new run of the script by all of them."""
        self.step = common.steps
        self._gates = dict(common.gates)
        self._snapshot.learn(common.written, common.gates)

    def _ddp_modules(self) -> list[DistributedDataParallel]:
        """Whether the Run was given them, or what they wrap, or parts of it."""
        return ddp.wrappers_of(param for _, param in self.inventory.scan().params)


def _warn(host: session.Session, warning: str) -> None:
    """One rank says it."""
    if warning and host.rank == 0:
        logger.warning("%s", warning)


def _nothing() -> None:
    """What an unprotected call does at its gate and before its updates."""
