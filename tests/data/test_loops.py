"""A rank that dies at any moment of its loops is resumed so that nothing differs from a run without a fault."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from memory_session import Killed, Session, assert_a_loss_changes_nothing, run_to_the_end, run_with_losses
from torch.utils.data import DataLoader, Dataset

from checkpointless_elastic.data import loops
from checkpointless_elastic.data.cursor import KEPT_LOOPS
from checkpointless_elastic.errors import ConfigError, ScriptMismatchError


class Noisy(Dataset[torch.Tensor]):
    """Items with a random transform; the rank may die while one is loaded."""

    def __init__(self, length: int, session: Session) -> None:
        self._length = length
        self._session = session

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> torch.Tensor:
        self._session.moment()
        return torch.tensor([float(index), random.random()]) + torch.randn(2)


def seeded(session: Session, length: int = 5) -> DataLoader[torch.Tensor]:
    torch.manual_seed(1)
    random.seed(1)
    return DataLoader(Noisy(length, session), batch_size=2, shuffle=True)


def train_and_validate(session: Session) -> None:
    """Two loops and a call in each epoch, two calls in each batch, draws and collectives between them."""
    train, validation = seeded(session), DataLoader(Noisy(3, session), batch_size=2)
    session.outside(0.5)
    for epoch in session.epochs(2):
        weight = torch.rand(2)
        for batch in session.batches(train):
            noise = torch.rand(2) * weight
            mixed = batch + session.outside(float(torch.rand(1)))
            loss = session.call(mixed, noise)
            noise = torch.randn(3)
            loss = session.call(noise, loss)
        for batch in session.batches(validation):
            worst = session.call(batch, random.gauss(0, 1))
        noise = torch.rand(1)
        session.call(epoch, loss, worst, noise)
    session.call(loss)


def only_steps(session: Session) -> None:
    torch.manual_seed(1)
    for step in session.steps(4):
        session.call(step, torch.rand(1))
        session.outside(float(step))
        torch.randn(1)


def left_by_break(session: Session) -> None:
    loader = seeded(session, 7)
    for epoch in session.epochs(3):
        for batch in session.batches(loader):
            loss = session.call(batch)
            if batch[0, 1] > 0:
                break
        session.call(epoch, loss, torch.rand(1))
        if epoch == 1:
            break
    for step in session.steps(2):
        session.call(step, loss)


def left_by_an_exception(session: Session) -> None:
    loader = seeded(session, 4)
    for epoch in session.epochs(2):
        try:
            for batch in session.batches(loader):
                loss = session.call(batch)
                raise LookupError
        except LookupError:
            session.call(torch.rand(1), loss, epoch)


def loops_without_an_item(session: Session) -> None:
    empty: list[int] = []
    torch.manual_seed(1)
    for step in session.steps(0):
        session.call(step)
    for _ in session.epochs(2):
        for item in session.batches(empty):
            session.call(item)
        for item in session.batches(DataLoader(empty)):
            session.call(item)
        session.call(torch.rand(1))
    for _ in session.batches(empty):
        session.call(1)


def calls_without_a_loop(session: Session) -> None:
    torch.manual_seed(1)
    for number in range(4):
        session.call(number, torch.rand(1))


def epochs_of_plain_python(session: Session) -> None:
    loader = seeded(session, 3)
    for epoch in range(3):
        for batch in session.batches(loader):
            loss = session.call(batch, epoch)
    session.call(loss)


def a_generator_that_is_held(session: Session) -> None:
    """As tqdm does: a loop left by break stays open until its name is bound anew."""
    loader = seeded(session, 5)
    for _ in session.epochs(2):
        held = session.batches(loader)
        for batch in held:
            loss = session.call(batch)
            break
        for step in session.steps(2):
            session.call(step, loss, torch.rand(1))
    session.call(loss)


def numbered_batches(session: Session) -> None:
    """As with gradient accumulation: what is called depends on the number of the batch."""
    loader = seeded(session, 9)
    for _ in session.epochs(2):
        for number, batch in session.numbered(loader):
            loss = session.call(batch)
            if number % 2:
                session.call(number, loss)
            if number == 3:
                break


SCRIPTS: list[Callable[[Session], None]] = [
    train_and_validate,
    only_steps,
    left_by_break,
    left_by_an_exception,
    loops_without_an_item,
    calls_without_a_loop,
    epochs_of_plain_python,
    a_generator_that_is_held,
    numbered_batches,
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_at_any_moment_changes_nothing(script: Callable[[Session], None]) -> None:
    whole = run_to_the_end(script)
    for moment in range(1, whole.moments + 1):
        assert_a_loss_changes_nothing(script, [moment], whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_losses_while_resuming_change_nothing(script: Callable[[Session], None]) -> None:
    whole = run_to_the_end(script)
    chance = random.Random(3)
    for _ in range(30):
        moments = [chance.randrange(1, whole.moments + 1) for _ in range(4)]
        assert_a_loss_changes_nothing(script, moments, whole)


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_session_the_loops_give_the_same(script: Callable[[Session], None]) -> None:
    class Plain(Session):
        def epochs(self, n: int) -> object:  # type: ignore[override]
            return loops.epochs(n)

        def steps(self, n: int) -> object:  # type: ignore[override]
            return loops.steps(n)

        def batches(self, loader: object) -> object:  # type: ignore[override]
            return loops.batches(loader)  # type: ignore[arg-type]

        def numbered(self, loader: object) -> object:  # type: ignore[override]
            return loops.numbered(loader)  # type: ignore[arg-type]

    plain = Plain()
    script(plain)
    assert plain.trace == run_to_the_end(script).trace


def test_a_replacement_skips_old_loops_of_one_iteration_and_resumes_the_last() -> None:
    def many_passes(session: Session) -> None:
        loader = seeded(session, 2)
        for epoch in range(KEPT_LOOPS + 4):
            for batch in session.batches(loader):
                session.call(batch, epoch)

    whole = run_to_the_end(many_passes)
    assert [child.compact for child in whole.cursor.top.children] == [True] * 4 + [False] * KEPT_LOOPS
    for moment in range(1, whole.moments + 1, 3):
        assert_a_loss_changes_nothing(many_passes, [moment], whole)


def test_an_exception_leaves_the_slot_inside_the_loop_that_it_unwound() -> None:
    def failing(session: Session) -> None:
        for step in session.steps(3):
            session.call(step)
            if step == 1:
                raise LookupError

    session = Session()
    with pytest.raises(LookupError):
        failing(session)
    assert len(session.cursor.stack) == 1
    replacement = Session(session.slot)
    assert len(replacement.cursor.stack) == 2
    with pytest.raises(LookupError):
        failing(replacement)


def test_a_script_that_takes_another_way_is_told_where_it_parts() -> None:
    def original(session: Session) -> None:
        for step in session.steps(2):
            session.call(step)
            session.call(step)

    def fewer_calls(session: Session) -> None:
        for step in session.steps(2):
            session.call(step)

    def another_loop(session: Session) -> None:
        for step in session.epochs(2):
            session.call(step)

    def no_loop(session: Session) -> None:
        session.call(1)

    def left_early(session: Session) -> None:
        for _ in session.steps(2):
            break
        session.call(1)

    slot = lost_before_call(original, 3)
    for script, sentence in [
        (fewer_calls, "leaves steps .* had made 2 replayable calls in steps and not 1"),
        (another_loop, "enters a loop of kind epochs in the script .* had entered one of kind steps"),
        (no_loop, "makes replayable call 0 in the script .* had entered a loop of kind steps"),
        (left_early, "leaves steps .* had made 2 replayable calls"),
    ]:
        with pytest.raises(ScriptMismatchError, match=sentence):
            script(Session(slot))


def lost_before_call(script: Callable[[Session], None], call: int) -> bytes:
    """The slot of a rank that died when it had committed this many calls and one more."""
    whole = run_to_the_end(script)
    for moment in range(1, whole.moments + 1):
        session = Session(None, moment)
        with pytest.raises(Killed):
            script(session)
        if len(session.trace) == call + 1:
            return session.slot
    raise AssertionError


def test_interleaved_loops_are_refused_with_advice() -> None:
    def interleaved(session: Session) -> None:
        for one, two in zip(session.steps(3), session.steps(3), strict=True):
            session.call(one, two)

    with pytest.raises(ConfigError, match=r"run.batches\(zip\(a, b\)\)"):
        run_to_the_end(interleaved)


def test_a_loop_keeps_no_reference_to_the_item_that_it_gave() -> None:
    import weakref

    class Item:
        pass

    class Items:
        def __iter__(self) -> object:
            return (Item() for _ in range(2))

    for item in Session().batches(Items()):  # type: ignore[arg-type]
        watched = weakref.ref(item)
        del item
        assert watched() is None


def test_the_last_session_of_many_losses_reaches_the_end() -> None:
    trace, last = run_with_losses(only_steps, [5, 5, 5])
    assert len(trace) == 4
    assert last.cursor.top.kind == "root"
