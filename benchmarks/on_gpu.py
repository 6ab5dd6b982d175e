"""All benchmarks and checks that need a GPU, in one call: `python benchmarks/on_gpu.py [RESULTS]`; on_gpu.sh calls it.

It runs without network, from the folder of prepare_gpu.py. Stages run one after the other, each in its own processes
with a time limit. Later stages leave out a kernel that fails its smoke test. Each stage prints a line; a short table
is last. RESULTS then holds on-gpu.json, which is rewritten after every row, files with its rows for README and
docs/training-step.md, and an archive of all logs. The status is 0 if nothing is wrong and all stages have run.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu import dry_run
from gpu.processes import Ending, Job, follow
from gpu.report import Report
from gpu.stages import STAGES, NotRun, Refused, Run, Stage, deadline, has_program, slower

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = 300.0
# Of a dry run; its stages have proportionally more time.
DRY_RUN_SECONDS = 900.0
# Least time left for the start of a stage.
LEAST_SECONDS = 5.0
# Left for the last writing of results.
LAST_SECONDS = 5.0
# Left by a compilation of everything for the stages after the build.
AFTER_FALLBACK_SECONDS = 130.0


def verdict(rows: list[dict]) -> str:
    """Verdict on a stage, by its rows."""
    return "WRONG" if any(row["ok"] is False for row in rows) else "ok"


def run_stage(run: Run, name: str, stage: Stage, until: float) -> None:
    """Runs one stage; its errors become rows."""
    began = time.monotonic()
    run.stage, run.until = name, min(until, began + stage.seconds)
    run.report.begin(name)
    try:
        if until - began < LEAST_SECONDS:
            raise NotRun("no time is left")
        if stage.imports and not built(run):
            raise NotRun("the package was not built")
        stage.work(run)
        rows = run.report.rows(name)
        late = any("no time is left" in row["text"] for row in rows)
        found = "cut" if late and not stage.may_be_cut and verdict(rows) == "ok" else verdict(rows)
    except Refused as refusal:
        run.add(name, None, str(refusal))
        found = "refused"
    except NotRun as reason:
        run.add(name, None, str(reason))
        found = "WRONG" if verdict(run.report.rows(name)) == "WRONG" else "not run"
    except Exception as error:
        run.add(name, False, f"{type(error).__name__}: {error}")
        found = "WRONG"
    run.report.end(name, found, time.monotonic() - began)
    print(run.report.line(name), flush=True)


def built(run: Run) -> bool:
    """True where a built package exists, of this run or of an earlier one in the same folder."""
    return any((run.work / "package" / "unicode_fast").glob("_C.*"))


def variables(run: Run) -> dict[str, str]:
    """Environment of all processes.

    Without PYTHONSAFEPATH Python would import the package of the working directory, without extension and kernels.
    """
    benchmarks = ROOT / "benchmarks"
    paths = [run.work / "package", run.work / "wheels", benchmarks, benchmarks / "gpu"]
    found = {"PYTHONSAFEPATH": "1", "UNICODE_FAST_CACHE": str(run.work / "cache"), "UNICODE_FAST_KIT": str(run.kit)}
    if run.dry:
        paths.append(run.work / "stand-ins")
        found |= dry_run.prepare(paths[-1], run.work / "wheels")
    return {**found, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def update_pages(run: Run, until: float) -> None:
    """Writes README and pages from the results."""
    for script in (["update_readme.py"], ["write_step_page.py"], ["scaling.py", "--write"]):
        job = Job(script[0], [sys.executable, str(ROOT / "benchmarks" / script[0]), *script[1:]], 60, run.environment)
        for _, found in follow([job], run.logs, until):
            if isinstance(found, Ending) and found.text:
                print(f"{script[0]}: {found.text}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="folder for at most six files [benchmarks/results]")
    parser.add_argument("--kit", type=Path, help="folder of prepare_gpu.py [gpu-kit, in a dry run build/dry-kit]")
    parser.add_argument("--only", default="", help=f"some of {','.join(STAGES)}; rows of the others are kept")
    parser.add_argument("--seconds", type=float, help=f"for all [{SECONDS:.0f}, in a dry run {DRY_RUN_SECONDS:.0f}]")
    parser.add_argument("--dry-run", action="store_true", help="no GPU; with the folder of prepare_gpu.py --host")
    parser.add_argument("--work", type=Path, help="folder for package and logs [build/on-gpu, or build/dry-run]")
    arguments = parser.parse_args()
    arguments.only = [name.strip() for name in arguments.only.split(",") if name.strip()]
    if arguments.seconds is None:
        arguments.seconds = DRY_RUN_SECONDS if arguments.dry_run else SECONDS
    if arguments.seconds <= 0:
        parser.error(f"--seconds must be positive, got {arguments.seconds:g}")
    arguments.kit = (arguments.kit or (dry_run.KIT if arguments.dry_run else ROOT / "gpu-kit")).resolve()
    if dry_run.is_kit(arguments.kit) != arguments.dry_run:
        expected = "a folder of prepare_gpu.py --host" if arguments.dry_run else "for a GPU, not for a dry run"
        parser.error(f"--kit must be {expected}, got {arguments.kit}")
    for name in arguments.only:
        if name not in STAGES:
            parser.error(f"--only must name some of {', '.join(STAGES)}, got {name!r}")
    arguments.work = (arguments.work or ROOT / "build" / ("dry-run" if arguments.dry_run else "on-gpu")).resolve()
    # Numbers of a dry run would replace those of this machine's CPU.
    arguments.results = arguments.results or (arguments.work / "results" if arguments.dry_run else RESULTS)
    for folder in (arguments.results, arguments.work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            parser.error(f"{folder} must be a folder that can be written to: {error.strerror}")
    if not arguments.dry_run and (obstacle := no_gpu()):
        parser.error(f"{obstacle}; --dry-run tries the stages without a GPU")
    return arguments


def no_gpu() -> str:
    """The reason why this Python's torch cannot use a GPU; "" where it can, or where that is unknown."""
    code = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    try:
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return ""
    if found.returncode != 0:
        return f"{sys.executable} cannot import torch; PYTHON names the interpreter that on_gpu.sh takes"
    version, cuda, usable = found.stdout.split()
    return "" if usable == "True" else f"torch {version} (CUDA {cuda}) of {sys.executable} finds no GPU"


def main() -> int:
    began = time.monotonic()
    arguments = parse()
    until = began + arguments.seconds - LAST_SECONDS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    dry, work = arguments.dry_run, arguments.work
    keep = bool(arguments.only)
    report = Report(arguments.results.resolve(), "cpu" if dry else "cuda", keep=keep, beside=work)
    run = Run(report, report.device, arguments.kit, work, dry, {})
    shutil.rmtree(run.logs, ignore_errors=True)
    run.logs.mkdir(parents=True)
    run.environment |= variables(run)
    os.chdir(ROOT)
    stages = slower(arguments.seconds / SECONDS) if dry else STAGES
    chosen = arguments.only or list(STAGES)
    unbuilt = any(STAGES[name].imports for name in chosen) and not built(run)
    if "build" not in chosen and (unbuilt or (any(STAGES[name].native for name in chosen) and not has_program(run))):
        chosen.insert(0, "build")
    after = AFTER_FALLBACK_SECONDS if set(chosen) - {"versions", "build"} else 0.0
    run.fallback_until = until - after
    try:
        for name in STAGES:
            if name in chosen:
                run_stage(run, name, stages[name], deadline(name, chosen, time.monotonic(), until, stages))
    finally:
        report.archive(run.logs)
        print(f"\n{report.table()}", flush=True)
    if arguments.results.resolve() == RESULTS:
        update_pages(run, until)
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
