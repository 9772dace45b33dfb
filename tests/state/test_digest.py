"""The digest sees every change that an accident makes, whatever the dtype and wherever the bytes are."""

from __future__ import annotations

import pytest
import torch

from checkpointless_elastic.state.digest import BLOCK_BYTES, Digest, digest, digest_bytes

both = pytest.mark.parametrize("device", ["cpu", "cuda"])  # where the state lives; the bytes are here


def _random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@both
@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, (1 << 20) + 3, 5 << 20])
def test_every_flipped_bit_changes_the_digest(count: int, device: str) -> None:
    data = _random_bytes(count)
    before = digest_bytes(data, device)
    for position in {0, count // 2, count - 1}:
        for bit in range(8):
            data[position] ^= 1 << bit
            assert digest_bytes(data, device) != before
            data[position] ^= 1 << bit
    assert digest_bytes(data, device) == before


@both
def test_swapped_words_change_the_digest(device: str) -> None:
    data = _random_bytes(3 << 20)
    before = digest_bytes(data, device)
    words = data.view(torch.int64)
    for left, right in ((0, 1), (5, 200_000), (131_071, 131_072)):
        swapped = words.clone()
        swapped[[left, right]] = words[[right, left]]
        assert digest_bytes(swapped.view(torch.uint8), device) != before


@both
def test_swapped_blocks_change_the_digest(device: str) -> None:
    data = _random_bytes(2 << 20)
    assert digest_bytes(data, device) != digest_bytes(torch.cat([data[1 << 20 :], data[: 1 << 20]]), device)


@both
def test_zeros_of_different_lengths_differ(device: str) -> None:
    zeros = torch.zeros(100, dtype=torch.uint8)
    assert len({digest_bytes(zeros[:count], device) for count in range(100)}) == 100


@pytest.mark.parametrize(("device", "known"), [("cpu", 0x29462356E2D9061A), ("cuda", 0xBFE55060448CA7E7)])
def test_the_digest_fits_64_bits_and_never_changes_between_versions(device: str, known: int) -> None:
    assert digest_bytes(torch.arange(1000, dtype=torch.int64).view(torch.uint8), device) == known
    assert digest(torch.empty(0)) < 1 << 64


@both
def test_bytes_that_come_in_blocks_have_the_digest_of_the_whole(device: str) -> None:
    data = _random_bytes(3 * BLOCK_BYTES + 5)
    parts = Digest(data.numel(), device)
    for part in data.split(BLOCK_BYTES):
        parts.add(part)
    assert parts.value() == digest_bytes(data, device)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int16]
)
def test_the_digest_is_that_of_the_bytes_for_every_dtype(dtype: torch.dtype) -> None:
    data = _random_bytes(1600) & 1
    assert digest(data.view(dtype)) == digest_bytes(data, "cpu")


@both
def test_memory_that_is_not_aligned_to_words_has_the_same_digest(device: str) -> None:
    data = _random_bytes(1003)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert digest_bytes(shifted, device) == digest_bytes(data, device)


def test_a_transposed_tensor_is_read_in_logical_order() -> None:
    data = torch.arange(12.0).view(3, 4)
    assert digest(data.t()) == digest(data.t().contiguous())


def test_the_digest_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    digest(torch.ones(10))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("count", [1, 9, (9 << 20) + 5])
def test_bytes_of_a_device_have_the_same_digest_in_host_memory(count: int) -> None:
    data = _random_bytes(count)
    assert digest(data.cuda()) == digest_bytes(data, "cuda")
