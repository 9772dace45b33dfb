"""Records of recoveries, also where their file system does not answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpointless_elastic.agent import recoveries
from checkpointless_elastic.agent.recoveries import Recoveries
from tests.agent.frozen import frozen_disk


def recover(it: Recoveries, *generations: int) -> None:
    for generation in generations:
        it.opened(generation, frozenset({1}), "was lost", float(generation))
        it.mark("committed", generation + 0.5)


def test_records_are_there_in_order_once_the_agent_has_ended(tmp_path: Path) -> None:
    it = Recoveries("", lambda: str(tmp_path / "logs"), {})
    recover(it, *range(1, 20))
    it.opened(20, frozenset({1}), "was lost", 20.0)
    it.end()
    lines = (tmp_path / "logs" / "recoveries.jsonl").read_text().splitlines()
    assert [json.loads(line)["generation"] for line in lines] == list(range(1, 21))


def test_a_script_that_is_run_again_is_a_phase_of_its_own(tmp_path: Path) -> None:
    it = Recoveries(str(tmp_path / "records"), str, {})
    with_state = {"forked": 10.75, "arrived": 11.25, "restored": 11.5, "resumed": 12.0, "committed": 12.5}
    for generation, marks in enumerate(({"committed": 12.5}, {}, with_state)):
        it.noticed(0, "was lost", 10.0)
        it.restarting(3, "no replicas", generation, 5, 10.5)
        for point, at in marks.items():
            it.mark(point, at)
        it.close()
    it.end()
    lines = [json.loads(line) for line in (tmp_path / "records").read_text().splitlines()]
    followed = {"fork": 0.25, "setup": 0.5, "transfer": 0.0, "forward": 0.25, "rebuild": 0.5, "replay": 0.5}
    assert [line["phases"] for line in lines] == [
        {"detect": 0.5, "rerun": 2.0},
        {},
        {"detect": 0.5, **followed},
    ]


def test_an_agent_does_not_wait_for_a_file_system_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recoveries, "WRITE_LIMIT_S", 0.2)
    with frozen_disk() as folder:
        it = Recoveries(str(folder / "recoveries.jsonl"), str, {})
        recover(it, 1, 2)
        it.end()
        assert "Records of recoveries could not be written: no answer within 0.2 s." in caplog.text
