"""What shows that an agent belongs to its job: the token that all its agents share, and the files for TLS.

Secrets stay in the agent: they are in no log line and no `repr`, and no worker gets them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from checkpointless_elastic.config import Config
from checkpointless_elastic.errors import ConfigError

__all__ = ["TOKEN_VARIABLE", "Tls", "read_tls", "read_token", "without_secrets"]

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "CHECKPOINTLESS_JOB_TOKEN"
_MIN_TOKEN = 16  # bytes; a shorter one can be guessed by whoever has recorded a handshake
_MAX_TOKEN = 1 << 16


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files, the same kind on every agent.

    Attributes:
        ca: certificates of who signs the agents' certificates.
        cert: this agent's certificate, with intermediate ones after it.
        key: its private key, not encrypted.
    """

    ca: str
    cert: str
    key: str


def read_tls(config: Config) -> Tls | None:
    """The job's TLS files; None if the connections are plain."""
    return Tls(config.tls_ca, config.tls_cert, config.tls_key) if config.tls_ca else None


def read_token(config: Config, env: Mapping[str, str], run_id: str) -> bytes:
    """The job's token: from `job_token_file`, else from the variable, else derived from the job's id.

    White space around it does not count. Raises ConfigError when the file cannot be read or the token is empty.
    """
    if config.job_token_file:
        return _checked(_from_file(config.job_token_file), f"The file {config.job_token_file}")
    if TOKEN_VARIABLE in env:
        return _checked(os.fsencode(env[TOKEN_VARIABLE]), f"The variable {TOKEN_VARIABLE}")
    logger.info(
        "The job has no token of its own: whoever knows its id %r and reaches an agent's port can connect. "
        "Give one in the file job_token_file or in %s.",
        run_id,
        TOKEN_VARIABLE,
    )
    return hashlib.sha256(b"checkpointless token\0" + os.fsencode(run_id)).digest()


def without_secrets(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what only agents may know; for every process that an agent starts."""
    return {name: value for name, value in env.items() if name != TOKEN_VARIABLE}


def _from_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH):
                logger.warning("Every user of this machine can read or write the job token in %s.", path)
            return file.read(_MAX_TOKEN + 1)
    except OSError as error:
        raise ConfigError(
            f"The job token cannot be read from {path} ({error.strerror}); correct job_token_file."
        ) from error


def _checked(raw: bytes, source: str) -> bytes:
    token = raw.strip()
    if not token:
        raise ConfigError(f"{source} holds no job token; write one into it, e.g. 32 random hex digits.")
    if len(raw) > _MAX_TOKEN:
        raise ConfigError(f"{source} is over {_MAX_TOKEN} bytes; a job token is at most that long.")
    if len(token) < _MIN_TOKEN:
        logger.warning(
            "%s holds a job token of less than %d bytes, which can be guessed.", source, _MIN_TOKEN
        )
    return token
