"""Every setting, in one place: name, unit, default, meaning.

A setting is given as ``--rdzv-conf name=value,...`` or as the variable ``CHECKPOINTLESS_NAME``; the option wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from checkpointless_elastic.errors import ConfigError

__all__ = ["Config"]

ENV_PREFIX = "CHECKPOINTLESS_"


def _setting(default: object, meaning: str) -> object:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Config:
    """Settings of one job, the same on all agents.

    Attributes:
        timeout: limit for the first rendezvous.
        settle_timeout: limit for survivors to answer a Freeze, and for groups to be rebuilt. Ranks that miss it are
            ended and replaced once; then rung 4.
        join_timeout: limit for survivors to come out of a void step (hang detection finds those that are stuck long
            before), and for a replacement to run the script up to its first step, with the same consequences.
        max_faults_per_step: faults without one committed step between them that rungs 1 and 2 answer; then rung 3.
        node_faults: lost workers of one node within 100 committed steps after which it is excluded, if no other node
            has lost as many and a spare can take its place; 0: never.
        mirror_every: committed calls between two copies of each rank's state to host memory, of its own node and, with
            several nodes, of another one, where each takes four times the state of a node's ranks; 0: none are made.
        job_token_file: file with the secret that all agents of the job share; empty: CHECKPOINTLESS_JOB_TOKEN.
        tls_ca: PEM file of the authority that signs the agents' certificates; empty: connections are plain.
        tls_cert: PEM file of this agent's certificate.
        tls_key: PEM file of its key.
        verify_every: committed calls between two comparisons of replicas, which find silent corruption; they are
            compared in each recovery too, before a replacement copies them. 0: once, after the first step.
        health_check: command that says with its exit code 0 that this node may run workers; empty: only what is built
            in is checked.
        unprotected: how rung 3 is done: rerun (in the surviving processes) or restart (in new ones).
        active_nodes: nodes that get workers, the others wait as spares; 0: the smaller number of --nnodes MIN:MAX.
        on_loss: what is done about a lost node without a spare: wait for a node to come, shrink (the job goes on
            with fewer nodes, at least MIN of --nnodes MIN:MAX, and with up to active_nodes when they come), or fail.
        on_loss_timeout: how long to wait for it, with shrink too where the job cannot go on without it.
        heartbeat: seconds between two signs of life of an agent.
        heartbeat_misses: after so many heartbeats without a sign of life an agent is taken to be gone.
        store_timeout: limit for one call to the rendezvous store; with etcd, more than an election there takes (2 s).
        is_host: whether this agent opens the embedded store: true or false; empty: if the endpoint is this machine.
        etcd_user: user name at etcd; its password stands in `etcd_password_file` or CHECKPOINTLESS_ETCD_PASSWORD.
        etcd_password_file: file with the password of `etcd_user`.
        etcd_ca: file with the certificates that etcd's must descend from; given, connections use TLS.
        etcd_cert, etcd_key: files with the certificate and key that the agent shows to etcd.
        hang_factor: a step is late after so many times what steps take at most, and `hang_slack`; 0: no hang is looked
            for.
        hang_slack: see `hang_factor`; doubled where a late worker of the node was ended, since it may only have been
            slow: for the next try of the step, and at the same place of the script for 100 steps.
        hang_timeout: limit for what no limit is learned for: first calls, compilation, and between calls.
        events: file for the JSON lines of recoveries; empty: ``recoveries.jsonl`` in the log directory.
    """

    timeout: timedelta = _setting(timedelta(seconds=900), "limit for the first rendezvous")  # type: ignore[assignment]
    settle_timeout: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=120),
        "limit for survivors to answer when a rank is lost, and to rebuild groups; later ones are ended",
    )
    join_timeout: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=600),
        "limit for survivors to leave a void step, and for a replacement to reach its first step; later ones are ended",
    )
    max_faults_per_step: int = _setting(8, "faults without a committed step between them before rung 3")  # type: ignore[assignment]
    node_faults: int = _setting(
        5, "lost workers of one node within 100 steps before a spare takes its place; 0: never"
    )  # type: ignore[assignment]
    mirror_every: int = _setting(
        0, "copy the state to host memory every so many calls, for shards without a replica; 0: never"
    )  # type: ignore[assignment]
    verify_every: int = _setting(
        0, "compare replicas bit for bit every so many calls; 0: once, after the first step"
    )  # type: ignore[assignment]
    health_check: str = _setting(
        "",
        "command that ends with code 0 where a node is fit for workers; its last line is the reason otherwise",
    )  # type: ignore[assignment]
    unprotected: str = _setting(
        "rerun",
        "how rung 3 runs the script again: rerun (in the surviving processes) or restart (in new ones)",
    )  # type: ignore[assignment]
    active_nodes: int = _setting(
        0, "nodes that get workers, others wait as spares; 0: the smaller number of --nnodes MIN:MAX"
    )  # type: ignore[assignment]
    on_loss: str = _setting(
        "wait", "about a lost node without a spare: wait for a node, shrink to fewer, or fail"
    )  # type: ignore[assignment]
    on_loss_timeout: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=600), "how long to wait for a node in place of a lost one"
    )
    heartbeat: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=0.5), "time between two signs of life of an agent"
    )
    heartbeat_misses: int = _setting(
        4, "heartbeats without a sign of life after which an agent is taken to be gone"
    )  # type: ignore[assignment]
    job_token_file: str = _setting(
        "", "file with the secret that all agents share; empty: the variable CHECKPOINTLESS_JOB_TOKEN"
    )  # type: ignore[assignment]
    tls_ca: str = _setting("", "PEM file of the authority that signs the agents' certificates; empty: no TLS")  # type: ignore[assignment]
    tls_cert: str = _setting("", "PEM file of this agent's certificate")  # type: ignore[assignment]
    tls_key: str = _setting("", "PEM file of this agent's key, not encrypted")  # type: ignore[assignment]
    store_timeout: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=5), "limit for one call to the rendezvous store"
    )
    is_host: str = _setting(
        "", "whether this agent opens the embedded store: true, false; empty: if the endpoint is this machine"
    )  # type: ignore[assignment]
    etcd_user: str = _setting(
        "", "user at etcd; password in etcd_password_file or CHECKPOINTLESS_ETCD_PASSWORD"
    )  # type: ignore[assignment]
    etcd_password_file: str = _setting("", "file with the password of etcd_user")  # type: ignore[assignment]
    etcd_ca: str = _setting("", "file with the CA of etcd's certificates; given, connections use TLS")  # type: ignore[assignment]
    etcd_cert: str = _setting("", "file with the certificate that the agent shows to etcd")  # type: ignore[assignment]
    etcd_key: str = _setting("", "file with the key of etcd_cert")  # type: ignore[assignment]
    hang_factor: float = _setting(
        3.0,
        "a step is late after so many times what steps take at most, and hang_slack; 0: hangs are not looked for",
    )  # type: ignore[assignment]
    hang_slack: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=0.7),
        "added to that; doubled for the next try of a step where a late worker was ended, and there for 100 steps",
    )
    hang_timeout: timedelta = _setting(  # type: ignore[assignment]
        timedelta(seconds=1800), "limit for what no limit is learned for: first calls, and between calls"
    )
    events: str = _setting(
        "", "file for the JSON lines of recoveries; empty: recoveries.jsonl in the log directory"
    )  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name, item in self.__dataclass_fields__.items():
            if isinstance(item.default, timedelta) and getattr(self, name) <= timedelta(0):
                raise ConfigError(f"{name} must be a positive number of seconds, not {getattr(self, name)}.")
        if self.max_faults_per_step < 1:
            raise ConfigError(f"max_faults_per_step must be at least 1, not {self.max_faults_per_step}.")
        if self.heartbeat_misses < 2:
            raise ConfigError(f"heartbeat_misses must be at least 2, not {self.heartbeat_misses}.")
        if self.on_loss not in ("wait", "shrink", "fail"):
            raise ConfigError(f"on_loss must be wait, shrink or fail, not {self.on_loss!r}.")
        if not 0 <= self.hang_factor < 1e6:
            raise ConfigError(f"hang_factor must be 0 or a positive number, not {self.hang_factor}.")
        if self.node_faults < 0:
            raise ConfigError(f"node_faults must be 0 or a number of lost workers, not {self.node_faults}.")
        if self.unprotected not in ("rerun", "restart"):
            raise ConfigError(f"unprotected must be rerun or restart, not {self.unprotected!r}.")
        if self.active_nodes < 0:
            raise ConfigError(f"active_nodes must be 0 or a number of nodes, not {self.active_nodes}.")
        if self.mirror_every < 0:
            raise ConfigError(f"mirror_every must be 0 or a number of steps, not {self.mirror_every}.")
        if self.verify_every < 0:
            raise ConfigError(f"verify_every must be 0 or a number of steps, not {self.verify_every}.")

        self._check_stores()

    def _check_stores(self) -> None:
        missing = [name for name in ("tls_ca", "tls_cert", "tls_key") if not getattr(self, name)]
        if 0 < len(missing) < 3:
            lack = " and ".join(missing) + (" is" if len(missing) == 1 else " are")
            raise ConfigError(
                f"TLS needs tls_ca, tls_cert and tls_key; {lack} missing: give all three or none."
            )
        if self.is_host not in ("", "true", "false"):
            raise ConfigError(f"is_host must be true, false or left out, not {self.is_host!r}.")
        if bool(self.etcd_cert) != bool(self.etcd_key):
            raise ConfigError("etcd_cert and etcd_key belong together: give both or neither.")
        if self.etcd_cert and not self.etcd_ca:
            raise ConfigError("etcd_cert needs TLS: give etcd_ca too.")

    @classmethod
    def parse(cls, options: Mapping[str, object], env: Mapping[str, str]) -> Config:
        """Make the settings from ``--rdzv-conf`` options and ``CHECKPOINTLESS_*`` variables.

        Raises ConfigError on an unknown option or a value that cannot be read.
        """
        fields = {item.name: item for item in dataclasses.fields(cls)}
        unknown = sorted(set(options) - set(fields))
        if unknown:
            raise ConfigError(
                f"Unknown setting {unknown[0]!r} in --rdzv-conf; known settings are {', '.join(sorted(fields))}."
            )
        values: dict[str, object] = {}
        for name, item in fields.items():
            given = options.get(name, env.get(ENV_PREFIX + name.upper()))
            if given is not None:
                values[name] = _read(name, given, type(item.default))
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def describe(cls) -> list[tuple[str, str, str]]:
        """Rows of (name, default, meaning), for documents and messages."""
        return [(f.name, str(f.default), f.metadata["meaning"]) for f in dataclasses.fields(cls)]


def _read(name: str, given: object, kind: type) -> object:
    try:
        if kind is timedelta:
            return (
                given
                if isinstance(given, timedelta)
                else timedelta(seconds=float(str(given).removesuffix("s")))
            )
        return kind(given)
    except (TypeError, ValueError, OverflowError) as error:
        wanted = {timedelta: "a number of seconds", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"The setting {name} must be {wanted}, not {given!r}.") from error
