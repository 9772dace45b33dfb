"""The order of DDP's buckets: captured, handed to a replacement, and a reducer put right after a void backward.

Read in torch 2.13: `torch/nn/parallel/distributed.py`; how the reducer in C++ behaves was found by running it. After
its first backward the reducer computes buckets in the order in which gradients became ready, and `_rebuild_buckets`,
called before the next forward, takes rank 0's order by two broadcasts: bucket indices, then bucket sizes. It changes
the reducer only after both, so a rank has rebuilt wholly or not at all. `_reset_state`, which torch has for a change of
the process group, puts a reducer back to before its first backward, with the buckets it has.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Reducer
from torch.nn.parallel import DistributedDataParallel

from checkpointless_elastic.errors import StateMismatchError, UnsupportedTorchError
from checkpointless_elastic.groups.backward import forget_buckets
from checkpointless_elastic.groups.ops import Call
from checkpointless_elastic.tensor_bytes import to_bytes

if TYPE_CHECKING:
    from checkpointless_elastic.groups.issue import Engine, Region

__all__ = [
    "adopt_bucket_order",
    "bucket_order",
    "force_bucket_order",
    "install",
    "reset",
    "uninstall",
    "wrappers_of",
]

_NEEDED = ("_rebuild_buckets", "_push_all_rebuilt_params", "_reset_state", "_delay_all_reduce")
_originals: dict[str, tuple[Any, Any]] = {}  # what was exchanged, by name: where it stands, and torch's own
_engine: Engine | None = None
_logger = logging.getLogger(__name__)
_orders: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
_made: weakref.WeakValueDictionary[int, DistributedDataParallel] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def install(engine: Engine) -> None:
    """Has every reducer report the broadcasts of its rebuild, and every DDP module that is made be known.

    Once per process; `uninstall` undoes it.
    """
    global _engine
    uninstall()
    missing = [name for name in _NEEDED if not hasattr(Reducer, name)]
    if missing:
        raise UnsupportedTorchError(f"DDP's Reducer has no {missing}: use torch 2.13, which was read.")
    _engine = engine
    exchanged: list[tuple[Any, str, Any]] = [
        (Reducer, "_rebuild_buckets", _rebuild),
        (Reducer, "_delay_all_reduce", _delayed),
        (DistributedDataParallel, "__init__", _known(DistributedDataParallel.__init__)),
        (dist, "_register_builtin_comm_hook", _builtin),
    ]
    for place, name, own in exchanged:
        _originals[name] = place, getattr(place, name)
        setattr(place, name, own)


def uninstall() -> None:
    """Puts torch's own methods back."""
    global _engine
    for name, (place, original) in _originals.items():
        setattr(place, name, original)
    _originals.clear()
    _engine = None


def _original(name: str) -> Any:
    """Torch's own function."""
    return _originals[name][1]


def _delayed(reducer: Any) -> None:
    """With static_graph the first backward's buckets are launched at its end, and awaited at once: the reducer is
    called by Python here, see `backward.asked_by_reducer`.

    Before them it asks all ranks which parameters they used. The peers of a replacement have done so in their own first
    backward, and do not any more.
    """
    if reducer not in _orders:
        _original("_delay_all_reduce")(reducer)
        return
    used = _Used()
    with used.answering:
        _original("_delay_all_reduce")(reducer)


def _builtin(reducer: Any, kind: Any) -> None:
    """A comm hook of torch's in C++ takes only futures that C++ has made; an abort cannot complete those."""
    assert _engine is not None
    if not _engine.native_futures:
        _logger.warning(
            "A comm hook of torch's in C++ (%s) waits in native code: if a peer is lost meanwhile, this rank may have "
            "to be replaced too. torch.distributed.algorithms.ddp_comm_hooks has the same in Python.",
            kind,
        )
    _engine.native_futures = True
    forget_buckets()
    _original("_register_builtin_comm_hook")(reducer, kind)


def _known(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def remember(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _made[next(_numbers)] = self
        weakref.finalize(self, forget_buckets)

    return remember


def wrappers_of(params: Iterable[torch.Tensor]) -> list[DistributedDataParallel]:
    """The DDP modules that reduce one of these parameters, in the order in which they were made since `install`.

    Of several around one module it is the newest: when the others are collected differs from rank to rank.
    """
    wanted = {id(param) for param in params}
    newest: dict[int, DistributedDataParallel] = {}
    for _, made in sorted(_made.items()):
        newest.pop(id(made.module), None)
        newest[id(made.module)] = made
    return [made for made in newest.values() if any(id(param) in wanted for param in made.parameters())]


def bucket_order(ddp: DistributedDataParallel) -> bytes | None:
    """The order that this reducer has taken, None if it has not rebuilt its buckets yet."""
    return _orders.get(ddp.reducer)


def force_bucket_order(ddp: DistributedDataParallel) -> bytes | None:
    """Rebuilds now, by this rank's own order, on a survivor that finished its first backward. Contacts nobody.

    None if there is nothing to rebuild by: DDP never rebuilds with find_unused_parameters, no backward has finished,
    or one was cut short (the reducer is then reset). If no survivor has an order, `reset` all of them: the replacement
    has the buckets of construction too, and the first step runs as it did.
    """
    order = bucket_order(ddp)
    if order is not None:
        return order
    local = _Local()
    forget_buckets()
    try:
        with _Answering(local):
            rebuilt = _original("_rebuild_buckets")(ddp.reducer)
    except RuntimeError:  # an assertion of torch: gradients of only a part of the parameters were seen
        reset(ddp)
        return None
    return _taken(ddp, local.order()) if rebuilt else None


def adopt_bucket_order(ddp: DistributedDataParallel, order: bytes) -> None:
    """Gives the reducer the buckets of another rank: on a replacement, or a survivor that has not rebuilt yet.

    Contacts nobody. Raises StateMismatchError if the order is of another model.
    """
    if bucket_order(ddp) == order:
        return
    _orders.pop(ddp.reducer, None)
    ddp.reducer._reset_state()
    ddp.reducer._push_all_rebuilt_params()
    forget_buckets()
    with _Answering(_Answers(order)):
        rebuilt = _original("_rebuild_buckets")(ddp.reducer)
    if not rebuilt:
        raise StateMismatchError(
            "DDP does not rebuild its buckets here, but did on a survivor: use one script."
        )
    _taken(ddp, order)


def reset(ddp: DistributedDataParallel) -> None:
    """Puts a reducer right that an exception left in the middle of a backward; its order is kept."""
    order = _orders.pop(ddp.reducer, None)
    ddp.reducer._reset_state()
    if order is not None:
        adopt_bucket_order(ddp, order)


def _taken(ddp: DistributedDataParallel, order: bytes) -> bytes:
    _has(ddp.reducer, order)
    ddp._has_rebuilt_buckets = True
    return order


def _has(reducer: Any, order: bytes) -> None:
    _orders[reducer] = order
    forget_buckets()


def _rebuild(reducer: Any) -> bool:
    """What stands in place of `Reducer._rebuild_buckets`, which each forward calls."""
    if reducer in _orders:  # it does so once, and only checks something from then on
        return bool(_original("_rebuild_buckets")(reducer))
    capture = _Capture()
    with _Answering(capture):
        rebuilt: bool = _original("_rebuild_buckets")(reducer)
    if rebuilt:
        _has(reducer, capture.order())
    return rebuilt


_rebuild._torchdynamo_disable = True  # type: ignore[attr-defined]


class _Answering:
    """A region in force. Each forward passes one: what contextlib makes of a generator would cost more."""

    def __init__(self, region: Region) -> None:
        if _engine is None:
            raise UnsupportedTorchError(
                "DDP's rebuild is asked for before Registry.install(): call that first."
            )
        self._engine = _engine
        self._region: Region | None = region

    def __enter__(self) -> None:
        engine = self._engine
        self._region, engine.region = engine.region, self._region
        engine.look()

    def __exit__(self, *exception: object) -> None:
        self._engine.region = self._region
        self._engine.look()


class _Capture:
    """Broadcasts are issued for real and their values kept."""

    def __init__(self) -> None:
        self._tensors: list[tuple[str, int, bytes]] = []

    def answer(self, call: Call) -> bool:
        return False

    def capture(self, call: Call) -> None:
        for tensor in call.tensors(0):
            self._tensors.append((str(tensor.dtype), tensor.numel(), to_bytes(tensor)))

    def order(self) -> bytes:
        """A line that says types and lengths, and the raw values."""
        header = json.dumps([[dtype, length] for dtype, length, _ in self._tensors]).encode()
        return header + b"\n" + b"".join(data for *_, data in self._tensors)


class _Local(_Capture):
    """Broadcasts leave this rank's own values."""

    def answer(self, call: Call) -> bool:
        self.capture(call)
        return True


class _Used:
    """The first collective leaves what this rank has; with that it is in force no more."""

    def __init__(self) -> None:
        self.answering = _Answering(self)

    def answer(self, call: Call) -> bool:
        self.answering.__exit__()
        return True

    def capture(self, call: Call) -> None:
        """Nothing is issued for real."""


class _Answers:
    """Broadcasts give the values of an order."""

    def __init__(self, order: bytes) -> None:
        header, _, self._data = order.partition(b"\n")
        self._expected: list[tuple[str, int]] = [(dtype, length) for dtype, length in json.loads(header)]

    def answer(self, call: Call) -> bool:
        for tensor in call.tensors(0):
            found = (str(tensor.dtype), tensor.numel())
            expected = self._expected.pop(0) if self._expected else None
            if found != expected:
                raise StateMismatchError(
                    f"The order of DDP's buckets is of another model: {expected} from the survivors, {found} here. "
                    "Build the same model in every start."
                )
            self._take(tensor)
        return True

    def _take(self, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        values = torch.frombuffer(bytearray(self._data[:size]), dtype=tensor.dtype)
        self._data = self._data[size:]
        tensor.data.copy_(values.reshape(tensor.shape))

    def capture(self, call: Call) -> None:
        """Nothing is issued for real."""
