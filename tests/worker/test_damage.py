"""A bit of a worker's memory flips when chaos asks for it, and only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointless_elastic.state.pieces import OPTIMIZER, PARAMETER, Piece, piece_of
from checkpointless_elastic.worker.damage import ASKED, Damage, obstacle_path, request_path

RANK = 1
Make = Callable[..., Damage]


@pytest.fixture
def damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv(ASKED, "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    return lambda every=1: Damage(str(tmp_path), RANK, every)


def ask(folder: Path) -> Path:
    path = Path(request_path(str(folder), RANK))
    path.touch()
    return path


def said(folder: Path) -> str:
    return Path(obstacle_path(str(folder), RANK)).read_text()


def held(*tensors: torch.Tensor) -> list[Piece]:
    return [piece_of(f"model.{number}", PARAMETER, tensor) for number, tensor in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_of_the_largest_parameter_flips_once_for_each_request(
    tmp_path: Path, damage: Make, dtype: torch.dtype
) -> None:
    small, large = (nn.Parameter(torch.ones(size, 3, dtype=dtype)) for size in (2, 5))
    it, version = damage(), large._version
    it.begin(4, lambda: held(small, large))
    assert said(tmp_path) == ""
    assert torch.equal(large, torch.ones(5, 3, dtype=dtype))
    request = ask(tmp_path)
    it.begin(5, lambda: held(small, large))
    assert not request.exists()
    it.begin(6, lambda: held(small, large))
    assert torch.equal(small, torch.ones(2, 3, dtype=dtype))
    before, after = (t.detach().view(torch.uint8) for t in (torch.ones(5, 3, dtype=dtype), large))
    changed = (before ^ after).flatten()
    assert changed.sum() == 1 << 6 and large._version == version
    assert large.isfinite().all()


def test_nothing_flips_before_replicas_are_compared(tmp_path: Path, damage: Make) -> None:
    weight = nn.Parameter(torch.ones(4))
    request = ask(tmp_path)
    damage().begin(0, lambda: held(weight))
    assert request.exists()
    assert torch.equal(weight, torch.ones(4))


@pytest.mark.parametrize(
    ("every", "pieces", "why"),
    [
        (0, held(torch.ones(4)), "give it verify_every=1"),
        (2, held(torch.ones(4)), "give it verify_every=1"),
        (1, held(torch.ones(4, dtype=torch.int64)), "no parameter is held by 3 ranks"),
        (1, [piece_of("model.w", PARAMETER, torch.ones(4), (0, 1))], "no parameter is held by 3 ranks"),
        (1, [piece_of("optimizer.w", OPTIMIZER, torch.ones(4))], "no parameter is held by 3 ranks"),
    ],
)
def test_the_rank_says_why_a_flip_would_not_be_put_right(
    every: int, pieces: list[Piece], why: str, tmp_path: Path, damage: Make
) -> None:
    damage(every).begin(1, lambda: pieces)
    assert why in said(tmp_path)


def test_without_the_variable_a_request_means_nothing(
    tmp_path: Path, damage: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ASKED)
    weight = nn.Parameter(torch.ones(4))
    request = ask(tmp_path)
    damage().begin(5, lambda: held(weight))
    assert request.exists()
    assert torch.equal(weight, torch.ones(4))
