"""A stripe that is read where it is: the same digests as through a segment; on CUDA from another process."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import msgspec
import pytest
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state.device import DeviceMemory, Opened, gathered, share, shareable
from checkpointless_elastic.state.inventory import Inventory
from checkpointless_elastic.state.pieces import Piece
from checkpointless_elastic.state.plan import Chunk, PieceSize, Plan, plan
from checkpointless_elastic.state.transfer import ChunkDigest, Receiver, vouch

SIZES = (5, 1_500_000, 3, 70, 0, 900_001)
LIMIT_S = 120.0


def pieces(device: str = "cpu", seed: int = 0) -> list[Piece]:
    torch.manual_seed(seed)
    tensors = {f"t{number}": torch.randn(size).to(device) for number, size in enumerate(SIZES)}
    return Inventory(tensors).pieces()


def layout(sources: list[int]) -> Plan:
    return plan([PieceSize(4 * size) for size in SIZES], sources)


def test_stripes_read_in_place_fill_a_replacement_bit_by_bit() -> None:
    sources, target, whole = pieces(), pieces(seed=1), layout([0, 3])
    data = [piece.tensor.view(torch.uint8) for piece in sources]
    receiver = Receiver(target, whole, lambda _, chunk: gathered(data, chunk))
    receiver.receive(digest for rank in (0, 3) for digest in vouch(sources, whole, rank))
    assert receiver.finish().nbytes == 4 * sum(SIZES)
    for mine, theirs in zip(target, sources, strict=True):
        assert torch.equal(mine.tensor, theirs.tensor)


def test_a_source_that_changed_after_its_digest_is_found() -> None:
    sources, target, whole = pieces(), pieces(seed=1), layout([0])
    digests = vouch(sources, whole, 0)
    sources[0].tensor[0] += 1
    data = [piece.tensor.view(torch.uint8) for piece in sources]

    def read(_: int, chunk: Chunk) -> torch.Tensor:
        return gathered(data, chunk)

    with pytest.raises(StateMismatchError, match="was damaged on its way"):
        Receiver(target, whole, read).receive(digests)


def test_memory_of_the_cpu_is_not_shared_in_this_way() -> None:
    assert not shareable(pieces())


def _source(pipe: Connection) -> None:
    held = pieces("cuda")
    assert shareable(held)
    pipe.send_bytes(msgspec.msgpack.encode((vouch(held, layout([0]), 0), share(held))))
    assert pipe.poll(LIMIT_S)  # the memory stays until the reader says so


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: CUDA IPC is not verified here")
def test_the_memory_of_a_device_is_read_from_another_process() -> None:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_source, args=(theirs,))
    process.start()
    assert mine.poll(LIMIT_S)
    kind = tuple[list[ChunkDigest], list[DeviceMemory]]
    digests, memory = msgspec.msgpack.decode(mine.recv_bytes(), type=kind)
    target, opened = pieces("cuda", seed=1), Opened(memory)
    receiver = Receiver(target, layout([0]), lambda _, chunk: opened.read(chunk))
    receiver.receive(digests)
    receiver.finish()
    mine.send_bytes(b"read")
    process.join(LIMIT_S)
    for one, other in zip(target, pieces(), strict=True):
        assert torch.equal(one.tensor.cpu(), other.tensor)
