"""Where the main thread of this process is, as another thread of it sees."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

from checkpointless_elastic.protocol.messages import Explained

__all__ = ["explain"]

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_WAITING = tuple(os.path.join(_OURS, "groups", name) for name in ("waiting.py", "link.py"))
_COMPILING = tuple(
    os.path.join("torch", *name) for name in (("_dynamo", "convert_frame.py"), ("_inductor", "compile_fx.py"))
)
"""Read in torch 2.13: on the stack while torch.compile compiles, and not when compiled code runs."""


def explain() -> Explained:
    """Any thread. Does not block."""
    frames = list(_frames(sys._current_frames().get(threading.main_thread().ident or 0)))
    names = [frame.f_code.co_filename for frame in frames]
    at = next((frame for frame in frames if _of_the_script(frame.f_code.co_filename)), None)
    return Explained(
        "" if at is None else _place(at),
        any(name in _WAITING for name in names),
        any(name.endswith(_COMPILING) for name in names),
    )


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _of_the_script(name: str) -> bool:
    return not name.startswith(("<", _OURS, *_LIBRARIES))


def _place(frame: FrameType) -> str:
    place = traceback.extract_stack(frame, limit=1)[0]
    return f"{os.path.basename(place.filename)}:{place.lineno} in {place.name}"
