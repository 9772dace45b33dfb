"""An overview of the job for people and for programs, and the node that a word means."""

from __future__ import annotations

from checkpointless_elastic.command.client import CommandError
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.protocol.requests import Overview, Place

__all__ = ["document", "find", "ranks_of", "table", "words"]


def ranks_of(seen: Overview, seat: int) -> list[int]:
    """Ranks of this seat."""
    return list(ranks(seat, seen.bases, seen.world))


def words(ranks: list[int]) -> str:
    """Ranks that follow each other, in short: ranks 4-7."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {ranks[0]}-{ranks[-1]}"


def find(seen: Overview, node: str) -> Place:
    """The agent that this word means: a seat's number, or an agent's name or address, or a part of it.

    Raises CommandError when it means none, or several.
    """
    if node.isascii() and node.isdecimal():
        return _at(seen, int(node))
    exact = [place for place in seen.agents if place.agent == node]
    found = exact or [
        place for place in seen.agents if node and (node in place.agent or node in place.address)
    ]
    if len(found) == 1:
        return found[0]
    names = ", ".join(place.agent for place in found or seen.agents)
    if found:
        raise CommandError(
            f"{node!r} is part of {len(found)} agents' names or addresses: {names}; give more of it."
        )
    raise CommandError(
        f"No agent has {node!r} in its name or address; give a seat's number, or one of {names}."
    )


def _at(seen: Overview, seat: int) -> Place:
    if seat >= len(seen.bases):
        raise CommandError(f"There is no seat {seat}: the job has {len(seen.bases)}, numbered from 0.")
    place = next((place for place in seen.agents if place.seat == seat), None)
    if place is None:
        raise CommandError(f"Seat {seat} is vacant: its node is lost already.")
    return place


def table(job: str, seen: Overview) -> str:
    """Some lines for a terminal."""
    counted = seen.restarts - seen.resizes
    restarts = f", {counted} restarts" if counted else ""
    restarts += f", {seen.resizes} changes of the number of nodes" if seen.resizes else ""
    head = (
        f"Job {job}: {seen.state}, generation {seen.generation}, step {seen.step}{restarts}; term {seen.term}"
    )
    rows = [("SEAT", "RANKS", "HOST", "AGENT", "")]
    by_seat = {place.seat: place for place in seen.agents if place.seat >= 0}
    for seat in range(len(seen.bases)):
        ranks = words(ranks_of(seen, seat)).partition(" ")[2]
        place = by_seat.get(seat)
        rows.append((str(seat), ranks, *_who(seen, place)) if place else (str(seat), ranks, "", "vacant", ""))
    rows += [("spare", "", *_who(seen, place)) for place in seen.agents if place.seat < 0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [f"Not joined yet: ranks {', '.join(map(str, seen.pending))}"] if seen.pending else []
    notes += [
        f"Slow: rank {rank}, for which all others wait {seconds * 1e3:.0f} ms in each step"
        for rank, seconds in sorted(seen.slow.items())
    ]
    if 0 < len(seen.bases) < seen.wanted:
        notes.append(f"Runs on {len(seen.bases)} of {seen.wanted} nodes, and grows when one comes")
    if seen.exposed:
        notes.append(f"A lost rank would run the script again from its top: {seen.exposed}")
    return "\n".join([head, "", *(line.rstrip() for line in lines), *([""] if notes else []), *notes])


def _who(seen: Overview, place: Place) -> tuple[str, str, str]:
    hangs = f"hangs on seat {place.parent}" if place.parent >= 0 else ""
    return _host(place), place.agent, "coordinates" if place.agent == seen.coordinator else hangs


def _host(place: Place) -> str:
    return place.address.rpartition(":")[0].strip("[]")


def document(job: str, seen: Overview) -> dict[str, object]:
    """The same for programs. ``agent`` and ``host`` are null where a seat is vacant."""
    by_seat = {place.seat: place for place in seen.agents if place.seat >= 0}
    seats = []
    for seat in range(len(seen.bases)):
        place = by_seat.get(seat)
        entry: dict[str, object] = {"seat": seat, "ranks": ranks_of(seen, seat)}
        seats.append(entry | (_entry(place) if place else {"agent": None, "host": None, "address": None}))
    spares = [_entry(place) | {"workers": place.size} for place in seen.agents if place.seat < 0]
    return {
        "job": job,
        "verdict": "",
        "term": seen.term,
        "coordinator": seen.coordinator,
        "state": seen.state,
        "generation": seen.generation,
        "step": seen.step,
        "restarts": seen.restarts - seen.resizes,
        "resizes": seen.resizes,
        "wanted": seen.wanted,
        "world": seen.world,
        "pending": seen.pending,
        "exposed": seen.exposed,
        "slow": {str(rank): seconds for rank, seconds in sorted(seen.slow.items())},
        "seats": seats,
        "spares": spares,
    }


def _entry(place: Place) -> dict[str, object]:
    tree = {"parent": place.parent} if place.parent >= 0 else {}
    return {"agent": place.agent, "host": _host(place), "address": place.address, **tree}
