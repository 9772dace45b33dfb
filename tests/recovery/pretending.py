"""torchrun with an agent whose ranks pretend to be on several nodes: NODES gives the lowest rank of each.

Each node has a directory of its own. With NODE_DIES a rank of a node takes the others of it along, and what workers
left in the directory but for slots. With MOVES the store in which workers meet is lost with it: a new one is opened.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch.distributed import TCPStore, run  # type: ignore[attr-defined]

from checkpointless_elastic.agent import agent, control
from checkpointless_elastic.agent.context import Child
from checkpointless_elastic.agent.workforce import LocalWorkforce
from checkpointless_elastic.protocol.between import Ordered, Seated
from checkpointless_elastic.protocol.messages import Decision, Freeze, Hello, Message, Welcome
from checkpointless_elastic.protocol.places import Nodes
from checkpointless_elastic.protocol.station import Station
from checkpointless_elastic.worker.ballot import Ballot, ballot_path

NODES = Nodes(tuple(map(int, os.environ["NODES"].split(","))))
DIES, MOVES = (os.environ.get(name, "") for name in ("NODE_DIES", "MOVES"))
KEPT = ("slot-", "lifeline-", "ballot")
_known: dict[str, Any] = {name: getattr(control, name) for name in ("slot_path", "lifeline_path", "newest")}


def folder(run_dir: str, rank: int) -> str:
    """The directory of a rank's node."""
    path = os.path.join(run_dir, f"node-{NODES.of(rank)}")
    os.makedirs(path, exist_ok=True)
    return path


def there(name: str) -> Any:
    """A function of the agent that looks into a directory, but into that of the rank's node."""
    return lambda run_dir, rank, *rest: _known[name](folder(run_dir, rank), rank, *rest)


class Pretending(control.AgentControl):
    """See the module."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._dying: set[int] = set()
        self.store = self.first = self._open()
        self.first_port = self.first.port
        self._moved = False

    def _lay_out(self, seat: Seated) -> None:
        super()._lay_out(seat)
        for base in NODES.bases:  # it is never open there, as with several nodes
            Ballot.create(ballot_path(folder(self.run_dir, base)), seat.world)

    def _open(self) -> TCPStore:
        return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    @property
    def address(self) -> str:
        """The store in force, once it has moved."""
        return f"localhost:{self.store.port}" if self._moved else ""

    def _lose(self, rank: int, cause: str) -> None:
        if DIES and NODES.of(rank) > 0 and rank not in self._dying:
            self._end_node(rank)
        self._dying.discard(rank)
        super()._lose(rank, cause)

    def _end_node(self, rank: int) -> None:
        self._dying = {other for other in self._workers.ranks if NODES.of(other) == NODES.of(rank)}
        for other in self._dying - {rank}:
            self._workers.kill(other)
        for path in Path(folder(self._workers.run_dir, rank)).iterdir():
            if not path.name.startswith(KEPT):
                path.unlink()
        if MOVES:
            self.store, self._moved = self._open(), True
            del self.first  # its server ends

    def _accept(self, hello: Hello) -> Message | None:
        answer = super()._accept(hello)
        if isinstance(answer, Welcome):
            return msgspec.structs.replace(answer, bases=NODES.bases, store=self.address)
        return answer

    def _deliver(self, station: Station, message: Ordered) -> None:
        if isinstance(message, Decision):
            message = msgspec.structs.replace(message, store=self.address)
        if isinstance(message, Freeze) and MOVES == "told":
            message = msgspec.structs.replace(message, store_lost=self._moved)
        super()._deliver(station, message)


def environment(workforce: LocalWorkforce, child: Child) -> Mapping[str, str]:
    """What a worker finds, on its pretended node. The store is always named as it was at the start."""
    made = workforce._control
    assert isinstance(made, Pretending)
    given = dict(_environment(workforce, child))
    given["CHECKPOINTLESS_RUN_DIR"] = folder(workforce.run_dir, workforce.base + child.local_rank)
    return {**given, "MASTER_ADDR": "localhost", "MASTER_PORT": str(made.first_port)}


if __name__ == "__main__":
    for name in _known:
        setattr(control, name, there(name))
    _environment = LocalWorkforce.environment
    LocalWorkforce.environment = environment  # type: ignore[method-assign]
    agent.make_control = lambda handler, spec: Pretending(  # type: ignore[assignment]
        handler.config, handler.rules(spec.max_restarts), handler.open_store
    )
    run.main()
