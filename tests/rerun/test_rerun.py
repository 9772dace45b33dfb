"""Rung 3: the script runs again in the processes that live, and finds what it would find in new ones."""

from __future__ import annotations

import pytest

from tests.conftest import Finished, Launcher

TRAIN = """
    import os, signal, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    with open("runs", "a") as runs:
        runs.write(f"{rank} {count} {os.getpid()}\\n")
    dist.init_process_group("gloo")
    torch.manual_seed(int(rank))
    model = DistributedDataParallel(torch.nn.Linear(10, 10))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(12):
        if (rank, count, step, os.environ.get("FAULT")) == ("1", "0", 6, "kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.randn(8, 10)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), f"result.{rank}")
    dist.destroy_process_group()
    """
BEGIN = """
    import os, signal, sys, time
    rank, count = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    with open("runs", "a") as runs:
        runs.write(f"{rank} {count} {os.getpid()}\\n")
    def die_when(*names):
        while not all(map(os.path.exists, names)): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """


def pids(torchrun: Launcher) -> dict[tuple[str, str], list[str]]:
    """By rank and restart count, the processes in which the script was run."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in (torchrun.folder / "runs").read_text().splitlines():
        rank, count, pid = line.split()
        found.setdefault((rank, count), []).append(pid)
    return found


def run(torchrun: Launcher, text: str, *options: str, ranks: int = 2) -> Finished:
    """Run a script of two halves, with one restart; it must succeed."""
    torchrun.script(text)
    finished = torchrun.run("--max-restarts", "1", *options, "train.py", ranks=ranks)
    assert finished.code == 0, finished.err
    return finished


def stayed(torchrun: Launcher, rank: str) -> bool:
    """Was the script run once more in the same process?"""
    first, second = (pids(torchrun)[rank, count] for count in "01")
    return first == second


def test_survivors_run_the_script_again_in_their_processes(torchrun: Launcher) -> None:
    torchrun.script(TRAIN)
    finished = torchrun.run("--max-restarts", "1", "train.py", env={"FAULT": "kill"}, ranks=3)
    assert finished.code == 0, finished.err
    assert "All workers are restarted (restart 1): rung 3: " in finished.err
    assert "Traceback" not in finished.err
    assert [stayed(torchrun, rank) for rank in "012"] == [True, False, True]
    results = {path.read_bytes() for path in torchrun.folder.glob("result.*")}
    assert len(results) == 1


@pytest.mark.slow
def test_the_result_is_that_of_plain_torchrun(torchrun: Launcher) -> None:
    torchrun.script(TRAIN)
    assert torchrun.run("train.py", backend="c10d").code == 0
    expected = (torchrun.folder / "result.0").read_bytes()
    (torchrun.folder / "runs").unlink()
    torchrun.run("--max-restarts", "1", "train.py", env={"FAULT": "kill"})
    assert (torchrun.folder / "result.0").read_bytes() == expected
    assert stayed(torchrun, "0")


@pytest.mark.slow
def test_restart_is_another_way_of_rung_3(torchrun: Launcher) -> None:
    torchrun.script(TRAIN)
    options = ("--max-restarts", "1", "--rdzv-conf", "unprotected=restart")
    finished = torchrun.run(*options, "train.py", env={"FAULT": "kill"})
    assert finished.code == 0, finished.err
    assert not stayed(torchrun, "0")


@pytest.mark.slow
def test_each_run_has_log_files_of_its_own(torchrun: Launcher) -> None:
    torchrun.script(TRAIN.replace("optimizer.step()", "optimizer.step(); print(count)"))
    finished = torchrun.run(
        *("--max-restarts", "1", "--log-dir", "logs", "--redirects", "3", "--tee", "1", "train.py"),
        env={"FAULT": "kill"},
    )
    assert finished.code == 0, finished.err
    assert stayed(torchrun, "0")
    (log,) = (torchrun.folder / "logs").glob("*/attempt_1/0/stdout.log")
    assert log.read_text() == "1\n" * 12
    assert finished.out.count("[default0]:1\n") == 12


@pytest.mark.slow
def test_a_script_that_swallows_everything_is_run_in_a_new_process_within_the_limit(
    torchrun: Launcher,
) -> None:
    text = """
    if count == "0" and rank == "1":
        die_when("deaf")
    while count == "0":
        try:
            open("deaf", "w").close()
            time.sleep(1000)
        except BaseException:
            pass
    """
    finished = run(torchrun, BEGIN + text, "--rdzv-conf", "settle_timeout=2")
    assert "rank 0 did not leave the script within 2 s: it is forked anew" in finished.err
    assert not stayed(torchrun, "0")


@pytest.mark.slow
def test_a_sleep_outside_of_anything_is_left(torchrun: Launcher) -> None:
    text = """
    if count == "0" and rank == "1":
        die_when("asleep")
    if count == "0":
        open("asleep", "w").close()
        time.sleep(1000)
    """
    run(torchrun, BEGIN + text)
    assert stayed(torchrun, "0")


SURROUNDINGS = """
    import atexit, json, logging, multiprocessing, pathlib, random, threading, torch
    import helper, helper_package.part
    from torch.optim import optimizer as hooks
    root = logging.getLogger()
    found = [
        helper.state, helper_package.part.state, "mine" in globals(), os.getcwd(), sys.argv, sys.path[:2],
        os.environ.get("MINE"), str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), str(signal.getsignal(signal.SIGUSR1)), len(root.handlers),
        root.level, sys.stdout is sys.__stdout__, sys.excepthook is sys.__excepthook__, sys.getrecursionlimit(),
        multiprocessing.get_start_method(allow_none=True), str(torch.get_default_device()),
        len(hooks._global_optimizer_post_hooks), threading.active_count(),
    ]
    pathlib.Path(f"/proc/self/cwd/found.{rank}.{count}").write_text(json.dumps(found))
    here = os.getcwd()
    random_numbers = [random.random(), torch.rand(1).item()]
    pathlib.Path(f"random.{rank}.{count}").write_text(json.dumps(random_numbers))
    mine = helper.state = helper_package.part.state = os.environ["MINE"] = "changed"
    sys.argv.append("x"); sys.path.insert(0, "/nowhere"); os.chdir("/")
    torch.set_default_dtype(torch.float64); torch.set_grad_enabled(False); torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True); torch.set_default_device("meta")
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    logging.basicConfig(level=10)
    sys.stdout = open(os.devnull, "w"); sys.excepthook = print; sys.setrecursionlimit(5000)
    multiprocessing.set_start_method("spawn")
    hooks.register_optimizer_step_post_hook(lambda *_: None)
    atexit.register(lambda: open(f"{here}/exits", "a").write(f"{rank} {count}\\n"))
    if count == "0" and rank == "1":
        die_when(f"{here}/exits.soon")
    elif count == "0":
        open(f"{here}/exits.soon", "w").close()
        time.sleep(1000)
    """


@pytest.mark.slow
def test_the_script_finds_what_it_finds_in_a_new_process(torchrun: Launcher) -> None:
    (torchrun.folder / "helper_package").mkdir()
    for name in ("helper.py", "helper_package/part.py"):
        torchrun.script("state = 'fresh'", name)
    run(torchrun, BEGIN + SURROUNDINGS)
    assert stayed(torchrun, "0") and not stayed(torchrun, "1")
    first, second = (torchrun.folder / f"found.0.{count}" for count in "01")
    assert second.read_text() == first.read_text()
    assert "fresh" in first.read_text()
    numbers = {(torchrun.folder / f"random.0.{count}").read_text() for count in "01"}
    assert len(numbers) == 2
    assert sorted((torchrun.folder / "exits").read_text().splitlines()) == ["0 1", "1 1"]


@pytest.mark.slow
def test_loader_workers_and_other_children_do_not_outlive_the_run(torchrun: Launcher) -> None:
    text = """
    import psutil, subprocess, torch
    from torch.utils.data import DataLoader
    with open(f"children.{rank}.{count}", "w") as file:
        file.write(str(len(psutil.Process().children(recursive=True))))
    if rank == "0":
        loader = DataLoader(range(1000), num_workers=2, persistent_workers=True)
        batches = iter(loader)
        next(batches)
        sleeper = subprocess.Popen(["sleep", "1000"])
        open("loading", "w").close()
        for batch in batches:
            if count == "0": time.sleep(0.1)
        sleeper.kill()
    elif count == "0":
        die_when("loading")
    """
    run(torchrun, BEGIN + text)
    assert stayed(torchrun, "0")
    assert {(torchrun.folder / f"children.0.{count}").read_text() for count in "01"} == {"0"}


KEPT = {
    "80 MiB of tensors on cpu were not given back": "json.kept = torch.zeros(20 << 20)",
    "threads of the script are still running: Thread-": """
    def turn():
        while True: time.sleep(0.01)
    threading.Thread(target=turn, daemon=True).start()
    """,
    "a process group of the script is still held": """
    dist.init_process_group("gloo")
    json.kept = dist.new_group([0, 1])
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("reason", KEPT)
def test_a_process_with_something_of_the_script_left_is_not_used_again(
    reason: str, torchrun: Launcher
) -> None:
    text = """
    import json, threading, torch, torch.distributed as dist
    if count == "0":
        {}
        open(f"done.{{rank}}", "w").close()
        die_when("done.0", "done.1") if rank == "1" else time.sleep(1000)
    """
    finished = run(torchrun, BEGIN + text.format(KEPT[reason].strip().replace("\n", "\n    ")))
    assert f"[rank 0] The script cannot be run again in this process: {reason}" in finished.err
    assert not stayed(torchrun, "0")


@pytest.mark.slow
def test_a_script_that_fails_on_its_own_traces_is_run_in_a_new_process_without_another_restart(
    torchrun: Launcher,
) -> None:
    text = """
    import json, torch, torch.distributed as dist
    if hasattr(json, "trace"):
        raise ValueError("been here")
    json.trace = True
    dist.init_process_group("gloo")
    dist.barrier()
    if count == "0" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    """
    finished = run(torchrun, BEGIN + text)
    assert (
        "rank 0 is forked anew: in its old process the script failed: ValueError: been here" in finished.err
    )
    old, *again = pids(torchrun)["0", "1"]
    assert pids(torchrun)["0", "0"] == [old] and len(again) == 1


@pytest.mark.slow
def test_a_rank_that_dies_while_it_leaves_the_script_is_forked(torchrun: Launcher) -> None:
    text = """
    if count == "0":
        open(f"up.{rank}", "w").close()
        if rank == "1":
            die_when("up.0", "up.2")
        try:
            time.sleep(1000)
        finally:
            if rank == "2": os.kill(os.getpid(), signal.SIGKILL)
    """
    run(torchrun, BEGIN + text, ranks=3)
    assert [stayed(torchrun, rank) for rank in "012"] == [True, False, False]


@pytest.mark.slow
def test_another_loss_while_the_script_begins_again_is_answered_by_new_processes(torchrun: Launcher) -> None:
    torchrun.script(
        BEGIN
        + """
    import torch.distributed as dist
    if count == "1" and rank == "2":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.init_process_group("gloo")
    dist.barrier()
    if count == "0" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    """
    )
    finished = torchrun.run("--max-restarts", "2", "train.py", ranks=3)
    assert finished.code == 0, finished.err
    assert stayed(torchrun, "0")
    assert not {*pids(torchrun)["0", "1"]} & {*pids(torchrun)["0", "2"]}


@pytest.mark.slow
def test_a_worker_that_waits_at_the_end_of_a_protected_script_runs_it_again(torchrun: Launcher) -> None:
    text = """
    import atexit, torch, torch.distributed as dist, checkpointless_elastic as ce
    dist.init_process_group("gloo")
    model = torch.nn.Linear(2, 2)
    run = ce.Run(model=model)
    if count == "0" and rank == "1":
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    """
    run(torchrun, BEGIN + text)
    assert stayed(torchrun, "0")
