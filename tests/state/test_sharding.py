"""What is known of meshes belongs to one run of the script."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from checkpointless_elastic.state.sharding import forget, replicas, sharding


def test_in_the_next_run_this_rank_may_have_another_place_on_an_equal_mesh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    meshes = []
    for rank, place, same in ((1, 1, (1, 5)), (6, 2, (2, 6))):
        forget()
        mesh = DeviceMesh("cpu", torch.arange(8).view(2, 4), _init_backend=False, _rank=rank)
        tensor = DTensor.from_local(torch.zeros(2), mesh, [Replicate(), Shard(0)], run_check=False)
        found = sharding(tensor)
        assert found is not None
        assert found.place == (place,)
        assert replicas(tensor) == same
        meshes.append(mesh)
    assert meshes[0] == meshes[1]
    forget()
