"""What the two runs showed: for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from checkpointless_elastic.chaos.job import Job
from checkpointless_elastic.chaos.trial import Outcome, Trial
from checkpointless_elastic.observe.machine import provenance

__all__ = ["document", "good", "table", "verdict"]

SHOWN = 20
"""So many differences are named."""


def document(trial: Trial, job: Job, differences: Sequence[str], seed: int) -> dict[str, Any]:
    """The report. `job` has ended and was left. When it failed, or was stuck, the last fault was not survived."""
    struck = [outcome for outcome in trial.outcomes if outcome.struck]
    longest = max((o for o in struck if o.seconds is not None), key=lambda o: o.seconds or 0.0, default=None)
    code = None if trial.stuck else job.code
    fatal = struck[-1] if struck and code != 0 else None
    entries = [_entry(outcome, outcome is not fatal and outcome.found) for outcome in trial.outcomes]
    return {
        "faults": len(struck),
        "survived": sum(entry["survived"] for entry in entries),
        "equal": not differences,
        "longest_interruption_s": longest.seconds if longest else None,
        "longest_interruption_cause": _cause(longest) if longest else None,
        "seed": seed,
        "faults_asked_for": len(trial.outcomes),
        "exit_code": code,
        "stuck": trial.stuck,
        "left_behind": job.left,
        "differences": list(differences[:SHOWN]),
        "rungs": dict(Counter(str(o.recovery.rung if o.recovery else None) for o in struck)),
        "fault_list": entries,
        **provenance(),
    }


def good(report: dict[str, Any]) -> bool:
    """Whether all faults came to pass and were survived, with equal files, and nothing stayed behind."""
    counts = report["survived"] == report["faults"] == report["faults_asked_for"]
    return bool(counts and report["equal"] and report["exit_code"] == 0 and not report["left_behind"])


def table(report: dict[str, Any]) -> str:
    """One row for each fault."""
    head = ("", "KIND", "MOMENT", "OF", "RUNG", "INTERRUPTION", "SURVIVED")
    rows = [head, *(_row(number, fault) for number, fault in enumerate(report["fault_list"], 1))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def verdict(report: dict[str, Any]) -> str:
    """Some sentences."""
    lines = [f"{report['survived']} of {report['faults']} faults survived."]
    if report["faults"] != report["faults_asked_for"]:
        lines.append(
            f"Only {report['faults']} of {report['faults_asked_for']} faults came to pass before the job ended: "
            f"take fewer, or a longer job."
        )
    if report["longest_interruption_s"] is not None:
        lines.append(
            f"Longest interruption {report['longest_interruption_s']:.2f} s: {report['longest_interruption_cause']}."
        )
    if report["stuck"]:
        lines.append(f"Stuck: {report['stuck']}")
    elif report["exit_code"]:
        lines.append(f"The command ended with exit code {report['exit_code']}.")
    if report["left_behind"]:
        lines.append(f"It left behind (processes are killed now): {', '.join(report['left_behind'])}.")
    lines += [f"Different: {difference}" for difference in report["differences"]]
    lines.append("The files are equal, bit for bit." if report["equal"] else "The files are NOT equal.")
    return "\n".join(lines)


def _cause(outcome: Outcome) -> str:
    answer = outcome.recovery
    how = f"answered by rung {answer.rung} ({answer.reason})" if answer else _unanswered(outcome)
    return f"{outcome.fault.kind} of {outcome.who}, {how}"


def _unanswered(outcome: Outcome) -> str:
    return "nobody was lost" if outcome.found else "which was not found"


def _entry(outcome: Outcome, survived: bool) -> dict[str, Any]:
    answer = outcome.recovery
    return {
        "kind": outcome.fault.kind,
        "moment": outcome.moment,
        "of": outcome.who,
        "rung": answer.rung if answer else None,
        "seconds": outcome.seconds,
        "cause": answer.cause if answer else "",
        "struck": outcome.struck,
        "survived": outcome.struck and survived,
    }


def _row(number: int, fault: dict[str, Any]) -> tuple[str, ...]:
    if not fault["struck"]:
        return str(number), fault["kind"], "", "", "", "", "not struck"
    seconds = "" if fault["seconds"] is None else f"{fault['seconds']:.2f} s"
    rung = "-" if fault["rung"] is None else str(fault["rung"])
    survived = "yes" if fault["survived"] else "NO"
    return str(number), fault["kind"], f"{fault['moment']:.1f} s", fault["of"], rung, seconds, survived
