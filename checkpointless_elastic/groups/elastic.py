"""The process group that user code, DDP, FSDP and DeviceMesh hold: it stays, the native group inside is exchanged.

Read in torch 2.13: `PyProcessGroup.hpp` for what C++ callers reach (trampolines), `distributed_c10d.py` for what
Python callers use. No backend is registered on the C++ side of the object, since `setBackend` keeps the first one per
type for good; a C++ caller that bypasses the trampolines gets an error and never a dead group. `getBackendName`
answers "elastic:gloo" to C++ because DDP's logger would cast the backend of a group called "gloo".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import ProcessGroup, Store, Work

from checkpointless_elastic.errors import RankLostError
from checkpointless_elastic.groups.backward import asked_by_reducer, await_at_end, buckets
from checkpointless_elastic.groups.host import Situation
from checkpointless_elastic.groups.ops import OPS, Op
from checkpointless_elastic.groups.work import ElasticWork, wait_for

if TYPE_CHECKING:
    from checkpointless_elastic.groups.issue import Engine
    from checkpointless_elastic.groups.link import Link
    from checkpointless_elastic.groups.spec import GroupSpec

__all__ = ["ElasticProcessGroup"]

NEVER = -2
"""Stamp of a group that has carried no collective."""
_ATTEMPT, _COMMITTED = Situation.ATTEMPT, Situation.COMMITTED


class ElasticProcessGroup(ProcessGroup):
    """A process group whose native group can be exchanged.

    Its collectives are added below the class: each one of `ops.OPS` under every name that torch knows.

    Attributes:
        spec: what it is made of.
        engine: what becomes of collectives that cannot simply be passed on.
        link: the native group inside; a void one without a native group while in shadow or lazy.
        stamp: the number of committed calls at its last collective; see `Registry.report_use`.
    """

    def __init__(self, spec: GroupSpec, store: Store, engine: Engine, link: Link) -> None:
        super().__init__(spec.rank, spec.size)  # type: ignore[call-arg]
        self.spec = spec
        self.engine = engine
        self.link = link
        self.stamp = NEVER
        self._counted = engine.place(spec.name)
        self._store = store
        self._batch: list[ElasticWork] | None = None
        self._splits = 0
        self.splitter: Callable[[GroupSpec], ElasticProcessGroup] | None = None
        if spec.device is not None:
            self.bound_device_id = spec.device

    # What it is. The names in camel case are those that C++ calls.

    @property
    def group_name(self) -> Any:
        """The name torch gave the group."""
        return self.spec.name

    @property
    def group_desc(self) -> str:
        """The description torch gave the group."""
        return self.spec.description

    def getGroupName(self) -> str:
        return self.spec.name

    def getGroupDesc(self) -> str:
        return self.spec.description

    def setGroupName(self, name: str) -> None:
        self.spec = replace(self.spec, name=name)
        self._counted = self.engine.place(name)

    def setGroupDesc(self, desc: str) -> None:
        self.spec = replace(self.spec, description=desc)

    _set_group_name = setGroupName
    _set_group_desc = setGroupDesc

    def getBackendName(self) -> str:
        return f"elastic:{self.name()}"

    def name(self) -> str:
        """The native default backend: "gloo" or "nccl"."""
        return "nccl" if "nccl" in self.spec.backends else "gloo"

    def _get_backend_name(self) -> str:
        return self.name()

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(device) for device, _ in self.spec.devices]

    def get_group_store(self) -> Store:
        """The store under the group's prefix, as at its creation."""
        return self._store

    # What is asked of the native group. In shadow there is none.

    @property
    def native(self) -> ProcessGroup:
        """The native group inside; None in shadow. A lazy group is connected. Blocks for that.

        Raises RankLostError if the group lost a member before it was connected again.
        """
        if self.link.lazy is not None:
            self.engine.wake(self)
        native: ProcessGroup = self.link.native
        if native is None and not self.engine.shadow:
            raise RankLostError(
                f"Group {self.spec.name} lost a rank in generation {self.engine.generation} and is not connected. "
                "The agent decides what follows; nothing is to be done here."
            )
        return native

    def _get_backend(self, device: torch.device) -> Any:
        if self.engine.shadow and self.link.native is None:
            from torch._C._distributed_c10d import FakeProcessGroup

            make = getattr(FakeProcessGroup, "_create_internal", FakeProcessGroup)
            return make(self.rank(), self.size())
        return self.native._get_backend(device)

    @property
    def use_pg_for_symm_mem_rendezvous(self) -> bool:
        """Whether symmetric memory meets through this group."""
        return self.native.use_pg_for_symm_mem_rendezvous

    @use_pg_for_symm_mem_rendezvous.setter
    def use_pg_for_symm_mem_rendezvous(self, value: bool) -> None:
        self.native.use_pg_for_symm_mem_rendezvous = value

    def set_timeout(self, timeout: timedelta) -> None:
        """Changes the timeout of later collectives, of later native groups too."""
        self.spec = replace(self.spec, timeout=timeout)
        if self.link.native is not None:
            self.native.set_timeout(timeout)

    def split_group(
        self,
        new_ranks: list[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: Any = None,
        group_desc: str | None = None,
        device_types: list[torch.device] | None = None,
    ) -> ProcessGroup | None:
        """A group of some of the members, made of new connections: splitting would need the lost ranks later.

        Blocks until they are connected. None on members that are not among them.
        """
        if self.rank() not in new_ranks or self.splitter is None:
            return None
        self._splits += 1
        new_ranks = sorted(new_ranks)
        kinds = None if device_types is None else {device.type for device in device_types}
        spec = replace(
            self.spec,
            name=group_name or f"{self.spec.name}:split:{self._splits}:{'_'.join(map(str, new_ranks))}",
            description=group_desc or f"{self.spec.description}:split:{self._splits}",
            ranks=tuple(self.spec.ranks[rank] for rank in new_ranks),
            rank=new_ranks.index(self.rank()),
            devices=tuple(pair for pair in self.spec.devices if kinds is None or pair[0] in kinds),
            timeout=timeout or self.spec.timeout,
            options=opts if "nccl" in self.spec.backends else None,
        )
        return self.splitter(spec)

    splitGroup = split_group

    def shutdown(self) -> None:
        """Ends the native group; the group is not rebuilt any more."""
        if self.engine.ending:
            return
        self.engine.groups.pop(self.spec.name, None)
        if self.link.native is not None:
            self.native.shutdown()

    def abort(self) -> None:
        """Ends the native group without waiting for its collectives; the group is not rebuilt any more."""
        self.engine.groups.pop(self.spec.name, None)
        if self.link.native is not None:
            self.native.abort()

    # Coalescing, which only NCCL has: the works of a batch have one native work, issued at its end.

    def _start_coalescing(self, device: torch.device) -> None:
        self.stamp = self.engine.calls
        if self.link.lazy is not None:
            self.engine.wake(self)
        if not self.link.void:
            self.native._start_coalescing(device)
        self._batch = []
        self.engine.batches += 1
        self.engine.look()

    def _end_coalescing(self, device: torch.device) -> Any:
        batch, self._batch = self._batch or [], None
        self.engine.batches -= 1
        self.engine.look()
        op = _batch_op(batch)
        native = None if self.link.void else self.native._end_coalescing(device)
        work = ElasticWork(self, self.link, native, op, "_end_coalescing", (), {})
        if native is not None:
            self.link.track(native)
        return work

    start_coalescing = _start_coalescing  # the names that C++ calls in torch after 2.13
    end_coalescing = _end_coalescing

    def batch_up(self, work: ElasticWork) -> None:
        """Notes a work issued while a batch is open."""
        if self._batch is not None:
            self._batch.append(work)


def _batch_op(batch: list[ElasticWork]) -> Op:
    return Op(
        "batch",
        (),
        lambda _: [tensor for work in batch for tensor in work.op.writes(work.call())],
        lambda _: chain.from_iterable(work.op.fills(work.call()) for work in batch),
        point_to_point=True,
    )


def _collective(method: str, op: Op) -> Callable[..., Work | None]:
    """The method that issues one collective: on the native group if nothing is to be minded."""

    reduces = method == "allreduce"  # what the reducer asks for

    def issue(self: ElasticProcessGroup, *args: Any, **kwargs: Any) -> Work | None:
        link, engine = self.link, self.engine
        self.stamp = engine.calls
        counts, place = engine.counts, self._counted
        counts[place] += 1
        if counts[place] == 1:
            engine.first()
        situation = engine.host.situation()
        if link.void or engine.attention or (situation is not _ATTEMPT and situation is not _COMMITTED):
            return engine.issue(self, op, method, args, kwargs)
        try:
            native = getattr(link.native, method)(*args, **kwargs)
        except RuntimeError as error:
            work = ElasticWork(self, link, None, op, method, args, kwargs)
            if not engine.failed(work, error):
                raise
            return work
        if native is None:
            return None
        in_flight = link.in_flight
        if len(in_flight) > 31:
            link.track(native)
        else:
            in_flight.add(native)
        if (
            buckets
            and reduces
            and asked_by_reducer()
            and (done := buckets.get(args[0][0]._cdata)) is not None
        ):
            await_at_end(partial(wait_for, link, native, self, op, method, args, kwargs))
            return done
        return ElasticWork(self, link, native, op, method, args, kwargs)

    issue.__name__ = method
    issue.__doc__ = getattr(getattr(ProcessGroup, method, None), "__doc__", None)
    return issue


def _forwarded(method: str) -> Callable[..., Any]:
    """A method that the native group answers."""

    def forward(self: ElasticProcessGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.native, method)(*args, **kwargs)

    forward.__name__ = method
    return forward


_FORWARDED = (
    "_backend_id",
    "_enable_collectives_timing",
    "_get_sequence_number_for_group",
    "_has_hooks",
    "_register_on_completion_hook",
    "_set_sequence_number_for_group",
    "_wait_for_pending_works",
    "merge_remote_group",
)

for _method, _op in OPS.items():
    if hasattr(ProcessGroup, _method):
        setattr(ElasticProcessGroup, _method, _collective(_method, _op))
for _method in _FORWARDED:
    if hasattr(ProcessGroup, _method):
        setattr(ElasticProcessGroup, _method, _forwarded(_method))
