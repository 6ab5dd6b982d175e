"""Writes measured numbers into README and docs, between their markers: `python benchmarks/update_readme.py [RUN]`.

All numbers are from benchmarks/results/. With RUN, that run becomes the default run there, with its pictures.
"""

import argparse
import json
import platform
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import comparison
import contenders
from compare_presets import table
from comparison import machine
from shapes import CONTRAST_CASES, CONTRAST_SHAPES, SEARCH_SHAPES, SHAPES
from write_step_page import RESULTS, ROOT, read

from unicode_fast import ablate
from unicode_fast.files.writing import write_text
from unicode_fast.presets import PRESETS, from_saved
from unicode_fast.report import ablation
from unicode_fast.tasks import Row, Sharing, format_markdown, format_sharing
from unicode_fast.tasks.table import token_cell

PICTURES = ("zero-shot.png", "code-usage.png", "timeline.png")
DEVICES = ("cpu", "cuda")
# Public operators of dispatched operators with other names.
OPERATORS = {"codebook_apply": "codebook_update", "codebook_statistics": "codebook_update"}
# Lines in the README.
SHORT: tuple[comparison.Key, ...] = (
    ("quantiser", "search", "published"),
    ("quantiser", "search", "wide"),
    ("quantiser", "search", "one row"),
    ("quantiser", "update", "wide"),
    ("quantiser", "step", "published"),
    ("contrast", "published", "float32"),
    ("train-step", "default"),
)


def expected_lines(device: str) -> dict[comparison.Key, str]:
    """All problems of the operators on a device, with their sizes."""
    found = {}
    for problem in contenders.PROBLEMS:
        for name in contenders.shape_names(problem):
            shape = SHAPES[name] if problem == "step" else SEARCH_SHAPES[name]
            found["quantiser", problem, name] = f"{comparison.WHAT[problem]}, {comparison.size_of(shape._asdict())}"
    for name, precision in CONTRAST_CASES[device]:
        size = comparison.size_of({**CONTRAST_SHAPES[name]._asdict(), "precision": precision})
        found["contrast", name, precision] = f"{comparison.WHAT['contrast']}, {size}"
    return found


def replace_section(name: str, text: str) -> None:
    """Writes text between the markers of this name in README or a page of docs/."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*(<!-- /{name} -->)", re.DOTALL)
    pages = [page for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) if pattern.search(page.read_text())]
    if len(pages) != 1:
        raise SystemExit(f"one page must have the markers of {name!r}, got {', '.join(map(str, pages)) or 'none'}")
    write_text(pages[0], pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", pages[0].read_text()))


def measured(device: str) -> dict[comparison.Key, comparison.Problem]:
    """The problems of a device that have numbers."""
    found = comparison.problems({stem: read(f"{stem}-{device}.json") for stem in comparison.PROBLEMS})
    return {key: problem for key, problem in found.items() if "median_ms" in problem.ours}


def machines(found: Iterable[comparison.Problem]) -> str:
    """The machines and commits of some problems."""
    return "; ".join(dict.fromkeys(machine(problem.ours) for problem in found))


def speed_table() -> str:
    """All measured problems, and those that have not run."""
    lines, notes = [], [comparison.NOTE]
    for device in DEVICES:
        found, expected = measured(device), expected_lines(device)
        lines += map(comparison.cells, found.values())
        if found:
            notes.append(f"{device}: {machines(found.values())}.")
            notes += comparison.memory_notes(read(f"contrast-{device}.json"))
        missing = [text for key, text in expected.items() if key not in found]
        if missing and found:
            notes.append(f"Not run on {device}: {'; '.join(missing)}.")
        elif missing:
            notes.append(f"None of them has run on {device}.")
    return comparison.table(lines) + "\n\n" + "\n\n".join(notes)


def short_speed_table() -> str:
    """The lines of the README."""
    found = [measured("cpu")[key] for key in SHORT if key in measured("cpu")]
    return f"{comparison.table(list(map(comparison.cells, found)))}\n\n{comparison.NOTE}\n\n{machines(found)}."


def shares() -> str:
    """Share of each operator in a training step, in one sentence."""
    measured = read("step-shares-cpu.json")
    total: Counter[str] = Counter()
    for name, row in measured["operators"].items():
        operator = name.removesuffix("_reference").removesuffix("_backward")
        total[OPERATORS.get(operator, operator)] += row["share"]
    shares = ", ".join(f"`{operator}` {100 * share:.1f} %" for operator, share in total.most_common())
    return (
        f"Shares of the operators in a step of the default run, {measured['step_ms']:.0f} ms, forward and backward: "
        f"{shares}. `python benchmarks/step_shares.py` measured them on {machine(measured)}."
    )


def step_sentence() -> str:
    """Time of a training step on the CPU, ours and the released code's."""
    rows = read("train-step-cpu.json")
    found = {(row["contender"], row["size"]): row for row in rows if "missing" not in row}
    seconds = {key: f"{row['median_ms'] / 1000:.2g} s" for key, row in found.items()}
    ours, quick, theirs = "recommended, float32", "recommended, bfloat16, channels last", "the original"
    default, published = "default", "published, 4 clips"
    shown = [found[ours, default], found[theirs, default], found[quick, published], found[theirs, published]]
    return (
        f"A default step on random features takes {seconds[ours, default]}, the released code's "
        f"{seconds[theirs, default]}. At the published sizes with four clips it takes {seconds[ours, published]}, with "
        f"bfloat16 and `channels_last` {seconds[quick, published]}, the released code's {seconds[theirs, published]}. "
        f"Machine: {'; '.join(dict.fromkeys(map(machine, shown)))}."
    )


def counts_table() -> str:
    """Instruction counts of the CUDA search."""
    found = read("instruction-counts.json")
    lines = [
        "| part of the search with wgmma | counted for | former form | present form |",
        "| --- | --- | ---: | ---: |",
    ]
    lines += [f"| {' | '.join(row)} |" for row in found["rows"]]
    return "\n".join(lines) + f"\n\nCompiled by nvcc {found['nvcc']}."


def preparations_table() -> str:
    """Cycles to prepare rows in the CUDA search, with a persistent grid and without."""
    heads = ["rows by", "D", "rounds", "bounds", "128 rows"]
    heads += [head for codewords in (1024, 8192) for head in (f"products, M {codewords}", "rows and products")]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    found = read("instruction-counts.json")
    lines += [f"| {' | '.join(map(str, row))} |" for row in found["preparations"]]
    latencies = ", ".join(f"{name} {cycles}" for name, cycles in found["latencies"].items())
    return "\n".join(lines) + f"\n\nAssumed latencies in cycles: {latencies}."


def clusters_table() -> str:
    """Cycles of the CUDA search among clusters."""
    heads = ["D", "M", "clusters", "spread", "random codewords", "clusters: search", "candidates", "members"]
    heads += ["rows scored twice", "ratio"]
    lines = [f"| {' | '.join(heads)} |", f"|{' ---: |' * len(heads)}"]
    for row in read("cluster-arithmetic.json"):
        members = row["codewords"] // row["clusters"]
        sizes = f"| {row['width']} | {row['codewords']} | {row['clusters']} of {members} | {row['spread']:g} |"
        cycles = " | ".join(f"{row[name]:.0f}" for name in ("random", "search", "finish", "members"))
        lines.append(f"{sizes} {cycles} | {100 * row['twice']:.1f} % | {row['ratio']:.1f} |")
    groups = next(f"{row['groups']:.1f}" for row in read("cluster-arithmetic.json") if row["codewords"] == 1024)
    note = f"Among 1024 random codewords of 64 columns a warp finds candidates in {groups} of eight groups of a tile."
    return "\n".join(lines) + f"\n\n{note}"


def busy_sentence() -> str:
    """Time of a default step beside another busy process."""
    rows = {(row["chosen"], row["busy"]): row for row in read("busy-cpu.json")}
    times = {key: f"{row['median_ms']:.0f} ms" for key, row in rows.items()}
    taken = rows["by train", 1]["threads"]
    return (
        f"On {rows['2', 0]['cores']} cores a default step takes {times['2', 0]} with two threads. Beside one busy "
        f"process it takes {times['2', 1]} with two threads and {times['1', 1]} with one. A new run of `train` takes "
        f"{taken} of 2 threads there: {times['by train', 1]}. Machine: {machine(rows['2', 0])}."
    )


def versions_sentence() -> str:
    """Steps beside those of an earlier commit."""
    found = read("versions-cpu.json")
    sizes = ", ".join(f"{row['ratio']:.2f} times as fast at the {row['size']}" for row in found["rows"])
    return (
        f"With equal configuration fields a float32 step of commit `{found['commit'][:12]}`, beside "
        f"`{found['before'][:12]}` on {found['cores']} cores, is {sizes} "
        f"(`python benchmarks/compare_versions.py`, {found['date']})."
    )


def install_sentence() -> str:
    """Time and disk space of the first command."""
    found = read("install.json")
    note = f", {found['note']}" if found["note"] else ""
    minutes = {name: f"{seconds / 60:.1f}" for name, seconds in found["seconds"].items()}
    sizes = found["gigabytes"]
    return (
        f"From a fresh clone the first command installs in {minutes['downloading']} minutes, with the download of "
        f"{sizes['download']:.1f} GB, or in {minutes['downloaded']} from files on the disk. The environment takes "
        f"{sizes['disk']:.1f} GB. The command then makes the data, trains and probes in {minutes['run']} minutes "
        f"({found['device']}, {found['cores']} cores, Python {found['python']}, torch {found['torch']}, "
        f"{found['date']}, commit `{(found['commit'] or 'unknown')[:12]}`{note}; "
        "`python benchmarks/install_time.py`)."
    )


def making_sentence() -> str:
    """Time to make the built-in data."""
    made = read("data-made.json")
    times = " and ".join(f"`{name}` in {seconds:.0f} s" for name, seconds in made["seconds"].items())
    return (
        f"Made and checked: {times} ({made['device']}, {made['cores']} cores; `python benchmarks/make_data.py`); later "
        "runs open them from the cache."
    )


def reading_sentence() -> str:
    """Time of a random batch from zips and from stores."""
    rows = read("data-cpu.json")
    times = ", ".join(
        f"{row['contender']}: {row['median_ms']:.3g} ms ({row['times_slower_than_store_float32']:.2g}x)" for row in rows
    )
    one = rows[0]
    return (
        f"A random batch of {one['clips']} clips of the published shapes, in the page cache, and its time over that of "
        f"a float32 store: {times}.\nMedians of {one['repeats']}, {machine(one)}."
    )


def numbers_table() -> str:
    """The run on talking-numbers, beside accuracies of the same encoders trained with labels."""
    summary = read("talking-numbers-run.json")
    bounds = read("upper-bound.json")["talking-numbers"]
    heads = ["task", "direction", "zero-shot", "same modality", "tokens / same", "trained with labels"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for row in map(Row.from_dict, summary["rows"]):
        labelled = bounds["accuracy"][row.target] if row.task == "classification" else []
        cells = [
            row.task,
            f"{row.source} → {row.target}",
            f"{100 * row.score:.1f} %",
            f"{100 * row.same_modality:.1f} %",
        ]
        cells.append(token_cell(row.token, None))
        cells.append(f"{100 * statistics.mean(labelled):.1f} %" if labelled else "-")
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"One seed, {summary['seconds'] / 60:.1f} minutes on {platform.machine()} with {summary['threads']} threads; "
        "chance is 1 % in classification. Trained with labels: the encoder of the tested modality with a classifier, "
        f"end to end (`python benchmarks/upper_bound.py talking-numbers --steps {bounds['steps']} --seeds "
        f"{len(bounds['accuracy']['audio'])}`)."
    )
    return "\n".join(lines) + "\n\n" + note


def ablation_findings() -> str:
    """Removals with another effect than in the paper, or an undecided one, as a table."""
    path = RESULTS / "ablation.json"
    content = json.loads(path.read_text())
    base = from_saved(content["config"])
    record = ablate.Record(path, base)
    seeds = sorted({run["seed"] for run in record.runs})
    lines = ["| pre-trained on | removed | task | change | 95 % interval | published, other data | finding |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | --- |")
    variants = ablate.variants(base, ("audio", "video", "text"), ("table2", "table3"), ())
    for experiment, modalities in {"table2": "two modalities", "table3": "three"}.items():
        found, missing = ablate.collect(record, variants, seeds, experiment)
        if missing:
            raise SystemExit(f"the ablation lacks {'; '.join(missing)}")
        for change in ablation.changes(experiment, found):
            if not change.finding.startswith("as in the paper"):
                label, task, _, points, interval, _, paper, finding = ablation.change_cells([change])[1]
                lines.append(f"| {modalities} | {label} | {task} | {points} | {interval} | {paper} | {finding} |")
    return "\n".join(lines)


def put_run(run: Path) -> None:
    """Copies a finished run to the results as the default run, and its pictures to docs/."""
    summary = json.loads((run / "summary.json").read_text())
    seeds = summary.get("seeds", [summary.get("seed")])
    below = run / f"seed-{seeds[0]}" if len(seeds) > 1 else run
    for name in PICTURES:
        source = run / "plots" / name if (run / "plots" / name).exists() else below / "plots" / name
        shutil.copy(source, ROOT / "docs" / name)
    write_text(RESULTS / "default-run.json", json.dumps(summary, indent=2) + "\n")


def default_run() -> tuple[str, str]:
    """The table of the default run, short and with measures of codes; both with the origin."""
    summary = read("default-run.json")
    rows = [Row.from_dict(row) for row in summary["rows"]]
    seeds = summary.get("seeds", [summary.get("seed")])
    minutes = summary["seconds"] / len(seeds) / 60
    codes = "\n\n".join(
        f"codes on the test split, {words}\n{format_sharing(Sharing(**values))}"
        for words, values in summary["sharing"].items()
    )
    whole = format_markdown(rows)
    origin = (
        f"Mean and standard deviation of {len(seeds)} seed(s), {minutes:.1f} minutes each on {platform.machine()} with "
        f"{summary['threads']} threads, torch {summary['versions']['torch']}, commit "
        f"`{(summary['git_commit'] or 'unknown')[:12]}`."
    )
    # Task, direction, zero-shot, same modality and chance.
    short = "\n".join("|".join(line.split("|")[:6]) + "|" for line in whole.splitlines())
    return f"{short}\n\n{origin}", f"{whole}\n\n```text\n{codes}\n```\n\n{origin}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="run folder, usually of --seeds 3")
    run = parser.parse_args().run
    if run is not None:
        put_run(run)
    for name, text in sections().items():
        replace_section(name, text)


def sections() -> dict[str, str]:
    """The text between each pair of markers."""
    short, results = default_run()
    return {
        "results-in-short": short,
        "results": results,
        "speed-in-short": short_speed_table(),
        "speed": speed_table(),
        "shares": shares(),
        "step": step_sentence(),
        "versions": versions_sentence(),
        "busy": busy_sentence(),
        "counts": counts_table(),
        "preparations": preparations_table(),
        "clusters": clusters_table(),
        "install": install_sentence(),
        "making": making_sentence(),
        "reading": reading_sentence(),
        "numbers": numbers_table(),
        "findings": ablation_findings(),
        "presets": table(PRESETS, read("presets.json")),
    }


if __name__ == "__main__":
    main()
