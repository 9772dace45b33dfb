"""Looks at a running job of several nodes, and moves the ranks of a node to a spare; tries a job with faults.

    checkpointless status --rdzv-backend checkpointless-etcd --rdzv-endpoint HOST:PORT --rdzv-id ID
    checkpointless drain NODE ... (the same options)
    checkpointless chaos [options] -- torchrun --rdzv-backend checkpointless ... train.py ... (chaos --help)

The options of the first two are those that torchrun was given. NODE is a seat's number, or the name or address of an
agent, or a part of it that no other agent has. Draining costs the step in flight, which is done again; all other ranks
keep their processes. The drained node's torchrun ends with exit code 0, or waits as a spare with --keep. Without a
spare it is refused, but with on_loss=shrink: then the job goes on with one node less, and a node that is kept waits
without ranks until its torchrun is started anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from checkpointless_elastic.errors import CheckpointlessError, ConfigError

if TYPE_CHECKING:
    from checkpointless_elastic.command.client import Client
    from checkpointless_elastic.protocol.requests import Overview, Place

__all__ = ["main"]

BACKENDS = ("checkpointless", "checkpointless-etcd")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 when nothing or not all was done, 2 for options that cannot be read."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["chaos"]:  # what stands behind "--" is not for argparse
            from checkpointless_elastic.chaos.command import main as chaos

            return chaos(words[1:])
        options = _parse(words)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch is loaded: errors are told once
        logging.basicConfig(level=os.environ.get("LOGLEVEL", "ERROR"), format="%(levelname).1s %(message)s")
        return _run(options)
    except CheckpointlessError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="checkpointless", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="who has which ranks, and how the job is")
    drain = commands.add_parser("drain", help="move the ranks of nodes to spares")
    commands.add_parser("chaos", help="run a command with faults and compare what it writes", add_help=False)
    drain.add_argument(
        "nodes", metavar="NODE", nargs="+", help="seat, or a part of an agent's name or address"
    )
    drain.add_argument("--keep", action="store_true", help="the node stays in the job, as a spare")
    for command, seconds in ((status, 10.0), (drain, 120.0)):
        _add_common(command, seconds)
    return parser.parse_args(arguments)


def _add_common(command: argparse.ArgumentParser, seconds: float) -> None:
    for name, default in (("backend", BACKENDS[0]), ("endpoint", ""), ("id", "none"), ("conf", "")):
        command.add_argument(
            f"--rdzv-{name}",
            f"--rdzv_{name}",
            default=default,
            choices=BACKENDS if name == "backend" else None,
            help="as torchrun was given it",
        )
    command.add_argument("--timeout", type=float, default=seconds, help=f"seconds (default {seconds:g})")
    command.add_argument("--json", action="store_true", help="write JSON instead of text")


def _run(options: argparse.Namespace) -> int:
    from checkpointless_elastic.command.client import JobEndedError, open_client

    conf = _read_conf(options.rdzv_conf)
    patience = min(options.timeout, 10.0)
    with open_client(options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id, conf, patience) as client:
        if options.command == "drain":
            return _drain_all(client, options)
        try:
            _print(options, client.overview(options.timeout))
        except JobEndedError as error:
            ended = {"job": options.rdzv_id, "verdict": error.verdict}
            print(json.dumps(ended) if options.json else error)
    return 0


def _read_conf(text: str) -> dict[str, Any]:
    from torch.distributed.elastic.rendezvous.utils import _parse_rendezvous_config

    try:
        return dict(_parse_rendezvous_config(text))
    except ValueError as error:
        raise ConfigError(f"--rdzv-conf {text!r} cannot be read: {error}") from error


def _print(options: argparse.Namespace, seen: Overview) -> None:
    from checkpointless_elastic.command.show import document, table

    job = options.rdzv_id
    print(json.dumps(document(job, seen), indent=2) if options.json else table(job, seen))


# ---- drain


def _drain_all(client: Client, options: argparse.Namespace) -> int:
    from checkpointless_elastic.command.show import find

    seen = client.overview(min(options.timeout, 10.0))
    places = [find(seen, node) for node in options.nodes]  # all are understood before anything is done
    done = [_drain(client, place, options) for place in places]
    if options.json:
        print(json.dumps(done, indent=2))
    return 0


def _drain(client: Client, place: Place, options: argparse.Namespace) -> dict[str, object]:
    from checkpointless_elastic.protocol.requests import Drain

    if not options.keep:
        _check_store(client, place)
    begun = time.monotonic()
    before = client.overview(options.timeout)  # a job that shrinks numbers its seats anew
    place = next((other for other in before.agents if other.agent == place.agent), place)
    client.drain(Drain(place.seat, place.agent, options.keep), options.timeout)
    seen = client.until(lambda seen: _settled(seen, place, options.keep), options.timeout)
    seconds = time.monotonic() - begun
    shrunk = seen.resizes > before.resizes
    now = next((other for other in seen.agents if other.seat == place.seat >= 0 and not shrunk), None)
    if not options.json:
        print(_shrunk(before, seen, place, seconds) if shrunk else _sentence(seen, place, now, seconds))
    return {
        "seat": place.seat if place.seat >= 0 else None,
        "agent": place.agent,
        "moved_to": now.agent if now else None,
        "nodes": len(seen.bases),
        "step": seen.step,
        "seconds": round(seconds, 3),
    }


def _check_store(client: Client, place: Place) -> None:
    from checkpointless_elastic.command.client import CommandError

    host = client.directory.host()
    if host and place.agent.startswith(host + "-"):
        raise CommandError(
            f"Refused: the rendezvous store lives in agent {place.agent} and would be lost with it, and the job with "
            f"the store; give --keep, so that the agent stays, or start jobs with --rdzv-backend checkpointless-etcd."
        )


def _settled(seen: Overview, place: Place, keep: bool) -> bool:
    """The ranks run elsewhere, and the agent has gone or waits as a spare."""
    seats = {other.agent: other.seat for other in seen.agents}
    gone = seats.get(place.agent) == -1 if keep else place.agent not in seats
    taken = set(range(len(seen.bases))) <= set(seats.values())
    return gone and taken and seen.state == "running" and not seen.pending


def _sentence(seen: Overview, place: Place, now: Place | None, seconds: float) -> str:
    from checkpointless_elastic.command.show import ranks_of, words

    if now is None:
        return f"The spare {place.agent} has left the job."
    ranks = words(ranks_of(seen, place.seat))
    return (
        f"Seat {place.seat} ({ranks}) has moved from {place.agent} to {now.agent} in {seconds:.1f} s; "
        f"the job is at step {seen.step}."
    )


def _shrunk(before: Overview, seen: Overview, place: Place, seconds: float) -> str:
    from checkpointless_elastic.command.show import ranks_of, words

    return (
        f"Seat {place.seat} ({words(ranks_of(before, place.seat))}, {place.agent}) was given up in {seconds:.1f} s; "
        f"the job goes on with {len(seen.bases)} of {len(before.bases)} nodes, from step {seen.step}."
    )
