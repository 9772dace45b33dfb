"""Real torchrun jobs that lose workers: every moment, every kind of end, and the result of a run without a fault."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.recovery.launching import Ended, difference, launch


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The same job without a fault."""
    ended = launch(tmp_path_factory.mktemp("oracle"))
    assert ended.code == 0, ended.text
    return ended


def check(ended: Ended, oracle: Ended, recoveries: int | None = None) -> None:
    assert ended.code == 0, ended.text
    for rank, (mine, theirs) in enumerate(zip(ended.finals(), oracle.finals(), strict=True)):
        assert difference(mine, theirs, f"rank {rank}") == ""
    assert recoveries in (None, len(ended.recoveries())), ended.text


@pytest.mark.parametrize(
    "faults",
    [
        "0:1:start:kill,1:3:forward:kill,2:5:backward:kill,0:7:stepped:kill,1:8:load:kill,2:9:between:kill",
        "2:4:outside:kill,0:12:evaluate:kill,1:12:save:kill,2:17:forward:segv,0:20:backward:exit,1:22:stepped:sysexit",
        "1:2:forward:raise,0:23:backward:kill,1:24:evaluate:raise,2:24:after:kill,0:24:passed:kill",
    ],
    ids=["within a step", "around a step", "at the end"],
)
def test_a_worker_lost_at_any_moment_costs_one_step(faults: str, oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, faults)
    check(ended, oracle)
    lost = [rank for record in ended.recoveries() for rank in record["lost_ranks"]]
    assert sorted(lost) == sorted(
        int(fault[0]) for fault in faults.split(",")
    )  # a fault may fall into a recovery
    assert all(record["rung"] == 1 for record in ended.recoveries()), ended.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [("1:5:forward:linger", "failed: Boom: forward"), ("1:5:stepped:lingerexit", "")],
    ids=["failed", "exited"],
)
def test_nobody_waits_for_the_end_of_a_process_whose_script_has_ended(
    fault: str, cause: str, oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, fault)
    check(ended, oracle, recoveries=1)
    (record,) = ended.recoveries()
    assert record["lost_ranks"] == [1], ended.text
    assert not cause or record["cause"] == cause


@pytest.mark.parametrize(
    "faults",
    [
        "1:forward,3:returned,5:forward,6:stepped,7:forward,8:returned,9:forward,11:forward,12:forward",
        pytest.param("1:top,3:top,5:top,7:top,9:top,11:top,12:top,13:top", marks=pytest.mark.slow),
        pytest.param("2:stepped,4:top,8:forward,10:stepped,-11:forward,12:returned", marks=pytest.mark.slow),
    ],
    ids=["in the next step", "before it", "around it"],
)
def test_a_replacement_does_not_do_again_what_followed_the_last_step(faults: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("job_iterations.py")
    whole, ended = (
        launch(tmp_path / name, which, 2, script) for name, which in (("whole", ""), ("lost", faults))
    )
    check(ended, whole)
    assert len(list(ended.out.glob("died-*"))) == faults.count(",") + 1
    for rank in range(2):
        lines, expected = ((one.out / f"after-{rank}.log").read_text().splitlines() for one in (ended, whole))
        assert lines == expected, f"rank {rank}"


def test_survivors_keep_their_processes_and_a_replacement_has_its_own(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:5:forward:kill")
    check(ended, oracle, recoveries=1)
    assert [len(ended.pids(rank)) for rank in range(3)] == [1, 2, 1]


@pytest.mark.slow
def test_a_replacement_of_rank_0_has_the_run_id_that_the_lost_one_broadcast(
    oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, "0:4:forward:kill")
    check(ended, oracle, recoveries=1)
    found = re.findall(r"rank \d finished, run (\w+)", ended.text)
    assert len(found) == 3
    assert len(set(found)) == 1


@pytest.mark.slow
def test_several_ranks_lost_at_once_and_all_but_one_are_replaced(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "0:4:forward:kill,1:4:forward:kill,1:9:backward:kill,2:9:backward:kill")
    check(ended, oracle)
    lost = {rank for record in ended.recoveries() for rank in record["lost_ranks"]}
    assert lost == {0, 1, 2}


@pytest.mark.slow
def test_the_same_rank_again_and_again_and_a_replacement_lost_while_it_starts(
    oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, "1:4:forward:kill3,0:8:forward:kill,0:0:setup:kill")
    check(ended, oracle)


def test_a_loss_in_the_first_step_runs_the_script_again_if_a_restart_is_left(
    oracle: Ended, tmp_path: Path
) -> None:
    ended = launch(tmp_path, "1:0:backward:kill", options=("--max-restarts=1",))
    check(ended, oracle, recoveries=1)
    (record,) = ended.recoveries()
    assert record["rung"] == 3
    assert "before the first step was committed" in record["reason"]


def test_a_bug_that_comes_again_at_the_same_step_stops_the_job_and_shows_its_traceback(
    tmp_path: Path,
) -> None:
    ended = launch(tmp_path, "1:5:forward:always")
    assert ended.code == 1
    assert "failed twice at step" in ended.text
    assert "Boom: always" in ended.text
    assert "train_step" in ended.text


def test_the_record_of_a_recovery_names_cause_rung_and_phases(oracle: Ended, tmp_path: Path) -> None:
    ended = launch(tmp_path, "1:5:forward:kill")
    check(ended, oracle, recoveries=1)
    (record,) = ended.recoveries()
    assert record["cause"] == "was killed by SIGKILL"
    assert record["lost_ranks"] == [1]
    assert (record["generation"], record["rung"], record["step"], record["decision"]) == (1, 1, 5, "void")
    assert list(record["phases"]) == [
        "detect",
        "freeze",
        "fork",
        "setup",
        "transfer",
        "forward",
        "rebuild",
        "replay",
    ]
    assert record["bytes_moved"] > 0
    assert record["groups_rebuilt"] == 1
    assert "lost rank 1 at step 5" in ended.text


@pytest.mark.parametrize("backend", ["c10d", pytest.param("checkpointless", marks=pytest.mark.slow)])
def test_the_same_script_gives_the_same_result_under_plain_torchrun(
    backend: str, oracle: Ended, tmp_path: Path
) -> None:
    check(launch(tmp_path, backend=backend), oracle, recoveries=0)
