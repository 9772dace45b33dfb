"""The state of every random number generator of this process, taken and put back bit for bit.

A state is taken before each fetch of a batch and at each replayable call, so it is made of raw words (no
pickle) and costs 15 microseconds on a CPU, 45 with NumPy. NumPy counts only where the script has imported it,
an accelerator only where it is initialised: taking a state never loads a library and never creates a device
context."""

from __future__ import annotations

import functools
import random
import struct
import sys
from typing import Any

import msgspec
import torch

from checkpointless_elastic.errors import StateMismatchError

__all__ = ["RngState", "capture", "capture_generator", "restore", "restore_generator"]

_PYTHON = struct.Struct("<I625IBd")
_NUMPY = struct.Struct("<2496sIBd")
_PYTHON_VERSION = 3  # of random.getstate(), the same from Python 3.2 on
_NUMPY_KIND = "MT19937"


class RngState(msgspec.Struct, frozen=True, array_like=True):
    """What all generators of one process stood at.

    Attributes:
        python: the state of the module random, Gauss cache included.
        numpy: NumPy's global legacy generator, Gauss cache included; empty if numpy.random was not imported.
        torch_cpu: torch's default CPU generator.
        devices: device name, such as "cuda:0", to the state of its default generator.
    """

    python: bytes
    numpy: bytes
    torch_cpu: bytes
    devices: dict[str, bytes] = {}


def capture() -> RngState:
    """Take the state of Python, NumPy, torch and the accelerator. Does not wait for a device."""
    torch_cpu = capture_generator(torch.default_generator)
    return RngState(_python_state(), _numpy_state(), torch_cpu, _device_states())


def restore(state: RngState) -> None:
    """Put a state back. NumPy is imported if the state has a part for it, a device must already be usable."""
    version, *words, has_gauss, gauss = _PYTHON.unpack(state.python)
    random.setstate((version, tuple(words), gauss if has_gauss else None))
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


def _python_state() -> bytes:
    version, words, gauss = random.getstate()
    return _PYTHON.pack(version, *words, gauss is not None, gauss or 0.0)


def _numpy_state() -> bytes:
    module = sys.modules.get("numpy.random")
    if module is None or not hasattr(module, "get_state"):  # absent, or half imported
        return b""
    # 30 of the 45 microseconds of capture(): NumPy copies word by word, and has no other way to its Gauss cache.
    state = module.get_state()
    if not isinstance(state, tuple):  # numpy.random.set_bit_generator put another kind in place
        raise StateMismatchError(
            f"NumPy's global generator is a {state['bit_generator']}; "
            f"its state is not kept, leave it {_NUMPY_KIND}."
        )
    _, key, position, has_gauss, gauss = state
    return _NUMPY.pack(key.tobytes(), position, has_gauss, gauss)


def _restore_numpy(blob: bytes) -> None:
    import numpy

    key, position, has_gauss, gauss = _NUMPY.unpack(blob)
    words = numpy.frombuffer(key, dtype=numpy.uint32)
    numpy.random.set_state((_NUMPY_KIND, words, position, has_gauss, gauss))


@functools.lru_cache(maxsize=1)
def _accelerator() -> tuple[str, Any] | None:
    """Name and module of the accelerator that this torch was built for, which a process never changes."""
    device = torch.accelerator.current_accelerator()
    return None if device is None else (device.type, torch.get_device_module(device.type))


def _device_states() -> dict[str, bytes]:
    found = _accelerator()
    if found is None or not _is_initialised(found[1]):
        return {}
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
