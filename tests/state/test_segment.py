"""A segment is a private file, complete when it is made, and goes away with its owner."""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path

import pytest
import torch

from checkpointless_elastic.errors import StateMismatchError
from checkpointless_elastic.state import segment as module
from checkpointless_elastic.state.segment import Segment


def test_what_the_owner_writes_a_peer_reads(tmp_path: Path) -> None:
    with Segment.create(tmp_path, "s", 100_000) as mine:
        mine.bytes[:] = 7
        theirs = Segment.open(mine.path, 100_000)
        theirs.populate()
        assert bool((theirs.bytes == 7).all())
        theirs.bytes[5] = 1
        assert int(mine.bytes[5]) == 1
        theirs.close()
    assert not (tmp_path / "s").exists()


def test_nobody_else_may_read_the_file(tmp_path: Path) -> None:
    with Segment.create(tmp_path, "s", 10) as mine:
        assert stat.S_IMODE(os.stat(mine.path).st_mode) == 0o600


def test_all_pages_are_there_from_the_start(tmp_path: Path) -> None:
    with Segment.create(tmp_path, "s", 1 << 20) as mine:
        assert os.stat(mine.path).st_blocks * 512 >= 1 << 20


def test_a_name_is_not_used_twice(tmp_path: Path) -> None:
    with Segment.create(tmp_path, "s", 10), pytest.raises(FileExistsError):
        Segment.create(tmp_path, "s", 10)


def test_a_file_that_is_too_small_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(b"x")
    with pytest.raises(StateMismatchError, match="instead of 5000"):
        Segment.open(tmp_path / "s", 5000)


def test_views_stay_valid_after_close(tmp_path: Path) -> None:
    mine = Segment.create(tmp_path, "s", 64)
    view = mine.bytes[:8]
    mine.close()
    mine.unlink()
    view[:] = 3
    assert int(view.sum()) == 24


def test_an_empty_segment_works(tmp_path: Path) -> None:
    with Segment.create(tmp_path, "s", 0) as mine:
        assert mine.bytes.numel() == 0
        mine.populate()


def test_a_full_shared_memory_falls_back_to_the_temporary_directory_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.statvfs(tmp_path)
    full = os.statvfs_result((*real[:4], 0, *real[5:]))
    monkeypatch.setattr(module.os, "statvfs", lambda _path: full)
    monkeypatch.setattr(module, "_warned", False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = tmp_path / "shared"  # what is beside it is checkpointless-shared
    shared.mkdir()
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b"):
            with Segment.create(shared, name, 1000) as mine:
                mine.bytes[:] = torch.ones(1000, dtype=torch.uint8)
                assert mine.path.parent != shared
    assert len(caplog.records) == 1
    assert "enlarge the shared memory" in caplog.text
