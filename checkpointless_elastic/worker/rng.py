"""The state of every random number generator of this process, taken and put back bit for bit.

A state is taken before each fetch of a batch and at each replayable call, so it is made of raw words (no
pickle), and costs 4 microseconds where nothing was drawn since the last one. NumPy counts only where the script
has imported it, an accelerator only where it is initialised: taking a state never loads a library and never
creates a device context.

Most states of a script differ in one part from the one before, or in none: a state is made of the numbers of
its parts, see `worker.parts`."""

from __future__ import annotations

import functools
import random
import struct
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.worker.parts import Parts
from checkpointless_elastic.worker.rng_memory import (
    GAUSS,
    WORDS_BYTES,
    numpy_reader,
    python_reader,
    read_torch,
    torch_address,
    write_torch,
)

__all__ = ["RngState", "adopt", "capture", "capture_generator", "parts", "restore", "restore_generator"]

_WORDS = struct.Struct("<625I")
_NUMPY = struct.Struct("<2496si")
_PYTHON_VERSION = 3  # of random.getstate(), the same from Python 3.2 on
_NUMPY_KIND = "MT19937"
_NO_DEVICES: Mapping[str, bytes] = MappingProxyType({})


class RngState(msgspec.Struct, frozen=True, array_like=True, weakref=True):
    """What all generators of one process stood at, by the numbers of its parts.

    Attributes:
        python: the state of the module random: position, words, Gauss cache.
        numpy: NumPy's global legacy generator, Gauss cache included; empty if numpy.random was not imported.
        torch_cpu: torch's default CPU generator.
        devices: device name, such as "cuda:0", to the state of its default generator.
    """

    python: int
    numpy: int
    torch_cpu: int
    devices: dict[str, int] = {}

    def numbers(self) -> tuple[int, ...]:
        """Of all its parts."""
        return self.python, self.numpy, self.torch_cpu, *self.devices.values()


parts = Parts()
"""The parts of all states of this process."""


def adopt(state: RngState, found: Mapping[int, bytes]) -> None:
    """Make a decoded state one of this process; `found` has its parts. KeyError if one is missing."""
    for number in state.numbers():
        parts.adopt(number, found)
    parts.release_with(state, state.numbers())


def capture() -> RngState:
    """Take the state of Python, NumPy, torch and the accelerator. Does not wait for a device. Main thread only."""
    global _last, _seen
    seen = _read_python(), _read_numpy(), _read_torch(), _device_states()
    if _last is None or seen != _seen:
        *own, devices = seen
        python, numpy, torch_cpu = map(parts.take, own)
        _last = RngState(python, numpy, torch_cpu, {name: parts.take(part) for name, part in devices.items()})
        parts.release_with(_last, _last.numbers())
        _seen = seen
    return _last


def restore(state: RngState) -> None:
    """Put a state back. NumPy is imported if the state has a part for it, a device must already be usable."""
    python, numpy = parts.held[state.python], parts.held[state.numpy]
    position, *words = _WORDS.unpack_from(python)
    has_gauss, gauss = GAUSS.unpack_from(python, WORDS_BYTES)
    random.setstate((_PYTHON_VERSION, (*words, position), gauss if has_gauss else None))
    if numpy:
        _restore_numpy(numpy)
    torch_cpu = parts.held[state.torch_cpu]
    if _torch_address is None:
        restore_generator(torch.default_generator, torch_cpu)
    else:
        _put_back_torch(_torch_address, torch_cpu)
    for name, number in state.devices.items():
        restore_generator(_device_generator(name), parts.held[number])


def _put_back_torch(address: int, state: bytes) -> None:
    if not write_torch(address, state):
        raise StateMismatchError(
            "The state of torch's CPU generator was taken while another thread drew from it; "
            "give that thread a torch.Generator of its own."
        )


def capture_generator(generator: torch.Generator) -> bytes:
    """The state of one torch.Generator, on whatever device it is."""
    return generator.get_state().numpy().tobytes()


def restore_generator(generator: torch.Generator, state: bytes) -> None:
    """Put the state of one torch.Generator back."""
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _python_state() -> bytes:
    _, (*words, position), gauss = random.getstate()
    return _WORDS.pack(position, *words) + GAUSS.pack(gauss is not None, gauss or 0.0)


def _read_numpy() -> bytes:
    module = sys.modules.get("numpy.random")
    if module is None or not hasattr(module, "get_state"):  # absent, or half imported
        return b""
    read = _numpy_reader(module)
    return (b"" if read is None else read()) or _numpy_state(module)


_numpy_reader = functools.lru_cache(maxsize=1)(numpy_reader)


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


@functools.lru_cache(maxsize=1)
def _accelerator() -> tuple[str, Any] | None:
    """Name and module of the accelerator that this torch was built for, which a process never changes."""
    device = torch.accelerator.current_accelerator()
    return None if device is None else (device.type, torch.get_device_module(device.type))


def _device_states() -> Mapping[str, bytes]:
    found = _accelerator()
    if found is None or not _is_initialised(found[1]):
        return _NO_DEVICES
    name, module = found
    return {f"{name}:{index}": capture_generator(one) for index, one in enumerate(module.default_generators)}


def _is_initialised(module: Any) -> bool:
    known = getattr(module, "is_initialized", None)
    return bool(known is not None and known() and getattr(module, "default_generators", ()))


def _device_generator(name: str) -> torch.Generator:
    kind, _, index = name.partition(":")
    generators = getattr(torch.get_device_module(kind), "default_generators", ())
    if int(index) >= len(generators):
        raise StateMismatchError(
            f"The state of {name} cannot be put back, as {len(generators)} such devices are in use here; "
            "initialise the device before the first loop, as the lost rank did."
        )
    generator: torch.Generator = generators[int(index)]
    return generator


def _read_torch() -> bytes:
    if _torch_address is None:
        return capture_generator(torch.default_generator)
    return read_torch(_torch_address)


_read_python = python_reader() or _python_state
_torch_address = torch_address(torch.default_generator)
_last: RngState | None = None  # the newest state
_seen: tuple[bytes, bytes, bytes, Mapping[str, bytes]] = (b"", b"", b"", _NO_DEVICES)  # what it was made of
