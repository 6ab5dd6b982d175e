"""The stages of a run on a GPU: their processes, their limits, and the rows made from their lines.

A stage script prints one JSON object per line with "name", "ok" (null: not run) and "text". The native program has its
own format. `on_gpu.py` chooses the stages, their order and their limits.
"""

import csv
import json
import math
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from gpu import program
from gpu.package import link_package
from gpu.processes import Ending, Job, follow
from gpu.report import Report, Row

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = Path(__file__).resolve().parent
KERNELS = (
    "operands",
    "search_wgmma",
    "search_wide",
    "search_middle",
    "search_narrow",
    "search_plain",
    "search_direct",
    "statistics_scan",
    "statistics_sorted",
    "apply",
    "commitment",
)
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 9
# Kernels for the sanitizers: those with asynchronous copies and products, and sums of many threads.
SANITIZED = ("search_wgmma", "search_middle", "statistics_sorted", "apply", "commitment")
# Searches with the switches of forms.h.
SWITCHED = ("search_wgmma", "search_wide", "search_middle", "search_narrow")
# Switches for codebooks with few codewords that are far apart.
FOR_COLLAPSED = ("EXCLUDE_DUPLICATES", "SEARCH_AGAIN", "FIND_CLUSTERS")
# Kernels of csrc/cuda with a profile of the first launch, by their name in the native program.
PROFILED = {"search_wgmma": "hopper_search_kernel", "statistics_sorted": "piece_kernel"}
METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
# Limit for finding out that a tool is refused.
PROBE_SECONDS = 9.0
TEST_PROCESSES = 6
# Of the build: a check or a compilation of the native program, a link, a compilation of everything.
PROGRAM_SECONDS, LINK_SECONDS, COMPILE_SECONDS = 60.0, 40.0, 200.0
# A script of operators or targets without output for so long hangs; Triton compiles in less.
QUIET_SECONDS = 20.0


@dataclass(frozen=True)
class Limits:
    """Seconds and sizes; those of a dry run are smaller.

    Attributes:
        smoke: of a kernel's smoke test.
        times: of its event times.
        times_at_once: number of kernels that are timed at one time.
        tool: of one kernel under a sanitizer or profiler.
        test: of one test.
        kernels: of the native program that run.
        sanitized: of these, those that run under a sanitizer, the most important first.
        test_processes: number of processes for the tests.
        tests: arguments of pytest that select them.
        at_once: number of smoke tests at one time.
    """

    smoke: float = 15.0
    times: float = 15.0
    times_at_once: int = 1
    tool: float = 25.0
    test: float = 30.0
    kernels: tuple[str, ...] = KERNELS
    sanitized: tuple[str, ...] = SANITIZED
    test_processes: int = TEST_PROCESSES
    tests: tuple[str, ...] = ("tests",)
    at_once: int = 6


# An emulator takes up to ten seconds for a search. All tests are collected, few run, as .ci/kernels-on-host runs them.
TINY = Limits(
    smoke=20.0,
    times=40.0,
    times_at_once=2,
    test_processes=2,
    tests=("tests", "-k", "test_commitment or test_compared_codewords"),
    at_once=2,
)


class Refused(Exception):
    """This machine does not permit a tool."""


class NotRun(Exception):
    """A stage lacks its input."""


@dataclass
class Run:
    """State that stages share.

    Attributes:
        report: takes the rows.
        device: "cuda", or "cpu" in a dry run.
        kit: folder that prepare_gpu.py made.
        work: folder for the package, wheels and logs.
        dry: a dry run.
        environment: variables of every process.
        stage: the name of the running one.
        until: time.monotonic() at which it must have ended.
        fallback_until: the same of a compilation of everything, in the build.
        suspects: kernels of rows on several kernels that ended their process.
    """

    report: Report
    device: str
    kit: Path
    work: Path
    dry: bool
    environment: dict[str, str]
    stage: str = ""
    until: float = 0.0
    fallback_until: float = 0.0
    suspects: set[str] = field(default_factory=set)

    @property
    def limits(self) -> Limits:
        return TINY if self.dry else Limits()

    @property
    def size(self) -> str:
        """Size of the stage scripts."""
        return "tiny" if self.dry else "target"

    @property
    def native_size(self) -> str:
        """Size of the native program where it is timed or profiled."""
        return "small" if self.dry else "target"

    @property
    def logs(self) -> Path:
        return self.work / "logs"

    @property
    def program(self) -> str:
        """The native program.

        Raises:
            NotRun: the build could not get one.
        """
        found = self.work / "kernels"
        if not found.exists():
            raise NotRun("there is no native program; the row of the build has the reason")
        return str(found)

    def working(self, names: Sequence[str]) -> list[str]:
        """Kernels that have not failed.

        Raises:
            NotRun: all have failed.
        """
        left = [name for name in names if name not in self.report.failed]
        if not left:
            raise NotRun(f"failed before: {', '.join(names)}")
        return left

    def add(self, name: str, ok: bool | None, text: str, **numbers: object) -> None:
        """Adds a row to this stage."""
        self.report.add(self.stage, {"name": name, "ok": ok, "text": text, **numbers})

    def job(self, name: str, command: Sequence[str], seconds: float, **variables: str) -> Job:
        """A process of this stage."""
        return Job(f"{self.stage}-{name}", command, seconds, {**self.environment, **variables})

    def follow(self, jobs: Sequence[Job], at_once: int = 1) -> Iterator[tuple[Job, str | Ending]]:
        """As processes.follow, until the end of this stage."""
        yield from follow(jobs, self.logs, self.until, at_once)

    def collect(self, jobs: Sequence[Job], at_once: int = 1) -> Iterator[tuple[Job, list[str], Ending]]:
        """Jobs with all their lines, as each ends."""
        lines: dict[str, list[str]] = {job.name: [] for job in jobs}
        for job, found in self.follow(jobs, at_once):
            if isinstance(found, Ending):
                yield job, lines[job.name], found
            else:
                lines[job.name].append(found)


def json_row(line: str) -> dict | None:
    """The object in a line; None for another content."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def script_job(run: Run, name: str, *options: str, label: str = "script") -> Job:
    """Job of a script of this folder."""
    without = ["--without", ",".join(sorted(run.report.failed))] if run.report.failed else []
    command = [sys.executable, str(HERE / f"{name}.py"), "--device", run.device, "--size", run.size, *without, *options]
    return run.job(label, command, 1e9)


def add_ending(run: Run, ending: Ending, row: Row | None) -> None:
    """Adds the row of a script that failed; one without enough time is not wrong."""
    if ending.text:
        text = f"{ending.text}, in {row['name']}" if row else ending.text
        run.add("script", None if ending.out_of_time and not ending.status else False, text)


def script(run: Run, name: str, *options: str, quiet: float = math.inf) -> None:
    """Runs a stage that is a script of this folder.

    The script prints the name and the kernels of a row before the row begins. After a crash or a hang, the script is
    started again for the remaining rows, without the kernel of the row. If the row has several kernels, those that
    were in such a row before are left out.

    Args:
        run: of the stage.
        name: of the script.
        options: of its command line.
        quiet: seconds without a line that count as a hang.
    """
    forget(run)
    done: list[str] = []
    while True:
        skip = ["--skip", json.dumps(done)] if done else []
        job = script_job(run, name, *options, *skip, label=f"script {len(done)}" if done else "script")
        open_row, ending = follow_rows(run, job._replace(quiet=quiet), done)
        if not ending.text or open_row is None or (ending.out_of_time and ending.status is None):
            add_ending(run, ending, open_row)
            return
        if open_row["name"] not in done:
            done.append(open_row["name"])
            run.add(open_row["name"], False, ending.text, kernels=open_row.get("kernels", []))
        kernels = {name for name in open_row.get("kernels", ()) if name != "operands"}
        for kernel in open_row.get("at_fault") or sorted(kernels & run.suspects):
            blame(run, kernel, open_row["name"], ending.text)
        run.suspects |= kernels


def forget(run: Run) -> None:
    """Forgets failures of kernels in an earlier run of this stage."""
    for kernel in [kernel for kernel, text in run.report.failed.items() if text.startswith(f"{run.stage}, ")]:
        del run.report.failed[kernel]


def blame(run: Run, kernel: str, row: str, text: str) -> None:
    """Notes that a kernel has failed in a row of this stage, unless it had failed before."""
    run.report.failed.setdefault(kernel, f"{run.stage}, {row}: {text}")


def follow_rows(run: Run, job: Job, done: list[str]) -> tuple[Row | None, Ending]:
    """Adds the rows of a script and their names to `done`, and blames the kernels of wrong rows.

    Returns:
        The row at the script's end, if any, and its ending. The row is one that has begun. Or it is the last one if
        that is wrong, because it may have lost the device.
    """
    begun: Row | None = None
    for _, found in run.follow([job]):
        if isinstance(found, Ending):
            ending = found
        elif (row := json_row(found)) is None:
            continue
        elif "begins" in row:
            begun = {**row, "name": row["begins"]}
        else:
            row = {"name": "?", "ok": None, "text": "", **row}
            done.append(row["name"])
            run.report.add(run.stage, row)
            begun = row if row["ok"] is False else None
            for kernel in row.get("at_fault", ()) if begun else ():
                blame(run, kernel, row["name"], row["text"])
    return begun, ending


def versions(run: Run) -> None:
    """GPU, driver, torch, Triton, compilers, and packages that are missing."""
    script(run, "versions")


def install_wheels(kit: Path, folder: Path) -> list[str]:
    """Unpacks the kit's wheels, which are pure Python; returns their names."""
    wheels = sorted((kit / "wheels").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return [wheel.name for wheel in wheels]


def build(run: Run) -> None:
    """The wheels, the native program, and the package with an extension, which is tested first."""
    names = install_wheels(run.kit, run.work / "wheels")
    run.add("wheels", True if names else None, ", ".join(names) or "the kit has none")
    package = link_package(run.work / "package")
    works = make_extension(run, package)
    make_program(run)
    if not works:
        shutil.rmtree(package)


def make_program(run: Run) -> None:
    """The native program: the kit's, or one that is compiled here, which may use the time of other stages."""
    run.until = max(run.until, run.fallback_until)
    command = [sys.executable, str(HERE / "program.py"), "--kit", str(run.kit), "--out", str(run.work)]
    command += ["--host"] if run.dry else []
    for _, lines, ending in run.collect([run.job("program", command, PROGRAM_SECONDS)]):
        run.add("program", None if ending.text else True, ending.text or (lines or [""])[-1])
    if ending.text:
        # A stopped compilation may have left an incomplete file.
        (run.work / "kernels").unlink(missing_ok=True)


def has_program(run: Run) -> bool:
    """True where a native program of these sources exists."""
    return program.is_current(run.work, on_host=run.dry)


# Exit status of a process where another extension might help.
BAD_EXTENSION = 3
# Arguments are device and backend: lists the extension's operators, then imports the package of the environment.
TRIAL = """
import sys
import torch
from unicode_fast.backend import EXTENSION, available_backends, __file__ as here
device, backend = sys.argv[1:]
key = "CUDA" if device == "cuda" else "CPU"
registered = set(torch._C._dispatch_get_registrations_for_dispatch_key(key))
print(here, sorted(name for name in registered if name.startswith("unicode_fast::")))
missing = [name for name in {operators} if f"unicode_fast::{{name}}" not in registered]
if EXTENSION.module is None or missing:
    print(EXTENSION.problem or f"the extension lacks {{', '.join(missing)}}", file=sys.stderr)
    sys.exit({bad})
import unicode_fast.train, unicode_fast.kernels
found = available_backends(device)["nearest_codeword"][backend]
if found != "available":
    sys.exit(found)
"""
OPERATORS = ("nearest_codeword", "codebook_statistics", "codebook_apply", "codebook_update", "commitment_loss")
CUDA_OPERATORS = ("compared_codewords", "codebook_operands")


def imports(run: Run, *, last: bool) -> bool | None:
    """True where a process has the package and the extension's operators.

    Returns:
        None where another extension might help, which is no fault unless this one was the `last`.
    """
    chosen = OPERATORS if run.dry else OPERATORS + CUDA_OPERATORS
    code = TRIAL.format(operators=chosen, bad=BAD_EXTENSION)
    command = [sys.executable, "-c", code, run.device, "cpp" if run.dry else "cuda"]
    for _, lines, ending in run.collect([run.job("import", command, 60)]):
        # A hang and a crash count as a bad extension too.
        bad = ending.status is None or ending.status < 0 or ending.status == BAD_EXTENSION
        ok = not ending.text if last or not bad else None
        run.add("import", ok, ending.text or "the package and its extension are imported", lines=lines)
    return ok


def make_extension(run: Run, package: Path) -> bool:
    """Links the kit's objects; compiles everything where that fails, or where the linked extension does not load."""
    linking = [sys.executable, str(HERE / "link.py"), "--kit", str(run.kit), "--package", str(package.parent)]
    # It makes the extension beside the objects, in the package.
    compiling = [sys.executable, str(HERE / "compile_objects.py"), str(run.work)]
    everything = run.job("compile", compiling, COMPILE_SECONDS, UNICODE_FAST_CUDA="0" if run.dry else "1")
    for job in (run.job("link", linking, LINK_SECONDS), everything):
        last = "compile" in job.name
        for old in package.glob("_C.*"):
            old.unlink()
        if last:
            # Without a package no stage with torch can run, so it may use their time.
            run.until = max(run.until, run.fallback_until)
        for _, _, ending in run.collect([job]):
            ok = not ending.text or (False if last else None)
            run.add(job.name.removeprefix(f"{run.stage}-"), ok, ending.text or "done")
        if not ending.text and (works := imports(run, last=last)) is not None:
            return works
    return False


def native(run: Run, name: str, seconds: float, *options: str, kind: str = "") -> Job:
    """Job of the native program for one kernel."""
    return run.job(f"{kind}{name}", [run.program, *options, "--only", name], seconds)


def native_row(found: Mapping) -> Row:
    """A row of the native program in the format of the scripts."""
    texts = [found.get("message") or ""]
    if found.get("rows"):
        texts.append(f"{found.get('wrong')} of {found['rows']} rows wrong")
    if found.get("fallback") is not None:
        texts.append(f"{found['fallback']} fell back, {found.get('candidates') or 0:.2f} compared")
    if found.get("median_ms") is not None:
        texts.insert(0, f"{found['median_ms']:.4g} ms")
    name = f"{found.get('kernel')} {found.get('case')}"
    return {**found, "name": name, "ok": found.get("ok"), "text": ", ".join(filter(None, texts))}


def kernels(run: Run) -> None:
    """The smoke test of each kernel in its own process, then the event times of those that pass."""
    limits = run.limits
    small = {name: native(run, name, limits.smoke, "--size", "small") for name in limits.kernels}
    forget(run)
    run_native(run, [small[name] for name in run.working(limits.kernels)], limits.at_once)
    options = ("--size", run.native_size, "--times")
    left = [native(run, name, limits.times, *options, kind="times-") for name in run.working(limits.kernels)]
    run_native(run, left, limits.times_at_once)


def run_native(run: Run, jobs: Sequence[Job], at_once: int) -> None:
    """Runs the native program, and notes which kernels fail."""
    failed = run.report.failed
    for job, found in run.follow(jobs, at_once):
        name, timed = job.command[-1], "--times" in job.command
        if not isinstance(found, Ending):
            row = json_row(found)
            if row is not None and "kernel" in row:
                row = native_row(row)
                run.report.add(run.stage, row)
                # Rows that fell back are right, but slow.
                if row["ok"] is False and not (timed and row.get("fallback")):
                    blame(run, name, row["name"], row["text"])
        elif not found.started:
            # The kernel is not at fault.
            raise NotRun(found.text)
        elif found.out_of_time:
            run.add(name, None, found.text)
        elif found.text and not (found.status in (1, 2) and name in failed):
            # A wrong row has its own line. A kernel that is right but too slow for its time limit is not at fault.
            if not (timed and found.status is None):
                blame(run, name, name, found.text)
            run.add(name, False, found.text)


def tool(name: str) -> str:
    """Path of a tool of the CUDA toolkit.

    Raises:
        Refused: the tool is not installed.
    """
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *(f"{home}/bin" for home in homes if home)]))
    if found is None:
        raise Refused(f"{name} is not installed")
    return found


def sanitizers(run: Run) -> None:
    """memcheck, racecheck and synccheck of the native program, each kernel by itself."""
    program = tool("compute-sanitizer")
    names = run.working(run.limits.sanitized)

    def job(check: str, name: str, seconds: float) -> Job:
        command = [program, "--tool", check, "--error-exitcode", str(SANITIZER_ERROR), run.program, "--size", "small"]
        return run.job(f"{check} {name}", [*command, "--only", name], seconds)

    probe = job("memcheck", names[-1], PROBE_SECONDS)
    for _, lines, ending in run.collect([probe]):
        if not any("SUMMARY" in line for line in lines):
            raise Refused(" ".join([*lines[:2], ending.text])[:200])
        add_sanitized(run, probe, lines, ending)
    # The most important ones come first; six run at once.
    jobs = [job(check, name, run.limits.tool) for name in names for check in SANITIZERS]
    jobs = [each for each in jobs if each.name != probe.name]
    for each, lines, ending in run.collect(jobs, run.limits.at_once):
        add_sanitized(run, each, lines, ending)


def add_sanitized(run: Run, job: Job, lines: Sequence[str], ending: Ending) -> None:
    """Adds the row of one kernel under one tool; a kernel that is too slow there is not wrong."""
    summary = next((line.strip("= ") for line in lines if "SUMMARY" in line), "")
    wrong = ending.status is not None and (ending.status != 0 or not summary)
    first = next((line.strip("= ") for line in lines if line.startswith("========= ") and "at 0x" in line), "")
    text = ", ".join(filter(None, (summary, ending.text, first if wrong else "")))
    name = job.name.removeprefix(f"{run.stage}-")
    run.add(name, False if wrong else (None if ending.text else True), text)


def profile(run: Run) -> None:
    """A few metrics of the two kernels with the largest share of the time."""
    program = tool("ncu")
    options = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "--launch-count", "1"]
    probe = [program, *options, run.program, "--size", "small", "--only", run.working(run.limits.kernels)[-1]]
    for _, lines, ending in run.collect([run.job("probe", probe, PROBE_SECONDS)]):
        if ending.text or not profiled(lines):
            errors = [line for line in lines if line.startswith("==ERROR==")]
            raise Refused((errors or [ending.text or "no metrics came back"])[0][:200])
    for name in run.working(tuple(PROFILED)):
        command = [program, *options, "--kernel-name", f"regex:{PROFILED[name]}"]
        job = run.job(name, [*command, run.program, "--size", run.native_size, "--only", name], run.limits.tool)
        for _, lines, ending in run.collect([job]):
            for kernel, metrics in profiled(lines).items():
                run.add(f"{name} {kernel}", True, ", ".join(f"{k} {v}" for k, v in metrics.items()), **metrics)
            if ending.text:
                run.add(name, None, ending.text)


def profiled(lines: Sequence[str]) -> dict[str, dict[str, str]]:
    """Metrics with their units, by kernel, from the CSV among ncu's lines."""
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(line for line in lines if line.startswith('"')):
        if row.get("Metric Name"):
            kernel = row["Kernel Name"].split("(")[0].split("<")[0]
            metrics = found.setdefault(kernel, {})
            metrics[row["Metric Name"].split(".")[0]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def operators(run: Run) -> None:
    """Each operator in torch, Triton's kernels included."""
    script(run, "operators", quiet=QUIET_SECONDS)


def tests(run: Run) -> None:
    """The tests that run kernels, in processes by kernel; each stops at its first failure."""
    limits = run.limits
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", *limits.tests]
    command += ["--kernels-on", run.device, "--without", ",".join(sorted(run.report.failed))]
    if find_spec("pytest_timeout"):
        command += ["-p", "pytest_timeout", f"--timeout={limits.test:.0f}", "--timeout-method=thread"]
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    if not run.dry:
        variables["UNICODE_FAST_REQUIRE_CUDA"] = "1"
    number = limits.test_processes
    jobs = [
        run.job(f"process {i}", [*command, f"--shard={i}/{number}"], 1e9, **variables) for i in range(1, number + 1)
    ]
    for job, lines, ending in run.collect(jobs, number):
        ok, text = tests_verdict(lines, ending)
        run.add(job.name.removeprefix("tests-"), ok, text)


def tests_verdict(lines: Sequence[str], ending: Ending) -> tuple[bool | None, str]:
    """True where the tests of a process passed; and a line with their number, or the first failure."""
    closing = next((line.strip("= ") for line in reversed(lines) if line.startswith("==")), "")
    if not ending.text:
        return True, closing
    if ending.status == 5:
        return None, "no tests are for this process"
    if ending.out_of_time:
        return None, ending.text
    failed = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), None)
    # A process that dies has printed the name of its test, and no more.
    last = next((line for line in reversed(lines) if "::" in line), "before the first test")
    return False, failed or f"{ending.text}, in {last.split(' ')[0]}"


def step(run: Run) -> None:
    """Whole training steps."""
    script(run, "step")


def default_run(run: Run) -> None:
    """The default run, its options, and a resume."""
    script(run, "default_run", "--data", str(run.kit / "store"))


def targets(run: Run) -> None:
    """The figures that have targets."""
    script(run, "targets", quiet=QUIET_SECONDS)


def contenders(run: Run) -> None:
    """Ours beside the contenders."""
    script(run, "peers")


def forms(run: Run) -> None:
    """Times of the search with each switch of forms.h at its other value, beside those with all at the chosen one.

    Those of FOR_COLLAPSED come first, with a codebook of 40 distinct vectors and one of 40 tight clusters.
    """
    chosen = {row["name"]: row["median_ms"] for row in run.report.rows("kernels") if row.get("median_ms")}
    folder, reason = run.work / "forms", "the kit has no such program"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        shutil.unpack_archive(program.of_kit(run.kit, program.FORMS, on_host=run.dry), folder, filter="data")
    except (program.ProgramError, OSError) as error:
        reason = str(error)
    programs = {}
    for switch in program.switches():
        if (folder / switch).exists():
            programs[f"other {switch}"] = str(folder / switch)
        else:
            run.add(f"other {switch}", None, reason)
    searches = run.working(SWITCHED)
    collapsed = {form: path for form, path in programs.items() if searches and form.split()[1] in FOR_COLLAPSED}
    if collapsed and has_program(run):
        collapsed = {"as chosen": run.program, **collapsed}

    def job(what: str, form: str, path: str, size: str, kernels: str) -> Job:
        command = [path, "--size", size, "--times", "--only", kernels]
        return run.job(f"{what}, {form}", command, run.limits.times)

    jobs = [job("collapsed codebooks", *each, "collapsed", ",".join(searches)) for each in collapsed.items()]
    jobs += [job(kernel, *each, run.native_size, kernel) for kernel in searches for each in programs.items()]
    for each, found in run.follow(jobs):
        name = each.name.removeprefix(f"{run.stage}-")
        form = name.rpartition(", ")[2]
        if isinstance(found, Ending):
            if found.text:
                run.add(name, None if found.out_of_time else False, found.text)
        elif (row := json_row(found)) is not None and "kernel" in row:
            row = native_row(row)
            if form == "as chosen":
                chosen[row["name"]] = row.get("median_ms")
            beside = chosen.get(row["name"])
            other = f"chosen {'not timed' if beside is None else f'{beside:.4g} ms'}, other {row['text']}"
            text = row["text"] if form == "as chosen" else other
            run.report.add(run.stage, {**row, "name": f"{row['name']}, {form}", "text": text, "chosen_ms": beside})


class Stage(NamedTuple):
    """A stage: its work, its time limits, and its needs.

    Attributes:
        work: runs it, and adds rows.
        seconds: its limit.
        promised: seconds that earlier stages leave to it.
        imports: it needs the built package.
        native: it needs the native program.
        may_be_cut: a lack of time is no fault.
    """

    work: Callable[[Run], None]
    seconds: float
    promised: float = 0.0
    imports: bool = True
    native: bool = False
    may_be_cut: bool = False


# In the order of a run. All promised seconds fit into a run whose build only links. A stage that ends early leaves its
# time to all later ones.
STAGES: dict[str, Stage] = {
    "versions": Stage(versions, 20, 8, imports=False),
    "build": Stage(build, 270, 42, imports=False),
    "kernels": Stage(kernels, 60, 30, imports=False, native=True),
    "sanitizers": Stage(sanitizers, 30, 12, imports=False, native=True, may_be_cut=True),
    "operators": Stage(operators, 60, 28),
    "targets": Stage(targets, 40, 24),
    "profile": Stage(profile, 20, 6, imports=False, native=True),
    "tests": Stage(tests, 60, 40),
    "step": Stage(step, 60, 45),
    "default_run": Stage(default_run, 60, 45),
    "contenders": Stage(contenders, 60, 9),
    "forms": Stage(forms, 40, 6, imports=False, may_be_cut=True),
}


def slower(factor: float) -> dict[str, Stage]:
    """The stages with limits and promises times `factor`."""
    return {
        name: stage._replace(seconds=factor * stage.seconds, promised=factor * stage.promised)
        for name, stage in STAGES.items()
    }


def deadline(name: str, chosen: Sequence[str], now: float, until: float, stages: Mapping[str, Stage] = STAGES) -> float:
    """The latest end of a stage, by its own limit and the promises to later ones.

    If less is left than all promises together, each stage gets its share.

    Args:
        name: the stage.
        chosen: all stages of the run, before and after it.
        now: its beginning.
        until: end of the run.
        stages: all, with their limits.
    """
    order = list(stages)
    later = sum(stages[each].promised for each in chosen if order.index(each) > order.index(name))
    share = min(1.0, max(0.0, until - now) / (later + stages[name].promised))
    return min(now + stages[name].seconds, until - share * later)
