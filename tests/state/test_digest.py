"""The digest sees every change that an accident makes, and is the same whatever the dtype and the device."""

from __future__ import annotations

import pytest
import torch

from checkpointless_elastic.state.digest import digest, digest_bytes


def _random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, (1 << 20) + 3, 5 << 20])
def test_every_flipped_bit_changes_the_digest(count: int) -> None:
    data = _random_bytes(count)
    before = digest_bytes(data)
    for position in {0, count // 2, count - 1}:
        for bit in range(8):
            data[position] ^= 1 << bit
            assert digest_bytes(data) != before
            data[position] ^= 1 << bit
    assert digest_bytes(data) == before


def test_swapped_words_change_the_digest() -> None:
    data = _random_bytes(3 << 20)
    before = digest_bytes(data)
    words = data.view(torch.int64)
    for left, right in ((0, 1), (5, 200_000), (131_071, 131_072)):
        swapped = words.clone()
        swapped[[left, right]] = words[[right, left]]
        assert digest(swapped) != before


def test_swapped_blocks_change_the_digest() -> None:
    data = _random_bytes(2 << 20)
    assert digest_bytes(data) != digest_bytes(torch.cat([data[1 << 20 :], data[: 1 << 20]]))


def test_zeros_of_different_lengths_differ() -> None:
    assert len({digest(torch.zeros(count, dtype=torch.uint8)) for count in range(100)}) == 100


def test_the_digest_fits_64_bits_and_never_changes_between_versions() -> None:
    assert digest(torch.arange(1000, dtype=torch.int64)) == 0xBFE55060448CA7E7
    assert digest(torch.empty(0)) < 1 << 64


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int16]
)
def test_the_digest_is_that_of_the_bytes_for_every_dtype(dtype: torch.dtype) -> None:
    data = _random_bytes(1600) & 1
    assert digest(data.view(dtype)) == digest_bytes(data)


def test_memory_that_is_not_aligned_to_words_has_the_same_digest() -> None:
    data = _random_bytes(1003)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert digest_bytes(shifted) == digest_bytes(data)


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
def test_cuda_and_cpu_give_the_same_digest(count: int) -> None:
    data = _random_bytes(count)
    assert digest_bytes(data.cuda()) == digest_bytes(data)
