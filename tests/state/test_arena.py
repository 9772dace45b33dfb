"""Tensors made for a replacement are ordinary tensors, each with memory of its own."""

from __future__ import annotations

import io
import threading

import pytest
import torch

from checkpointless_elastic.state.arena import Arena, prepare, size_of
from checkpointless_elastic.state.pieces import PieceInfo, describe

_SHAPES = [((1 << 20,), torch.float32), ((), torch.float32), ((3, 5), torch.bfloat16), ((7,), torch.bool)]


def _described() -> list[PieceInfo]:
    tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in _SHAPES]
    tensors.append(torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last))
    return [describe(str(index), "optimizer", tensor) for index, tensor in enumerate(tensors)]


def test_tensors_are_as_described_and_do_not_overlap() -> None:
    infos = _described()
    arena = Arena(infos)
    made = [arena.tensor(info) for info in infos]
    for number, tensor in enumerate(made):
        assert tensor is not None
        assert describe(str(number), "optimizer", tensor) == infos[number]
        assert tensor.data_ptr() % 64 == 0
        assert not tensor._is_view()
        tensor.fill_(number % 2)
    assert [bool((t == n % 2).all()) for n, t in enumerate(made) if t is not None] == [True] * len(made)


def test_saving_one_saves_only_its_own_bytes() -> None:
    infos = _described()
    arena = Arena(infos)
    made = [arena.tensor(info) for info in infos]
    buffer = io.BytesIO()
    torch.save(made[2], buffer)
    assert len(buffer.getvalue()) < 5000


def test_a_tensor_outlives_the_arena() -> None:
    infos = _described()
    arena = Arena(infos)
    tensor = arena.tensor(infos[0])
    del arena
    assert tensor is not None
    assert float(tensor.fill_(2).sum()) == 2.0 * (1 << 20)


@pytest.mark.parametrize("count", [1, 3])
def test_little_state_is_left_to_torch(count: int) -> None:
    info = describe("small", "optimizer", torch.empty(100))
    arena = Arena([info] * count)
    assert arena.tensor(info) is None


def test_memory_made_beforehand_is_used_once_and_holds_what_is_written() -> None:
    infos = _described()
    thread = threading.Thread(target=prepare(size_of(infos) + 4096, 48 << 20))
    thread.start()
    thread.join()
    arena, later = Arena(infos), Arena(infos)
    first = [tensor for info in infos if (tensor := arena.tensor(info)) is not None]
    second = [tensor for info in infos if (tensor := later.tensor(info)) is not None]
    for number, tensor in enumerate([*first, *second]):
        tensor.fill_(number % 2)
    assert [bool((t == n % 2).all()) for n, t in enumerate([*first, *second])] == [True] * 2 * len(infos)
    blocks = [torch.full((3 << 20,), float(number)) for number in range(6)]  # out of the heap
    assert [float(block.sum()) for block in blocks] == [number * float(3 << 20) for number in range(6)]
