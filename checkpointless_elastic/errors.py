"""The errors that this library raises, by whose fault it is and what the reader can do.

CheckpointlessError
├── ConfigError            the user's settings: correct the option that the sentence names
├── DirectoryError         the rendezvous store failed: no coordinator can be found or elected until it answers
├── ProtocolError          a peer speaks another version or sent garbage: the connection is dropped
├── RankLostError          a lost peer: raised where no replay is possible, the agent decides what follows
├── ScriptMismatchError    the replacement's run differs from the survivors': rung 3 follows
├── StateMismatchError     state cannot be restored from the replicas: rung 3 follows
└── UnsupportedTorchError  a private detail of torch changed: use a version that the sentence names
"""

from __future__ import annotations

__all__ = [
    "CheckpointlessError",
    "ConfigError",
    "DirectoryError",
    "ProtocolError",
    "RankLostError",
    "ScriptMismatchError",
    "StateMismatchError",
    "UnsupportedTorchError",
]


class CheckpointlessError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(CheckpointlessError, ValueError):
    """Raised when a setting is unknown, malformed or out of range."""


class DirectoryError(CheckpointlessError, RuntimeError):
    """Raised when the rendezvous store does not answer in time, refuses a call or holds what it should not."""


class ProtocolError(CheckpointlessError):
    """Raised when a message cannot be understood or is not allowed in the present state."""


class RankLostError(CheckpointlessError, RuntimeError):
    """Raised when a collective outside a replayable function needs a rank that is lost and cannot be repeated."""


class ScriptMismatchError(CheckpointlessError):
    """Raised in a replacement whose script, groups or collectives differ from those of the rank it replaces."""


class StateMismatchError(CheckpointlessError):
    """Raised when state received from the replicas is missing, damaged or of another shape than the model's."""


class UnsupportedTorchError(CheckpointlessError):
    """Raised when a private detail of torch that this library relies on is not as it was read."""
