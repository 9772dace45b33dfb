"""The run directory: private, removed with its overflow, and by the next agent if nobody else could."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from checkpointless_elastic import run_dir
from checkpointless_elastic.run_dir import RunDir, empty, overflow, scratch

HOLD = """
import signal, sys, tempfile
from checkpointless_elastic import run_dir
tempfile.tempdir = sys.argv[2]
run_dir._roots = lambda: sys.argv[1:]
made = run_dir.RunDir()
print(made.path, run_dir.overflow(made.path), flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both places are of this test, and different."""
    (tmp_path / "shm").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(run_dir, "_roots", lambda: [str(tmp_path / "shm"), str(tmp_path / "tmp")])


def test_it_is_private_and_removed_with_its_overflow() -> None:
    made = RunDir()
    path, more = Path(made.path), overflow(made.path)
    assert [stat.S_IMODE(found.stat().st_mode) for found in (path, more)] == [0o700, 0o700]
    (path / "agent.sock").touch()
    (more / "segment").touch()
    made.remove()
    assert not path.exists()
    assert not more.exists()


def test_emptying_it_leaves_its_sockets_its_lock_and_what_is_of_a_process() -> None:
    made = RunDir()
    path = Path(made.path)
    (path / "slot-0").touch()
    (path / "parts" / "deep").mkdir(parents=True)
    Path(scratch(made.path, 1)).mkdir()
    (path / "link").symlink_to(path)
    present = os.getcwd()
    os.chdir(path)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("agent.sock")
    finally:
        os.chdir(present)
    empty(made.path)
    assert sorted(found.name for found in path.iterdir()) == ["agent.sock", "alive", "multiprocessing-1"]
    made.remove()


def test_the_next_one_removes_what_a_killed_process_has_left_and_nothing_else(tmp_path: Path) -> None:
    roots = [tmp_path / "shm", tmp_path / "tmp"]
    (roots[0] / "checkpointless-1-being-made").mkdir()
    (roots[1] / "others").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, *roots], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        path, more = map(Path, holder.stdout.readline().split())
        living = RunDir()
        assert path.exists()
        assert more.exists()
    finally:
        holder.kill()
        holder.communicate()
    next_one = RunDir()
    assert {found.name for root in roots for found in root.iterdir()} == {
        "checkpointless-1-being-made",
        "others",
        os.path.basename(living.path),
        os.path.basename(next_one.path),
    }
    assert not path.exists()
    for made in (living, next_one):
        made.remove()


def test_an_overflow_that_somebody_else_has_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow("/dev/shm/checkpointless-1-x")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="not a directory of this user"):
        overflow("/dev/shm/checkpointless-1-x")
