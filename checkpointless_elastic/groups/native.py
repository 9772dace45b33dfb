"""Native groups are built here, as torch's own `_new_process_group_helper` builds them, but able to be given up.

Read in torch 2.13: `torch/distributed/distributed_c10d.py`, `_new_process_group_helper`. Differences: every
member first says in the store that it is there and on which addresses its gloo devices listen, and looks for the
others again and again, so that a member lost meanwhile ends the attempt at once instead of after a timeout. NCCL
communicators are made non-blocking and not connected before their first use, since one that nobody uses need not be
rebuilt.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, cast

import torch
from torch._C._distributed_c10d import (
    DebugLevel,
    PrefixStore,
    ProcessGroup,
    ProcessGroupGloo,
    Store,
    _ProcessGroupWrapper,
    get_debug_level,
)

from checkpointless_elastic.errors import RankLostError
from checkpointless_elastic.groups.link import Link
from checkpointless_elastic.groups.owed import Place
from checkpointless_elastic.groups.sockets import Address, open_devices
from checkpointless_elastic.groups.spec import GroupSpec, Superseded

__all__ = ["Attempt", "connect", "meet"]

_WRAPPER_PREFIX = "pg_wrapper"
_SHORTEST, _LONGEST = 0.0005, 0.01
_FULL_MESH = timedelta(seconds=5)


@dataclass
class Attempt:
    """One try at connecting groups.

    Attributes:
        generation: that the native groups belong to.
        limit: seconds that a member may take to come; None: the group's timeout.
        places: this rank's place in each group, for those behind.
        given_up: set when it is pointless, from any thread.
    """

    generation: int
    limit: float | None = None
    places: dict[str, Place] = field(default_factory=dict)
    given_up: threading.Event = field(default_factory=threading.Event)


def connect(spec: GroupSpec, store: Store, attempt: Attempt) -> Link:
    """A native group of all members of `spec`, connected. Blocks until they have all come.

    Raises `Superseded` within 10 ms of the attempt being given up while a member has not come, RankLostError after its
    limit. A member that dies while connections are made can hold it up for 25 s: gloo tries five times.
    """
    native = ProcessGroup(store, spec.rank, spec.size)
    native._set_default_backend(_TYPES["nccl" if "nccl" in spec.backends else "gloo"])
    link = Link(native, attempt.generation, limit=spec.timeout)
    for backend in spec.backends:
        devices = [torch.device(device) for device, name in spec.devices if name == backend]
        meeting = _Meeting(spec, PrefixStore(f"{devices[0].type}/", store), link, attempt)
        built = _checked(meeting, _BUILDERS[backend](meeting))
        for device in devices:
            native._register_backend(device, _TYPES[backend], built)
    native._set_group_name(cast(Any, spec.name))
    native._set_group_desc(spec.description)
    return link


@dataclass(frozen=True)
class _Meeting:
    """What the builders of backends need.

    Attributes:
        spec: of the group.
        store: under the prefix of this backend.
        link: what is being built.
        attempt: of which this is a part.
    """

    spec: GroupSpec
    store: Store
    link: Link
    attempt: Attempt

    def meet(self, own: Sequence[Address]) -> None:
        """Says that this member is there, waits for the others and notes their addresses and places."""
        place = self.attempt.places.get(self.spec.name)
        says = json.dumps({"listens": own, "place": place})
        keys = meet(self.spec, self.store, self.attempt, "member", says)
        members = [json.loads(self.store.get(key)) for key in keys]
        self.link.own |= frozenset(own)
        self.link.peers |= {
            (str(host), int(port))
            for rank, member in enumerate(members)
            if rank != self.spec.rank
            for host, port in member["listens"]
        }
        self.link.places = [(calls, index) for calls, index in (m["place"] for m in members if m["place"])]


def meet(spec: GroupSpec, store: Store, attempt: Attempt, topic: str, says: str = "") -> list[str]:
    """Says something of this member and waits until all have. Returns the keys of what they say, by rank.

    Raises as `connect` does.
    """
    keys = [f"{topic}/{rank}" for rank in range(spec.size)]
    store.set(keys[spec.rank], says)
    limit = attempt.limit or spec.timeout.total_seconds()
    deadline = time.monotonic() + limit
    pause = _SHORTEST
    while not store.check(keys):
        pause = min(2 * pause, _LONGEST)
        if attempt.given_up.wait(pause):
            raise Superseded(f"Connecting group {spec.name} was given up: another rank was lost meanwhile.")
        if time.monotonic() > deadline:
            raise RankLostError(_who_is_missing(spec, store, keys))
    return keys


def _gloo(meeting: _Meeting) -> Any:
    devices, own = open_devices()
    meeting.meet(own)
    return _gloo_backend(meeting.spec, meeting.store, devices)


def _gloo_backend(spec: GroupSpec, store: Store, devices: list[Any]) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = devices
    options._threads = 2 * len(devices)
    options._timeout = min(spec.timeout, _FULL_MESH)
    backend: Any = ProcessGroupGloo(store, spec.rank, spec.size, options)
    set_timeout = getattr(backend, "set_timeout", None) or backend._set_default_timeout
    set_timeout(spec.timeout)
    if hasattr(backend, "options"):
        backend.options.global_ranks_in_group = list(spec.ranks)
        backend.options.group_name = spec.name
    backend._set_sequence_number_for_group()
    return backend


def _nccl(meeting: _Meeting) -> Any:
    """Its communicator is made at its first collective."""
    from torch.distributed import ProcessGroupNCCL

    spec = meeting.spec
    options: Any = ProcessGroupNCCL.Options() if spec.options is None else copy.deepcopy(spec.options)
    options._timeout = spec.timeout
    options.config.blocking = 0
    if options.split_from is not None:
        options.split_from = None
    options.global_ranks_in_group = list(spec.ranks)
    options.group_name = spec.name
    meeting.meet([])
    backend = ProcessGroupNCCL(meeting.store, spec.rank, spec.size, options)
    backend._set_sequence_number_for_group()
    meeting.link.device = spec.device or torch.device(
        "cuda"
    )  # to ask for the current one would make a context on it
    return backend


def _checked(meeting: _Meeting, backend: Any) -> Any:
    """With TORCH_DISTRIBUTED_DEBUG=DETAIL, the backend inside torch's wrapper that compares collectives."""
    if get_debug_level() != DebugLevel.DETAIL:
        return backend
    store = PrefixStore(f"{_WRAPPER_PREFIX}:{meeting.spec.name}", meeting.store)
    helper = _gloo(replace(meeting, store=store))
    return _ProcessGroupWrapper(backend, helper)


def _who_is_missing(spec: GroupSpec, store: Store, keys: list[str]) -> str:
    missing = [spec.ranks[rank] for rank, key in enumerate(keys) if not store.check([key])]
    return (
        f"Group {spec.name} could not be connected: global ranks {missing} did not come in time. "
        "Look for what holds these workers up, or raise the timeout of the group."
    )


_BUILDERS = {"gloo": _gloo, "nccl": _nccl}
_TYPES = {"gloo": ProcessGroup.BackendType.GLOO, "nccl": ProcessGroup.BackendType.NCCL}
