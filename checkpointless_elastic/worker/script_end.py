"""What a worker tells its agent when its script has ended, well or not."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from checkpointless_elastic.errors import RankLostError, ScriptMismatchError
from checkpointless_elastic.protocol.hangs import Activity
from checkpointless_elastic.protocol.messages import Failed, Release, Stage
from checkpointless_elastic.worker.health import broken_device
from checkpointless_elastic.worker.session import Session, Superseded

if TYPE_CHECKING:
    from checkpointless_elastic.worker.recovery import Recovery

__all__ = ["script_ended"]


def script_ended(session: Session, error: BaseException | None) -> None:
    """The script's top level has ended, before the interpreter shuts down. Blocks until all ranks have finished."""
    good = error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
    if good and session.recovery is not None:
        _finish(session, session.recovery)
        session.registry.all_finished()
        session.registry.close()
    elif not good:
        _fail(session, error)
    session.channel.close()
    session.held_in = -1  # nor can a Hold come any more


def _finish(session: Session, recovery: Recovery) -> None:
    if session.shadow:
        recovery.prepare()
        if session.resume is not None:
            session.resume.check()
        recovery.join()
    while True:
        if session.is_frozen():
            session.settle()
        session.registry.settle()
        session.pulse.idle(Activity.GATE, session.stretch)
        session.report(Stage.FINISHED, session.generation)
        try:
            session.next_message(Release, session.generation)
            return
        except Superseded:
            continue


def _fail(session: Session, error: BaseException | None) -> None:
    if isinstance(error, ScriptMismatchError):
        session.unfit(str(error))
    if session.shadow and (reason := broken_device()):
        session.unhealthy(reason)
    if error is None or isinstance(error, RankLostError):
        return
    lines = traceback.format_exception_only(type(error), error)
    said = "" if isinstance(error, SystemExit) else lines[-1].strip().rstrip(".")
    session.channel.control.send(Failed(session.step, said))
