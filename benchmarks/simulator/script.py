"""Stories: what happens to a job, command by command, and the transcript of what came of it.

A file has its intent in lines that start with ``#``, then commands, each followed by ``----`` and its transcript, up to
an empty line. Every delay is 1 ms, so a story is always the same.

    job AGENTS SPARES STEPS [FAN_OUT]
                                 the first command; FAN_OUT: of the tree of agents, see `protocol.branch`
    until commit N               until N steps are committed
    until end                    until all agents have ended
    for SECONDS
    kill RANK                    its worker dies
    crash AGENT [silently]       its process ends, or its whole machine; ``coordinator`` names who coordinates
    pause AGENT, resume AGENT
    cut AGENT                    its connection to its parent in the tree breaks
    cut off AGENT..., together   these machines cannot reach the others, nor the directory
    store down, store up
    join                         one more agent comes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from simulator.agent import Agent
from simulator.world import Job, World

__all__ = ["Story", "parse"]

LIMIT_S = 200.0
"""No command takes longer, in virtual seconds."""


@dataclass(frozen=True)
class Story:
    """``intent``: lines with their ``#``; ``commands`` with the transcript that is expected of each."""

    intent: list[str]
    commands: list[tuple[str, list[str]]]

    def played(self) -> Story:
        """The same story with the transcript as it is now."""
        teller = _Teller()
        return Story(self.intent, [(command, teller.do(command)) for command, _ in self.commands])

    def text(self) -> str:
        """The file."""
        blocks = ["\n".join([command, "----", *lines]) for command, lines in self.commands]
        return "\n\n".join(["\n".join(self.intent), *blocks]) + "\n"


def parse(text: str) -> Story:
    """The story of a file's text."""
    blocks = [block.splitlines() for block in text.strip().split("\n\n")]
    intent = [line for block in blocks for line in block if line.startswith("#")]
    commands = [(block[0], block[2:]) for block in blocks if not block[0].startswith("#")]
    return Story(intent, commands)


class _Teller:
    """Carries commands out."""

    def __init__(self) -> None:
        self.world: World | None = None
        self._lines: list[str] = []
        self._commands: dict[str, Callable[[World, list[str]], None]] = {
            "until": self._until,
            "for": self._for,
            "kill": self._kill,
            "crash": self._crash,
            "pause": self._pause,
            "resume": lambda world, words: self._agent(world, words[0]).thaw(),
            "cut": self._cut,
            "together": lambda world, words: self._sides(world, []),
            "store": self._store,
            "join": lambda world, words: self._join(world),
        }

    def do(self, command: str) -> list[str]:
        """The transcript of one command."""
        self._lines = []
        word, *words = command.split()
        if self.world is None:
            agents, spares, steps, fan_out = map(int, [*words, "32"][:4])
            job = Job(
                agents, spares, steps=steps, compute=(0.1, 0.1), leaves=0.0, fixed=0.001, fan_out=fan_out
            )
            self.world = World(job, seed=1, story=self._hear)
        else:
            self._commands[word](self.world, words)
        return self._lines

    def _hear(self, sentence: str) -> None:
        assert self.world is not None
        self._lines.append(f"{self.world.clock.now:6.2f}  {sentence}")

    def _steps(self, world: World, done: Callable[[], bool]) -> None:
        limit = world.clock.now + LIMIT_S
        while not done() and world.clock.now < limit and world.clock.step():
            pass

    def _until(self, world: World, words: list[str]) -> None:
        if words[0] == "end":
            self._steps(world, lambda: not world.live())
            return
        commits = int(words[1])
        self._steps(
            world, lambda: max(len(run.steps) for run in [*world.oracle.runs.values(), _NONE]) >= commits
        )

    def _for(self, world: World, words: list[str]) -> None:
        end = world.clock.now + float(words[0])
        self._steps(world, lambda: world.clock.now >= end)

    def _agent(self, world: World, name: str) -> Agent:
        coordinator = world.coordinator()
        if name == "coordinator" and coordinator is not None:
            return coordinator
        return world.agents[f"{name}:1"]

    def _kill(self, world: World, words: list[str]) -> None:
        rank = int(words[0])
        next(agent for agent in world.live() if rank in agent.workers).kill(rank)

    def _crash(self, world: World, words: list[str]) -> None:
        world.crash(self._agent(world, words[0]), silent="silently" in words, back=None)

    def _pause(self, world: World, words: list[str]) -> None:
        self._agent(world, words[0]).frozen = True

    def _cut(self, world: World, words: list[str]) -> None:
        if words[0] == "off":
            self._sides(world, words[1:])
        else:
            agent = self._agent(world, words[0])
            world.network.cut(agent, max(world.network.links(agent)), silent=False)

    def _sides(self, world: World, names: Iterable[str]) -> None:
        chosen = {self._agent(world, name).name for name in names}
        for agent in world.agents.values():
            agent.side = int(agent.name in chosen)
        world.network.heal()

    def _store(self, world: World, words: list[str]) -> None:
        world.directory.down = words[0] == "down"

    def _join(self, world: World) -> None:
        world.add_agent()


class _Nothing:
    steps: list[int] = []


_NONE = _Nothing()
