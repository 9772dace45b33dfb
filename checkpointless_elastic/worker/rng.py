"""The state of every random number generator of this process, taken and put back bit for bit.

A state is taken before each fetch of a batch and at each replayable call, so it is made of raw words (no
pickle), and costs a few microseconds in a loop, some 30 in a step, whose caches are cold. NumPy counts only where
the script has imported it, an accelerator only where it is initialised: taking a state never loads a library and
never creates a device context. Generators that the Run names belong to it.

Most states of a script differ in one part from the one before, or in none: a state is made of numbered parts, and
shares with the one before it what did not change, so that a part is written to a slot once."""

from __future__ import annotations

import functools
import itertools
import random
import struct
import sys
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.worker import generators
from checkpointless_elastic.worker.rng_memory import (
    GAUSS,
    WORDS_BYTES,
    Reader,
    asked,
    clean,
    numpy_reader,
    python_reader,
    torch_address,
    torch_reader,
    write_torch,
)

__all__ = ["RngState", "capture", "include", "restore"]

_WORDS = struct.Struct("<625I")
_NUMPY = struct.Struct("<2496si")
_PYTHON_VERSION = 3  # of random.getstate(), the same from Python 3.2 on
_NUMPY_KIND = "MT19937"
_NO_DEVICES: Mapping[str, bytes] = MappingProxyType({})
_UNKNOWN: tuple[int, Any] = 0, None  # number and data of a part that was not taken yet


class RngState:
    """What all generators of one process stood at. Not to be changed.

    Attributes:
        parts: of the module random (position, words, Gauss cache), of NumPy's global legacy generator (empty if
            numpy.random was not imported), of torch's default CPU generator, of each device's default generator.
            By number: it stands for these bytes for good. Numbers start at the time of first use, so that a
            replacement never gives one that the rank it replaces has given.
        devices: names of these devices, such as "cuda:0", and after them of the generators that the Run names.
        encoded: the numbers of the parts and the names, as a slot holds them.
    """

    __slots__ = ("devices", "encoded", "parts")

    def __init__(self, parts: dict[int, bytes], devices: tuple[str, ...] = ()) -> None:
        self.parts, self.devices = parts, devices
        self.encoded = tuple(parts), devices

    def __eq__(self, other: object) -> bool:
        """Equal states, whatever their numbers."""
        if not isinstance(other, RngState):
            return NotImplemented
        return self.devices == other.devices and self.clean() == other.clean()

    __hash__ = None  # type: ignore[assignment]

    def clean(self) -> list[bytes]:
        """The data of the parts, the same for equal states."""
        python, numpy, torch_cpu, *others = self.parts.values()
        return [python, numpy, clean(torch_cpu), *others]


def decoded(encoded: Any, found: Mapping[int, bytes]) -> RngState:
    """A state of another process; `found` has its parts. KeyError, TypeError or ValueError if it is damaged."""
    numbers, devices = encoded
    parts = {number: found[number] for number in numbers}
    if len(parts) != 3 + len(devices):
        raise ValueError(f"{len(parts)} parts of a random state with {len(devices)} devices")
    return RngState(parts, tuple(devices))


def include(named: Mapping[str, Any]) -> None:
    """From now on the state has these generators too, in place of those of earlier calls. By name in the Run."""
    global _named, _last
    for name, generator in named.items():
        generators.check(name, generator)
    _named, _last = {f"Run.{name}": generator for name, generator in named.items()}, None


def capture() -> RngState:
    """Take the state of Python, NumPy, torch and the accelerator. Does not wait for a device. Main thread only."""
    global _last, _seen
    if not _readers or sys.modules.get("numpy.random") is not _numpy_module:
        _look_around()
    devices = _NO_DEVICES if _accelerator is None else _device_states(*_accelerator)
    if _named:
        devices = {**devices, **{name: generators.read(one) for name, one in _named.items()}}
    python, numpy, torch_cpu = _readers
    seen = python.glance(), numpy.glance(), torch_cpu.glance(), *devices.items()
    if _last is None or seen != _seen:
        _last, _seen = _taken(seen, tuple(devices)), seen
    return _last


def _taken(seen: tuple[Any, ...], devices: tuple[str, ...]) -> RngState:
    """The state of now, with the parts of the last one that are the same; the last one itself if all of them are."""
    last = _last if _last is not None and _last.devices == devices else None
    parts = [_UNKNOWN] * len(seen) if last is None else [*last.parts.items()]
    before: Iterable[Any] = _seen if _seen and last is not None else itertools.repeat(_UNKNOWN)
    same = last
    for place, (now, was) in enumerate(zip(seen, before, strict=False)):
        if now != was:
            data = _readers[place].read() if place < len(_readers) else now[1]
            if data != parts[place][1]:
                parts[place], same = (next(_numbers()), data), None
    return same or RngState(dict(parts), devices)


@functools.lru_cache(maxsize=1)
def _numbers() -> itertools.count[int]:
    return itertools.count(time.time_ns())


def restore(state: RngState) -> None:
    """Put a state back. NumPy is imported if the state has a part for it, a device must already be usable."""
    python, numpy, torch_cpu, *devices = state.parts.values()
    position, *words = _WORDS.unpack_from(python)
    has_gauss, gauss = GAUSS.unpack_from(python, WORDS_BYTES)
    random.setstate((_PYTHON_VERSION, (*words, position), gauss if has_gauss else None))
    if numpy:
        _restore_numpy(numpy)
    if _torch_address is None:
        generators.write(torch.default_generator, torch_cpu)
    else:
        _put_back_torch(_torch_address, torch_cpu)
    for name, data in zip(state.devices, devices, strict=True):
        generators.write(_named[name] if name in _named else _device_generator(name), data)


def _put_back_torch(address: int, state: bytes) -> None:
    if not write_torch(address, state):
        raise StateMismatchError(
            "The state of torch's CPU generator was taken while another thread drew from it; "
            "give that thread a torch.Generator of its own."
        )


def _python_state() -> bytes:
    _, (*words, position), gauss = random.getstate()
    return _WORDS.pack(position, *words) + GAUSS.pack(gauss is not None, gauss or 0.0)


def _look_around() -> None:
    """Find the generators. The script has imported NumPy; perhaps only by half: then it is looked for again."""
    global _numpy_module, _numpy, _accelerator, _readers, _seen
    module = sys.modules.get("numpy.random")
    if module is not _numpy_module and hasattr(module, "get_state"):
        _numpy_module, _numpy = module, _numpy_reader(module)
    _accelerator = _find_accelerator()
    _readers, _seen = (_python, _numpy, _torch), ()


def _numpy_reader(module: Any) -> Reader:
    reader = numpy_reader(module)
    if reader is None:
        return asked(functools.partial(_numpy_state, module))

    def read() -> bytes:
        global _numpy_module
        state = reader.read()
        if not state:
            _numpy_module = None  # another generator was put in place: look for it next time
        return state or _numpy_state(module)

    return Reader(read, reader.glance)


def _numpy_state(module: Any) -> bytes:
    state = module.get_state()
    if not isinstance(state, tuple):  # numpy.random.set_bit_generator put another kind in place
        raise StateMismatchError(
            f"NumPy's global generator is a {state['bit_generator']}; "
            f"its state is not kept, leave it {_NUMPY_KIND}."
        )
    _, key, position, has_gauss, gauss = state
    return _NUMPY.pack(key.tobytes(), position) + GAUSS.pack(has_gauss, gauss)


def _restore_numpy(blob: bytes) -> None:
    import numpy

    key, position = _NUMPY.unpack_from(blob)
    has_gauss, gauss = GAUSS.unpack_from(blob, WORDS_BYTES)
    words = numpy.frombuffer(key, dtype=numpy.uint32)
    numpy.random.set_state((_NUMPY_KIND, words, position, has_gauss, gauss))


def _find_accelerator() -> tuple[str, Any] | None:
    """Name and module of the accelerator that this torch was built for, which a process never changes."""
    device = torch.accelerator.current_accelerator()
    return None if device is None else (device.type, torch.get_device_module(device.type))


def _device_states(name: str, module: Any) -> Mapping[str, bytes]:
    if not _is_initialised(module):
        return _NO_DEVICES
    return {f"{name}:{index}": generators.read(one) for index, one in enumerate(module.default_generators)}


def _is_initialised(module: Any) -> bool:
    known = getattr(module, "is_initialized", None)
    return bool(known is not None and known() and getattr(module, "default_generators", ()))


def _device_generator(name: str) -> torch.Generator:
    if name.startswith("Run."):
        raise StateMismatchError(f"The lost rank's Run named the generator {name[4:]}, this one does not.")
    kind, _, index = name.partition(":")
    generators = getattr(torch.get_device_module(kind), "default_generators", ())
    if int(index) >= len(generators):
        raise StateMismatchError(
            f"The state of {name} cannot be put back, as {len(generators)} such devices are in use here; "
            "initialise the device before the first loop, as the lost rank did."
        )
    generator: torch.Generator = generators[int(index)]
    return generator


_python = python_reader() or asked(_python_state)
_numpy_module: Any = None
_numpy = Reader(bytes, bytes)
_torch_address = torch_address(torch.default_generator)
_torch = (
    asked(functools.partial(generators.read, torch.default_generator))
    if _torch_address is None
    else torch_reader(_torch_address)
)
_accelerator: tuple[str, Any] | None = None
_named: dict[str, Any] = {}
_readers: tuple[Reader, ...] = ()  # of Python, NumPy and torch
_last: RngState | None = None  # the newest state
_seen: tuple[Any, ...] = ()  # what they showed then, and the states of devices
