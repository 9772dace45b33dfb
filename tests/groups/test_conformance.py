"""Everything torch.distributed offers on a native gloo group works on an elastic one, with the same bits."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from checkpointless_elastic.groups import ElasticProcessGroup, Situation
from tests.groups.conformance_cases import CASES, run
from tests.groups.processes import Job, Worker


def compare_all(worker: Worker) -> dict[str, tuple[Any, Any]]:
    """The result of every case on a native group and on elastic ones inside and outside of a step."""
    dist.init_process_group("gloo", store=worker.store, rank=worker.rank, world_size=worker.size)
    native = dist.new_group()
    worker.registry.install()
    elastic = dist.new_group()
    assert type(elastic) is ElasticProcessGroup
    found = {}
    for situation in (Situation.ATTEMPT, Situation.STARTUP, Situation.OUTSIDE):
        worker.host.where = situation
        worker.registry.committed(3)
        for name in CASES:
            if name != "a_timeout_is_an_error":
                pair = [run(name, group, worker.rank, worker.size) for group in (native, elastic)]
                found[f"{name} in {situation.value}"] = (pair[0], pair[1])
    name = "a_timeout_is_an_error"
    found[name] = (run(name, native, worker.rank, worker.size), run(name, elastic, worker.rank, worker.size))
    worker.say("done")
    worker.hear()
    return found


def test_every_collective_gives_the_same_bits_and_errors_as_on_a_native_group() -> None:
    with Job(compare_all) as job:
        for rank in range(3):
            assert job.heard(rank) == "done"
        job.tell("end")
        for rank, found in enumerate(job.results()):
            for name, (native, elastic) in found.items():
                assert elastic == native, f"rank {rank}: {name} differs"
            assert len(found) > 60
