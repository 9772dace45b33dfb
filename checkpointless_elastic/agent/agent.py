"""The agent that torchrun runs: torch's `LocalElasticAgent` with forked workers and an event loop instead of polling.

Overridden are the loop (`_invoke_run`), the start of workers and their end; rendezvous, rank assignment, events,
metrics, watchdog, health check and signal handling are torch's. Read in torch 2.6 and 2.13.
"""

from __future__ import annotations

import logging
import os
import signal
from string import Template
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.utils import macros  # type: ignore[attr-defined]

from checkpointless_elastic.agent.context import ForkedContext, Launch
from checkpointless_elastic.agent.control import AgentControl
from checkpointless_elastic.agent.rendezvous import CheckpointlessRendezvousHandler
from checkpointless_elastic.agent.runtime import ControlPlane, EventLoop
from checkpointless_elastic.agent.servers import ForkServers
from checkpointless_elastic.agent.workforce import UNWIND_LIMIT_S, LocalWorkforce, Verdict, VerdictKind
from checkpointless_elastic.config import Config
from checkpointless_elastic.protocol.layout import ranks
from checkpointless_elastic.run_dir import RunDir

__all__ = ["CheckpointlessAgent", "make_control"]

logger = logging.getLogger(__name__)

_DEFAULT_SHUTDOWN_TIMEOUT_S = 30


def make_control(handler: CheckpointlessRendezvousHandler, spec: WorkerSpec) -> ControlPlane:
    """The control plane of a job."""
    network = handler.network if handler.max_nodes > 1 else None
    return AgentControl(handler.config, handler.rules(spec.max_restarts), handler.open_store, network)


class CheckpointlessAgent(LocalElasticAgent):
    """Runs one node's workers.

    With another rendezvous backend, or for a function instead of a command, it behaves exactly as torch's agent.
    """

    def __init__(self, spec: WorkerSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        handler = spec.rdzv_handler
        self._ours = isinstance(handler, CheckpointlessRendezvousHandler)
        if isinstance(handler, CheckpointlessRendezvousHandler):
            handler.has_agent = True
            if not isinstance(spec.entrypoint, str):
                logger.warning(
                    "Only commands are protected: %r runs as under plain torchrun.", spec.entrypoint
                )
                self._ours = False
        self._workforce: LocalWorkforce | None = None

    # ---- the run ------------------------------

    def _invoke_run(self, role: str = "default") -> RunResult:
        if not self._ours:
            return super()._invoke_run(role)
        group = self._worker_group
        self._prepare(group.spec)
        try:
            return self._serve(group)
        except SignalException as error:
            self._control.will_end(f"was drained ({error.sigval.name})")
            raise

    def _serve(self, group: WorkerGroup) -> RunResult:
        workforce = self._present()
        self._watch_for_stuck_workers()
        while self._control.await_seat():
            counted = self._control.seat.restarts - self._control.seat.resizes
            self._remaining_restarts = max(0, group.spec.max_restarts - counted)
            self._initialize_workers(group)
            if workforce.wait().kind not in (VerdictKind.RESTART, VerdictKind.GAVE_WAY):
                break
            self._stop_workers(group)
            group.state = WorkerState.STOPPED
        assert workforce.verdict is not None
        return self._finish(group, workforce.verdict)

    def _prepare(self, spec: WorkerSpec) -> None:
        handler = spec.rdzv_handler
        assert isinstance(handler, CheckpointlessRendezvousHandler)
        self._loop = EventLoop()
        self._run_dir = RunDir()
        path = self._run_dir.path
        self._servers = ForkServers(self._loop, path)
        self._servers.start()  # loads torch while the rest gets ready
        try:
            self._control = make_control(handler, spec)
            workforce = LocalWorkforce(
                self._loop,
                self._servers,
                self._control,
                path,
                self._patience(),
                _unwind_limit(handler.config),
            )
            self._control.attach(self._loop, workforce, spec.local_world_size)
        except BaseException:
            self._let_go()
            raise
        self._workforce = workforce

    def _finish(self, group: WorkerGroup, verdict: Verdict) -> RunResult:
        workforce = self._present()
        if verdict.kind is VerdictKind.SUCCEEDED:
            group.state = WorkerState.SUCCEEDED
            finished = [worker.global_rank for worker in group.workers]
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(finished))
        self._stop_workers(group)
        group.state = WorkerState.FAILED
        return RunResult(state=WorkerState.FAILED, failures=workforce.failures(verdict.ranks))

    def _watch_for_stuck_workers(self) -> None:
        """The one thing that can only be found by looking, and only if asked for: a worker that hangs in the kernel."""
        timeout = getattr(self, "_uninterruptible_state_timeout", 0.0)
        workforce = self._present()

        def look() -> None:
            if self._check_uninterruptible_state_timeout(self._worker_group, timeout) is not None:
                workforce.fail(workforce.ranks)
            self._loop.call_later(self._worker_group.spec.monitor_interval, look)

        if timeout > 0:
            look()

    # ---- starting ------------------------------

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        """The coordinator has given this node its seat already."""
        if not self._ours:
            super()._rendezvous(worker_group)
            return
        seat, spec = self._control.seat, worker_group.spec
        host, _, port = seat.store.rpartition(":")
        worker_group.workers = [
            Worker(local_rank, rank, rank, seat.world, seat.world)
            for local_rank, rank in enumerate(ranks(seat.seat, seat.bases, seat.world))
        ]
        group: Any = worker_group  # torch declares these as None
        group.group_rank, group.group_world_size = seat.seat, len(seat.bases)
        group.master_addr = spec.master_addr or host
        group.master_port = spec.master_port or int(port)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        if not self._ours:
            return super()._start_workers(worker_group)  # type: ignore[no-any-return]
        spec = worker_group.spec
        workforce = self._present()
        envs = self._environments(worker_group)
        self._setup_local_watchdog(envs=envs)
        self._setup_healthcheck()
        assert isinstance(spec.entrypoint, str)
        context = ForkedContext(
            name=spec.role,
            entrypoint=spec.entrypoint,
            args={rank: tuple(macros.substitute(list(spec.args), str(rank))) for rank in envs},
            envs=envs,
            logs_specs=self._logs_specs,
            launch=Launch(
                self._loop,
                self._servers,
                workforce,
                workforce.environment,
                workforce.run_again,
                self._cpus,
            ),
            children=workforce.next_children(),
            log_line_prefixes=self._prefixes(worker_group),
            **_filters(spec),
        )
        self._pcontext = context
        workforce.assign(context, [worker.global_rank for worker in worker_group.workers])
        context.start()
        return context.pids()

    def _environments(self, group: WorkerGroup) -> dict[int, dict[str, str]]:
        """By local rank: the variables that torch's agent gives to workers."""
        spec = group.spec
        shared = {
            "GROUP_RANK": str(group.group_rank),
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": str(spec.local_world_size),
            "GROUP_WORLD_SIZE": str(group.group_world_size),
            "MASTER_ADDR": str(group.master_addr),
            "MASTER_PORT": str(group.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(spec.max_restarts - self._remaining_restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(spec.max_restarts),
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": str(spec.rdzv_handler.use_agent_store),
            "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.getenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        }
        envs: dict[int, dict[str, str]] = {}
        for worker in group.workers:
            own: dict[str, str | None] = {
                "RANK": str(worker.global_rank),
                "ROLE_RANK": str(worker.role_rank),
                "WORLD_SIZE": str(worker.world_size),
                "ROLE_WORLD_SIZE": str(worker.role_world_size),
                "LOCAL_RANK": str(worker.local_rank),
            }
            if hasattr(self, "_set_local_rank_env"):  # newer torch: --virtual-local-rank
                self._set_local_rank_env(own, worker.local_rank, spec)
            envs[worker.local_rank] = {
                **shared,
                **{name: value for name, value in own.items() if value is not None},
            }
        return envs

    def _prefixes(self, group: WorkerGroup) -> dict[int, str] | None:
        if not self._log_line_prefix_template:
            return None
        template = Template(self._log_line_prefix_template)
        return {
            worker.local_rank: template.safe_substitute(
                role_name=group.spec.role, rank=worker.global_rank, local_rank=worker.local_rank
            )
            for worker in group.workers
        }

    def _cpus(self, local_rank: int) -> list[int]:
        """CPUs for `--numa-binding`; torch wraps the command in numactl for the same, which a fork cannot do."""
        options = getattr(self._worker_group.spec, "numa_options", None)
        if options is None:
            return []
        from torch.numa import binding

        try:
            return sorted(binding._get_logical_cpus_to_bind_to(gpu_index=local_rank, numa_options=options))
        except Exception as error:
            if not options.should_fall_back_if_binding_fails:
                raise
            logger.warning("Local rank %s is not bound to CPUs: %s.", local_rank, error)
            return []

    # ---- stopping ------------------------------

    def _stop_workers(self, worker_group: WorkerGroup, *args: Any) -> None:
        if not self._ours:
            super()._stop_workers(worker_group, *args)
            return
        super()._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **kwargs: Any) -> None:
        """The end of the run: stop the workers, then the control plane and the fork servers. Blocks.

        An agent that ends before the job does leaves it first: others take over at once, not when its workers are gone.
        """
        if self._workforce is not None and not self._workforce.ended:
            self._control.leave()
        super()._shutdown(death_sig, *args, **kwargs)
        if self._workforce is None:
            return
        self._workforce = None
        self._control.stopped()
        self._let_go()

    def _let_go(self) -> None:
        self._servers.close()
        self._loop.close()
        self._run_dir.remove()

    def _patience(self) -> float:
        return float(getattr(self, "_shutdown_timeout", _DEFAULT_SHUTDOWN_TIMEOUT_S))

    def _present(self) -> LocalWorkforce:
        assert self._workforce is not None, "the run has not begun"
        return self._workforce


def _unwind_limit(config: Config) -> float:
    if config.unprotected == "restart":
        return 0.0
    return min(UNWIND_LIMIT_S, config.settle_timeout.total_seconds())


def _filters(spec: WorkerSpec) -> dict[str, list[str]]:
    """`--duplicate-stdout-filters` and its sibling, where torch has them and they were given."""
    names = ("duplicate_stdout_filters", "duplicate_stderr_filters")
    return {name: value for name in names if (value := getattr(spec, name, None))}
