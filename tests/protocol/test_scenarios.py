"""Stories in scenarios/*.txt, played in virtual time; their format is in `simulator.script`.

WRITE_SCENARIOS=1 writes the transcripts as they are now: read the difference before it is committed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from simulator.script import parse

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_story_goes_as_it_is_written(path: Path) -> None:
    story = parse(path.read_text())
    played = story.played()
    if os.environ.get("WRITE_SCENARIOS"):
        path.write_text(played.text())
    else:
        assert played.text() == path.read_text()


def test_there_are_stories() -> None:
    assert len(FILES) >= 10
