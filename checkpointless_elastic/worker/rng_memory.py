"""Reads the global random generators where they lie in memory.

`random.getstate` makes 625 integers, `numpy.random.get_state` copies word by word and `Generator.get_state` fills a new
tensor: 50 microseconds in a loop, several times that in a process whose caches are cold, and a step asks four times.
Their memory holds the same 2,500 bytes each, read here in about one microsecond. Whether anything was drawn since then
shows in a few of them: a draw moves the position, and where it comes to stand at the same place all words are new.

Found in CPython 3.11 (the object's head, an int for the position, 624 words), NumPy 2.4 (624 words and an int at the
public `bit_generator.ctypes.state_address`; inside RandomState an int for "has a second Gauss draw" in the eight bytes
before that draw) and torch 2.13 (the engine's seed, position and 624 words, then the second draws of pairs). Other
versions were not tried: each place is tried out with known values before it is used, a function returns None where it
finds something else, and the library is asked each time instead.
"""

from __future__ import annotations

import ctypes
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from checkpointless_elastic.tensor_bytes import to_bytes

__all__ = [
    "GAUSS",
    "TORCH_BYTES",
    "WORDS_BYTES",
    "Reader",
    "asked",
    "clean",
    "numpy_reader",
    "python_reader",
    "torch_address",
    "torch_reader",
    "write_torch",
]

WORDS_BYTES = 2500  # 624 words of four bytes, and the position in them
GAUSS = struct.Struct("<Bd")
_FLAG = struct.Struct("<i4xd")
_PROBE = 0.7310585786300049  # any number that is in no object by chance
# Seed and left, seeded, next, words, optional<float>, optional<double>.
_TORCH = struct.Struct("<12s?3x4s2496s4x4s?3x8s?7x")
_TORCH_WORDS = 20  # where the words begin in it
TORCH_BYTES = _TORCH.size
_at = ctypes.string_at

_GLANCE = 16  # bytes: a position and three words


class Reader(NamedTuple):
    """Reads one generator.

    Attributes:
        read: gives its state; no bytes when the generator is not where it was.
        glance: gives something that is not equal to what it gave before if the state is another one.
    """

    read: Callable[[], bytes]
    glance: Callable[[], object]


def asked(read: Callable[[], bytes]) -> Reader:
    """A reader that asks the library each time."""
    return Reader(read, object)


def python_reader() -> Reader | None:
    """Reads the module random: position, words, `GAUSS`."""
    owner: Any = getattr(random.getstate, "__self__", None)
    if not hasattr(owner, "gauss_next") or not _is_at_head(random.Random(20)):
        return None
    start = id(owner) + object.__basicsize__
    words, first = _view(start, WORDS_BYTES), _view(start, _GLANCE).cast("Q")

    def read() -> bytes:
        gauss = owner.gauss_next
        return words.tobytes() + GAUSS.pack(gauss is not None, gauss or 0.0)

    def glance() -> object:
        return first[0], first[1], owner.gauss_next

    return Reader(read, glance)


def _view(address: int, length: int) -> memoryview[int]:
    return memoryview((ctypes.c_char * length).from_address(address)).cast("B")


def _is_at_head(trial: random.Random) -> bool:
    trial.random()
    words = trial.getstate()[1]
    expected = struct.pack("<625I", words[-1], *words[:-1])
    enough = type(trial).__basicsize__ >= object.__basicsize__ + WORDS_BYTES
    return enough and bool(_at(id(trial) + object.__basicsize__, WORDS_BYTES) == expected)


def numpy_reader(module: Any) -> Reader | None:
    """Reads the legacy generator of `numpy.random`: words, position, `GAUSS`."""
    offset = _flag_offset(module.RandomState)
    owner: Any = getattr(module.get_state, "__self__", None)
    generator = getattr(owner, "_bit_generator", None)
    if offset is None or not isinstance(generator, module.MT19937) or not _has_words(generator):
        return None
    start = generator.ctypes.state_address
    words, last = _view(start, WORDS_BYTES), _view(start + WORDS_BYTES - _GLANCE, _GLANCE).cast("Q")
    held = _view(id(owner) + offset, _FLAG.size)
    flag = held.cast("Q")

    def read() -> bytes:
        if owner._bit_generator is not generator:  # numpy.random.set_bit_generator put another one in place
            return b""
        has_gauss, gauss = _FLAG.unpack(held)
        return words.tobytes() + GAUSS.pack(has_gauss, gauss)

    def glance() -> object:
        return last[0], last[1], flag[0], flag[1], owner._bit_generator

    return Reader(read, glance)


def _flag_offset(kind: Any) -> int | None:
    """Where a RandomState says whether it has a second Gauss draw, which stands right behind."""
    trial = kind(20)
    name, key, position, _, _ = trial.get_state()
    trial.set_state((name, key, position, 1, _PROBE))
    held = _at(id(trial), kind.__basicsize__)
    offset = held.find(_FLAG.pack(1, _PROBE))
    if offset < 0 or held.count(struct.pack("<d", _PROBE)) != 1:
        return None
    trial.set_state((name, key, position, 0, _PROBE))
    return offset if _at(id(trial) + offset, _FLAG.size) == _FLAG.pack(0, _PROBE) else None


def _has_words(generator: Any) -> bool:
    inner = generator.state["state"]
    expected = inner["key"].tobytes() + struct.pack("<i", inner["pos"])
    return bool(_at(generator.ctypes.state_address, WORDS_BYTES) == expected)


def torch_address(generator: torch.Generator) -> int | None:
    """Where the TORCH_BYTES of a generator on the CPU are, to be read and to be written."""
    trial = torch.Generator().manual_seed(20)
    state = to_bytes(trial.get_state())
    words = struct.pack("<624I", *struct.unpack_from("<624Q", state, 24))
    start: int = trial._cdata  # type: ignore[attr-defined]
    offset = _at(start, 256).find(words[:32])
    if offset < _TORCH_WORDS or _at(start + offset, len(words)) != words:
        return None
    offset -= _TORCH_WORDS
    return generator._cdata + offset if _can_be_put_back(trial, start + offset) else None  # type: ignore[attr-defined]


def torch_reader(address: int) -> Reader:
    """Reads torch's generator at this address."""
    state = _view(address, TORCH_BYTES)
    words = state.cast("Q")

    def glance() -> object:  # position, some words, second draws
        return words[1], words[2], words[3], words[-3], words[-2], words[-1]

    return Reader(state.tobytes, glance)


def clean(state: bytes) -> bytes:
    """What was read of torch's generator, the same for equal states: padding and absent second draws are zero."""
    if len(state) != TORCH_BYTES:
        return state
    *engine, single, has_single, double, has_double = _TORCH.unpack(state)
    single, double = single if has_single else b"", double if has_double else b""
    return _TORCH.pack(*engine, single, has_single, double, has_double)


def write_torch(address: int, state: bytes) -> bool:
    """Put it back. False, without a change, if the position in it cannot be: it was read while a thread was drawing."""
    left, position = struct.unpack_from("<i", state, 8)[0], struct.unpack_from("<I", state, 16)[0]
    if len(state) != TORCH_BYTES or (left, position) != (1, 0) and left + position != 625:
        return False
    ctypes.memmove(address, state, TORCH_BYTES)
    return True


def _can_be_put_back(trial: torch.Generator, address: int) -> bool:
    """Whether the bytes at this address are all that the next draws depend on."""
    torch.randn(1, generator=trial)  # the second draw of the pair takes nothing from the words
    kept, state = torch_reader(address).read(), trial.get_state()
    torch.randn(2, generator=trial), torch.rand(700, generator=trial)
    return write_torch(address, kept) and torch.equal(trial.get_state(), state)
