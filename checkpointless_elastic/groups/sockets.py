"""The TCP sockets of gloo groups: found precisely, shut down to wake waiting collectives.

torch's `abort()` does not wake a waiting gloo collective; shutting down its connections does, within a millisecond.
Found by running torch 2.13: every gloo device has one listening socket, and each connection between two members has the
listening address of one of them as its local or remote address. So a socket belongs to a group exactly if its local
address is that of the group's own device, or its remote address that of another member's device.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

from torch.distributed import ProcessGroupGloo

from checkpointless_elastic.errors import UnsupportedTorchError

__all__ = ["Address", "open_devices", "shut_down"]

Address = tuple[str, int]
"""Host and port of a listening socket."""

_TRIES = 20
_construction = threading.Lock()


def open_devices() -> tuple[list[Any], list[Address]]:
    """New gloo devices, as torch makes them for a group, with the address on which each one listens.

    The address is that of the one listening socket that appeared. When another thread opened one at the same moment
    the device is dropped and made again, so that an address is never a guess.
    """
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")
    devices, addresses = [], []
    for interface in interfaces:
        device, address = _open_device(interface)
        devices.append(device)
        addresses.append(address)
    return devices, addresses


def _open_device(interface: str) -> tuple[Any, Address]:
    with _construction:
        for _ in range(_TRIES):
            before = _descriptors()
            device = (
                ProcessGroupGloo.create_device(interface=interface)
                if interface
                else ProcessGroupGloo.create_default_device()
            )
            found = [address for fd in _descriptors() - before if (address := _listening(fd[0])) is not None]
            if len(found) == 1:
                return device, found[0]
            del device
    raise UnsupportedTorchError(
        f"A gloo device opened {len(found)} listening sockets where torch 2.13 opens one: "
        "use torch 2.13 and GLOO_DEVICE_TRANSPORT=TCP."
    )


def _descriptors() -> set[tuple[int, str]]:
    """Every open socket of this process as descriptor and inode."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed since the listing
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                found.add((int(name), target))
    return found


def _listening(fd: int) -> Address | None:
    """The address on which this socket listens, None for any other socket."""
    with _duplicate(fd) as held:
        if held is None or not held.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        return _address(held.getsockname())


def shut_down(own: frozenset[Address], peers: frozenset[Address]) -> int:
    """Shuts down every connection accepted at one of `own` or made to one of `peers`. Returns how many.

    May be called on any thread and does not block. A socket is looked at and shut down through a duplicate of its
    descriptor, so that a descriptor closed and used again meanwhile cannot be meant. Listening sockets are left alone.
    """
    count = 0
    for fd, _ in _descriptors():
        with _duplicate(fd) as held:
            if held is not None and _belongs(held, own, peers):
                with contextlib.suppress(OSError):  # the peer was faster
                    held.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def _belongs(held: socket.socket, own: frozenset[Address], peers: frozenset[Address]) -> bool:
    try:
        remote = _address(held.getpeername())
        return _address(held.getsockname()) in own or remote in peers
    except OSError:
        return False


@contextlib.contextmanager
def _duplicate(fd: int) -> Iterator[socket.socket | None]:
    """The TCP socket behind a descriptor, held open; None if it is closed by now or something else."""
    try:
        held = socket.socket(fileno=os.dup(fd))
    except OSError:
        yield None
        return
    with held:
        yield held if held.family in (socket.AF_INET, socket.AF_INET6) else None


def _address(name: Any) -> Address:
    """Host and port; an IPv4 address mapped to IPv6 as IPv4, a local one of IPv6 without the name of the interface."""
    return str(name[0]).removeprefix("::ffff:").partition("%")[0], int(name[1])
