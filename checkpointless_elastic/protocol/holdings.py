"""Which rank holds what: the claims and digests that ranks report after the first step."""

from __future__ import annotations

from checkpointless_elastic.protocol.messages import Replicas

__all__ = ["Holdings"]


class Holdings:
    """What ranks have said that they hold.

    Attributes:
        held: by rank.
        distrust: why live recovery would not give the right state; empty: it would, as far as is known.
    """

    def __init__(self, ranks: frozenset[int]) -> None:
        self.ranks = ranks
        self.held: dict[int, Replicas] = {}
        self.distrust = ""
        self._twins: dict[int, frozenset[int]] = {}

    def compare(self, rank: int, held: Replicas) -> str:
        """Take what a rank holds; a sentence when all are in and are not as they claim, else ''."""
        self.held[rank] = held
        if self.held.keys() != self.ranks:
            return ""
        self.find_twins()
        holders: dict[tuple[str, frozenset[int]], dict[int, int]] = {}
        for other in sorted(self.ranks):
            claims = self._claims(other)
            for key, (claim, digest) in self.held[other].pieces.items():
                holders.setdefault((key, claims[claim]), {})[other] = digest
        self.distrust = next(
            filter(None, (_disagreement(key, ranks, held) for (key, ranks), held in holders.items())), ""
        )
        return self.distrust

    def find_twins(self) -> None:
        """A rank that nobody can ask any more is a twin of those that say they are twins of it."""
        shared: dict[
            tuple[frozenset[int], ...], frozenset[int]
        ] = {}  # most ranks claim the same: one set for all
        for rank in self.held:
            claims = tuple(self._claims(rank))
            if claims not in shared:
                shared[claims] = self.ranks.intersection(*claims)
            self._twins[rank] = shared[claims]
        for rank in self.ranks - self.held.keys():
            known = {other for other in self.held if rank in self._twins[other]}
            self._twins[rank] = frozenset(known | {rank})

    def twins(self, rank: int) -> frozenset[int]:
        """The ranks that hold all that this one holds, itself among them; all of them before it is known."""
        return self._twins.get(rank, self.ranks)

    def exposed(self) -> list[int]:
        """Ranks that hold something that no other rank holds, as far as is known."""
        return [rank for rank, twins in sorted(self._twins.items()) if twins == {rank}]

    def survivable(self) -> int:
        """How many ranks may be lost at once, whichever of those are not `exposed` they are; 0 as far as is known."""
        return min((len(twins) - 1 for twins in self._twins.values() if len(twins) > 1), default=0)

    def warning(self, mirrored: bool, nodes: int) -> str:
        """Once all have said what they hold: why not every loss can be answered live, and what to do; else ''.

        ``nodes``: on which they are.
        """
        if self.held.keys() != self.ranks:
            return ""
        if self.distrust:
            return (
                f"A lost rank cannot be recovered live: {self.distrust}. Leave it out of Run, make it equal, or name "
                "the ranks that share it with run.declare_replicas."
            )
        exposed = self.exposed()
        if not exposed or (mirrored and nodes > 1):
            return ""
        if mirrored:
            return (
                f"{len(exposed)} of {len(self.ranks)} ranks hold state that no other rank holds "
                f"({', '.join(map(str, exposed))}), and all mirrors of it are on one node: a lost worker comes back "
                "from them, a lost node does not. Train on two nodes or more, and each keeps mirrors of another one."
            )
        return (
            f"{len(exposed)} of {len(self.ranks)} ranks hold state that no other rank holds "
            f"({', '.join(map(str, exposed))}): the loss of one of them cannot be recovered live, that of "
            f"{self.survivable()} at once of the others can. Train with more than one replica of each shard (a mesh "
            "with a replicate dimension), or set mirror_every."
        )

    def _claims(self, rank: int) -> list[frozenset[int]]:
        return [frozenset(claim) or self.ranks for claim in self.held[rank].claims]


def _disagreement(key: str, ranks: frozenset[int], digests: dict[int, int]) -> str:
    """Why these ranks are not replicas of one piece; empty if they are."""
    first = min(digests)
    for rank in sorted(ranks):
        if rank not in digests:
            return f"{key} of rank {first} should be the same on rank {rank}, which has no such state"
        if digests[rank] != digests[first]:
            return f"{key} differs between ranks {first} and {rank}, so they are no replicas"
    return ""
