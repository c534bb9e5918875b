"""A part of a file that a command writes, between two marks."""

from __future__ import annotations

import re
from pathlib import Path


def rewrite(path: Path, marks: tuple[str, str], body: str) -> None:
    """Put a text between the two marks of a file, whatever is there.

    Raises:
        ValueError: the marks are not both there once, in order.
    """
    old = path.read_text(encoding="utf-8")
    between = re.compile(f"{re.escape(marks[0])}.*{re.escape(marks[1])}", re.DOTALL)
    if any(old.count(mark) != 1 for mark in marks) or between.search(old) is None:
        raise ValueError(f"{path}: expected {marks[0]} and after it {marks[1]}, once each; nothing was written")
    new = f"{marks[0]}\n{body}\n{marks[1]}"
    path.write_text(between.sub(lambda _: new, old), encoding="utf-8")
