"""A random state taken and put back gives the same draws, bit for bit."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import numpy.random
import pytest
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.worker import rng, rng_memory
from checkpointless_elastic.worker.packing import pack, unpack


def draws() -> list[object]:
    """An odd number of Gauss draws of each kind, so that a cached second one must survive."""
    found: list[object] = [random.random(), random.gauss(0, 1), random.gauss(0, 1), random.gauss(0, 1)]
    found += [
        np.random.rand(),
        np.random.randn(),
        np.random.randn(),
        np.random.randn(),
        np.random.randint(1 << 30),
    ]
    found += [
        torch.rand(3).tolist(),
        torch.randn(1).item(),
        torch.randn(17).tolist(),
        torch.normal(0.0, 1.0, (1,)),
    ]
    return found


@pytest.mark.parametrize("gauss", [0, 1, 2, 3])
def test_a_restored_state_repeats_all_draws_and_gauss_caches(gauss: int) -> None:
    for _ in range(gauss):
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    state = rng.capture()
    first = draws()
    draws()
    rng.restore(state)
    assert rng.capture() == state
    assert draws() == first


def test_a_state_survives_packing_and_equal_parts_are_written_once() -> None:
    states = []
    for _ in range(4):
        torch.rand(1)
        states.append(rng.capture())
    packed = pack(states)
    assert unpack(packed, list[rng.RngState]) == states
    assert len(packed) < 4 * len(states[0].torch_cpu) + len(states[0].python) + len(states[0].numpy) + 200


def test_python_and_numpy_are_read_from_memory_and_as_the_library_says() -> None:
    assert rng_memory.python_reader() is not None
    read = rng_memory.numpy_reader(np.random)
    assert read is not None
    for _ in range(3):
        np.random.randn()
        assert read() == rng._numpy_state_by_library(np.random)


def test_the_state_is_the_one_that_the_libraries_give() -> None:
    random.gauss(0, 1), np.random.randn(), torch.randn(1)
    python, legacy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    state = rng.capture()
    draws()
    rng.restore(state)
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), legacy, strict=True))
    assert torch.equal(torch.get_rng_state(), own)


def test_taking_a_state_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    rng.capture()
    assert torch.equal(torch.rand(1), expected)


def test_a_generator_of_its_own_is_taken_and_put_back() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.randn(3, generator=generator)
    state = rng.capture_generator(generator)
    first = torch.randn(4, generator=generator)
    rng.restore_generator(generator, state)
    assert torch.equal(torch.randn(4, generator=generator), first)


def test_taking_a_state_imports_neither_numpy_random_nor_a_device() -> None:
    script = (
        "import sys, torch\n"
        "from checkpointless_elastic.worker import rng\n"
        "state = rng.capture()\n"
        "assert state.numpy == b'' and 'numpy.random' not in sys.modules\n"
        "assert not torch.cuda.is_initialized() and state.devices == {}\n"
        "rng.restore(state)\n"
        "assert rng.capture() == state\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_another_kind_of_numpy_generator_is_refused() -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.warns(RuntimeWarning), pytest.raises(StateMismatchError, match="PCG64"):
            rng.capture()
    finally:
        np.random.set_bit_generator(before)


def test_a_state_of_a_device_that_is_not_here_is_refused() -> None:
    here = rng.capture()
    state = rng.RngState(here.python, here.numpy, here.torch_cpu, {"cuda:99": b"\0" * 16})
    with pytest.raises(StateMismatchError, match="cuda:99"):
        rng.restore(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_state_of_each_cuda_device_is_taken_and_put_back() -> None:
    torch.randn(5, device="cuda")
    state = rng.capture()
    assert len(state.devices) == torch.cuda.device_count()
    first = torch.randn(7, device="cuda"), torch.nn.functional.dropout(torch.ones(9, device="cuda"))
    rng.restore(state)
    again = torch.randn(7, device="cuda"), torch.nn.functional.dropout(torch.ones(9, device="cuda"))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert rng.capture().devices != state.devices
