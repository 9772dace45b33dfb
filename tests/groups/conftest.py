"""The warm server that workers are forked from lives as long as the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing import forkserver

import pytest


@pytest.fixture(scope="session", autouse=True)
def _warm_server() -> Iterator[None]:
    """Started before any test, so that no test is held to have left it behind."""
    forkserver.ensure_running()
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
