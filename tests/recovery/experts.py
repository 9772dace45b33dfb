"""Expert parallelism by hand: experts split over one dimension of a mesh, the same ones over the other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from phases import WIDTH, Kind, moment, updating
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh


class Experts(nn.Module):
    """The experts of this rank, as one tensor per layer."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, WIDTH, 2 * WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(count, 2 * WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor, owner: Tensor) -> Tensor:
        parts = [
            (owner == number).unsqueeze(1) * (torch.relu(x @ up) @ down)
            for number, (up, down) in enumerate(zip(self.up, self.down, strict=True))
        ]
        return torch.stack(parts).sum(0)


class Routed(nn.Module):
    """Sends each row to the rank of its best expert, and the result back."""

    def __init__(self, group: dist.ProcessGroup, experts_per_rank: int) -> None:
        super().__init__()
        self.group, self.per_rank = group, experts_per_rank
        self.router = nn.Linear(WIDTH, experts_per_rank * group.size())
        self.experts = Experts(experts_per_rank)

    def _exchanged(self, x: Tensor, received: list[int], sent: list[int]) -> Tensor:
        result: Tensor = all_to_all_single_autograd(x, received, sent, self.group)
        return result

    def forward(self, x: Tensor) -> Tensor:
        weight, best = self.router(x).softmax(1).max(1)
        order = best.argsort(stable=True)
        counts = torch.bincount(best // self.per_rank, minlength=self.group.size())
        others = torch.empty_like(counts)
        dist.all_to_all_single(others, counts, group=self.group)
        sent, received = counts.tolist(), others.tolist()
        rows = self._exchanged(x[order].contiguous(), received, sent)
        owner = torch.empty(sum(received), dtype=best.dtype)
        dist.all_to_all_single(owner, (best[order] % self.per_rank).contiguous(), received, sent, self.group)
        moment("forward")
        answer = self._exchanged(self.experts(rows, owner).contiguous(), sent, received)
        answer.register_hook(lambda grad: moment("backward"))
        return x + weight.unsqueeze(1) * torch.zeros_like(x).index_copy(0, order, answer)


class Mixture(nn.Module):
    """A layer of experts between two dense ones."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.routed = Routed(group, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.routed(torch.relu(self.first(x))))
        return result


def experts() -> Kind:
    """Four experts on two ranks, twice."""
    split = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "expert"))
    dense = torch.get_rng_state()
    model = Mixture(split.get_group("expert"))
    torch.manual_seed(50 + split["expert"].get_local_rank())
    with torch.no_grad():
        for param in model.routed.experts.parameters():
            param.normal_(std=0.2)
    torch.set_rng_state(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    updating(optimizer)
    own = set(model.routed.experts.parameters())

    def step(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(12, WIDTH, generator=generator)
        loss = (model(x) - x.flip(1)).square().mean()
        loss.backward()
        for param in model.parameters():
            assert param.grad is not None
            dist.all_reduce(param.grad, group=split.get_group("replicate") if param in own else None)
        moment("computed")
        optimizer.step()
        moment("stepped")
        optimizer.zero_grad()
        return loss.detach()

    return Kind(
        {"model": model, "optimizer": optimizer}, step, declared={"model.routed.experts": split["replicate"]}
    )
