"""The protocol under random schedules: losses, delays and any order of delivery between channels, in one process.

Workers are modelled as the session behaves: a listener that answers Freeze, and a main thread that votes and recovers.
With mirrors each rank holds state of its own, and its mirrors outlive it. Votes are messages, or stores to memory that
all ranks see (`worker.ballot`).
A worker's weights are the list of the steps it applied, so that a step lost, doubled or out of order shows.
"""

from __future__ import annotations

import random
from collections import deque

import msgspec
import pytest

from checkpointless_elastic.protocol.between import Seated
from checkpointless_elastic.protocol.checks import Published, next_due
from checkpointless_elastic.protocol.coordinator import Coordinator, State
from checkpointless_elastic.protocol.events import (
    Action,
    Broadcast,
    End,
    Event,
    Lost,
    Replace,
    Restart,
    Stop,
)
from checkpointless_elastic.protocol.hearing import event_of
from checkpointless_elastic.protocol.messages import (
    Commit,
    Decision,
    Freeze,
    FromWorker,
    Frozen,
    Left,
    Message,
    Phase,
    Rebuild,
    Release,
    Replicas,
    Report,
    Restore,
    Resume,
    Stage,
)
from checkpointless_elastic.protocol.mirrors import is_due
from checkpointless_elastic.protocol.station import Station

STEPS = 12
VERIFY = 4


class Ballot:
    """Votes in memory; ``usable``: never open if not. At every VERIFY-th step votes are messages."""

    def __init__(self, ranks: int, usable: bool) -> None:
        self.cells = [0] * ranks
        self.usable = usable
        self.limit = 0

    def begin(self, after: int) -> None:
        self.limit = next_due(after, VERIFY) if self.usable else 0

    def committed(self) -> int:
        return min(self.cells) if self.limit else 0


class Worker:
    """One incarnation of one rank."""

    def __init__(
        self,
        rank: int,
        generation: int,
        shadow: bool,
        ballot: Ballot,
        mirrors: dict[int, list[int]],
        every: int = 0,
    ) -> None:
        self.rank, self.shadow, self.ballot = rank, shadow, ballot
        self.mirrors, self.every = mirrors, every
        self.generation = -1 if shadow else generation
        self.frozen = generation
        self.weights: list[int] = []
        self.phase = Phase.COMPUTING
        self.control: deque[Message] = deque()
        self.votes: deque[Message] = deque()
        self.out: dict[str, deque[Message]] = {"control": deque(), "vote": deque()}
        self.decision: Decision | None = None
        self.waiting: type | None = Decision if shadow else None
        self.done = False

    @property
    def step(self) -> int:
        return len(self.weights)

    def listen(self) -> None:
        message = self.control.popleft()
        assert isinstance(message, Freeze)
        self.frozen = max(self.frozen, message.generation)
        self.out["control"].append(Frozen(message.generation, self.step, self.phase, not self.shadow, True))

    def mirror(self) -> None:
        """The mirror of the step in flight is whole."""
        if is_due(self.step, self.every) and self.step not in self.mirrors:
            while len(self.mirrors) > 1:
                del self.mirrors[min(self.mirrors)]
            self.mirrors[self.step] = list(self.weights)

    def compute(self, leaves: bool) -> None:
        """The main thread, when it waits for nothing, comes to its gate or its end."""
        if self.frozen > self.generation:
            if leaves:
                self.out["control"].append(Left(self.frozen))
            self.waiting = Decision
        elif self.step == STEPS:
            self._report(Stage.FINISHED, self.generation)
            self.waiting = Release
        else:
            self.mirror()
            self.phase = Phase.READY
            self.counts = self.step < self.ballot.limit
            self.ballot.cells[self.rank] = self.step + self.counts
            if not self.counts:
                self._report(Stage.READY, self.generation)
            self.waiting = Commit

    @property
    def sees_all(self) -> bool:
        """It waits until all have voted in memory, and they have."""
        waits = self.waiting is Commit and self.counts and self.frozen == self.generation
        return waits and min(self.ballot.cells) > self.step

    def receive(self) -> None:
        message = self.votes.popleft()
        if isinstance(message, Decision):
            if message.generation >= self.frozen:
                self._follow(message)
        elif isinstance(message, Commit) and self.waiting is Commit:
            if (message.generation, message.step) == (
                self.generation,
                self.step,
            ) and self.frozen == self.generation:
                self.apply()
        elif self.decision is not None and message.generation == self.decision.generation:  # type: ignore[attr-defined]
            self._recover(message, self.decision.generation)
        elif (
            isinstance(message, Release) and self.waiting is Release and message.generation == self.generation
        ):
            self.done = True

    def apply(self) -> None:
        self.weights.append(self.step)
        self.phase, self.waiting = Phase.COMPUTING, None

    def _follow(self, decision: Decision) -> None:
        self.decision = decision
        if self.rank in decision.pending:
            self._report(Stage.ARRIVED, decision.generation)
            self.waiting = Restore
            return
        if decision.step == self.step + 1:
            assert self.phase is Phase.READY, "only a rank that was ready may roll forward"
            self.apply()
        assert decision.step == self.step
        self.phase = Phase.COMPUTING
        published = msgspec.msgpack.encode(Published(b"", bytes(self.weights)))
        self._report(Stage.PUBLISHED, decision.generation, published)
        self.waiting = Rebuild

    def _recover(self, message: Message, generation: int) -> None:
        if isinstance(message, Restore) and self.waiting is Restore:
            assert self.decision is not None
            if self.every:
                self.weights = list(self.mirrors[self.decision.step])
                for later in [step for step in self.mirrors if step > self.step]:
                    del self.mirrors[later]
            else:
                copies = {bytes(weights) for weights in message.publications.values()}
                assert len(copies) == 1, "sources differ"
                self.weights = list(copies.pop())
            assert self.step == self.decision.step
            self._report(Stage.RESTORED, generation)
            self.waiting = Rebuild
        elif isinstance(message, Rebuild) and self.waiting is Rebuild:
            self._report(Stage.REBUILT, generation)
            self.waiting = Resume
        elif isinstance(message, Resume) and self.waiting is Resume:
            self.generation, self.shadow, self.decision = generation, False, None
            self.waiting = Decision if self.frozen > generation else None

    def _report(self, stage: Stage, generation: int, payload: bytes = b"") -> None:
        self.out["vote"].append(Report(stage, generation, self.step, payload))


class World:
    """Agent, coordinator and workers, moved on one random action at a time."""

    def __init__(self, ranks: int, seed: int, losses: int, memory: bool, every: int = 0) -> None:
        self.random = random.Random(seed)
        self.every = every
        self.mirrors: dict[int, dict[int, list[int]]] = {rank: {} for rank in range(ranks)}
        self.ending: list[int] = []
        self.went_back = 0
        self.by_memory = 0
        self.coordinator = Coordinator(
            frozenset(range(ranks)), max_faults_per_step=10_000, mirror_every=every
        )
        self.ballot = Ballot(ranks, memory)
        seat = Seated(0, 0, [0], ranks, "", "", 0, 0, False)
        self.station = Station(seat, self.ballot.committed)
        self.workers = {
            rank: Worker(rank, 0, False, self.ballot, self.mirrors[rank], every) for rank in range(ranks)
        }
        self.losses = losses
        self.committed: list[int] = []
        self.ended: Action | None = None
        for rank in range(ranks):
            self.coordinator.protect(rank)
            if every:
                assert self.coordinator.holdings.compare(rank, Replicas([[rank]], {"shard": (0, rank)})) == ""

    def run(self) -> None:
        for _ in range(200_000):
            if self.ended is not None or all(worker.done for worker in self.workers.values()):
                return
            moves = list(self._moves())
            assert moves, f"nothing can happen any more in state {self.coordinator.state}"
            self.random.choice(moves)()
        raise AssertionError("the schedule does not end")

    def _moves(self):  # type: ignore[no-untyped-def]
        for rank in self.ending:
            yield lambda rank=rank: self._ended(rank)
        for worker in [worker for rank, worker in self.workers.items() if rank not in self.ending]:
            if worker.waiting is None and self.random.random() < 0.5:
                yield worker.mirror
            if worker.control:
                yield worker.listen
            if worker.votes and worker.waiting is not None:
                yield worker.receive
            if worker.sees_all:
                yield worker.apply
            if worker.waiting is None and not worker.done:
                yield lambda worker=worker: worker.compute(self.random.random() < 0.3)
            for channel, queue in worker.out.items():
                if queue:
                    yield lambda worker=worker, channel=channel: self._take(
                        worker.rank, worker.out[channel].popleft()
                    )
        alive = [
            worker.rank
            for worker in self.workers.values()
            if not worker.done and worker.rank not in self.ending
        ]
        whole = [rank for rank in self.coordinator.whole if rank in alive]
        first = max(1, 3 * self.every)  # by then every rank has a mirror
        possible = self.every or len(whole) > 1
        if (
            self.losses
            and alive
            and max(self.station.step, len(self.committed)) >= first
            and possible
            and self.random.random() < 0.05
        ):
            yield lambda: self._lose(self.random.choice(alive))

    def _lose(self, rank: int) -> None:
        if self.coordinator.whole == {rank} and not self.every:
            return
        self.losses -= 1
        self._tell(Lost(rank, "was lost", mirrored=max(self.mirrors[rank], default=-1)))

    def _ended(self, rank: int) -> None:
        self.ending.remove(rank)
        self._tell(Lost(rank, "was ended", mirrored=max(self.mirrors[rank], default=-1)))

    def _take(self, rank: int, message: FromWorker) -> None:
        said = self.station.said(rank, message)
        event = event_of(said) if said is not None else None
        if event is not None:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        counted = self.station.counted()
        if counted is not None:
            self.by_memory += 1
            self.committed.extend(range(len(self.committed), counted.step))
            news = event_of(counted)
            assert news is not None
            self._do(self.coordinator.handle(news))
        self._do(self.coordinator.handle(event))

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Replace):
                generation, mirrors = self.coordinator.generation, self.mirrors[action.rank]
                self.workers[action.rank] = Worker(
                    action.rank, generation, True, self.ballot, mirrors, self.every
                )
            elif isinstance(action, End):
                self.ending.append(action.rank)
            elif isinstance(action, (Restart, Stop)):
                self.ended = action
            elif isinstance(action, Broadcast):
                self._send(action.message)

    def _send(self, message: Message) -> None:
        if isinstance(message, Decision):
            self.ballot.limit = 0
        assert self.station.obey(message)  # type: ignore[arg-type]
        if isinstance(message, Commit):
            self.ballot.begin(message.step)
        if isinstance(message, Decision):
            if message.step < len(self.committed):
                assert len(self.committed) - message.step <= self.every, "more steps are lost than allowed"
                del self.committed[message.step :]
                self.went_back += 1
        if isinstance(message, Commit):
            assert message.step == len(self.committed), "steps are committed once, in order"
            self.committed.append(message.step)
        for rank, worker in self.workers.items():
            if isinstance(message, Freeze):
                worker.control.append(message)
            elif not isinstance(message, Restore) or rank in self.coordinator.pending:
                worker.votes.append(message)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("first_seed", range(0, 2000, 250))
def test_any_schedule_of_losses_ends_with_every_step_applied_once_on_every_rank(
    first_seed: int, memory: bool
) -> None:
    by_memory = 0
    for seed in range(first_seed, first_seed + 250):
        world = World(ranks=2 + seed % 4, seed=seed, losses=seed % 7, memory=memory)
        world.run()
        assert world.ended is None, f"seed {seed}: {world.ended}"
        assert world.coordinator.state is State.ENDED, f"seed {seed}"
        for worker in world.workers.values():
            assert worker.weights == list(range(STEPS)), f"seed {seed}, rank {worker.rank}"
        by_memory += world.by_memory
    assert bool(by_memory) is memory


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("first_seed", range(0, 1200, 200))
def test_any_schedule_of_losses_of_shards_without_replicas_ends_the_same_with_mirrors(
    first_seed: int, memory: bool
) -> None:
    went_back = 0
    for seed in range(first_seed, first_seed + 200):
        world = World(ranks=1 + seed % 4, seed=seed, losses=seed % 6, memory=memory, every=1 + seed % 3)
        world.run()
        assert world.ended is None, f"seed {seed}: {world.ended}"
        assert world.coordinator.state is State.ENDED, f"seed {seed}"
        for worker in world.workers.values():
            assert worker.weights == list(range(STEPS)), f"seed {seed}, rank {worker.rank}"
        went_back += world.went_back
    assert went_back, "no schedule went back to an older mirror"
