"""What lies between an agent's messages and the bytes on its TCP connections: nothing, or TLS in memory.

Host names are not checked: the authority is the job's own (`tls_ca`), whoever has a certificate of it belongs to the
job, and agents are reached by addresses that change when nodes are replaced.
"""

from __future__ import annotations

import ssl
from typing import Protocol

from checkpointless_elastic.agent.credentials import Tls
from checkpointless_elastic.agent.handshake import NotAccepted, Role, without_tls
from checkpointless_elastic.errors import ConfigError

__all__ = ["Channel", "Channels", "Plain", "Secure"]

_CHUNK = 1 << 16
_TLS_TYPES = range(0x14, 0x18)  # first byte of a TLS record


class Channel(Protocol):
    """Turns plain bytes into what goes on the wire and back. Does no I/O.

    Attributes:
        ready: plain bytes may be sealed.
    """

    @property
    def ready(self) -> bool: ...

    def open(self, data: bytes) -> bytes:
        """Plain bytes from received ones. Raises NotAccepted."""

    def seal(self, data: bytes) -> bytes:
        """Bytes to send for plain ones. Raises NotAccepted when the connection has failed already."""

    def pending(self) -> bytes:
        """Bytes that are to be sent on the channel's own behalf, after each `open` and at first."""


class Plain:
    """No TLS."""

    ready = True

    def open(self, data: bytes) -> bytes:
        """See Channel."""
        return data

    def seal(self, data: bytes) -> bytes:
        """See Channel."""
        return data

    def pending(self) -> bytes:
        """See Channel."""
        return b""


class Secure:
    """TLS. The handshake goes on in `open`, as bytes arrive."""

    def __init__(self, context: ssl.SSLContext, role: Role) -> None:
        self.ready = False
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=role is Role.ACCEPTOR)
        self._first = b""
        self._shake()

    def open(self, data: bytes) -> bytes:
        """See Channel."""
        if not self._first:
            self._first = data[:1]
            if data[0] not in _TLS_TYPES:
                self._out.read()
                raise without_tls(data)
        self._in.write(data)
        try:
            self._shake()
            return self._read() if self.ready else b""
        except ssl.SSLError as error:
            raise NotAccepted(_explained(error)) from error

    def seal(self, data: bytes) -> bytes:
        """See Channel."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._tls.write(view[:_CHUNK]) :]
        except ssl.SSLError as error:
            raise NotAccepted(_explained(error)) from error
        return self._out.read()

    def pending(self) -> bytes:
        """See Channel."""
        return self._out.read()

    def _shake(self) -> None:
        if not self.ready:
            try:
                self._tls.do_handshake()
                self.ready = True
            except ssl.SSLWantReadError:
                return

    def _read(self) -> bytes:
        plain = bytearray()
        try:
            while data := self._tls.read(_CHUNK):
                plain += data
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return bytes(plain)
        return bytes(plain)


class Channels:
    """Makes a channel for each connection. Raises ConfigError when the TLS files cannot be used."""

    def __init__(self, tls: Tls | None) -> None:
        self._contexts = None if tls is None else {role: _context(tls, role) for role in Role}

    def new(self, role: Role) -> Channel:
        """A channel of the side that connected, or that was connected to."""
        return Plain() if self._contexts is None else Secure(self._contexts[role], role)


def _context(tls: Tls, role: Role) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role is Role.ACCEPTOR else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if role is Role.ACCEPTOR:
        context.num_tickets = 0  # no session is ever resumed
    try:
        context.load_verify_locations(tls.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The file {tls.ca} of tls_ca cannot be used ({_short(error)}).") from error
    try:
        context.load_cert_chain(
            tls.cert, tls.key, password=""
        )  # without one, OpenSSL would ask on the terminal
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"The files {tls.cert} of tls_cert and {tls.key} of tls_key cannot be used ({_short(error)}); "
            f"they must be a certificate and its key, not encrypted, in PEM."
        ) from error
    return context


def _short(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)


def _explained(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted ({error.verify_message}); compare tls_ca on both sides"
    if "ALERT" in (error.reason or ""):
        return f"it ended the TLS handshake ({_short(error)}); compare the TLS settings on both sides"
    return f"TLS with it failed ({_short(error)})"
