"""Files of two runs are compared bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpointless_elastic.chaos.compare import folders
from checkpointless_elastic.chaos.plan import draw

ALL = ["**/*"]


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("left", "right"):
        (tmp_path / name / "below").mkdir(parents=True)
    return tmp_path / "left", tmp_path / "right"


def safetensors(path: Path, order: list[str], data: dict[str, bytes]) -> None:
    """A file whose tensors, of bytes, stand in this order."""
    header, at = {}, 0
    for name in order:
        header[name] = {"dtype": "U8", "shape": [len(data[name])], "data_offsets": [at, at + len(data[name])]}
        at += len(data[name])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data[name] for name in order))


def test_tensors_are_compared_by_their_bits_and_not_by_the_bytes_of_the_file(
    sides: tuple[Path, Path],
) -> None:
    for folder, other in zip(sides, ("a", "another_name"), strict=True):
        torch.save({"w": torch.tensor([0.0, float("nan")])}, folder / other)  # the name stands in the archive
        (folder / other).rename(folder / "below" / "x.pt")
    assert (sides[0] / "below" / "x.pt").read_bytes() != (sides[1] / "below" / "x.pt").read_bytes()
    assert folders(*sides, ALL) == []
    torch.save({"w": torch.tensor([-0.0, float("nan")])}, sides[1] / "below" / "x.pt")
    assert folders(*sides, ALL) == ["below/x.pt.w: tensors differ"]


def test_safetensors_are_compared_by_name(sides: tuple[Path, Path]) -> None:
    safetensors(sides[0] / "m.safetensors", ["a", "b"], {"a": b"12", "b": b""})
    safetensors(sides[1] / "m.safetensors", ["b", "a"], {"a": b"12", "b": b""})
    assert folders(*sides, ALL) == []
    safetensors(sides[1] / "m.safetensors", ["b", "a"], {"a": b"13", "b": b""})
    assert folders(*sides, ALL) == ["m.safetensors.a.2: tensors differ"]


def test_other_files_are_compared_byte_for_byte(sides: tuple[Path, Path]) -> None:
    for folder in sides:
        (folder / "log.txt").write_text("same")
        (folder / "time.log").write_text(folder.name)
    assert folders(*sides, ["*.txt"]) == []
    assert folders(*sides, ALL) == ["time.log: not equal byte for byte"]


def test_a_file_that_only_one_run_has_is_a_difference(sides: tuple[Path, Path]) -> None:
    (sides[0] / "a").write_text("")
    (sides[1] / "b").write_text("")
    assert folders(*sides, ALL) == ["a is missing", "b should not be there"]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_cannot_be_read_is_a_difference(sides: tuple[Path, Path], name: str) -> None:
    for folder in sides:
        (folder / name).write_text(f"broken {folder.name}")
    (found,) = folders(*sides, ALL)
    assert found.startswith(f"{name}: not equal byte for byte, and it cannot be read (")


def test_each_seed_draws_faults_of_all_kinds_in_order() -> None:
    faults = draw(30, 1, ["kill", "stop", "slow"], 4)
    assert faults == draw(30, 1, ["kill", "stop", "slow"], 4) != draw(30, 2, ["kill", "stop", "slow"], 4)
    assert {fault.target for fault in faults} == {0, 1, 2, 3}
    assert all(0 <= a.part < b.part < 1 for a, b in zip(faults, faults[1:], strict=False))
    assert [sum(fault.kind == kind for fault in faults) for kind in ("kill", "stop", "slow")] == [10, 10, 10]
