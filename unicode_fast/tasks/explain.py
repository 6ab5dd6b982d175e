"""Definition of each task under each protocol, from the pages in `protocols/`, which the documentation includes."""

from __future__ import annotations

from importlib.resources import files

from unicode_fast.tasks.runner import check_tasks
from unicode_fast.tasks.table import check_protocol


def explain(task: str, protocol: str = "held_out") -> str:
    """The section of a task's page on one protocol, after the text on both.

    Args:
        task: one of `TASKS`.
        protocol: held_out or official.

    Raises:
        ValueError: the task or the protocol is unknown.
    """
    check_tasks([task])
    title = f"{task}, {check_protocol(protocol)} protocol"
    page = (files("unicode_fast.tasks") / "protocols" / f"{task}.md").read_text(encoding="utf-8")
    (_, _, both), *sections = (section.partition("\n") for section in page.split("\n### "))
    return title + "\n" + both + next(own for heading, _, own in sections if heading == title).rstrip()
