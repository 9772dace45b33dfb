"""Private details of torch that the groups rely on; each failure says what changed and what hangs on it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, Work
from torch.distributed import distributed_c10d as c10d

from checkpointless_elastic.groups import ElasticProcessGroup, Registry, patch
from checkpointless_elastic.groups.ops import ALL_OPS, OPS
from tests.groups.processes import Job, MemoryHost, Worker

NOT_COLLECTIVES = {
    "abort",
    "bound_device_id",
    "boxed",
    "get_group_store",
    "group_desc",
    "group_name",
    "merge_remote_group",
    "name",
    "rank",
    "set_timeout",
    "shutdown",
    "size",
    "split_group",
    "unbox",
    "use_pg_for_symm_mem_rendezvous",
}


def test_every_method_of_a_process_group_is_known() -> None:
    public = {name for name in dir(ProcessGroup) if not name.startswith("_") and name[0].islower()}
    unknown = public - set(OPS) - NOT_COLLECTIVES
    assert not unknown, (
        f"torch has new methods {sorted(unknown)}: give each an Op in groups/ops.py, or name it here"
    )


def test_every_collective_has_a_method_in_this_torch_and_is_elastic() -> None:
    for op in ALL_OPS:
        offered = [method for method in op.methods if hasattr(ProcessGroup, method)]
        assert offered, f"torch has none of {op.methods} for {op.name}: add its new name to groups/ops.py"
        for method in offered:
            own, native = getattr(ElasticProcessGroup, method), getattr(ProcessGroup, method)
            assert own is not native, (
                f"{method} of an elastic group goes to the C++ object, which has no backend"
            )


def test_every_method_of_a_work_is_answered() -> None:
    public = {name for name in dir(Work) if not name.startswith("_")} - {"boxed", "unbox"}
    from checkpointless_elastic.groups import ElasticWork

    missing = [name for name in public if getattr(ElasticWork, name) is getattr(Work, name)]
    assert not missing, f"torch's Work has new methods {missing}: answer them in groups/work.py"


def test_new_groups_are_made_by_the_function_that_is_exchanged() -> None:
    for function in (c10d.init_process_group, c10d._new_group_with_tag):
        source = inspect.getsource(inspect.unwrap(function))
        assert "_new_process_group_helper(" in source, f"{function.__name__} makes groups in another way now"


def test_install_is_undone_by_uninstall() -> None:
    before = (c10d._new_process_group_helper, c10d.batch_isend_irecv, dist.batch_isend_irecv)
    Registry(MemoryHost(), shadow=False).install()
    assert c10d._new_process_group_helper is not before[0]
    assert dist.batch_isend_irecv is c10d.batch_isend_irecv is not before[1]
    patch.uninstall()
    from checkpointless_elastic.groups import ddp

    ddp.uninstall()
    assert (c10d._new_process_group_helper, c10d.batch_isend_irecv, dist.batch_isend_irecv) == before


def test_a_future_made_by_fork_holds_a_list_of_tensors_for_cpp() -> None:
    future = torch._C.fork(lambda: [torch.ones(2)])
    assert future.done()
    assert torch.equal(future.value()[0], torch.ones(2)), (
        "DDP's reducer would not read the future of a filled work"
    )


def other_backends(worker: Worker) -> Any:
    worker.registry.install()
    dist.init_process_group("fake", store=worker.store, rank=worker.rank, world_size=worker.size)
    found = type(dist.group.WORLD).__name__, dist.get_backend()
    dist.destroy_process_group()
    return found


def test_other_backends_are_left_to_torch() -> None:
    with Job(other_backends, 1) as job:
        assert job.results() == [("ProcessGroup", "fake")]
