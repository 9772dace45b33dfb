"""The job's token and TLS files: where they come from, and where they never go."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std

from checkpointless_elastic import Config, ConfigError
from checkpointless_elastic.agent import preload
from checkpointless_elastic.agent.context import Child, ForkedContext, Launch
from checkpointless_elastic.agent.credentials import (
    TOKEN_VARIABLE,
    Tls,
    read_tls,
    read_token,
    without_secrets,
)
from tests.agent.nursery import nursery

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    return path


def test_the_token_is_read_from_the_file_without_white_space_around_it(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.parse({"job_token_file": str(token_file)}, {})
    assert read_token(config, {}, "run") == TOKEN.encode()
    assert read_token(config, {TOKEN_VARIABLE: "not this one"}, "run") == TOKEN.encode()
    assert caplog.records == []


def test_the_token_is_read_from_the_variable(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert read_token(Config(), {TOKEN_VARIABLE: TOKEN}, "run") == TOKEN.encode()
    assert TOKEN not in caplog.text


def test_without_a_token_it_is_derived_from_the_jobs_id_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first = read_token(Config(), {}, "run")
    assert first == read_token(Config(), {}, "run") != read_token(Config(), {}, "other")
    assert len(first) == 32
    assert (
        "whoever knows its id 'run' and reaches an agent's port can connect" in caplog.records[0].getMessage()
    )
    assert len(caplog.records) == 3


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_token_is_an_error_and_not_the_default(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match="token holds no job token"):
        read_token(Config(job_token_file=str(tmp_path / "token")), {}, "run")
    with pytest.raises(ConfigError, match="The variable CHECKPOINTLESS_JOB_TOKEN holds no job token"):
        read_token(Config(), {TOKEN_VARIABLE: text}, "run")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere .No such file or directory.; correct job_token_file"):
        read_token(Config(job_token_file=str(tmp_path / "nowhere")), {}, "run")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_token(Config(job_token_file=str(tmp_path)), {}, "run")
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    with pytest.raises(ConfigError, match="is over 65536 bytes"):
        read_token(Config(job_token_file=str(tmp_path / "large")), {}, "run")


def test_a_token_that_others_can_read_or_guess_is_warned_of(
    token_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    token_file.chmod(0o644)
    read_token(Config(job_token_file=str(token_file)), {}, "run")
    read_token(Config(), {TOKEN_VARIABLE: "short"}, "run")
    one, two = (record.getMessage() for record in caplog.records)
    assert one.startswith("Every user of this machine can read")
    assert two.startswith("The variable CHECKPOINTLESS_JOB_TOKEN holds a job token of less than 16 bytes")
    assert "short" not in two


@pytest.mark.parametrize("given", [("ca",), ("cert", "key"), ("ca", "key")])
def test_tls_files_are_given_all_or_none(given: tuple[str, ...]) -> None:
    missing = " and ".join(f"tls_{name}" for name in ("ca", "cert", "key") if name not in given)
    with pytest.raises(ConfigError, match=f"; {missing} (is|are) missing"):
        Config.parse({f"tls_{name}": "x.pem" for name in given}, {})
    assert read_tls(Config()) is None
    config = Config.parse({"tls_ca": "a", "tls_cert": "b"}, {"CHECKPOINTLESS_TLS_KEY": "c"})
    assert read_tls(config) == Tls("a", "b", "c")


def test_what_an_agent_starts_does_not_get_the_token() -> None:
    assert without_secrets({TOKEN_VARIABLE: "x", "OTHER": "y"}) == {"OTHER": "y"}


LOOK = f"""
import os
from pathlib import Path
server = Path(f"/proc/{{os.getppid()}}/environ").read_bytes()
own = Path("/proc/self/environ").read_bytes()
print(any({TOKEN.encode()!r} in block for block in (server, own)), {TOKEN_VARIABLE!r} in os.environ, flush=True)
"""


def test_a_fork_server_does_not_start_with_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it forks has its own environment, but the server's first one can be read in /proc."""
    monkeypatch.setattr(preload, "BASE", ("checkpointless_elastic.worker.bootstrap",))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    (tmp_path / "look.py").write_text(LOOK)
    with nursery(tmp_path) as nest:
        assert nest.run("script", [str(tmp_path / "look.py")]).out == "False True\n"


class Silent:
    """Is told of workers and does nothing."""

    def started(self, child: Child) -> None: ...

    def lost(self, child: Child) -> None: ...

    def exited(self, child: Child, status: int) -> None: ...


@pytest.mark.parametrize("program", [False, True], ids=["script", "program"])
def test_workers_do_not_get_the_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: bool) -> None:
    monkeypatch.setattr(preload, "BASE", ("checkpointless_elastic.worker.bootstrap",))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    (tmp_path / "look.py").write_text(LOOK)
    command = ("/usr/bin/env", sys.executable) if program else (sys.executable, "-u")
    logs = DefaultLogsSpecs(log_dir=str(tmp_path / "logs"), redirects=Std.OUT)
    with nursery(tmp_path) as nest:
        launch = Launch(
            nest.loop, nest.servers, Silent(), lambda child: {}, lambda child, again: False, lambda rank: []
        )
        args = {0: (*command[1:], str(tmp_path / "look.py"))}
        context = ForkedContext("worker", command[0], args, {0: {}}, logs, launch, {})
        nest.servers.offspring = context
        context._start()
        assert nest.loop.run(context.all_ended, 60.0)
        assert Path(context.stdouts[0]).read_text() == "False False\n"
