"""What torchrun's launcher does with our entry point; fails clearly when torch changed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.launcher import api

from checkpointless_elastic.agent.agent import CheckpointlessAgent
from checkpointless_elastic.agent.install import create_handler, install_agent
from checkpointless_elastic.agent.rendezvous import CheckpointlessRendezvousHandler
from checkpointless_elastic.errors import ConfigError, UnsupportedTorchError


@pytest.fixture(autouse=True)
def _torchs_own_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LocalElasticAgent", LocalElasticAgent)


def parameters(**changes: object) -> RendezvousParameters:
    given = {
        "backend": "checkpointless",
        "endpoint": "",
        "run_id": "7",
        "min_nodes": 1,
        "max_nodes": 1,
        **changes,
    }
    return RendezvousParameters(**given)  # type: ignore[arg-type]


def test_the_launcher_makes_the_rendezvous_handler_before_it_looks_up_the_agent() -> None:
    """Without this order `install_agent` comes too late."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(api.launch_agent)))
    calls = {
        name: node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (name := _called(node.func))
    }
    sentence = f"launch_agent of torch {torch.__version__} is not as agent/install.py needs it: "
    assert "get_rendezvous_handler" in calls, sentence + "it does not call get_rendezvous_handler."
    assert "LocalElasticAgent" in calls, sentence + "it does not look up LocalElasticAgent by name."
    assert calls["get_rendezvous_handler"] < calls["LocalElasticAgent"], (
        sentence + "it makes the agent first."
    )


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def test_the_names_of_torchs_agent_that_ours_overrides_exist() -> None:
    for name in ("_invoke_run", "_start_workers", "_stop_workers", "_shutdown", "_setup_local_watchdog"):
        assert hasattr(LocalElasticAgent, name), (
            f"torch {torch.__version__} has no LocalElasticAgent.{name} any more."
        )


def test_creating_the_handler_installs_the_agent_once_and_again() -> None:
    for _ in range(2):
        assert isinstance(create_handler(parameters()), CheckpointlessRendezvousHandler)
        assert api.LocalElasticAgent is CheckpointlessAgent


def test_another_replacement_of_the_agent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LocalElasticAgent", object)
    with pytest.raises(UnsupportedTorchError, match="cannot take its place"):
        install_agent()


def test_a_launcher_without_the_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(api, "LocalElasticAgent")
    with pytest.raises(UnsupportedTorchError, match="is None"):
        install_agent()


def test_under_torchs_own_agent_the_rendezvous_says_what_is_wrong() -> None:
    with pytest.raises(UnsupportedTorchError, match="agent is not in place"):
        CheckpointlessRendezvousHandler(parameters()).next_rendezvous()


def test_active_nodes_outside_of_the_range_of_nnodes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="active_nodes is 5; .* from 1 to 4"):
        CheckpointlessRendezvousHandler(parameters(min_nodes=1, max_nodes=4, active_nodes="5"))


def test_an_endpoint_that_cannot_be_reached_from_here_is_an_error() -> None:
    with pytest.raises(ConfigError, match="give --rdzv-endpoint"):
        CheckpointlessRendezvousHandler(parameters(endpoint="", min_nodes=2, max_nodes=2))


def test_each_run_of_the_script_has_a_store_of_its_own() -> None:
    handler = CheckpointlessRendezvousHandler(parameters(endpoint="localhost:0"))
    first = handler.open_store()
    host, _, port = first.rpartition(":")
    assert host == "localhost"
    TCPStore(host, int(port), is_master=False).set("peer", "address")
    host, _, port = handler.open_store().rpartition(":")
    assert not TCPStore(host, int(port), is_master=False).check(["peer"])
    assert handler.use_agent_store
    assert handler.shutdown()


def test_with_several_nodes_the_own_store_is_not_looked_for_on_the_network() -> None:
    """This address belongs to nobody (RFC 5737): connecting to it would hold the agent up until a limit."""
    nodes = {"endpoint": "192.0.2.200:1", "local_addr": "192.0.2.201", "min_nodes": 2, "max_nodes": 2}
    handler = CheckpointlessRendezvousHandler(parameters(**nodes))
    host, _, port = handler.open_store().rpartition(":")
    assert host == "192.0.2.201"
    TCPStore("localhost", int(port), is_master=False).set("peer", "address")


def test_a_port_that_is_taken_is_an_error_that_says_what_to_do() -> None:
    holder = CheckpointlessRendezvousHandler(parameters())
    taken = holder.open_store()
    handler = CheckpointlessRendezvousHandler(parameters(endpoint=taken))
    with pytest.raises(ConfigError, match="give this machine and a free port of it"):
        handler.open_store()


@pytest.mark.parametrize("endpoint", ["nowhere.invalid:29400", "localhost:29400:1"])
def test_a_host_that_does_not_exist_is_refused_at_once(endpoint: str) -> None:
    handler = CheckpointlessRendezvousHandler(parameters(endpoint=endpoint))
    with pytest.raises(ConfigError, match="No store can be opened at .*; give this machine and a free port"):
        handler.open_store()


def test_torchrun_of_other_backends_does_not_load_the_library() -> None:
    program = (
        "import sys, torch.distributed.run\n"
        "from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as registry\n"
        "assert 'checkpointless' in registry._registry\n"
        "assert not [name for name in sys.modules if name.startswith('checkpointless_elastic.')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_with_another_backend_in_the_same_process_our_agent_is_torchs(tmp_path: object) -> None:
    program = textwrap.dedent(
        r"""
        import sys
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        for backend, endpoint in (("checkpointless", ""), ("c10d", "localhost:0")):
            config = LaunchConfig(1, 1, 2, run_id="x", rdzv_backend=backend, rdzv_endpoint=endpoint, max_restarts=0)
            program = "import os; os.write(1, f\"{os.getppid() == int(os.environ['LAUNCHER'])} \".encode())"
            import os; os.environ["LAUNCHER"] = str(os.getpid())
            assert elastic_launch(config, sys.executable)("-u", "-c", program) == {0: None, 1: None}
        """
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True", "True"]


def test_a_function_runs_under_torchs_own_agent_with_one_warning() -> None:
    program = textwrap.dedent(
        """
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
        def double(x): return 2 * x
        if __name__ == "__main__":
            how = dict(rdzv_backend="checkpointless", max_restarts=0, start_method="fork")
            config = LaunchConfig(1, 1, 2, run_id="x", **how)
            assert elastic_launch(config, double)(21) == {0: 42, 1: 42}
        """
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stderr.count("runs as under plain torchrun") == 1
