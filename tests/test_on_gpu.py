"""The run on a GPU: its limits and reports with made-up stages, its selection of tests, and a complete dry run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import on_gpu
import prepare_gpu
import pytest
import selection
from cases import Place
from gpu import program as program_of
from gpu import stages
from gpu.processes import Ending, Job, follow
from gpu.report import Report
from gpu.stages import NotRun, Refused, Run, Stage

ROOT = Path(__file__).resolve().parent.parent
FAR = 1e9
SLEEPS = "import subprocess, sys, time; print('up', flush=True); "
# A process that starts another one, which would outlive it.
PARENT = (
    SLEEPS + "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(p.pid, flush=True); "
)


def python(code: str, seconds: float = 30.0, name: str = "one") -> Job:
    return Job(name, [sys.executable, "-c", code], seconds)


def ends(jobs: list[Job], logs: Path, until: float = FAR, at_once: int = 1) -> tuple[list[str], dict[str, Ending]]:
    lines: list[str] = []
    endings: dict[str, Ending] = {}
    for job, found in follow(jobs, logs, until, at_once):
        if isinstance(found, Ending):
            endings[job.name] = found
        else:
            lines.append(found)
    return lines, endings


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


WRONG_ROW = json.dumps({"kernel": "apply", "case": "d", "rows": 9, "wrong": 3, "ok": False})
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


class TestProcesses:
    @needs_proc
    @pytest.mark.parametrize("rest", ["time.sleep(60)", "pass"])
    def test_the_whole_group_ends(self, rest: str, tmp_path: Path) -> None:
        lines, endings = ends([python(PARENT + rest, 2.0)], tmp_path)
        assert lines[0] == "up"
        assert endings["one"].text == ("timed out after 2 s" if "sleep" in rest else "")
        assert not runs(int(lines[1]))

    def test_endings(self, tmp_path: Path) -> None:
        jobs = [
            python("print(1); print(2, end='')", name="fine"),
            python("import os; os.abort()", name="crash"),
            python("import sys; sys.exit('broken')", name="error"),
            Job("absent", ["/nowhere/at/all"], 1.0),
        ]
        lines, endings = ends(jobs, tmp_path, at_once=2)
        assert lines == ["1", "2"]
        assert {name: ending.text.split(":")[0] for name, ending in endings.items()} == {
            "fine": "",
            "crash": "killed by SIGABRT",
            "error": "exit 1",
            "absent": "cannot be started",
        }
        assert endings["error"].text == "exit 1: broken"
        assert [name for name, ending in endings.items() if not ending.started] == ["absent"]

    def test_silence(self, tmp_path: Path) -> None:
        """Silence counts only after the first line, as a start may take long; a process with output continues."""
        talks = "import time; time.sleep(1); print(1, flush=True)"
        goes_on = talks + "; [(time.sleep(0.3), print(2, flush=True)) for _ in range(3)]"
        jobs = [python(code, name=name) for name, code in (("hangs", talks + "; time.sleep(60)"), ("goes on", goes_on))]
        _, endings = ends([job._replace(quiet=0.7) for job in jobs], tmp_path, at_once=2)
        assert endings == {"hangs": Ending(None, "hangs: no line for 1 s"), "goes on": Ending(0, "")}

    def test_the_limit_of_all(self, tmp_path: Path) -> None:
        jobs = [python(SLEEPS + "time.sleep(60)", name=name) for name in ("first", "second")]
        _, endings = ends(jobs, tmp_path, until=time.monotonic() + 0.5)
        assert all(ending.out_of_time and "no time is left" in ending.text for ending in endings.values())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(Report(tmp_path / "results", "cpu", keep=False), "cpu", tmp_path, tmp_path, False, {})
    made.logs.mkdir()
    return made


def saved(run: Run) -> dict[str, dict]:
    found = json.loads((run.report.folder / "on-gpu.json").read_text())
    return {stage["stage"]: stage for stage in found["stages"]}


def do(run: Run, work: Callable[[Run], None], seconds: float = 30.0, until: float = FAR, name: str = "stage") -> dict:
    on_gpu.run_stage(run, name, Stage(work, seconds, imports=False), until)
    return saved(run)[name]


class TestStages:
    def test_partial_results_are_kept(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A script that hangs has left its rows, also the ones that README reads."""
        row = {"name": "a", "ok": True, "text": "", "problem": "search", "shape": "s", "contender": "ours"}
        (tmp_path / "partial.py").write_text(f"import time; print('''{json.dumps(row)}''', flush=True); time.sleep(60)")
        monkeypatch.setattr(stages, "HERE", tmp_path)
        found = do(run, lambda run: stages.script(run, "partial"), seconds=1.0)
        assert [row["name"] for row in found["rows"]] == ["a", "script"]
        assert (found["verdict"], found["rows"][1]["ok"]) == ("cut", None)
        kept = json.loads((run.report.folder / "quantiser-cpu.json").read_text())
        assert kept == [{"problem": "search", "shape": "s", "contender": "ours"}]

    @pytest.mark.parametrize(
        ("error", "verdict", "ok"),
        [(Refused("not here"), "refused", None), (NotRun("no"), "not run", None), (KeyError("x"), "WRONG", False)],
    )
    def test_errors_are_rows(self, run: Run, error: Exception, verdict: str, ok: bool | None) -> None:
        def work(run: Run) -> None:
            raise error

        found = do(run, work)
        assert (found["verdict"], found["rows"][0]["ok"]) == (verdict, ok)
        assert run.report.clean == (verdict == "refused")

    def test_no_stage_starts_without_time(self, run: Run) -> None:
        found = do(run, lambda run: pytest.fail("it was started"), until=time.monotonic() + 1)
        assert (found["verdict"], found["rows"][0]["text"]) == ("not run", "no time is left")

    def test_stages_are_repeated_alone(self, run: Run) -> None:
        for name in ("first", "second"):
            do(run, lambda run: run.add("row", False, "before"), name=name)
        run.report.failed["apply"] = "killed"
        run.report.save()
        again = Report(run.report.folder, "cpu", keep=True)
        run.report = again
        do(run, lambda run: run.add("row", True, "after"), name="second")
        assert [saved(run)[name]["rows"][0]["text"] for name in ("first", "second")] == ["before", "after"]
        assert saved(run)["second"]["without"] == ["apply"]
        assert not Report(run.report.folder, "cpu", keep=False).stages

    def test_stages_are_repeated_where_results_are_taken_away(self, run: Run, tmp_path: Path) -> None:
        for number in (1, 2):
            run.report = Report(tmp_path / f"results {number}", "cpu", keep=True, beside=tmp_path / "work")
            do(run, lambda run: run.add("row", True, ""), name=f"stage {number}")
        assert list(saved(run)) == ["stage 1", "stage 2"]

    def test_all_promises_fit(self) -> None:
        """If every stage takes its whole limit, each later stage keeps its promise, and the run ends in time."""
        names = list(stages.STAGES)
        until = on_gpu.SECONDS - on_gpu.LAST_SECONDS
        assert sum(stage.promised for stage in stages.STAGES.values()) <= until
        assert all(stage.promised <= stage.seconds for stage in stages.STAGES.values())
        now = 0.0
        for name in names:
            end = stages.deadline(name, names, now, until)
            assert end - now >= stages.STAGES[name].promised
            now = end
        assert now <= until

    def test_what_is_saved_is_for_later_stages(self) -> None:
        names = list(stages.STAGES)
        assert stages.deadline("kernels", names, 20.0, 298.0) == 20.0 + stages.STAGES["kernels"].seconds
        assert stages.deadline("contenders", ["contenders"], 0.0, 298.0) == stages.STAGES["contenders"].seconds
        # After a compilation each stage has its share of the remaining time.
        left = [stages.STAGES[name].promised for name in names[2:]]
        share = 130.0 / sum(left)
        assert stages.deadline("kernels", names, 168.0, 298.0) == pytest.approx(168.0 + share * left[0])

    def test_some_stages_may_be_cut(self, run: Run) -> None:
        for may, verdict in ((True, "ok"), (False, "cut")):
            stage = Stage(
                lambda run: run.add("a", None, "not run: no time is left"), 30.0, imports=False, may_be_cut=may
            )
            on_gpu.run_stage(run, "stage", stage, FAR)
            assert saved(run)["stage"]["verdict"] == verdict

    def test_the_table_is_short(self, run: Run) -> None:
        for name in stages.STAGES:
            do(run, lambda run: [run.add(str(i), i % 3 != 0, "x" * 300) for i in range(20)], name=name)
        table = run.report.table()
        assert len(table.splitlines()) <= 60
        assert len(table) < 12_000


class TestNative:
    """The runner with the native program and NVIDIA's tools."""

    @pytest.fixture
    def program(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
        run.kit = run.work
        monkeypatch.setattr(Run, "limits", stages.Limits(smoke=2.0, times=2.0, kernels=("apply", "commitment")))
        path = run.work / "kernels"
        row = {"kernel": "NAME", "case": "c", "rows": 9, "wrong": 0, "fallback": None, "candidates": None, "ok": True}
        said = json.dumps(row).replace("NAME", "'$name'")
        # The name is the last argument.
        lines = ["#!/bin/sh", "for name; do :; done", '[ "$name" = "$SICK" ] && eval "$ILL"', f"echo '{said}'"]
        path.write_text("\n".join(lines))
        path.chmod(0o755)
        return path

    @pytest.mark.parametrize(
        ("ill", "text"),
        [
            ("kill -ABRT $$", "killed by SIGABRT"),
            ("sleep 60", "timed out after 2 s"),
            (
                'echo \'{"kernel": "apply", "case": "d", "rows": 9, "wrong": 3, "ok": false}\'; exit 1',
                "3 of 9 rows wrong",
            ),
            ("exit 2", "exit 2"),
        ],
    )
    def test_a_kernel_that_fails_is_left_out(self, run: Run, program: Path, ill: str, text: str) -> None:
        run.environment |= {"SICK": "apply", "ILL": ill}
        found = do(run, stages.kernels, name="kernels")
        assert found["verdict"] == "WRONG"
        assert list(run.report.failed) == ["apply"]
        assert text in run.report.failed["apply"]
        assert [row["kernel"] for row in found["rows"] if row["ok"]] == ["commitment"] * 2
        assert f"left out: apply ({run.report.failed['apply']})" in run.report.table()
        seen: list[list[str]] = []
        do(run, lambda run: seen.append(run.working(("apply", "commitment"))), name="later")
        assert seen == [["commitment"]]

    def test_without_a_program_no_kernel_has_failed(self, run: Run, program: Path) -> None:
        for ruin in (lambda: program.chmod(0o644), lambda: program.write_text("no program"), program.unlink):
            ruin()
            found = do(run, stages.kernels, name="kernels")
            assert (found["verdict"], run.report.failed) == ("not run", {})

    @pytest.fixture
    def kit(self, run: Run, tmp_path: Path) -> Path:
        """A kit with a program that starts; like some copies, it is not executable."""
        run.kit = tmp_path / "kit"
        run.kit.mkdir()
        (run.kit / "kernels").write_text("#!/bin/sh\n")
        (run.kit / "manifest.json").write_text(json.dumps({"kernels": program_of.inputs()}))
        run.environment["CUDA_HOME"] = str(tmp_path / "cuda")
        run.environment["PATH"] = "/bin:/usr/bin"
        return run.kit

    def test_the_kit_has_a_program(self, run: Run, kit: Path) -> None:
        found = do(run, stages.make_program)
        assert (found["verdict"], found["rows"][0]["text"]) == ("ok", "the kit's")
        assert os.access(run.program, os.X_OK)
        assert stages.has_program(run)

    @pytest.mark.parametrize("lacks", ["kernels", "manifest.json", "everything", "sources", "start", "a GPU"])
    def test_it_is_compiled(self, run: Run, kit: Path, lacks: str) -> None:
        """With a compiler that writes a program, each source is compiled once."""
        compiler = Path(run.environment["CUDA_HOME"]) / "bin" / "nvcc"
        compiler.parent.mkdir(parents=True)
        lines = ["#!/bin/sh", 'echo "$@" >> "$0.log"', "for out; do :; done", 'printf "#!/bin/sh\\n" > "$out"']
        compiler.write_text("\n".join([*lines, 'chmod +x "$out"']))
        compiler.chmod(0o755)
        if lacks == "sources":
            (kit / "manifest.json").write_text(json.dumps({"kernels": {"inputs": "other"}}))
        elif lacks == "a GPU":
            (kit / "manifest.json").write_text(json.dumps({"kernels": program_of.inputs(on_host=True)}))
        elif lacks == "start":
            (kit / "kernels").write_text("#!/bin/sh\nexit 127\n")
        else:
            for path in kit.iterdir():
                if lacks in (path.name, "everything"):
                    path.unlink()
        found = do(run, stages.make_program)
        assert found["rows"][0]["text"].startswith("compiled here, as ")
        assert stages.has_program(run)
        assert run.program == str(run.work / "kernels")
        calls = Path(f"{compiler}.log").read_text().splitlines()
        files = [word for call in calls for word in call.split() if word.endswith(".cu")]
        assert len(files) == len(set(files)) == len(calls) - 1 > 8

    def test_switches_of_forms(self) -> None:
        """Each switch of forms.h is found with its value."""
        text = program_of.SEARCH.with_name("forms.h").read_text()
        assert set(re.findall(r"= UNICODE_FAST_(\w+)", text)) == set(program_of.switches())
        for name, other in program_of.switches().items():
            assert f"#define UNICODE_FAST_{name} {1 - other}\n" in text

    def test_programs_of_the_kit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With a compiler that writes its arguments: each switch has a program, and missing ones are made again."""
        monkeypatch.setattr(prepare_gpu, "WORK", tmp_path / "work")
        compiler, kit = tmp_path / "nvcc", tmp_path / "kit"
        compiler.write_text('#!/bin/sh\necho "$@" >> "$0.log"\nfor out; do :; done\necho "$@" > "$out"\n')
        compiler.chmod(0o755)
        names = ["commitment-commitment", "nearest_codeword-nearest_codeword", "nearest_codeword-nearest_codeword_op"]
        objects = {"nvcc": str(compiler), "architectures": "9.0a", "files": [f"cuda-{name}.o" for name in names]}
        kit.mkdir()

        def calls(before: dict) -> list[str]:
            Path(f"{compiler}.log").write_text("")
            assert prepare_gpu.make_programs(kit, objects, before) == program_of.inputs()
            return Path(f"{compiler}.log").read_text().splitlines()

        made, switches = calls({}), program_of.switches()
        assert len(made) == len(list(program_of.SOURCES.glob("*.cu"))) + 1 + 2 * len(switches)
        for name, value in switches.items():
            assert sum(f"-DUNICODE_FAST_{name}={value} -c {program_of.SEARCH} " in call for call in made) == 1
        shutil.unpack_archive(kit / program_of.FORMS, tmp_path / "forms", filter="data")
        links = {path.name: path.read_text() for path in (tmp_path / "forms").iterdir()}
        assert set(links) == set(switches)
        for name, link in {**links, "kernels": (kit / "kernels").read_text()}.items():
            assert (f"/{name}.o" in link) == (name != "kernels") != ("nearest_codeword-nearest_codeword.o" in link)
            assert "commitment-commitment.o" in link
            assert "/main.o" in link
            assert "_op.o" not in link
        assert not calls(program_of.inputs())
        (kit / program_of.FORMS).unlink()
        (folder,) = (tmp_path / "work").iterdir()
        (folder / min(switches)).unlink()
        assert len(calls(program_of.inputs())) == 1
        assert (kit / program_of.FORMS).exists()

    def test_both_forms_stand_side_by_side(self, run: Run, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One switch has a program, a second one's crashes, and the others' are missing."""
        first, second, *others = program_of.switches()
        row = {"kernel": "search_wgmma", "case": "c", "rows": 9, "wrong": 0, "median_ms": 3.0, "ok": True}
        with tarfile.open(kit / program_of.FORMS, "w:xz") as archive:
            for name, line in ((first, f"echo '{json.dumps(row)}'"), (second, "kill -ABRT $$")):
                (kit / name).write_text(f"#!/bin/sh\n{line}\n")
                (kit / name).chmod(0o755)
                archive.add(kit / name, name)
        monkeypatch.setattr(stages, "SWITCHED", ("search_wgmma",))
        chosen = stages.native_row({**row, "median_ms": 2.0})
        do(run, lambda run: run.report.add("kernels", chosen), name="kernels")
        found = do(run, stages.forms, name="forms")
        timed = next(row for row in found["rows"] if row["ok"])
        assert (timed["name"], timed["median_ms"], timed["chosen_ms"]) == (f"search_wgmma c, other {first}", 3.0, 2.0)
        assert timed["text"] == "chosen 2 ms, other 3 ms, 0 of 9 rows wrong"
        assert texts(found)[f"search_wgmma, other {second}"] == "killed by SIGABRT"
        lacking = {row["name"]: row["text"] for row in found["rows"] if row["ok"] is None}
        assert lacking == {f"other {name}": "the kit has no such program" for name in others}
        assert not run.report.failed
        assert f"forms search_wgmma c, other {first}: {timed['text']}" in run.report.table()
        (kit / "manifest.json").write_text(json.dumps({"kernels": {"inputs": "other"}}))
        rows = do(run, stages.forms, name="forms")["rows"]
        assert len(rows) == len(program_of.switches())
        assert all(row["ok"] is None and "is of other sources" in row["text"] for row in rows)

    def test_forms_for_collapsed_codebooks(self, run: Run, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """First, of all searches at once, beside the chosen form; a search left out takes no part."""
        assert set(stages.FOR_COLLAPSED) < set(program_of.switches())
        switches = ("SKIP_GROUPS", "SEARCH_AGAIN")
        row = {"kernel": "search_wide", "rows": 9, "wrong": 0, "ok": True}
        with tarfile.open(kit / program_of.FORMS, "w:xz") as archive:
            for name, time_ms in (("kernels", 2.0), *zip(switches, (3.0, 4.0), strict=True)):
                line = json.dumps({**row, "case": "CASE", "median_ms": time_ms}).replace("CASE", "'$2 $5'")
                (kit / name).write_text(f"#!/bin/sh\necho '{line}'\n")
                (kit / name).chmod(0o755)
                if name != "kernels":
                    archive.add(kit / name, name)
        assert do(run, stages.make_program)["rows"][0]["text"] == "the kit's"
        run.report.failed["search_narrow"] = "killed"
        every = "collapsed search_wgmma,search_wide,search_middle"
        found = {row["name"]: row["text"] for row in do(run, stages.forms, name="forms")["rows"] if row["ok"]}
        assert list(found)[:2] == [f"search_wide {every}, {form}" for form in ("as chosen", "other SEARCH_AGAIN")]
        assert found[f"search_wide {every}, as chosen"] == "2 ms, 0 of 9 rows wrong"
        assert found[f"search_wide {every}, other SEARCH_AGAIN"] == "chosen 2 ms, other 4 ms, 0 of 9 rows wrong"
        assert len(found) == 2 + 2 * 3
        (run.work / "kernels").unlink()
        found = {row["name"]: row["text"] for row in do(run, stages.forms, name="forms")["rows"] if row["ok"]}
        assert found[f"search_wide {every}, other SEARCH_AGAIN"] == "chosen not timed, other 4 ms, 0 of 9 rows wrong"

    def test_nor_is_there_a_compiler(self, run: Run, kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (kit / "kernels").unlink()
        broken = Path(run.environment["CUDA_HOME"]) / "bin" / "nvcc"
        broken.parent.mkdir(parents=True)
        broken.write_text("#!/bin/sh\necho 'error: no such kernel' >&2; exit 1\n")
        broken.chmod(0o755)
        found = do(run, stages.make_program)
        assert found["rows"][0]["ok"] is None
        assert "has no native program; nvcc failed: error: no such kernel" in found["rows"][0]["text"]
        assert not stages.has_program(run)
        assert do(run, stages.kernels, name="kernels")["verdict"] == "not run"
        assert not run.report.failed

    def test_an_extension_that_does_not_load_is_compiled(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        package = run.work / "package" / "unicode_fast"
        package.mkdir(parents=True)
        for name in ("link", "compile_objects"):
            (run.work / f"{name}.py").write_text(f"open('{package}/_C.so', 'x').write('{name}')")
        monkeypatch.setattr(stages, "HERE", run.work)
        trial = f"import sys; sys.exit(3 * (open('{package}/_C.so').read() != 'SOUND'))"
        for sound, rows in (("link", ["link", "import"]), ("compile_objects", ["link", "import", "compile", "import"])):
            monkeypatch.setattr(stages, "TRIAL", trial.replace("SOUND", sound))
            found = do(run, lambda run: stages.make_extension(run, package) or pytest.fail("it does not load"))
            assert [row["name"] for row in found["rows"]] == rows
            assert found["verdict"] == "ok"
        # A compilation does not help a package with a missing dependency.
        monkeypatch.setattr(stages, "TRIAL", "import nothing_of_this_name")
        found = do(run, lambda run: stages.make_extension(run, package) and pytest.fail("it does not load"))
        assert [(row["name"], row["ok"]) for row in found["rows"]] == [("link", True), ("import", False)]

    def test_sanitizers(self, run: Run, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stages, "tool", lambda name: "/bin/echo")
        assert do(run, stages.sanitizers)["verdict"] == "refused"
        sound = Ending(0, "")
        job = Job("stage-memcheck apply", [], 1.0)
        for line, ending, ok in [
            ("========= ERROR SUMMARY: 0 errors", sound, True),
            ("========= ERROR SUMMARY: 2 errors", Ending(9, "exit 9: no message"), False),
            ("", Ending(3, "exit 3"), False),
            ("", Ending(None, "timed out after 9 s"), None),
        ]:
            run.report.begin("stage")
            run.stage = "stage"
            stages.add_sanitized(run, job, [line], ending)
            assert run.report.rows("stage")[0]["ok"] is ok

    def test_metrics(self) -> None:
        lines = [
            "==PROF== Profiling",
            '{"kernel": "x"}',
            '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
            '"0","sort_kernel<float>(const float *)","gpu__time_duration.sum","us","12.3"',
            '"0","sort_kernel<float>(const float *)","launch__registers_per_thread","register/thread","40"',
        ]
        metrics = {"gpu__time_duration": "12.3 us", "launch__registers_per_thread": "40 register/thread"}
        assert stages.profiled(lines) == {"sort_kernel": metrics}
        assert stages.profiled(lines[:2]) == {}

    @pytest.mark.parametrize(
        ("lines", "ending", "ok", "text"),
        [
            (["=== 4 passed in 2 s ==="], Ending(0, ""), True, "4 passed in 2 s"),
            (["FAILED a::b - E", "=== 1 failed ==="], Ending(1, "exit 1"), False, "FAILED a::b - E"),
            (["a::b PASSED", "a::c "], Ending(-6, "killed by SIGABRT"), False, "killed by SIGABRT, in a::c"),
            ([], Ending(5, "exit 5"), None, "no tests are for this process"),
        ],
    )
    def test_verdict_of_tests(self, lines: list[str], ending: Ending, ok: bool | None, text: str) -> None:
        assert stages.tests_verdict(lines, ending) == (ok, text)


# A script of operators: the fate of each row that is neither left out nor done.
OPERATORS = """
import json, os, sys, time
rows, options = json.loads(os.environ["ROWS"]), dict(zip(sys.argv[1::2], sys.argv[2::2]))
without, skip = options.get("--without", "").split(","), json.loads(options.get("--skip", "[]"))
for name, kernels, at_fault, ill in rows:
    if name in skip:
        continue
    marks = {"kernels": kernels, "at_fault": at_fault}
    print(json.dumps({"begins": name, **marks}), flush=True)
    left_out = set(without) & set(kernels)
    if not left_out and ill == "dies":
        os.abort()
    if not left_out and ill == "hangs":
        time.sleep(60)
    ok = None if left_out else ill not in ("wrong", "lost")
    print(json.dumps({"name": name, "ok": ok, "text": ill, **marks}), flush=True)
    if not left_out and ill == "lost":
        sys.exit("the device is lost")
"""


class TestOperators:
    def test_what_fails_in_torch_is_left_out(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        (run.work / "operators.py").write_text(OPERATORS)
        monkeypatch.setattr(stages, "HERE", run.work)
        monkeypatch.setattr(stages, "QUIET_SECONDS", 1.0)
        rows = [
            ("fine", ["operands", "search_narrow"], ["search_narrow"], ""),
            ("dies", ["operands", "search_wgmma"], ["search_wgmma"], "dies"),
            ("hangs", ["statistics_scan"], ["statistics_scan"], "hangs"),
            ("wrong", ["apply", "statistics_sorted"], ["apply"], "wrong"),
            ("wrong of two", ["operands", "search_direct"], [], "wrong"),
            ("lost", ["commitment"], ["commitment"], "lost"),
            ("dies of three", ["operands", "search_middle", "search_wide"], [], "dies"),
            ("hangs of two", ["operands", "search_middle"], [], "hangs"),
            ("again", ["search_wgmma"], ["search_wgmma"], "dies"),
            ("no kernel", [], [], "dies"),
            ("last", [], [], ""),
        ]
        run.environment["ROWS"] = json.dumps(rows)
        run.report.failed |= {"search_plain": "killed", "cross_info_nce": "operators, B 80: before"}
        found = do(run, stages.operators, name="operators")
        assert [(row["name"], row["ok"]) for row in found["rows"]] == [
            (name, None if name == "again" else name in ("fine", "last")) for name, *_ in rows
        ]
        left_out = {"search_plain", "search_wgmma", "statistics_scan", "apply", "commitment", "search_middle"}
        assert set(run.report.failed) == left_out
        assert run.report.failed["search_wgmma"] == "operators, dies: killed by SIGABRT"
        assert run.report.failed["statistics_scan"] == "operators, hangs: hangs: no line for 1 s"
        assert run.report.failed["apply"] == "operators, wrong: wrong"
        # A repeated stage forgets its own findings.
        run.environment["ROWS"] = json.dumps(rows[:1])
        do(run, stages.operators, name="operators")
        assert set(run.report.failed) == {"search_plain"}

    def test_a_script_that_never_begins(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        (run.work / "operators.py").write_text("import nothing_of_this_name")
        monkeypatch.setattr(stages, "HERE", run.work)
        found = do(run, stages.operators)
        assert [(row["name"], row["ok"]) for row in found["rows"]] == [("script", False)]
        assert not run.report.failed


class TestSelection:
    def test_kernels_of_places(self) -> None:
        assert selection.kernels_of(Place("nearest_codeword", "cuda", "cuda", "wgmma")) == {
            "operands",
            "search_direct",
            "search_wgmma",
        }
        assert set(stages.KERNELS) == set().union(
            *(selection.kernels_of(Place(name, "cuda", "cuda")) for name in ("nearest_codeword", "codebook_update")),
            selection.kernels_of(Place("commitment_loss", "cuda", "cuda")),
        )
        assert selection.kernels_of(Place("cross_info_nce", "cuda", "triton")) == {"cross_info_nce"}

    def test_each_test_has_one_process(self) -> None:
        groups = ["a"] * 5 + [None] * 2 + ["b"] * 3 + ["c"] * 3
        taken = [selection.shard_of(groups, number, 2) for number in (1, 2)]
        assert [sum(mine) for mine in zip(*taken, strict=True)] == [group is not None for group in groups]
        assert [sum(mine) for mine in taken] == [5, 6]


HOST = os.environ.get("UNICODE_FAST_HOST", "")
BENCHMARKS = ROOT / "benchmarks"


def prepare_kit(folder: Path) -> Path:
    command = [sys.executable, str(BENCHMARKS / "prepare_gpu.py"), "--host", HOST, "--out", str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder


@pytest.fixture(scope="class")
def dry_kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_kit(tmp_path_factory.mktemp("kit"))


def dry_run(
    folder: Path, kit: Path, *options: str, **variables: str
) -> tuple[subprocess.CompletedProcess, dict[str, dict]]:
    """The runner's output and stages."""
    command = [sys.executable, str(BENCHMARKS / "on_gpu.py"), str(folder / "results"), "--dry-run", "--kit", str(kit)]
    command += ["--work", str(folder / "work"), *options]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    rows = json.loads((folder / "results" / "on-gpu.json").read_text())["stages"]
    return found, {stage["stage"]: stage for stage in rows}


def texts(stage: dict) -> dict[str, str]:
    return {row["name"]: row["text"] for row in stage["rows"]}


@pytest.mark.host
class TestDryRun:
    def test_every_stage(self, dry_kit: Path, tmp_path: Path) -> None:
        found, ran = dry_run(tmp_path, dry_kit)
        assert found.returncode == 0, found.stdout + found.stderr
        assert list(ran) == list(stages.STAGES)
        assert ran.pop("profile")["verdict"] == "refused"
        assert all(stage["verdict"] == "ok" and stage["rows"] for stage in ran.values())
        files = {path.name for path in (tmp_path / "results").iterdir()}
        assert len(files) <= 6
        assert {"on-gpu.json", "on-gpu-logs.tar.gz", "quantiser-cpu.json", "contrast-cpu.json"} < files
        with tarfile.open(tmp_path / "results" / "on-gpu-logs.tar.gz") as logs:
            assert "logs/targets-script.err" in logs.getnames()
        assert "the kit's" in texts(ran["build"])["program"]
        assert texts(ran["build"])["link"] == "done"
        missing = texts(ran["versions"])["packages"]
        assert all(name in missing for name in ("espeakng_loader", "webdataset"))
        # The rows that have not run are of libraries that are missing or have no kernel for a CPU.
        for name, stage in ran.items():
            idle = [row["text"] for row in stage["rows"] if row["ok"] is None]
            assert name in ("versions", "contenders", "forms") or not idle, idle
        for kernel in stages.KERNELS:
            timed = [row["median_ms"] for row in ran["kernels"]["rows"] if row["kernel"] == kernel]
            assert None in timed
            assert any(timed)
        assert {row["kernel"] for row in ran["kernels"]["rows"]} == set(stages.KERNELS)
        lacking = {f"other {switch}": "the kit has no native program" for switch in program_of.switches()}
        assert texts(ran["forms"]) == lacking
        assert "scores differ from the CPU's by" in texts(ran["default_run"])["float32"]

    def test_collapsed_codebooks(self) -> None:
        """The emulator takes minutes for the larger size."""
        command = [f"{HOST}/kernels", "--size", "collapsed", "--only", "search_wgmma"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            rows = [json.loads(process.stdout.readline()) for _ in range(2)]
            process.kill()
        cases = [f"2400 x 400 x 256, {name}" for name in ("40 distinct", "40 tight clusters")]
        assert [row["case"] for row in rows] == cases
        # One codeword takes part for all that are equal or near to it, so few rows have a second candidate.
        assert all(row["ok"] and row["fallback"] == 0 and row["candidates"] < 1.5 for row in rows)

    def test_stages_that_fail(self, dry_kit: Path, tmp_path: Path) -> None:
        """In the native program, in an operator, at a target, and in the default run, whose other rows are kept."""
        native = {"search_narrow": "crash", "search_wgmma": "hang", "apply": "wrong"}
        faults = {**native, "commitment_loss float32": "hang", "G5 K 1": "wrong", "bfloat16": "crash"}
        left_out = {
            "search_narrow": "kernels, search_narrow: killed by SIGABRT",
            "search_wgmma": "kernels, search_wgmma: timed out",
            "apply": "rows wrong",
            "commitment": "operators, commitment_loss float32: hangs",
            "cross_info_nce": "targets, G5 K 1: UNICODE_FAST_FAULT",
        }
        run = [name for name in stages.STAGES if name not in ("versions", "profile")]
        joined = ",".join(f"{name}:{fault}" for name, fault in faults.items())
        found, ran = dry_run(tmp_path, dry_kit, "--only", ",".join(run), UNICODE_FAST_FAULT=joined)
        assert found.returncode == 1
        table = found.stdout.split("\n\n")[-1]
        lines = table.splitlines()
        for name, text in left_out.items():
            assert any(f"left out: {name} (" in line and text in line for line in lines), table
        assert any("WRONG default_run bfloat16: killed by SIGABRT" in line for line in lines), table
        verdicts = {name: stage["verdict"] for name, stage in ran.items()}
        wrong = {"kernels", "operators", "targets", "default_run"}
        assert verdicts == {name: "WRONG" if name in wrong else "ok" for name in run}, table
        known = {"sanitizers": native, "operators": native, "targets": {*native, "commitment"}}
        for name in run[run.index("sanitizers") :]:
            assert ran[name]["without"] == sorted(known.get(name, left_out))
        assert not [row for row in ran["sanitizers"]["rows"] if row["name"].split()[-1] in native]
        for stage, row, kernel in (
            ("operators", "nearest_codeword narrow", "search_narrow"),
            ("operators", "codebook_update paper", "apply"),
            ("targets", "G2", "apply"),
            ("targets", "G4", "apply"),
            ("contenders", "search, published, ours with mma.sync", "search_narrow"),
            ("contenders", "update, narrow, ours", "apply"),
            ("contenders", "published, bfloat16, ours", "cross_info_nce"),
        ):
            assert texts(ran[stage])[row].startswith("left out: "), (row, texts(ran[stage])[row])
            assert kernel in texts(ran[stage])[row]
        ours = [row for row in ran["step"]["rows"] if row.get("contender", "").startswith("recommended")]
        assert ours
        assert all(row["without"] == sorted(left_out) for row in ours)
        # No table has these rows.
        steps = json.loads((tmp_path / "results" / "train-step-cpu.json").read_text())
        assert [row["contender"] for row in steps] == ["the original"]
        assert {row["name"]: row["ok"] for row in ran["default_run"]["rows"]} == {
            "float32": True,
            "in a CUDA graph": True,
            "bfloat16": False,
            "resume": True,
        }

    def test_a_kit_of_other_sources(self, dry_kit: Path, tmp_path: Path) -> None:
        """The whole extension is compiled, and the native program if there is a CUDA compiler."""
        kit = tmp_path / "kit"
        kit.mkdir()
        for path in dry_kit.iterdir():
            (kit / path.name).symlink_to(path)
        manifest = json.loads((kit / "manifest.json").read_text())
        manifest["objects"]["sources"] = manifest["kernels"]["inputs"] = "0"
        (kit / "manifest.json").unlink()
        (kit / "manifest.json").write_text(json.dumps(manifest))
        found, ran = dry_run(tmp_path, kit, "--only", "build")
        assert found.returncode == 0, found.stdout + found.stderr
        rows = texts(ran["build"])
        assert "objects must be of sources" in rows["link"]
        assert rows["compile"] == "done"
        assert "are imported" in rows["import"]
        expected = "compiled here, as the kit's native program is of other sources"
        assert (expected if shutil.which("nvcc") else "nvcc is not installed") in rows["program"]
