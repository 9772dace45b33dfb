"""Random generators that a script makes for itself and names in its Run: their state as bytes, and put back.

NumPy's are told by what their `state` shows (JSON, as its integers have up to 128 bits), so each kind of bit generator
is read. NumPy is not imported where the script has not done so.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import torch

from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.tensor_bytes import to_bytes

__all__ = ["is_generator", "read", "write"]


def is_generator(value: Any) -> bool:
    """Whether it is a torch.Generator, a random.Random or one of NumPy's, and has no state_dict() of its own."""
    kinds = (torch.Generator, random.Random, *_numpy_kinds())
    return isinstance(value, kinds) and not hasattr(value, "state_dict")


def check(name: str, generator: Any) -> None:
    """Raise ConfigError if it has no state to be put back."""
    try:
        write(generator, read(generator))
    except (NotImplementedError, TypeError, StateMismatchError) as error:  # such as random.SystemRandom
        raise ConfigError(
            f"Run({name}=...) got a {type(generator).__name__}, whose draws cannot be repeated: leave it out."
        ) from error


def read(generator: Any) -> bytes:
    """The state of one generator."""
    if isinstance(generator, torch.Generator):
        return to_bytes(generator.get_state())
    if isinstance(generator, random.Random):
        return json.dumps(generator.getstate()).encode()
    return json.dumps(_shown(generator), default=_plain).encode()


def write(generator: Any, state: bytes) -> None:
    """Put such a state back. Raises StateMismatchError if it is that of another kind of generator."""
    try:
        if isinstance(generator, torch.Generator):
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        elif isinstance(generator, random.Random):
            version, words, gauss = json.loads(state)
            generator.setstate((version, tuple(words), gauss))
        elif isinstance(generator, sys.modules["numpy.random"].RandomState):
            generator.set_state(json.loads(state, object_hook=_array))
        else:
            generator.bit_generator.state = json.loads(state, object_hook=_array)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise StateMismatchError(
            f"The state of a {type(generator).__name__} cannot be put back ({error}); make it in the same way in each "
            "run of the script."
        ) from error


def _numpy_kinds() -> tuple[type, ...]:
    module = sys.modules.get("numpy.random")
    found = (getattr(module, name, None) for name in ("Generator", "RandomState"))
    return tuple(kind for kind in found if isinstance(kind, type))


def _shown(generator: Any) -> Any:
    if isinstance(generator, sys.modules["numpy.random"].RandomState):
        return generator.get_state(legacy=False)
    return generator.bit_generator.state


def _plain(value: Any) -> Any:
    """NumPy's arrays and scalars, for JSON."""
    return {"array": value.tolist(), "dtype": str(value.dtype)} if value.shape else value.item()


def _array(found: dict[str, Any]) -> Any:
    if found.keys() != {"array", "dtype"}:
        return found
    return sys.modules["numpy"].array(found["array"], dtype=found["dtype"])
