"""The line of the log about a recovery that has ended."""

from __future__ import annotations

import logging

import pytest

from checkpointless_elastic.observe.timeline import Recovery, tell


def recovery() -> Recovery:
    return Recovery(2, 1, "was killed by SIGABRT", {0, 2}, 10.0, 0.0, "replicas live", step=54)


def test_each_lost_rank_has_its_own_cause(caplog: pytest.LogCaptureFixture) -> None:
    it = recovery()
    it.causes = {0: "was killed by SIGABRT", 2: "was killed by SIGKILL"}
    it.mark("opened", 10.5)
    tell(it.record({}))
    assert caplog.messages == [
        "[generation 2] lost ranks 0, 2 at step 54: rank 0 was killed by SIGABRT, rank 2 was killed by SIGKILL; "
        "rung 1 (replicas live), 500 ms: detect 500 ms"
    ]


def test_a_cause_that_all_share_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    it = recovery()
    it.causes = dict.fromkeys((0, 2), "was killed by SIGABRT")
    it.mark("opened", 10.5)
    tell(it.record({}))
    assert "at step 54: was killed by SIGABRT; rung 1" in caplog.text


def test_what_has_no_phases_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    tell(recovery().record({}))
    assert caplog.messages == []
