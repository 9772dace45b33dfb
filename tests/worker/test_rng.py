"""A random state taken and put back gives the same draws, bit for bit."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.random
import pytest
import torch

from checkpointless_elastic.errors import ProtocolError, StateMismatchError
from checkpointless_elastic.state.slot import Content
from checkpointless_elastic.worker import generators, rng, rng_memory
from checkpointless_elastic.worker.packing import unpack


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


def test_a_state_shares_with_the_one_before_it_what_did_not_change() -> None:
    first = rng.capture()
    torch.rand(1)
    second = rng.capture()
    (*shared, last), before = second.parts, [*first.parts]
    assert shared == before[:2]
    assert last > max(before)


def test_a_torch_state_that_was_read_in_the_middle_of_a_draw_is_not_put_back() -> None:
    state = rng.capture()
    *others, (_, data) = state.parts.items()
    torn = bytearray(data)
    torn[16:20] = (2**31).to_bytes(4, "little")
    here = torch.get_rng_state()
    with pytest.raises(StateMismatchError, match="another thread"):
        rng.restore(rng.RngState(dict([*others, (0, bytes(torn))])))
    assert torch.equal(torch.get_rng_state(), here)


def test_a_state_that_another_process_wrote_is_put_back(tmp_path: Path) -> None:
    script = (
        "import msgspec, sys, torch\n"
        "from checkpointless_elastic.worker import packing, rng\n"
        "torch.manual_seed(8)\n"
        "content = packing.pack([rng.capture(), None, rng.capture()])\n"
        "open(sys.argv[1], 'wb').write(msgspec.msgpack.encode(content))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "state")], check=True)
    content = msgspec.msgpack.decode((tmp_path / "state").read_bytes(), type=Content)
    state, _, same = unpack(content, list[rng.RngState | None])
    assert state == same
    rng.restore(state)
    found = torch.rand(3)
    torch.manual_seed(8)
    assert torch.equal(found, torch.rand(3))


@pytest.mark.parametrize(
    "encoded", [7, [[1, 2], []], [[1, 2, 3], ["cuda:0"]], [[1, 2, 4], []], [["x"] * 3, []]]
)
def test_a_state_that_is_damaged_is_refused(encoded: object) -> None:
    found = dict.fromkeys((1, 2, 3), b"")
    with pytest.raises(ProtocolError, match="cannot be read"):
        unpack(Content(msgspec.msgpack.encode(encoded), found), rng.RngState)


def test_all_generators_are_found_in_memory_and_read_as_the_library_says() -> None:
    python, legacy = rng_memory.python_reader(), rng_memory.numpy_reader(np.random)
    assert python is not None, "random.Random is laid out in another way: see rng_memory"
    assert legacy is not None, "numpy's RandomState is laid out in another way: see rng_memory"
    assert rng_memory.torch_address(torch.default_generator) is not None, (
        "CPUGeneratorImpl is laid out otherwise"
    )
    for _ in range(3):
        random.gauss(0, 1), np.random.randn()
        assert python.read() == rng._python_state()
        assert legacy.read() == rng._numpy_state(np.random)


@pytest.mark.parametrize("missing", ["python", "numpy", "torch"])
def test_what_is_not_found_in_memory_is_asked_of_the_library(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng.capture()  # it has looked for NumPy now
    library = {
        "python": rng._python_state,
        "numpy": lambda: rng._numpy_state(np.random),
        "torch": lambda: generators.read(torch.default_generator),
    }
    monkeypatch.setattr(rng, f"_{missing}", rng_memory.asked(library[missing]))
    if missing == "torch":
        monkeypatch.setattr(rng, "_torch_address", None)
    rng._look_around()
    draws()
    state = rng.capture()
    first = draws()
    rng.restore(state)
    assert rng.capture() == state
    assert draws() == first
    monkeypatch.undo()
    rng._look_around()
    rng.capture()


DRAWS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle(list(range(700))),
    "all words of random": lambda: random.getrandbits(32 * 624),
    "numpy rand": np.random.rand,
    "numpy randn": np.random.randn,
    "all words of numpy": lambda: np.random.bytes(4 * 624),
    "numpy permutation": lambda: np.random.permutation(2000),
    "torch rand": lambda: torch.rand(1),
    "torch randn": lambda: torch.randn(1),
    "torch double normal": lambda: torch.normal(0.0, 1.0, (1,), dtype=torch.float64),
    "torch dropout": lambda: torch.nn.functional.dropout(torch.ones(1, 1)),
    "torch many": lambda: torch.rand(624),
    "torch permutation": lambda: torch.randperm(100),
    "torch seed": lambda: torch.manual_seed(random.getrandbits(30)),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_each_draw_is_noticed(draw: str) -> None:
    for _ in range(1500):
        before = rng.capture()
        DRAWS[draw]()
        after = rng.capture()
        assert after != before
        rng.restore(before)
        assert rng.capture() == before
        rng.restore(after)


def test_nothing_is_taken_anew_where_nothing_was_drawn() -> None:
    draws()
    assert rng.capture() is rng.capture()


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


def test_taking_a_state_imports_neither_numpy_random_nor_a_device() -> None:
    script = (
        "import sys, torch\n"
        "from checkpointless_elastic.worker import rng\n"
        "state = rng.capture()\n"
        "assert [*state.parts.values()][1] == b'' and 'numpy.random' not in sys.modules\n"
        "assert not torch.cuda.is_initialized() and state.devices == ()\n"
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
    state = rng.RngState({**here.parts, 0: b""}, ("cuda:99",))
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
    assert rng.capture().parts[3:] != state.parts[3:]
