"""The command `checkpointless chaos` on a job that knows nothing of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointless_elastic.chaos.command import main
from checkpointless_elastic.chaos.processes import members
from checkpointless_elastic.chaos.strikes import KINDS, REFUSED
from checkpointless_elastic.chaos.trial import Oracle
from tests.conftest import wait_until
from tests.directory.etcd_server import free_ports

JOB = Path(__file__).with_name("job_chaos.py")
PROGRAM = "import sys; from checkpointless_elastic.command.cli import main; sys.exit(main())"
EXACT = Path(__file__).with_name("job_exact.py")
LIMIT_S = 300


def arguments(*options: object, script: Path = JOB, restarts: int = 0, ranks: int = 2) -> list[str]:
    """The command line of chaos; if the options have no command, for a job of so many ranks."""
    if "--" in options:
        return [sys.executable, "-c", PROGRAM, "chaos", *map(str, options)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "checkpointless"]
    job = [*torchrun, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), str(script), "{out}"]
    return [sys.executable, "-c", PROGRAM, "chaos", *map(str, options), "--", *job]


def chaos(
    folder: Path, *options: object, steps: int = 40, code: int = 0, script: Path = JOB, **job: int
) -> dict[str, Any]:
    """The report of a run, which must end with this exit code."""
    report = folder / "report.json"
    done = subprocess.run(
        arguments("--json", report, *options, script=script, **job),
        env={**os.environ, "STEPS": str(steps), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(report.read_text())
    return found | {"text": done.stdout}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command takes signals for itself; here they are those of pytest."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STEPS = 45


def exact(folder: Path, ranks: int, flips: str = "") -> Path:
    """What a run of job_exact.py without faults would have left, by its own rule."""
    (folder / "out").mkdir(parents=True)
    weight = torch.full((1, 8), -float(sum(step % 3 + ranks - 1 for step in range(STEPS))))
    for rank in range(ranks):
        torch.save({"weight": weight}, folder / "out" / f"final-{rank}.pt")
    Oracle(STEPS * 0.025, ranks, 0, STEPS, flips).save(folder)
    return folder


@pytest.fixture
def oracle(tmp_path: Path) -> Path:
    return exact(tmp_path / "oracle", 2)


def test_a_job_is_struck_and_ends_as_its_oracle(
    tmp_path: Path, oracle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setenv("STEPS", str(STEPS))
    options = ("--faults", 2, "--kinds", "kill,stop", "--stop-seconds", 0.3, "--seed", 4, "--json", report)
    assert main(arguments(*options, "--oracle", oracle, script=EXACT)[4:]) == 0
    found = json.loads(report.read_text())
    assert (found["faults"], found["survived"], found["equal"], found["seed"]) == (2, 2, True, 4)
    assert {"machine", "versions", "command"} <= found.keys()
    by_kind = {fault["kind"]: fault for fault in found["fault_list"]}
    assert (by_kind["kill"]["rung"], by_kind["kill"]["cause"]) == (1, "was killed by SIGKILL")
    assert by_kind["stop"]["seconds"] >= 0.3
    assert found["longest_interruption_s"] == max(fault["seconds"] for fault in found["fault_list"])


def test_a_flipped_bit_is_found_and_its_rank_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "report.json"
    monkeypatch.setenv("STEPS", str(STEPS))
    monkeypatch.setenv("CHECKPOINTLESS_VERIFY_EVERY", "1")
    options = ("--faults", 1, "--kinds", "corrupted-memory", "--seed", 2, "--json", report)
    oracle = exact(tmp_path / "oracle", 3)
    assert main(arguments(*options, "--oracle", oracle, script=EXACT, ranks=3)[4:]) == 0
    found = json.loads(report.read_text())
    (fault,) = found["fault_list"]
    assert (fault["kind"], fault["rung"], fault["survived"], found["equal"]) == (
        "corrupted-memory",
        1,
        True,
        True,
    )
    assert re.fullmatch(
        r"has other bytes than its replicas in model\.module\.weight at step \d+", fault["cause"]
    )


def test_a_job_that_does_not_go_on_is_stuck_and_ended(
    tmp_path: Path, oracle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--oracle", str(oracle), "--timeout", "0.2", "--keep", str(tmp_path / "kept"))
    assert main([*options, "--", "sleep", "600"]) == 1
    assert "Stuck: For 0.2 s there was no first step." in capsys.readouterr().out
    assert members(f"CHAOS_OUT={tmp_path / 'kept' / 'faults' / 'out'}") == []


@pytest.mark.slow
def test_every_kind_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHECKPOINTLESS_VERIFY_EVERY", "1")
    found = chaos(tmp_path, "--faults", len(KINDS), "--stop-seconds", 1, steps=220, ranks=3)
    assert {fault["kind"] for fault in found["fault_list"]} == set(KINDS) - {"killed-agent"}
    assert found["survived"] == len(KINDS)
    assert list(tmp_path.glob("chaos-*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("every", "ranks", "why"), [("0", 3, "give it verify_every=1"), ("1", 2, "held by 3 ranks")]
)
def test_memory_is_left_alone_where_a_flip_would_not_be_put_right(
    every: str, ranks: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHECKPOINTLESS_VERIFY_EVERY", every)
    found = chaos(tmp_path, "--faults", 2, "--seed", 3, "--stop-seconds", 1, steps=150, ranks=ranks)
    assert "corrupted-memory" not in {fault["kind"] for fault in found["fault_list"]}
    assert f"corrupted-memory is not done: {'the job' if every == '0' else 'no parameter'}" in found["text"]
    assert why in found["text"]


def test_a_named_kind_that_this_job_cannot_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = exact(tmp_path / "oracle", 2, flips="no parameter is held by 3 ranks")
    assert main(["--kinds", "kill,corrupted-memory", "--oracle", str(oracle), "--", "true"]) == 2
    assert "not done: no parameter is held by 3 ranks. Or leave it out of --kinds." in capsys.readouterr().err


@pytest.mark.slow
def test_an_agent_is_killed_where_a_spare_is_left(tmp_path: Path) -> None:
    """Three torchruns in one command, two of them with a worker; the one with the store is left alone."""
    (port,) = free_ports(1)
    options = f"--rdzv-backend checkpointless --rdzv-endpoint localhost:{port} --rdzv-id job --nnodes 2:3"
    torchrun = f"{sys.executable} -m torch.distributed.run {options} --local-addr 127.0.0.1 {JOB} {{out}} &"
    found = chaos(
        tmp_path,
        *("--faults", 2, "--kinds", "killed-agent,kill", "--"),
        *("sh", "-c", f"{torchrun * 3} wait"),
        steps=150,
    )
    assert (found["faults"], found["survived"], found["rungs"]) == (2, 2, {"1": 2})


@pytest.mark.slow
def test_a_script_without_a_run_is_struck_too_and_an_oracle_is_used_again(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import os, time, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.ones(4)\n"
        "for _ in range(40):\n"
        "    dist.all_reduce(x); x /= 2; time.sleep(0.05)\n"
        "torch.save(x, os.environ['CHAOS_OUT'] + f'/{dist.get_rank()}.pt')\n"
    )
    options = ("--faults", 1, "--kinds", "kill")
    found = chaos(tmp_path, *options, "--keep", tmp_path / "kept", script=script, restarts=1)
    assert found["fault_list"][0]["rung"] == 3
    assert json.loads((tmp_path / "kept" / "oracle" / "oracle.json").read_text())["steps"] == 0
    again = chaos(tmp_path, *options, "--oracle", tmp_path / "kept" / "oracle", code=1, script=script)
    assert (again["faults"], again["survived"], again["equal"]) == (1, 0, False)  # no restart was allowed
    assert "0.pt is missing" in again["text"]


@pytest.mark.slow
def test_an_interrupt_ends_the_job_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        arguments("--faults", 1, "--kinds", "stop", "--stop-seconds", 60, "--keep", tmp_path / "kept"),
        env={**os.environ, "STEPS": "60", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    mark = f"CHAOS_OUT={tmp_path / 'kept' / 'faults' / 'out'}"

    def is_stopped() -> bool:
        states = (
            Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in members(mark)
        )
        return "T" in states

    wait_until(is_stopped, "a worker is stopped", LIMIT_S)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert members(mark) == []


def test_a_command_that_starts_no_workers_of_ours_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["--keep", str(tmp_path / "a"), "--", "true"]) == 2
    assert "--rdzv-backend checkpointless" in capfd.readouterr().err
    assert main(["--keep", str(tmp_path / "b"), "--", "sh", "-c", "echo broken; exit 3"]) == 2
    assert "exit code 3:\nbroken" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--kinds", "kill,stab"], "there is no kind 'stab'; there are kill, segfault"),
        (["--kinds", "clock-jump"], REFUSED["clock-jump"].split(",")[0]),
        (["--kinds", "cut-link"], "scripts/chaos --nodes"),
        ([], "after --"),
        (["--", "torchrun", "--rdzv-conf", "timeout=9,events=x"], "leave events= out"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    wrong: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(wrong)
    assert raised.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
