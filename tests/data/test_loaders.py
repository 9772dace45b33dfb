"""Each kind of loader resumes at any batch with the same data, order and random state as a run without a fault."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from loading import (
    Counter,
    Drawing,
    Growing,
    Looking,
    Numbers,
    Slotted,
    Stream,
    Telling,
    accelerated,
    distributed,
    doubled,
    own,
    seed,
    seeded_worker,
)
from memory_session import Killed, Session, assert_a_loss_changes_nothing, run_to_the_end
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from checkpointless_elastic.data.source import Consumed, Sampled, Stateful, source_of
from checkpointless_elastic.errors import ScriptMismatchError, StateMismatchError


def one_generator_for_both() -> DataLoader[torch.Tensor]:
    generator = own(3)
    sampler = RandomSampler(Drawing(), replacement=True, num_samples=70, generator=generator)
    return DataLoader(Drawing(), batch_size=10, sampler=sampler, generator=generator)


def custom_batches(data: Numbers, **options: Any) -> DataLoader[torch.Tensor]:
    return DataLoader(data, batch_sampler=Growing([[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]]), **options)


IN_PROCESS: dict[str, Callable[[], Iterable[Any]]] = {
    "sequential": lambda: DataLoader(Drawing(), batch_size=4),
    "shuffle": lambda: DataLoader(Drawing(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(Drawing(), batch_size=4, shuffle=True, drop_last=True),
    "one by one": lambda: DataLoader(
        Drawing(), batch_size=None, sampler=RandomSampler(Drawing(), num_samples=4)
    ),
    "generator": lambda: DataLoader(Drawing(), batch_size=4, shuffle=True, generator=own(5)),
    "one generator for both": one_generator_for_both,
    "sampler with a generator": lambda: DataLoader(
        Drawing(), batch_size=4, sampler=SubsetRandomSampler(range(9), generator=own(6))
    ),
    "weighted": lambda: DataLoader(
        Drawing(), batch_size=2, sampler=WeightedRandomSampler([0.1, 0.5, 0.9], 7, generator=own(7))
    ),
    "distributed": distributed,
    "batch sampler": lambda: custom_batches(Drawing()),
    "random batch sampler": lambda: DataLoader(
        Drawing(), batch_sampler=BatchSampler(RandomSampler(Drawing()), 5, drop_last=False)
    ),
    "accelerated": accelerated,
    "telling wrapper": lambda: Telling(distributed()),
    "slotted wrapper": lambda: Slotted(DataLoader(Numbers(), batch_size=4, shuffle=True)),
    "with its own iter": lambda: Looking(Numbers(), batch_size=4, shuffle=True, generator=own(9)),
    "collate": lambda: DataLoader(Drawing(), batch_size=5, collate_fn=doubled, shuffle=True),
    "pinned": lambda: DataLoader(Drawing(), batch_size=5, shuffle=True, pin_memory=True),
    "iterable dataset": lambda: DataLoader(Stream(), batch_size=3),
    "list": lambda: [torch.ones(2) * number for number in range(4)],
    "stateful": lambda: StatefulDataLoader(Drawing(), batch_size=4, shuffle=True),
    "stateful with a generator": lambda: StatefulDataLoader(
        Drawing(), batch_size=4, shuffle=True, generator=own(8), drop_last=True
    ),
    "stateful over an iterable": lambda: StatefulDataLoader(Stream(), batch_size=3),
    "stateful iterable": lambda: StatefulDataLoader(Counter(), batch_size=3),
    "iterable with a state": Counter,
}

WITH_PROCESSES: dict[str, Callable[[], Iterable[Any]]] = {
    "shuffle": lambda: DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=2),
    "persistent": lambda: DataLoader(
        Numbers(),
        batch_size=3,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        worker_init_fn=seeded_worker,
    ),
    "persistent distributed": lambda: DataLoader(
        Numbers(),
        batch_size=2,
        sampler=DistributedSampler(Numbers(), num_replicas=2, rank=0),
        num_workers=1,
        persistent_workers=True,
        prefetch_factor=4,
    ),
    "persistent with its own iter": lambda: Looking(
        Numbers(), batch_size=3, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "accelerated persistent": lambda: accelerated(num_workers=1, persistent_workers=True),
    "batch sampler": lambda: custom_batches(Numbers(), num_workers=2, prefetch_factor=1, collate_fn=doubled),
    "generator": lambda: DataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=1, generator=own(5)),
    "iterable dataset that draws": lambda: DataLoader(Stream(), batch_size=2, num_workers=2),
    "stateful": lambda: StatefulDataLoader(Numbers(), batch_size=3, shuffle=True, num_workers=2),
}


def passes_over(make: Callable[[], Iterable[Any]]) -> Callable[[Session], None]:
    """A script of three passes over a loader, with draws from all generators in its body."""

    def script(session: Session) -> None:
        seed()
        loader = make()
        for epoch in session.epochs(3):
            sampler = getattr(loader, "sampler", None)
            if isinstance(sampler, DistributedSampler):
                sampler.set_epoch(epoch)
            for batch in session.batches(loader):
                session.call(batch, torch.rand(1), random.random(), float(np.random.randn()))
        session.call(torch.rand(1))

    return script


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_loader_resumes_exactly_at_any_moment(name: str) -> None:
    script = passes_over(IN_PROCESS[name])
    whole = run_to_the_end(script)
    assert len(whole.trace) > 6
    for moment in range(1, whole.moments + 1, 2):
        assert_a_loss_changes_nothing(script, [moment], whole)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_a_loader_resumes_exactly_from_a_resumed_loader(name: str) -> None:
    script = passes_over(IN_PROCESS[name])
    whole = run_to_the_end(script)
    chance = random.Random(5)
    for _ in range(6):
        moments = [chance.randrange(1, whole.moments + 1) for _ in range(4)]
        assert_a_loss_changes_nothing(script, moments, whole)


@pytest.mark.parametrize("name", WITH_PROCESSES)
def test_a_loader_with_processes_resumes_exactly(name: str) -> None:
    script = passes_over(WITH_PROCESSES[name])
    whole = run_to_the_end(script)
    per_batch = whole.moments // len(whole.trace)
    for moment in range(1, whole.moments + 1, 4 * per_batch + 1):
        assert_a_loss_changes_nothing(script, [moment, 2 * per_batch], whole)


def test_a_plain_run_over_the_same_loader_gives_the_same_batches() -> None:
    session = Session()
    torch.manual_seed(1)
    protected = [batch for _ in session.epochs(2) for batch in session.batches(IN_PROCESS["shuffle"]())]
    torch.manual_seed(1)
    plain = [batch for _ in range(2) for batch in IN_PROCESS["shuffle"]()]
    assert [batch[:, [0, 3]].tolist() for batch in protected] == [
        batch[:, [0, 3]].tolist() for batch in plain
    ]


def test_the_cheapest_exact_way_is_chosen() -> None:
    class Wrapped(DataLoader[torch.Tensor]):
        def __iter__(self) -> Any:
            return (batch for batch in DataLoader.__iter__(self))

    class Named(DataLoader[torch.Tensor]):
        pass

    assert type(source_of(DataLoader(Numbers()))) is Sampled
    assert type(source_of(Named(Numbers()))) is Sampled
    assert type(source_of(Wrapped(Numbers()))) is Consumed
    assert type(source_of(DataLoader(Stream()))) is Consumed
    assert type(source_of(StatefulDataLoader(Numbers()))) is Stateful
    assert type(source_of(StatefulDataLoader(Counter()))) is Stateful
    assert type(source_of(StatefulDataLoader(Stream()))) is Consumed


def test_nothing_that_was_consumed_is_loaded_again() -> None:
    loaded: list[int] = []

    class Counted(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            loaded.append(index)
            return super().__getitem__(index)

    first = Session()
    for batch in first.batches(DataLoader(Counted(), batch_size=2)):
        if float(batch[0]) == 8:
            break
    # The slot still has the loop open: leaving is not saved.
    loaded.clear()
    second = Session(first.slot)
    batch = next(second.batches(DataLoader(Counted(), batch_size=2)))
    assert batch.flatten().tolist() == [8, 9]
    assert loaded == [8, 9]


def lost_in_batch(number: int, loader: Iterable[Any]) -> bytes:
    """The slot of a rank that died in this batch."""
    session = Session()
    iterator = session.batches(loader)
    for _ in range(number + 1):
        next(iterator)
    return session.slot


@pytest.mark.parametrize("length", [0, 4, 5])
def test_a_loader_that_has_become_too_short_is_a_mismatch(length: int) -> None:
    for whole, short in [
        (DataLoader(Numbers(), batch_size=2), DataLoader(Numbers(), batch_sampler=[[0]] * length)),
        (list(range(9)), list(range(length))),
    ]:
        with pytest.raises(ScriptMismatchError, match="The loader ended after"):
            next(Session(lost_in_batch(5, whole)).batches(short))


def test_a_loader_with_other_generators_is_a_mismatch() -> None:
    slot = lost_in_batch(1, DataLoader(Numbers(), generator=own(1)))
    with pytest.raises(ScriptMismatchError, match="0 generators of its own, the lost rank's had 1"):
        next(Session(slot).batches(DataLoader(Numbers())))


class Spiteful:
    """A loader whose state would run code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))

    def state_dict(self) -> dict[str, Any]:
        return {"position": Harm(self.path)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    loader = Spiteful(tmp_path / "harm")
    slot = lost_in_batch(1, loader)
    with pytest.raises(StateMismatchError, match="state_dict of Spiteful"):
        next(Session(slot).batches(loader))
    assert not (tmp_path / "harm").exists()


FRESH_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from memory_session import Content, Session
from test_loaders import IN_PROCESS, passes_over
import msgspec
session = Session(msgspec.msgpack.decode(open(sys.argv[2], "rb").read(), type=Content))
passes_over(IN_PROCESS["shuffle"])(session)
open(sys.argv[3], "w").write(repr(session.trace))
"""


def test_a_fresh_process_goes_on_where_the_slot_says(tmp_path: Path) -> None:
    script = passes_over(IN_PROCESS["shuffle"])
    whole = run_to_the_end(script)
    dying = Session(None, whole.moments // 2)
    with pytest.raises(Killed):
        script(dying)
    (tmp_path / "slot").write_bytes(msgspec.msgpack.encode(dying.slot))
    arguments = [str(Path(__file__).parent), str(tmp_path / "slot"), str(tmp_path / "trace")]
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *arguments], check=True)
    assert repr(whole.trace[len(dying.trace) :]) == (tmp_path / "trace").read_text()


def test_sequential_samplers_and_lists_are_skipped_the_same() -> None:
    loader = DataLoader(Numbers(), batch_size=3, sampler=SequentialSampler(Numbers()))
    resumed = Session(lost_in_batch(2, loader)).batches(loader)
    assert [batch.flatten().tolist() for batch in resumed] == [[6, 7, 8], [9, 10, 11], [12]]
