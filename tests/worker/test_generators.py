"""Generators that a script makes for itself are taken and put back, alone and with the state of the process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from checkpointless_elastic.errors import ConfigError, StateMismatchError
from checkpointless_elastic.worker import generators, rng


def draw_of_numpy(generator: Any) -> list[float]:
    return [generator.random(), *generator.standard_normal(3), generator.integers(9)]


def draw_of_old_numpy(generator: Any) -> list[float]:
    return [generator.rand(), generator.randn(), generator.randint(9)]


def draw_of_torch(generator: Any) -> list[float]:
    drawn: list[float] = torch.randn(3, generator=generator).tolist()
    return drawn


def draw_of_python(generator: Any) -> list[float]:
    return [generator.random(), generator.gauss(), generator.randrange(9)]


KINDS: list[tuple[Any, Callable[[Any], list[float]]]] = [
    (torch.Generator().manual_seed(5), draw_of_torch),
    (random.Random(5), draw_of_python),
    (np.random.default_rng(5), draw_of_numpy),
    (np.random.Generator(np.random.MT19937(5)), draw_of_numpy),
    (np.random.Generator(np.random.Philox(5)), draw_of_numpy),
    (np.random.Generator(np.random.SFC64(5)), draw_of_numpy),
    (np.random.Generator(np.random.PCG64DXSM(5)), draw_of_numpy),
    (np.random.RandomState(5), draw_of_old_numpy),
]


@pytest.fixture
def nothing_named_afterwards() -> Iterator[None]:
    yield
    rng.include({})


@pytest.mark.parametrize(("generator", "draw"), KINDS)
def test_a_generator_repeats_its_draws(generator: Any, draw: Callable[[Any], list[float]]) -> None:
    assert generators.is_generator(generator)
    for _ in range(2):  # the second time there is a Gauss draw left where two are made at once
        draw(generator)
        state = generators.read(generator)
        assert generators.read(generator) == state
        first = draw(generator)
        assert generators.read(generator) != state
        generators.write(generator, state)
        assert draw(generator) == first


@pytest.mark.usefixtures("nothing_named_afterwards")
def test_named_generators_belong_to_the_state_of_the_process() -> None:
    noise, order = torch.Generator().manual_seed(1), np.random.default_rng(2)
    rng.include({"noise": noise, "order": order})
    state = rng.capture()
    assert rng.capture() is state
    first = torch.rand(2), draw_of_torch(noise), draw_of_numpy(order)
    after = rng.capture()
    assert after != state
    assert [*after.parts][0] == [*state.parts][0]  # nothing was drawn from that one
    rng.restore(rng.decoded(after.encoded, after.parts))
    rng.restore(state)
    assert torch.equal(torch.rand(2), first[0])
    assert (draw_of_torch(noise), draw_of_numpy(order)) == first[1:]


@pytest.mark.usefixtures("nothing_named_afterwards")
def test_a_state_with_a_generator_that_is_not_named_here_is_refused() -> None:
    rng.include({"noise": torch.Generator()})
    state = rng.capture()
    rng.include({})
    with pytest.raises(StateMismatchError, match="named the generator noise"):
        rng.restore(state)


def test_another_kind_of_generator_is_refused() -> None:
    state = generators.read(np.random.default_rng(1))
    for other in (np.random.Generator(np.random.MT19937(1)), random.Random(1), torch.Generator()):
        with pytest.raises(StateMismatchError, match="cannot be put back"):
            generators.write(other, state)


def test_a_generator_without_a_state_is_refused() -> None:
    with pytest.raises(ConfigError, match="SystemRandom, whose draws cannot be repeated"):
        rng.include({"secret": random.SystemRandom()})


def test_other_objects_are_no_generators() -> None:
    assert not any(map(generators.is_generator, (torch.ones(1), iter([]), (x for x in []), None)))
