"""Results of a run on a GPU: rows by stage, written after each row, and the files and the table made from them."""

import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

NAME = "on-gpu.json"
LOGS = "on-gpu-logs.tar.gz"
TABLE_LINES, LONGEST_LINE = 58, 160
# Stages whose numbers are in the table; other stages have only their wrong rows there.
SHOWN = ("targets", "profile", "step", "default_run", "kernels", "forms")
# Fields of a row that no derived file has.
OF_THE_RUN = ("name", "ok", "text", "kernels", "at_fault")
Row = dict[str, Any]


class Derived(NamedTuple):
    """A file that benchmarks/update_readme.py or write_step_page.py reads: one row for each `key`."""

    stem: str
    key: tuple[str, ...]


DERIVED = (
    Derived("quantiser", ("problem", "shape", "contender")),
    Derived("contrast", ("shape", "precision", "contender")),
    Derived("feed", ("size", "feed")),
    Derived("train-step", ("size", "contender")),
)


def write(path: Path, value: object) -> None:
    """Writes JSON atomically."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(beside, path)


class Report:
    """The stages so far.

    Args:
        folder: for its files, at most six.
        device: in the names of the derived files.
        keep: begin with the stages of the folder.
        beside: a second folder for the rows, read if the first has none, because results may be moved after a call.
    """

    def __init__(self, folder: Path, device: str, *, keep: bool, beside: Path | None = None) -> None:
        self.folder, self.device = folder, device
        self.places = [place / NAME for place in (folder, beside) if place is not None]
        for place in self.places:
            place.parent.mkdir(parents=True, exist_ok=True)
        known = next((place for place in self.places if keep and place.exists()), None)
        before = json.loads(known.read_text()) if known else {}
        self.stages: dict[str, dict[str, Any]] = {stage["stage"]: stage for stage in before.get("stages", [])}
        # Reason by kernel: "STAGE, ROW: text of the row".
        self.failed: dict[str, str] = before.get("failed", {})

    def begin(self, stage: str) -> None:
        """Begins a stage, without its former rows."""
        self.stages[stage] = {
            "stage": stage,
            "verdict": "stopped",
            "seconds": None,
            "without": sorted(self.failed),
            "rows": [],
        }
        self.save()

    def add(self, stage: str, row: Row) -> None:
        """Adds a row to the running stage."""
        self.stages[stage]["rows"].append(row)
        self.save()

    def end(self, stage: str, verdict: str, seconds: float) -> None:
        """Ends a stage."""
        self.stages[stage] |= {"verdict": verdict, "seconds": round(seconds, 1)}
        self.save()

    def save(self) -> None:
        """Writes the rows, and the files that are made from them."""
        for place in self.places:
            write(place, {"failed": self.failed, "stages": list(self.stages.values())})
        found: dict[str, dict[tuple, Row]] = {each.stem: {} for each in DERIVED}
        for stage in self.stages.values():
            for row in stage["rows"]:
                kind = next((each for each in DERIVED if set(each.key) <= row.keys()), None)
                if kind is None or row.get("without"):
                    # The row ran without a kernel of the table.
                    continue
                key = tuple(row[field] for field in kind.key)
                if "missing" not in row or key not in found[kind.stem]:
                    found[kind.stem][key] = {name: row[name] for name in row if name not in OF_THE_RUN}
        for stem, rows in found.items():
            if rows:
                write(self.folder / f"{stem}-{self.device}.json", list(rows.values()))

    def archive(self, logs: Path) -> None:
        """Packs all logs into one file."""
        with tarfile.open(self.folder / LOGS, "w:gz") as archive:
            archive.add(logs, arcname="logs")

    def line(self, stage: str) -> str:
        """A stage in one line."""
        found = self.stages[stage]
        rows = found["rows"]
        counts = {name: sum(row["ok"] is value for row in rows) for name, value in _NAMES.items()}
        sums = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        without = f"; left out: {', '.join(found['without'])}" if found["without"] else ""
        alone = f": {rows[0]['text']}" if len(rows) == 1 and not rows[0]["ok"] else ""
        return f"{stage:12} {found['verdict']:9} {found['seconds'] or 0:6.1f} s  {sums}{without}{alone}"[:LONGEST_LINE]

    def table(self) -> str:
        """All stages, wrong rows, kernels that were left out, and the most important numbers, in few lines."""
        lines = [self.line(stage) for stage in self.stages]
        lines += [f"left out: {name} ({text})"[:LONGEST_LINE] for name, text in self.failed.items()]
        failed = set(self.failed.values())
        wrong = [
            row_line(stage, row)
            for stage, found in self.stages.items()
            for row in found["rows"]
            if (row["ok"] is False and f"{stage}, {row['name']}: {row['text']}" not in failed)
            or (found["verdict"] == "cut" and "no time is left" in row["text"])
        ]
        lines += wrong[:20] + ([f"and {len(wrong) - 20} more that are wrong"] if len(wrong) > 20 else [])
        numbers = [
            row_line(stage, row)
            for stage in SHOWN
            for row in self.rows(stage)
            if row["ok"] and (stage != "kernels" or row.get("median_ms"))
        ]
        room = TABLE_LINES - len(lines)
        lines += numbers[:room]
        return "\n".join(lines)

    def rows(self, stage: str) -> list[Row]:
        """Rows of a stage; none where it has not run."""
        return self.stages.get(stage, {}).get("rows", [])

    @property
    def clean(self) -> bool:
        """True where all that ran is right, and nothing was cut for lack of time."""
        return all(stage["verdict"] in ("ok", "refused") for stage in self.stages.values())


_NAMES = {"right": True, "WRONG": False, "not run": None}


def row_line(stage: str, row: Row) -> str:
    """A row in one line."""
    mark = "WRONG " if row["ok"] is False else ""
    name = "" if row["text"].startswith(row["name"]) else f"{row['name']}: "
    return f"  {mark}{stage} {name}{row['text']}"[:LONGEST_LINE]
