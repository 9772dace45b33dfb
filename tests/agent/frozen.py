"""A file system on which whatever asks it waits, as on a file server that is gone: FUSE that nobody serves."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def frozen_disk() -> Iterator[Path]:
    """Its folder. At the end all that wait get an error. Skips the test where it cannot be mounted."""
    folder = tempfile.mkdtemp(prefix="frozen-")
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        os.rmdir(folder)
        pytest.skip(f"no file system without a server can be mounted: {error}")
    options = f"fd={server},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"frozen", folder.encode(), b"fuse", 0, options.encode()):
            pytest.skip(f"no file system can be mounted: {os.strerror(ctypes.get_errno())}")
        try:
            yield Path(folder)
        finally:
            os.close(server)
            server = -1
            subprocess.run(["umount", "--lazy", folder], check=True)
    finally:
        if server >= 0:
            os.close(server)
        shutil.rmtree(folder)  # who waited may have tried once more, and found the folder below
