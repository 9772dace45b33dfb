"""A single worker is forked again while the others run on; ordered by a small control plane, see `replacing.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.conftest import MARK, Job, Launcher

DRIVER = Path(__file__).with_name("replacing.py")


def start(torchrun: Launcher, *args: str, learn: str = "", ranks: int = 2) -> Job:
    """As `torchrun.start`, with the control plane that replaces."""
    mark = uuid.uuid4().hex
    options = ["--rdzv-backend", "checkpointless", "--nproc-per-node", str(ranks), "--log-dir", "logs", *args]
    process = subprocess.Popen(
        [sys.executable, str(DRIVER), *(["--learn", learn] if learn else []), *options],
        cwd=torchrun.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    job = Job(process, mark, torchrun.folder)
    torchrun.jobs.append(job)
    return job


def test_a_replacement_continues_the_logs_while_its_peer_keeps_its_process(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, sys
        rank = os.environ["RANK"]
        open("ran", "a").write(f"{rank} {os.getpid()} {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n")
        attempts = [line.split() for line in open("ran")]
        mine = sum(line[0] == rank for line in attempts)
        print(f"attempt {mine} of {rank}")
        if rank == "1" and mine < 3:
            raise ValueError(f"attempt {mine}")
        while sum(line.startswith("1 ") for line in open("ran")) < 3: os.sched_yield()
        """
    )
    job = start(torchrun, "--redirects", "3", "--tee", "1", "train.py")
    finished = job.finish()
    assert finished.code == 0, finished.err
    ran = [line.split() for line in job.read("ran")]
    assert sorted(rank for rank, _, _ in ran) == ["0", "1", "1", "1"]
    assert {count for _, _, count in ran} == {"0"}
    (logs,) = (torchrun.folder / "logs").glob("*/attempt_0")
    assert (logs / "1" / "stdout.log").read_text() == "".join(f"attempt {n} of 1\n" for n in (1, 2, 3))
    errors = {
        path.name: json.loads(path.read_text())["message"]["message"] for path in (logs / "1").glob("error*")
    }
    assert errors == {"error.0.json": "ValueError: attempt 1", "error.1.json": "ValueError: attempt 2"}
    assert [line for line in finished.out.splitlines() if " of 1" in line] == [
        f"[default1]:attempt {n} of 1" for n in (1, 2, 3)
    ]


@pytest.mark.slow
def test_each_incarnation_is_announced_lost_and_ended_in_order(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os
        open("ran", "a").write("x\\n")
        if len(open("ran").readlines()) < 3: os.kill(os.getpid(), 9)
        """
    )
    job = start(torchrun, "train.py", ranks=1)
    assert job.finish().code == 0
    started = [line.split() for line in job.read("started")]
    assert [(rank, incarnation) for rank, incarnation, _, _ in started] == [
        ("0", "0"),
        ("0", "1"),
        ("0", "2"),
    ]
    assert len({pid for _, _, pid, _ in started}) == 3
    assert {token for _, _, _, token in started} == {"32"}
    assert job.read("lost") == ["0 0", "0 1", "0 2"]
    assert [line.split()[1] for line in job.read("replaced")] == ["1", "2"]
    assert job.read("stopped") == ["stopped"]


def test_a_replacement_from_the_successor_has_the_learned_modules_loaded(torchrun: Launcher) -> None:
    torchrun.script(
        """
        import os, sys
        open("ran", "a").write(f"{'rich' in sys.modules}\\n")
        if len(open("ran").readlines()) == 1:
            while not os.path.exists("learned"): os.sched_yield()
            sys.exit(1)
        """
    )
    job = start(torchrun, "train.py", learn="rich", ranks=1)
    assert job.finish().code == 0
    assert job.read("ran") == ["False", "True"]


def test_a_job_that_fails_while_its_workers_are_restarted_ends(
    torchrun: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALT", "1")
    torchrun.script(
        """
        import os, signal
        open("ran", "a").write("x\\n")
        while len(open("ran").readlines()) < 2: os.sched_yield()
        os._exit(3) if os.environ["RANK"] == "1" else signal.pause()
        """
    )
    job = start(torchrun, "train.py")
    finished = job.finish()
    assert finished.code == 1
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 3" in finished.err, finished.err
    assert len(job.read("ran")) == 2
