"""Installing, importing and finding the entry point: as a wheel, editable, and from a source checkout."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = "import os; print('rank', os.environ['RANK'])\n"


def packages() -> set[str]:
    """Dotted names of all packages in the checkout."""
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("checkpointless_elastic/**/*.py")
    }
    return found | {"checkpointless_elastic_handlers"}


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def torchrun(python: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    (cwd / "hello.py").write_text(SCRIPT)
    command = [
        python,
        "-m",
        "torch.distributed.run",
        "--rdzv-backend",
        "checkpointless",
        str(cwd / "hello.py"),
    ]
    return run(*command, cwd=cwd, env=env)


def test_all_packages_of_the_checkout_are_listed() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert set(config["options"]["packages"].split()) == packages()


def test_the_entry_point_is_found_once_in_this_environment() -> None:
    (found,) = entry_points(group="torchrun.handlers", name="checkpointless")
    assert found.value == "checkpointless_elastic_handlers.c10d:handler"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a copy of the checkout is installed, without the network."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("checkpointless_elastic", "handlers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(
        *pip, "install", "--no-deps", "--no-build-isolation", "--target", str(folder), str(source), cwd=folder
    )
    return folder


def test_pip_install_gives_all_packages_and_a_working_torchrun(site: Path, tmp_path: Path) -> None:
    installed = {path.name for path in site.iterdir()}
    assert {"checkpointless_elastic", "checkpointless_elastic_handlers"} <= installed
    assert (site / "checkpointless_elastic" / "py.typed").exists()
    env = {**os.environ, "PYTHONPATH": str(site)}
    where = run(
        sys.executable,
        "-c",
        "import checkpointless_elastic.agent as a; print(a.__file__)",
        cwd=tmp_path,
        env=env,
    )
    assert where.startswith(str(site))
    assert torchrun(sys.executable, tmp_path, env) == "rank 0\n"


def test_torchrun_from_the_repository_root_uses_the_checkout() -> None:
    names = (
        "import checkpointless_elastic.agent as a, checkpointless_elastic_handlers as h\n"
        "print(a.__file__, h.__file__)"
    )
    agent, handlers = run(sys.executable, "-c", names, cwd=ROOT).split()
    assert Path(agent).parent.parent == ROOT / "checkpointless_elastic"
    assert Path(handlers).parent == ROOT / "handlers"


def test_torchrun_works_in_the_repository_root(tmp_path: Path) -> None:
    (tmp_path / "hello.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "checkpointless"]
    assert run(*command, str(tmp_path / "hello.py"), cwd=ROOT) == "rank 0\n"


def test_an_editable_install_points_at_the_checkout(tmp_path: Path) -> None:
    """Built as a wheel, which is what `pip install -e` installs; the present environment stays as it is."""
    program = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", program, cwd=ROOT).split()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        texts = {entry: wheel.read(entry).decode() for entry in wheel.namelist()}
    (finder,) = (text for entry, text in texts.items() if entry.endswith("finder.py"))
    assert f"'checkpointless_elastic_handlers': '{ROOT / 'handlers'}'" in finder
    assert f"'checkpointless_elastic': '{ROOT / 'checkpointless_elastic'}'" in finder
    (entries,) = (text for entry, text in texts.items() if entry.endswith("entry_points.txt"))
    assert "[torchrun.handlers]\ncheckpointless = checkpointless_elastic_handlers.c10d:handler" in entries
    assert "\ncheckpointless-etcd = checkpointless_elastic_handlers.etcd:handler" in entries
