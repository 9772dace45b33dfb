"""Schedules of faults, and the markers that let each fault strike once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from harness.schedule import last_step, schedule, steps_needed, with_flips, with_nodes
from jobs.faults import (
    CLOCK,
    FLIP,
    KINDS,
    OUTSIDE_KINDS,
    READY,
    Fault,
    Faults,
    InjectedError,
    read_schedule,
    write_schedule,
)

from checkpointless_elastic.worker.damage import request_path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("seed", range(20))
def test_every_seed_gives_as_many_faults_as_asked_for_within_the_job(seed: int) -> None:
    steps = steps_needed(50)
    faults = schedule(50, seed, 4, steps)
    assert [fault.number for fault in faults] == list(range(50))
    assert all(0 < len(fault.ranks) < 4 for fault in faults)
    assert all(fault.step < steps - 10 for fault in faults[:-2])
    assert [fault.moment for fault in faults[-2:]] == ["forward", "after the loop"]


def test_a_schedule_of_fifty_has_every_kind_moment_and_choice_of_ranks() -> None:
    faults = schedule(50, 1, 4, steps_needed(50))
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {CLOCK, READY, "data", "forward", "backward", "update", "after gate", "evaluation", "saving"} <= {
        fault.moment for fault in faults
    }
    assert {"rank 0", "several", "all but one", "same again", "replacement"} <= {f.target for f in faults}


def test_what_passes_is_done_to_one_rank_by_the_clock_and_has_no_replacement() -> None:
    faults = schedule(60, 3, 4, steps_needed(60), (*KINDS, *OUTSIDE_KINDS))
    outside = [fault for fault in faults if fault.kind in OUTSIDE_KINDS]
    assert {fault.kind for fault in outside} == set(OUTSIDE_KINDS)
    assert all(
        fault.moment == CLOCK and len(fault.ranks) == 1 and 0.3 <= fault.lasts <= 2 for fault in outside
    )
    assert all(faults[fault.after].kind in KINDS for fault in faults if fault.after >= 0)
    assert not any(fault.lasts for fault in faults if fault.kind in KINDS)


def test_a_schedule_of_what_passes_only_has_no_deaths() -> None:
    assert {fault.kind for fault in schedule(9, 0, 4, 100, ["stop", "slow"])} == {"stop", "slow"}


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_has_a_step_of_its_own(seed: int) -> None:
    steps = steps_needed(60)
    others = with_nodes(schedule(42, seed, 4, steps, (*KINDS, *OUTSIDE_KINDS)), 12, seed, steps)
    faults = with_flips(others, 6, seed, 4, steps)
    assert sorted(fault.number for fault in faults) == list(range(60))
    flips = [fault for fault in faults if fault.kind == FLIP]
    assert len(flips) == len({fault.step for fault in flips}) == 6
    assert [fault for fault in faults if fault.kind != FLIP] == others
    assert not any(other.step <= flip.step <= last_step(other) + 1 for flip in flips for other in others)


def test_the_same_seed_gives_the_same_schedule() -> None:
    assert schedule(30, 5, 4, 200) == schedule(30, 5, 4, 200) != schedule(30, 6, 4, 200)


def test_a_script_that_is_not_ours_is_struck_by_the_clock_only() -> None:
    assert {fault.moment for fault in schedule(10, 0, 4, 100, clock_only=True)} == {CLOCK}


def test_a_schedule_comes_back_from_its_file(tmp_path: Path) -> None:
    faults = schedule(10, 0, 4, 100)
    write_schedule(tmp_path, faults)
    assert read_schedule(tmp_path) == faults


def test_a_fault_strikes_its_rank_once_at_its_moment(tmp_path: Path) -> None:
    write_schedule(tmp_path, [Fault(0, "exception", "forward", 3, (1,))])
    Faults(tmp_path, 0, 2).at("forward", 3)
    mine = Faults(tmp_path, 1, 2)
    mine.at("forward", 2)
    mine.at("backward", 3)
    with pytest.raises(InjectedError):
        mine.at("forward", 4)
    mine.at("forward", 4)


def test_a_fault_of_a_replacement_waits_for_the_fault_that_causes_it(tmp_path: Path) -> None:
    chain = [Fault(0, "exception", "forward", 0, (0,)), Fault(1, "exception", "start", 0, (0,), after=0)]
    write_schedule(tmp_path, chain)
    mine = Faults(tmp_path, 0, 2)
    mine.at("start", 0)
    with pytest.raises(InjectedError, match="fault 0"):
        mine.at("forward", 0)
    with pytest.raises(InjectedError, match="fault 1"):
        mine.at("start", 0)


def test_a_flip_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINTLESS_RUN_DIR", str(tmp_path))
    write_schedule(tmp_path, [Fault(0, FLIP, "data", 3, (1,))])
    request = Path(request_path(str(tmp_path), 1))
    mine = Faults(tmp_path, 1, 4)
    mine.at("data", 3)
    assert request.exists()
    request.unlink()
    mine.at("data", 4)
    assert not request.exists()


@pytest.mark.parametrize(
    ("kind", "code"),
    [("SIGKILL", -9), ("SIGSEGV", -11), ("exit", 17), ("out-of-memory", -9), ("exception", 1)],
)
def test_a_process_dies_as_the_kind_says(tmp_path: Path, kind: str, code: int) -> None:
    write_schedule(tmp_path, [Fault(0, kind, "forward", 0, (0,))])
    body = "from pathlib import Path; from jobs.faults import Faults; "
    body += f"Faults(Path({str(tmp_path)!r}), 0, 2).at('forward', 0)"
    done = subprocess.run([sys.executable, "-c", body], cwd=BENCHMARKS, capture_output=True, check=False)
    assert done.returncode == code
