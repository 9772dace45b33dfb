"""Fails when a file is longer than 450 lines or a function longer than 60, and names each one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("checkpointless_elastic", "handlers", "benchmarks", "scripts", "tests")
MAX_FILE, MAX_FUNCTION = 450, 60


def too_long(path: Path) -> Iterator[str]:
    """One sentence for each thing in the file that is over its limit."""
    text = path.read_text()
    lines = text.count("\n")
    if lines > MAX_FILE:
        yield f"{path}: {lines} lines, at most {MAX_FILE}; split it by content."
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}."


def main() -> int:
    files = (path for folder in FOLDERS for path in sorted(Path(folder).rglob("*.py")))
    complaints = [complaint for path in files for complaint in too_long(path)]
    print("\n".join(complaints), end="\n" if complaints else "")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
