"""The state of every random number generator of this process, taken and put back bit for bit.

A state is taken before each fetch of a batch and at each replayable call, so it is made of raw words (no
pickle) and costs 5 microseconds on a CPU. NumPy counts only where the script has imported it, an accelerator
only where it is initialised: taking a state never loads a library and never creates a device context.

Most states of a script differ in one part from the one before, or in none: parts that are equal are one
object, and `worker.packing` writes each of them once."""

from __future__ import annotations

import functools
import random
import struct
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.worker.rng_memory import GAUSS, WORDS_BYTES, numpy_reader, python_reader

__all__ = ["RngState", "capture", "capture_generator", "restore", "restore_generator"]

_WORDS = struct.Struct("<625I")
_NUMPY = struct.Struct("<2496si")
_PYTHON_VERSION = 3  # of random.getstate(), the same from Python 3.2 on
_NUMPY_KIND = "MT19937"
_NO_DEVICES: Mapping[str, bytes] = MappingProxyType({})


class RngState:
    """What all generators of one process stood at. Not to be changed; encoded by `worker.packing`.

    Attributes:
        python: the state of the module random: position, words, Gauss cache.
        numpy: NumPy's global legacy generator, Gauss cache included; empty if numpy.random was not imported.
        torch_cpu: torch's default CPU generator.
        devices: device name, such as "cuda:0", to the state of its default generator.
    """

    __slots__ = ("devices", "numpy", "python", "torch_cpu")

    def __init__(
        self, python: bytes, numpy: bytes, torch_cpu: bytes, devices: Mapping[str, bytes] = _NO_DEVICES
    ) -> None:
        self.python = python
        self.numpy = numpy
        self.torch_cpu = torch_cpu
        self.devices = devices

    def parts(self) -> tuple[object, ...]:
        """All of it, to be compared."""
        return self.python, self.numpy, self.torch_cpu, dict(self.devices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RngState) and self.parts() == other.parts()

    __hash__ = None  # type: ignore[assignment]


_last = RngState(b"", b"", b"")


def capture() -> RngState:
    """Take the state of Python, NumPy, torch and the accelerator. Does not wait for a device. Main thread only."""
    global _last
    last = _last
    python, numpy = _python_state(), _numpy_state()
    torch_cpu, devices = capture_generator(torch.default_generator), _device_states()
    same = python == last.python, numpy == last.numpy, torch_cpu == last.torch_cpu, devices == last.devices
    if not all(same):
        _last = RngState(
            last.python if same[0] else python,
            last.numpy if same[1] else numpy,
            last.torch_cpu if same[2] else torch_cpu,
            last.devices if same[3] else devices,
        )
    return _last


def restore(state: RngState) -> None:
    """Put a state back. NumPy is imported if the state has a part for it, a device must already be usable."""
    global _last
    _last = state
    position, *words = _WORDS.unpack_from(state.python)
    has_gauss, gauss = GAUSS.unpack_from(state.python, WORDS_BYTES)
    random.setstate((_PYTHON_VERSION, (*words, position), gauss if has_gauss else None))
    if state.numpy:
        _restore_numpy(state.numpy)
    restore_generator(torch.default_generator, state.torch_cpu)
    for name, blob in state.devices.items():
        restore_generator(_device_generator(name), blob)


def capture_generator(generator: torch.Generator) -> bytes:
    """The state of one torch.Generator, on whatever device it is."""
    return generator.get_state().numpy().tobytes()


def restore_generator(generator: torch.Generator, state: bytes) -> None:
    """Put the state of one torch.Generator back."""
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_read_python = python_reader()


def _python_state() -> bytes:
    if _read_python is not None:
        return _read_python()
    _, (*words, position), gauss = random.getstate()
    return _WORDS.pack(position, *words) + GAUSS.pack(gauss is not None, gauss or 0.0)


_read_numpy = functools.lru_cache(maxsize=1)(numpy_reader)


def _numpy_state() -> bytes:
    module = sys.modules.get("numpy.random")
    if module is None or not hasattr(module, "get_state"):  # absent, or half imported
        return b""
    read = _read_numpy(module)
    return (b"" if read is None else read()) or _numpy_state_by_library(module)


def _numpy_state_by_library(module: Any) -> bytes:
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
