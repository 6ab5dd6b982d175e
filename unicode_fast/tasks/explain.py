"""What each task measures under each protocol: the pages in `protocols/`, which are part of the documentation too."""

from __future__ import annotations

from importlib.resources import files

from unicode_fast.tasks.runner import check_tasks
from unicode_fast.tasks.table import check_protocol


def explain(task: str, protocol: str = "held_out") -> str:
    """The part of a task's page on one protocol, after what holds for both.

    Args:
        task: one of `TASKS`.
        protocol: held_out or official.

    Raises:
        ValueError: one of them is unknown.
    """
    check_tasks([task])
    title = f"{task}, {check_protocol(protocol)} protocol"
    page = (files("unicode_fast.tasks") / "protocols" / f"{task}.md").read_text(encoding="utf-8")
    (_, _, both), *parts = (part.partition("\n") for part in page.split("\n### "))
    return title + "\n" + both + next(own for heading, _, own in parts if heading == title).rstrip()
