"""Faults of jobs whose state is in shards: no schedule takes the last rank that holds one."""

from __future__ import annotations

from pathlib import Path

import chaos
import pytest
import recovery_time
from harness.layouts import LAYOUTS, holders, survivable
from harness.schedule import last_step, schedule, steps_needed

SHARDED = [("hsdp", 8), ("hsdp", 4), ("tp", 8), ("tp", 4), ("hsdp_tp", 8), ("pp", 8), ("pp", 4)]


def test_who_holds_the_same_follows_from_the_mesh() -> None:
    assert holders("ddp", 4) == (frozenset(range(4)),)
    assert set(holders("zero", 4)) == set(holders("fsdp", 4)) == {frozenset({rank}) for rank in range(4)}
    assert set(holders("hsdp", 8)) == {frozenset({rank, rank + 4}) for rank in range(4)}
    assert set(holders("tp", 8)) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}
    assert set(holders("hsdp_tp", 8)) == {frozenset({rank, rank + 4}) for rank in range(4)}
    assert set(holders("pp", 8)) == {frozenset(range(4)), frozenset(range(4, 8))}


@pytest.mark.parametrize(("layout", "ranks"), [("hsdp", 3), ("tp", 5), ("hsdp_tp", 6), ("pp", 1)])
def test_a_number_of_ranks_that_a_layout_cannot_take_is_refused(layout: str, ranks: int) -> None:
    with pytest.raises(ValueError, match=layout):
        holders(layout, ranks)


def test_a_set_survives_with_one_of_its_ranks() -> None:
    parts = holders("hsdp", 4)
    assert survivable({0, 1}, parts)
    assert survivable({0, 3}, parts)
    assert not survivable({0, 2}, parts)


@pytest.mark.parametrize(("layout", "ranks"), SHARDED)
def test_no_faults_that_can_meet_take_all_of_a_part(layout: str, ranks: int) -> None:
    parts, steps = holders(layout, ranks), steps_needed(50)
    for seed in range(20):
        faults = schedule(50, seed, ranks, steps, holders=parts)
        assert [fault.number for fault in faults] == list(range(50))
        for index, fault in enumerate(faults):
            assert fault.ranks
            at = fault.step if fault.after < 0 else faults[fault.after].step
            meet = [other for other in faults[:index] if last_step(other) + 1 >= at]
            assert survivable({rank for other in [*meet, fault] for rank in other.ranks}, parts)


def test_all_but_one_is_as_many_ranks_as_the_layout_can_lose() -> None:
    faults = schedule(50, 1, 8, steps_needed(50), holders=holders("hsdp", 8))
    assert max(len(fault.ranks) for fault in faults if fault.target == "all but one") == 4
    assert {fault.target for fault in faults} >= {"rank 0", "several", "all but one", "replacement"}


@pytest.mark.parametrize("layout", ["fsdp", "zero"])
def test_chaos_does_not_start_without_mirrors_what_only_they_bring_back(
    layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        chaos.parse(["--layout", layout])
    assert (
        f"With {layout} a lost rank's shard is nowhere else: give --mirror-every K" in capsys.readouterr().err
    )
    (run,) = chaos.parse(["--layout", layout, "--mirror-every", "5"]).runs
    calm, struck = chaos.plans(run, Path("folder"), steps=10)
    assert struck.environment["CHECKPOINTLESS_MIRROR_EVERY"] == "5"
    assert "CHECKPOINTLESS_MIRROR_EVERY" not in calm.environment
    assert calm.environment["BENCH_LAYOUT"] == struck.environment["BENCH_LAYOUT"] == layout


def test_bits_flip_only_where_three_ranks_hold_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kinds", "all", "--layout", "ddp,hsdp", "--faults", "40"]
    ddp, hsdp = chaos.parse(options).runs
    assert [chaos.flips_of(run) for run in (ddp, hsdp)] == [2, 0]
    assert len(chaos.draw(ddp, 100)) == len(chaos.draw(hsdp, 100)) == 20
    struck = [chaos.plans(run, Path("folder"), steps=10)[1].environment for run in (ddp, hsdp)]
    assert ["CHECKPOINTLESS_VERIFY_EVERY" in environment for environment in struck] == [True, False]
    assert [
        chaos.flips_of(run) for run in chaos.parse([*options, "--layout", "tp", "--ranks", "6"]).runs
    ] == [4]
    with pytest.raises(SystemExit):
        chaos.parse(["--kinds", "corrupted-memory", "--layout", "hsdp"])
    assert "3 ranks hold the same" in capsys.readouterr().err


def test_recovery_time_takes_several_layouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert recovery_time.parse(["--layout", "ddp,hsdp"]).layout == ["ddp", "hsdp"]
    assert recovery_time.parse([]).layout == ["ddp"]
    for wrong in (["--layout", "sdp"], ["--layout", "hsdp", "--ranks", "3"]):
        with pytest.raises(SystemExit):
            recovery_time.parse(wrong)
    assert "multiple of 2 ranks" in capsys.readouterr().err
    assert set(recovery_time.SCRIPTS) == set(LAYOUTS)
