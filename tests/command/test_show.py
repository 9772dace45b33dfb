"""Which node a word means, and the table."""

from __future__ import annotations

import pytest

from checkpointless_elastic.command.client import CommandError
from checkpointless_elastic.command.show import document, find, table
from checkpointless_elastic.protocol.requests import Overview, Place

PLACES = [
    Place(0, "one-7-a", "10.0.0.1:5", 2),
    Place(2, "two-8-b", "10.0.0.2:5", 1),
    Place(-1, "two-9-c", "[::1]:5", 1),
]
SEEN = Overview(3, "one-7-a", "settling", 4, 17, 1, [0, 2, 4], 5, PLACES, [2, 3], "because", {4: 0.25})


@pytest.mark.parametrize(
    ("word", "place"),
    [("0", 0), ("2", 1), ("one", 0), ("10.0.0.2", 1), ("8-b", 1), ("two-9-c", 2), ("::1", 2)],
)
def test_a_word_means_one_node(word: str, place: int) -> None:
    assert find(SEEN, word) == PLACES[place]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("1", "Seat 1 is vacant"),
        ("3", "There is no seat 3: the job has 3"),
        ("-1", "No agent has '-1'"),
        ("two", "is part of 2 agents' names or addresses: two-8-b, two-9-c"),
        ("", "No agent has ''"),
        ("\x00\n", "No agent has '\\x00\\n'"),
        ("٣", "No agent has"),
    ],
)
def test_a_word_that_means_none_or_several_is_refused(word: str, sentence: str) -> None:
    with pytest.raises(CommandError) as caught:
        find(SEEN, word)
    assert sentence in str(caught.value)


def test_the_table_shows_vacant_seats_and_spares() -> None:
    assert table("job", SEEN).splitlines() == [
        "Job job: settling, generation 4, step 17, 1 restarts; term 3",
        "",
        "SEAT   RANKS  HOST      AGENT",
        "0      0-1    10.0.0.1  one-7-a  coordinates",
        "1      2-3              vacant",
        "2      4      10.0.0.2  two-8-b",
        "spare         ::1       two-9-c",
        "",
        "Not joined yet: ranks 2, 3",
        "Slow: rank 4, for which all others wait 250 ms in each step",
        "A lost rank would run the script again from its top: because",
    ]


def test_the_document_has_null_for_a_vacant_seat() -> None:
    found = document("job", SEEN)
    assert found["seats"][1] == {"seat": 1, "ranks": [2, 3], "agent": None, "host": None, "address": None}  # type: ignore[index]
    assert found["spares"] == [{"agent": "two-9-c", "host": "::1", "address": "[::1]:5", "workers": 1}]


def test_a_job_that_has_shrunk_says_so() -> None:
    two = [Place(0, "one-7-a", "10.0.0.1:5", 2), Place(1, "two-8-b", "10.0.0.2:5", 2)]
    seen = Overview(3, "one-7-a", "running", 4, 17, 2, [0, 2], 4, two, [], "", {}, 3, 1)
    lines = table("job", seen).splitlines()
    head = "Job job: running, generation 4, step 17, 1 restarts, 1 changes of the number of nodes; term 3"
    assert lines[0] == head
    assert lines[-1] == "Runs on 2 of 3 nodes, and grows when one comes"
    found = document("job", seen)
    assert (found["restarts"], found["resizes"], found["wanted"]) == (1, 1, 3)


def test_agents_that_hang_in_a_tree_are_shown_with_the_seat_they_hang_on() -> None:
    places = [Place(0, "a", "h:1", 1), Place(1, "b", "h:2", 1), Place(2, "c", "h:3", 1, 1)]
    seen = Overview(1, "a", "running", 0, 5, 0, [0, 1, 2], 3, places, [], "", {})
    assert table("job", seen).splitlines()[-1].split() == ["2", "2", "h", "c", "hangs", "on", "seat", "1"]
    assert [seat.get("parent") for seat in document("job", seen)["seats"]] == [None, None, 1]  # type: ignore[attr-defined]
