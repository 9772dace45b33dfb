"""Every torchrun flag keeps its meaning; where that is cheap, plain torchrun says what the meaning is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import Launcher

SHOW = """
    import json, os, sys
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME",
             "ROLE_RANK", "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
             "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS")
    shown = {name: os.environ.get(name) for name in names}
    extra = sorted(name for name in os.environ if name.startswith(("TORCHELASTIC", "MASTER", "OPENBLAS")))
    main = sys.modules["__main__"]
    shown.update(extra=extra, argv=sys.argv, path0=sys.path[0], file=__file__, name=__name__,
                 package=__package__, spec=__spec__ and __spec__.name, main=main.__file__,
                 unbuffered=sys.stdout.write_through, cwd=os.getcwd())
    with open(f"shown.{os.environ['RANK']}", "w") as file:
        json.dump(shown, file)
"""


def shown(torchrun: Launcher, ranks: int = 2) -> list[dict[str, object]]:
    return [json.loads((torchrun.folder / f"shown.{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "target",
    [
        ["-m", "package.train"],
        *(pytest.param([one], marks=pytest.mark.slow) for one in ("train.py", "folder")),
    ],
)
def test_a_worker_sees_what_plain_torchrun_would_give_it(torchrun: Launcher, target: list[str]) -> None:
    torchrun.script(SHOW)
    for name, file in (("package", "train.py"), ("package", "__init__.py"), ("folder", "__main__.py")):
        (torchrun.folder / name).mkdir(exist_ok=True)
        torchrun.script("" if file == "__init__.py" else SHOW, f"{name}/{file}")
    options = ["--role", "tester", "--max-restarts", "2", "--rdzv-id", "job7", *target, "--lr", "0.1", "-x"]
    seen = []
    for backend in ("c10d", "checkpointless"):
        finished = torchrun.run(*options, backend=backend)
        assert finished.code == 0, finished.err
        seen.append(shown(torchrun))
    assert seen[1] == seen[0]
    assert seen[1][1]["ROLE_NAME"] == "tester"


def test_no_python_runs_any_program(torchrun: Launcher) -> None:
    path = torchrun.script('#!/bin/sh\necho "$RANK $1 $2" >> out.$RANK\n', "work.sh")
    path.chmod(0o755)
    finished = torchrun.run("--no-python", "./work.sh", "a", "b c")
    assert finished.code == 0, finished.err
    assert [(torchrun.folder / f"out.{rank}").read_text() for rank in range(2)] == ["0 a b c\n", "1 a b c\n"]


@pytest.mark.slow
def test_another_interpreter_is_executed(torchrun: Launcher) -> None:
    torchrun.script("import os, sys; open('who', 'w').write(sys.executable)")
    other = torchrun.folder / "python"
    other.symlink_to(sys.executable)
    finished = torchrun.run("train.py", env={"PYTHON_EXEC": str(other)}, ranks=1)
    assert finished.code == 0, finished.err
    assert (torchrun.folder / "who").read_text() == str(other)


def test_a_missing_program_fails_the_job_and_says_so(torchrun: Launcher) -> None:
    finished = torchrun.run("--no-python", "./nothing-here", ranks=1)
    assert finished.code == 1
    assert "Cannot run './nothing-here': No such file or directory." in finished.err


NOISE = """
    import os, sys
    rank = os.environ["RANK"]
    print("out of", rank)
    print("err of", rank, file=sys.stderr)
"""


def tree(folder: Path) -> dict[str, str]:
    """File contents by path, without the random part of the run's directory."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {re.sub(r"^[^/]*/", "", str(path.relative_to(folder))): path.read_text() for path in files}


@pytest.mark.parametrize(
    "options",
    [
        ["--tee", "0:3,1:1", "--local-ranks-filter", "0"],
        pytest.param(["--redirects", "0:1,1:2"], marks=pytest.mark.slow),
        pytest.param(["--redirects", "3"], marks=pytest.mark.slow),
        pytest.param(["--tee", "3"], marks=pytest.mark.slow),
        pytest.param(["--local-ranks-filter", "1"], marks=pytest.mark.slow),
        pytest.param(["--tee", "3", "--duplicate-stdout-filters", "of 1"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_logs_are_laid_out_and_shown_as_by_plain_torchrun(torchrun: Launcher, options: list[str]) -> None:
    torchrun.script(NOISE)
    results = []
    for backend in ("c10d", "checkpointless"):
        finished = torchrun.run("--log-dir", backend, *options, "train.py", backend=backend)
        assert finished.code == 0, finished.err
        lines = sorted(
            line for line in (finished.out + finished.err).splitlines() if " of " in line and "/" not in line
        )
        results.append((tree(torchrun.folder / backend), lines))
    assert results[1] == results[0]


@pytest.mark.slow
def test_log_line_prefixes_are_kept(torchrun: Launcher) -> None:
    torchrun.script(NOISE)
    env = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${role_name}-${rank}>"}
    finished = torchrun.run("--role", "r", "--tee", "1", "train.py", env=env)
    assert {"<r-0>out of 0", "<r-1>out of 1"} <= set(finished.out.splitlines())


@pytest.mark.slow
def test_an_endpoint_chooses_the_port_of_the_store(torchrun: Launcher) -> None:
    torchrun.script(
        "import os; open('master', 'w').write(os.environ['MASTER_ADDR'] + ':' + os.environ['MASTER_PORT'])"
    )
    finished = torchrun.run("--rdzv-endpoint", "127.0.0.1:0", "train.py", ranks=1)
    assert finished.code == 0, finished.err
    host, port = (torchrun.folder / "master").read_text().split(":")
    assert host == "127.0.0.1"
    assert int(port) > 0


def test_an_unknown_setting_is_an_error_that_lists_the_known_ones(torchrun: Launcher) -> None:
    torchrun.script("raise SystemExit('must not run')")
    finished = torchrun.run("--rdzv-conf", "settle_timeuot=3", "train.py", ranks=1)
    assert finished.code == 1
    assert "Unknown setting 'settle_timeuot' in --rdzv-conf; known settings are" in finished.err
    assert "settle_timeout" in finished.err.split("known settings are")[1]


def test_several_nodes_without_an_endpoint_are_refused_in_one_sentence(torchrun: Launcher) -> None:
    torchrun.script("raise SystemExit('must not run')")
    finished = torchrun.run("--nnodes", "2", "train.py", ranks=1)
    assert finished.code == 1
    assert (
        "Several nodes need an endpoint that all of them can reach: give --rdzv-endpoint HOST:PORT."
        in finished.err
    )


@pytest.mark.slow
def test_one_to_one_nodes_are_one_node(torchrun: Launcher) -> None:
    torchrun.script("open('ran', 'w')")
    assert torchrun.run("--nnodes", "1:1", "train.py", ranks=1).code == 0
    assert (torchrun.folder / "ran").exists()


@pytest.mark.slow
def test_a_script_inside_run_path_runs_as_under_plain_torchrun(torchrun: Launcher) -> None:
    torchrun.script("import os; open(f'ran.{os.environ[\"RANK\"]}', 'w')")
    finished = torchrun.run("--run-path", "train.py", ranks=2)
    assert finished.code == 0, finished.err
    assert finished.err.count("runs as under plain torchrun") == 1
    assert (torchrun.folder / "ran.1").exists()
