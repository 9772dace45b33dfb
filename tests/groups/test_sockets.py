"""Only a group's own sockets are found and shut down."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, ProcessGroup, ProcessGroupGloo

from checkpointless_elastic.groups import sockets
from tests.groups.listener import begin
from tests.groups.processes import Job, Worker


def test_a_device_is_known_by_the_address_on_which_it_listens() -> None:
    devices, addresses = sockets.open_devices()
    assert len(devices) == len(addresses) == 1
    with socket.create_connection(addresses[0], timeout=5) as connection:
        assert connection.getpeername()[:2] == addresses[0]


def test_sockets_of_others_are_left_alone() -> None:
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = stack.enter_context(socket.create_connection(server.getsockname()))
        accepted, _ = server.accept()
        stack.enter_context(accepted)
        ours = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        gone = stack.enter_context(socket.create_connection(ours.getsockname()))
        taken, _ = ours.accept()
        stack.enter_context(taken)
        address = frozenset({ours.getsockname()[:2]})
        assert sockets.shut_down(address, frozenset()) == 1
        assert gone.recv(1) == b"", "the connection accepted by ours is shut down"
        client.sendall(b"x")
        assert accepted.recv(1) == b"x", "that of the other server works"
        again = stack.enter_context(socket.create_connection(ours.getsockname()))
        assert again.fileno() >= 0, "a listening socket is never shut down"
        assert sockets.shut_down(frozenset(), address) == 2


def two_groups(worker: Worker) -> list[float]:
    """An abort of one group's sockets leaves those of the other and of the store alone."""
    begin(worker)
    other = dist.new_group([0, 1], group_desc="untouched")
    dist.barrier()
    worker.meet("made")
    if worker.rank < 2:
        worker.registry.abort(frozenset({2}))
        dist.all_reduce(tensor := torch.ones(1), group=other)
        return [tensor.item()]
    return [0.0]


def test_an_abort_touches_no_other_group() -> None:
    with Job(two_groups) as job:
        assert job.results() == [[2.0], [2.0], [0.0]]


def test_a_group_of_one_has_no_connections() -> None:
    group = ProcessGroupGloo(PrefixStore("alone", HashStore()), 0, 1)
    assert isinstance(group, torch._C._distributed_c10d.Backend)
    assert not isinstance(group, ProcessGroup)
    assert sockets.shut_down(frozenset({("127.0.0.1", 1)}), frozenset()) == 0
