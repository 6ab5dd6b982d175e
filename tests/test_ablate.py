"""Ablations and reports: the runs, resuming, records, and tables with the scores of the runs."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import yaml

from unicode_fast import ablate, preset
from unicode_fast.checkpoint import CheckpointError
from unicode_fast.config import ADDED_FIELDS
from unicode_fast.data.talking_digits.digits import MODALITIES
from unicode_fast.files.locks import InUse
from unicode_fast.files.writing import write_json
from unicode_fast.many_runs import cause_in, held
from unicode_fast.presets import usual
from unicode_fast.report import ablation, published
from unicode_fast.report import tables as report
from unicode_fast.tasks import Estimate, Row, TokenScore
from unicode_fast.train import main as train
from unicode_fast.training.checks import check_flags

pytestmark = pytest.mark.usefixtures("short_probes")

ROOT = Path(__file__).resolve().parent.parent
SMALL = {**tiny.SIZES, "steps": 6, "batch_size": 10, "validations": 0}
PAIR = {name: value for name, value in SMALL.items() if name != "word_width"} | {"modalities": "audio,video"}


def words(**fields: object) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


class TestVariants:
    def test_table_2_takes_two_modalities_and_all_rows(self) -> None:
        found = ablate.variants(tiny.config(), ("audio", "video", "text"), ["table2"], [])
        assert [variant.label for variant in found] == list(ablate.COMPONENTS)
        assert {variant.config.data.modalities for variant in found} == {"audio,video"}
        assert len({variant.folder for variant in found}) == len(found)

    def test_every_row_changes_the_named_component(self) -> None:
        base = tiny.config()
        found = {variant.label: variant.config.method for variant in ablate.variants(base, ("a", "b"), ["table3"], [])}
        assert found["none"] == base.method
        assert found["CLUB"].club_estimator == "none"
        assert found["Cross-CPC"].cpc_weight == 0
        assert found["MM-EMA"].ema_partner == "none" and found["MM-EMA"].commitment_partner == 0
        assert found["reset"].reset_after == 0
        assert found["code matching"].code_matching_weight == 0
        assert "CLUB + Cross-CPC" not in found

    def test_equal_configurations_share_their_runs(self, tmp_path: Path) -> None:
        base = tiny.config(codewords=16)
        found = ablate.variants(base, ("a", "b", "c"), ["table3", "figure3"], [8, 16])
        runs = ablate.units(tmp_path, found, [0, 1])
        assert len(found) == 7 + 2
        assert len(runs) == 2 * (7 + 1)
        assert [unit.config.train.seed for unit in runs] == [0] * 8 + [1] * 8

    def test_table_1_has_the_methods_of_the_paper(self) -> None:
        base = tiny.config(steps=7)
        found = {one.label: one.config for one in ablate.variants(base, ("a", "b", "c"), ["table1"], [])}
        assert list(found) == list(dict.fromkeys(one.method for one in published.published() if one.table == 1))
        assert {(one.data.modalities, one.train.steps, one.model.width) for one in found.values()} == {("a,b", 7, 16)}
        assert found["Uni-Code"] == base.replace(modalities="a,b")
        assert (found["DCID+CMCM"].method.method, found["DCID+CMCM"].method.dcid) == ("cmcm", True)
        assert found["DCID+CMCM"].method.club_estimator == base.method.club_estimator
        assert found["CMCM"].method.club_estimator == "none"

    def test_changes_leave_the_methods_of_table_1_as_they_are(self) -> None:
        base = tiny.config(cpc_weight=0.5, club_weight=0.2)
        kinds = ("vector", "grid")
        found = {one.label: one.config for one in ablate.variants(base, ("a", "b"), ["table1"], [], kinds)}
        assert (found["S-MiT"].method.cpc_weight, found["S-MiT"].method.club_estimator) == (0, "none")
        assert (found["DCID+S-MiT"].method.cpc_weight, found["DCID+S-MiT"].method.club_weight) == (0.5, 0.2)
        for config in found.values():
            check_flags(config, (), usual(config).flat(), kinds)

    def test_fields_of_other_methods(self) -> None:
        found = {one.label: one for one in ablate.table_1(tiny.config(modalities="a,b"), others={"smit_alpha": 0.25})}
        assert {name for name, one in found.items() if one.config.method.smit_alpha == 0.25} == {"S-MiT", "DCID+S-MiT"}
        assert found["Uni-Code"].folder == "a-b/complete"
        with pytest.raises(ValueError, match="^smit_alpha must be a field that a row of this call reads, got smit_al"):
            ablate.variants(tiny.config(), ("a", "b"), ["table2"], [], others={"smit_alpha": 0.25})

    def test_own_losses_of_uni_code_in_table_1(self) -> None:
        base = tiny.config()
        said = ablate.own_losses(base)
        for name in ("assignment_weight", "grounding_weight", "commitment_partner"):
            assert f"`{name} {base.flat()[name]}`" in said
        assert "assignment_weight" not in ablate.own_losses(tiny.config("official"))

    def test_unknown_experiment(self) -> None:
        with pytest.raises(ValueError, match="experiments must be among table1, table2, table3, figure3, got 'table9'"):
            ablate.variants(tiny.config(), ("a", "b"), ["table9"], [])

    def test_a_folder_of_another_configuration_is_refused(self, tmp_path: Path) -> None:
        found = ablate.variants(tiny.config(), ("a", "b"), ["figure3"], [8])
        [unit] = ablate.units(tmp_path, found, [0])
        unit.folder.mkdir(parents=True)
        (unit.folder / "config.yaml").write_text(yaml.safe_dump({**unit.config.flat(), "steps": 7}))
        with pytest.raises(ValueError, match="was trained with another"):
            ablate.units(tmp_path, found, [0])
        # Fields of execution may differ.
        (unit.folder / "config.yaml").write_text(yaml.safe_dump({**unit.config.flat(), "micro_batches": 2}))
        assert ablate.units(tmp_path, found, [0]) == [unit]


@pytest.mark.parametrize("sizes", ["", "a", "1", "4,,8"])
def test_bad_sizes(sizes: str) -> None:
    with pytest.raises(ValueError, match="sizes must be whole numbers of at least 2"):
        ablate.numbers(sizes, "sizes")


def test_whole_command_and_again(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = words(data=store, **SMALL, experiments="figure3", sizes="4,12", seeds=1, jobs=2)
    out = tmp_path / "ablation"
    assert ablate.main([f"--out={out}", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    by_fields = {str(run["fields"]): run for run in json.loads((out / "runs.json").read_text())["runs"]}
    complete = json.loads((out / "audio-video-text" / "complete" / "seed-0" / "summary.json").read_text())
    assert len(by_fields) == 2 and by_fields["{'modalities': 'audio,video,text'}"]["rows"] == complete["rows"]
    assert by_fields["{'codewords': 4, 'modalities': 'audio,video,text'}"]["seed"] == 0
    page = (out / "ablation.md").read_text()
    assert "](figure3.png)" in page and "Not run yet" not in page
    assert (out / "figure3.png").stat().st_size > 1000
    table = list(csv.reader((out / "figure3.csv").open()))
    assert [line[:2] for line in table] == [["codewords", "seeds"], ["4", "1"], ["12", "1"]]
    row = Row.from_dict(complete["rows"][0])
    assert table[2][table[0].index(f"{row.task} {row.source} → {row.target}")] == f"{100 * row.score:.1f}"
    # A finished run is not trained again, and an unfinished run resumes.
    changed = (out / "audio-video-text" / "complete" / "seed-0" / "summary.json").stat().st_mtime_ns
    (out / "audio-video-text" / "codewords=4" / "seed-0" / "summary.json").unlink()
    (out / "runs.json").unlink()
    assert ablate.main([f"--out={out}", *flags, "--checkpoint_seconds=7"]) == 0
    again = json.loads((out / "audio-video-text" / "codewords=4" / "seed-0" / "summary.json").read_text())
    assert [(change["field"], change["after"]) for change in again["changes"]] == [("checkpoint_seconds", 7.0)]
    assert (out / "audio-video-text" / "complete" / "seed-0" / "summary.json").stat().st_mtime_ns == changed
    for run in json.loads((out / "runs.json").read_text())["runs"]:
        assert run["rows"] == by_fields[str(run["fields"])]["rows"]
    # A recorded run does not need its folder, and a missing run is named.
    shutil.rmtree(out / "audio-video-text")
    elsewhere = tmp_path / "elsewhere"
    flags = [*words(data=store, **SMALL, experiments="figure3", sizes="4,12", record=out / "runs.json")]
    monkeypatch.setattr(ablate, "run_all", lambda runs, *_: iter(()))
    assert ablate.main([f"--out={elsewhere}", "--seeds=2", *flags]) == 0
    other_page = (elsewhere / "ablation.md").read_text()
    assert "Not run yet: 4 (seed 1); 12 (seed 1)." in other_page
    assert [line for line in other_page.splitlines() if line.startswith("| 12 |")] == [
        line for line in page.splitlines() if line.startswith("| 12 |")
    ]


def test_table_1_beside_the_paper(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of its rows are trained, the others are named."""
    run_all = ablate.run_all
    monkeypatch.setattr(ablate, "run_all", lambda runs, *rest: run_all(runs[1:3], *rest))
    flags = words(data=store, **{**PAIR, "steps": 2}, table=1, seeds=1, jobs=2)
    assert ablate.main([f"--out={tmp_path / 'ablation'}", *flags]) == 0
    page = capsys.readouterr().out
    ours, theirs = page.split("The same in the paper, ")
    assert "The row Uni-Code is the configuration of this call" in ours
    assert "Fields with other values than usual: `--width 16 --codewords" in ours and f"--data {store}" in ours
    assert "## Table 1: methods, pre-trained on two modalities" in ours
    assert "Not run yet: Baseline (seed 0); CODIS (seed 0); " in ours
    rows = [[line.split(" | ")[0] for line in half.splitlines() if line.startswith("| ")] for half in (ours, theirs)]
    assert [one for one in rows[0] if one in ("| S-MiT", "| MST")][:2] == ["| S-MiT", "| MST"]
    assert rows[1] == ["| method", "| ---", "| S-MiT", "| MST"] and "| 15.9 | 14.4 |" in theirs
    with pytest.raises(ValueError, match="^table must be 1, 2 or 3, got 4$"):
        ablate.main([f"--out={tmp_path / 'other'}", *words(data=store, table=4)])
    with pytest.raises(ValueError, match="^table must not be given together with experiments, got 1 beside it$"):
        ablate.main([f"--out={tmp_path / 'other'}", *words(data=store, table=1, experiments="table2")])
    with pytest.raises(ValueError, match="^method must be uni-code, whose components are removed, got 's-mit'$"):
        ablate.main([f"--out={tmp_path / 'other'}", *words(data=store, **SMALL, method="s-mit")])


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "its log is empty"),
        ("probes: 0%| | 0/6 [00:00<?]error: data are gone\rprobes: 10%| | 1/6\n", "data are gone"),
        ("begins\nerror: first\nerror: last\nprobes: 10%\n", "last"),
        ("begins\nkilled\n", "killed"),
    ],
)
def test_cause_of_a_failed_run(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "run.log").write_text(text)
    assert cause_in(tmp_path / "run.log") == cause


class TestRecord:
    def test_a_row_for_each_run(self, tmp_path: Path) -> None:
        base = tiny.config()
        record = ablate.Record(tmp_path / "runs.json", base)
        row = Row("classification", "audio", "video", 0.5, 0.75, 0.25)
        summary = {"rows": [row.as_dict()], "seconds": 150.0, "threads": 1, "git_commit": "0"}
        assert record.times() == ""
        changed = base.replace(code_matching_weight=0.0, seed=3)
        assert record.find(changed) is None
        for _ in range(2):
            record.add(changed, summary)
        read = ablate.Record(tmp_path / "runs.json", base.replace(seed=7, micro_batches=2))
        assert read.runs == [
            {
                "fields": {"code_matching_weight": 0.0},
                "seed": 3,
                "rows": [row.as_dict()],
                "seconds": 150.0,
                "threads": 1,
            }
        ]
        assert "took 2.5 minutes a run (median) with 1 thread(s)" in read.times()
        assert read.find(changed) == [row]
        assert read.find(changed.replace(seed=4)) is None and read.find(base.replace(seed=3)) is None

    def test_two_that_add_to_one_file(self, tmp_path: Path) -> None:
        base = tiny.config()
        first, second = (ablate.Record(tmp_path / "runs.json", base) for _ in range(2))
        for seed, record in enumerate((first, second, first)):
            record.add(base.replace(seed=seed), {"rows": []})
        assert [run["seed"] for run in ablate.Record(tmp_path / "runs.json", base).runs] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("runs", "fault"),
        [
            ([{"fields": {}, "seed": 0}], "KeyError: 'rows'"),
            ([{"fields": {}, "seed": 0, "rows": []}] * 2, "run 1 is a duplicate"),
            ([{"fields": "x", "seed": 0, "rows": []}], "ValueError"),
            ([{"fields": {}, "seed": 0, "rows": [{"score": float("nan")}]}], "run 0 has nan"),
            ([{"fields": {}, "seed": 0, "rows": [{"score": 9.0}]}], "run 0 has 9.0"),
            ([{"fields": {}, "seed": 0, "rows": [{"score": "0.5"}]}], r"of the types .* got \['0.5'\]"),
        ],
    )
    def test_a_damaged_row(self, tmp_path: Path, runs: list, fault: str) -> None:
        record = ablate.Record(tmp_path / "runs.json", tiny.config())
        whole = Row("classification", "audio", "video", 0.5, 0.75, 0.25).as_dict()
        for run in runs:
            rows = {"rows": [{**whole, **row} for row in run["rows"]]} if "rows" in run else {}
            record.runs.append({**run, **rows})
        record.write()
        with pytest.raises(ValueError, match=f"record must be a new file or .*, got .*runs.json': .*{fault}"):
            ablate.Record(tmp_path / "runs.json", tiny.config())

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="record must be a new file or one of an ablation"):
            ablate.Record(tmp_path, tiny.config())

    def test_of_another_configuration(self, tmp_path: Path) -> None:
        base = tiny.config()
        ablate.Record(tmp_path / "runs.json", base).write()
        with pytest.raises(
            ValueError, match=r"record must be new or of the same configuration.*steps .* instead of 17"
        ):
            ablate.Record(tmp_path / "runs.json", base.replace(steps=17))

    def test_before_a_field_was_added(self, tmp_path: Path) -> None:
        base = tiny.config().replace_all(**ADDED_FIELDS)
        path = tmp_path / "runs.json"
        ablate.Record(path, base).write()
        content = json.loads(path.read_text())
        path.write_text(
            json.dumps({**content, "config": {k: v for k, v in content["config"].items() if k not in ADDED_FIELDS}})
        )
        assert ablate.Record(path, base).runs == []
        with pytest.raises(ValueError, match="feature_norm 'none' instead of 'batch'"):
            ablate.Record(path, base.replace(feature_norm="batch"))

    def test_fields_of_other_methods_do_not_matter_to_uni_code(self, tmp_path: Path) -> None:
        base, path = tiny.config(), tmp_path / "runs.json"
        ablate.Record(path, base.replace_all(fcid_target="moving")).add(base, {"rows": []})
        assert ablate.Record(path, base.replace_all(fcid_target="fixed")).find(base) == []

    @pytest.mark.parametrize("content", ["", "[]", '{"lines": []}', '{"config": {}, "runs": []}'])
    def test_no_such_file(self, tmp_path: Path, content: str) -> None:
        path = tmp_path / "runs.json"
        path.write_text(content)
        with pytest.raises(ValueError, match="record must be a new file or one of an ablation"):
            ablate.Record(path, tiny.config())
        assert path.read_text() == content


def line(label: str, *scores: tuple[float, float]) -> ablation.Line:
    """Classification from audio to video and back, of seeds 0, 1, ..."""
    return ablation.Line(
        label,
        {
            seed: [
                Row("classification", "audio", "video", there, 1, 0, token=TokenScore(there / 2, 1)),
                Row("classification", "video", "audio", back, 1, 0, token=TokenScore(back / 2, 1)),
                Row("classification", "audio", "text", 0.1 * seed, 1, 0),
            ]
            for seed, (there, back) in enumerate(scores)
        },
    )


class TestChanges:
    def test_points_and_tokens_by_seed_and_the_papers(self) -> None:
        lines = [line("none", (0.5, 0.7), (0.6, 0.8)), line("CLUB", (0.4, 0.6), (0.6, 0.6), (0, 0))]
        [change] = ablation.changes("table2", lines)
        assert change.by_seed == pytest.approx([-10, -10]) and change.tokens == pytest.approx([-5, -5])
        # Table 2, AVE: 37.2 and 40.3 % without CLUB, 47.7 and 52.3 % with it.
        assert change.paper == pytest.approx((37.2 + 40.3 - 47.7 - 52.3) / 2)

    def test_nothing_without_the_complete_method(self) -> None:
        assert ablation.changes("table2", [line("CLUB", (0.4, 0.6))]) == []
        assert ablation.changes("table2", [line("none", (0.4, 0.6))]) == []

    def test_the_interval_is_students(self) -> None:
        values = [1.0, 2.0, 4.0]
        found = ablation.t_interval(values)
        # t of 0.975 with 2 degrees of freedom is 4.3027; the deviation is sqrt(7/3).
        assert found == pytest.approx((7 / 3 - 4.30265 * (7 / 9) ** 0.5, 7 / 3 + 4.30265 * (7 / 9) ** 0.5), abs=1e-4)
        assert ablation.t_interval([1.0]) is None

    @pytest.mark.parametrize(
        ("by_seed", "paper", "finding"),
        [
            ([-10.0], -5.0, "one seed decides nothing"),
            ([-10.0, -10.5, -11.0], -10.2, "as in the paper"),
            ([-10.0, -10.5, -11.0], -5.0, "as in the paper, but more"),
            ([-10.0, -10.5, -11.0], -15.0, "as in the paper, but less"),
            ([-10.0, -10.5, -11.0], 5.0, "unlike the paper: the other way"),
            ([-10.0, 3.0, 9.0], -5.0, "undecided"),
            ([-1.0, 0.0, 1.5], -5.0, "unlike the paper: less or none"),
        ],
    )
    def test_finding(self, by_seed: list[float], paper: float, finding: str) -> None:
        assert ablation.Change("CLUB", "classification", by_seed, [], paper).finding == finding


def test_table_3_is_measured_across_data_sets_where_there_are_two() -> None:
    expected = "classification,localisation,cross-classification,cross-localisation"
    base = preset("recommended")
    assert ablate.with_all_columns(base, {}).train.probe_tasks == expected
    for config, flags in (
        (base.replace(data="store"), {}),
        (base, {"probe_tasks": "classification"}),
        (base.replace(probe_tasks="classification"), {}),
    ):
        assert ablate.with_all_columns(config, flags) == config


def test_the_page_of_the_documentation_is_that_of_the_record(tmp_path: Path) -> None:
    """The command of docs/reports.md goes on from the record."""
    flags = {"data": "talking-numbers", "steps": 400, "validations": 0}
    base = ablate.with_all_columns(preset("recommended").replace(**flags), {})
    record = ablate.Record(ROOT / "benchmarks" / "results" / "ablation.json", base)
    experiments = ablate.DEFAULT_EXPERIMENTS.split(",")
    found = ablate.variants(base, tuple(MODALITIES), experiments, ablate.numbers(ablate.SIZES, "sizes"))
    ablate.write_results(tmp_path, record, found, (0, 1, 2), base, flags=" ".join(words(**flags)).replace("=", " "))
    assert (tmp_path / "ablation.md").read_text() == (ROOT / "docs" / "ablation.md").read_text()


def test_a_second_call_in_the_same_folder(store: Path, tmp_path: Path) -> None:
    with held(tmp_path / "ablation"), pytest.raises(InUse, match="^folder .*ablation is in use by this process"):
        ablate.main([f"--out={tmp_path / 'ablation'}", *words(data=store, **SMALL)])


def test_a_failed_run_is_named(store: Path, tmp_path: Path) -> None:
    flags = words(data=store, **{**SMALL, "steps": 2}, experiments="figure3", sizes="100000", seeds=1)
    with pytest.raises(RuntimeError, match=r"codewords=100000/seed-0 failed: codewords must be at most"):
        ablate.main([f"--out={tmp_path / 'ablation'}", *flags])


def test_a_page_of_somebody_else_stays(store: Path, tmp_path: Path) -> None:
    (tmp_path / "ablation.md").write_text("# Notes")
    with pytest.raises(ValueError, match=r"out must be a new folder or .*, .*ablation.md is another file"):
        ablate.main([f"--out={tmp_path}", *words(data=store, **SMALL)])
    with pytest.raises(ValueError, match="out must be a folder, got ''"):
        ablate.main(["--out=", *words(data=store, **SMALL)])
    assert (tmp_path / "ablation.md").read_text() == "# Notes"


class TestPublished:
    def test_count(self) -> None:
        by_table = {table: sum(number.table == table for number in published.published()) for table in range(1, 6)}
        assert by_table == {1: 12 * 3 * 4, 2: 8 * 2 * 4, 3: 7 * 8 + 6, 4: 2 * (2 + 2 + 1 + 1), 5: 8}

    def test_single_numbers(self) -> None:
        found = {
            (number.table, number.pretraining, number.method, number.dataset, number.source): number.score
            for number in published.published()
            if number.measure == published.TASKS[number.dataset][1]
        }
        assert found[1, "AV 40K", "Uni-Code", "AVE", "audio"] == 52.3
        assert found[2, "AV 24K", "without Cross-CPC", "AVVP", "video"] == 10.9
        assert found[3, "AVT 40K", "Uni-Code", "UCF↔VGG", "audio"] == 60.6
        assert found[4, "AVT 40K", "Uni-Code", "AVS-S4", "audio"] == 78.0
        assert found[5, "VT 24K", "Uni-Code", "retrieval", "video"] == 21.9
        assert found[5, "VT 24K", "Uni-Code", "retrieval", "text"] == 16.7


@pytest.fixture(scope="module")
def runs(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    flags = words(data=store, **PAIR)
    train([*flags, "--seeds=2", f"--out={folder / 'two'}"])
    train([*flags, "--code_matching_weight=0", f"--out={folder / 'other'}"])
    for run in (folder / "two" / "seed-0", folder / "two" / "seed-1", folder / "other"):
        summary = json.loads((run / "summary.json").read_text())
        assert summary["dataset"] == "tiny"
        write_json(run / "summary.json", {**summary, "dataset": "talking-digits"})
    row = Row("segmentation", "audio", "video", 0.5, 0.6, 0.1)
    (folder / "other" / "evaluations").mkdir()
    write_json(
        folder / "other" / "evaluations" / "one.json", {"row": row.as_dict(), "flags": {"data": "/far/elsewhere"}}
    )
    row = Row("localisation", "audio", "video", 0.5, 0.6, 0.1, metrics={"official_precision": Estimate(0.41)})
    write_json(folder / "other" / "evaluations" / "two.json", {"row": row.as_dict(), "flags": {}})
    row = Row("classification", "audio", "video", 0.7, 0.8, 0.1, protocol="official")
    for name, flags in (("seed", {"seed": 3}), ("same", {})):
        write_json(folder / "other" / "evaluations" / f"{name}.json", {"row": row.as_dict(), "flags": flags})
    return [folder / "two", folder / "other"]


class TestReport:
    def test_lines(self, runs: list[Path]) -> None:
        first, second = report.collect(report.single_runs(map(str, runs)))
        assert len(first.folders) == 2 and len(second.folders) == 1
        assert (first.label, second.label) == ("recommended", "code_matching_weight 0.0")
        assert first.common == second.common and first.common.startswith("Uni-Code, recommended, width 16, ")
        (alone,) = report.collect(first.folders)
        assert alone.label.startswith("recommended, width 16, ") and alone.common == ""
        column = report.Column("classification", "audio", "video", "held_out")
        scores = [
            next(row for row in json.loads((folder / "summary.json").read_text())["rows"] if row["to"] == "video")[
                "score"
            ]
            for folder in first.folders
        ]
        assert first.cells[column].score == pytest.approx(sum(scores) / 2)
        assert first.cells[column].std == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        assert second.cells[report.Column("segmentation", "audio", "video", "held_out", "data elsewhere")].score == 0.5

    @pytest.mark.parametrize(
        ("several", "labels", "common"),
        [
            ([{}, {"method": "s-mit"}], ["Uni-Code", "S-MiT"], "recommended"),
            ([{"steps": 7}, {"method": "s-mit", "steps": 7}], ["Uni-Code", "S-MiT"], "recommended, steps 7"),
            ([{"method": "s-mit", "dcid": True}, {"method": "s-mit"}], ["DCID+S-MiT", "S-MiT"], "recommended"),
            ([{"size": "paper"}, {"steps": 7}], ["recommended (paper size)", "recommended, steps 7"], "Uni-Code"),
            ([{"steps": 7}, {"steps": 8}, {}], ["steps 7", "steps 8", "recommended"], "Uni-Code, recommended"),
            ([{"fcid_target": "moving"}, {"steps": 7}], ["recommended", "steps 7"], "Uni-Code, recommended"),
            ([{"method": "s-mit", "steps": 7}], ["S-MiT, recommended, steps 7"], ""),
        ],
    )
    def test_labels_say_what_differs(self, several: list[dict], labels: list[str], common: str) -> None:
        of = ("size", "method", "dcid")
        configs = [
            preset("recommended", **{name: value for name, value in one.items() if name in of}).replace_all(
                **{name: value for name, value in one.items() if name not in of}
            )
            for one in several
        ]
        assert report.labels_of(configs) == (labels, common)

    def test_a_published_number_stands_once_beside_the_official_column_of_its_data(self) -> None:
        def column(task: str, source: str, target: str, protocol: str = "held_out") -> report.Column:
            return report.Column(task, source, target, protocol, dataset=report.published_as(task, names[task]))

        names = {"classification": "ave", "localisation": "avvp"}
        columns = [
            column("classification", "audio", "video"),
            column("classification", "video", "audio"),
            column("localisation", "video", "audio"),
            column("classification", "audio", "video", "official"),
        ]
        line = report.Line("ours", [], {column: report.Cell(0.5, None, 1, 0.6, 0.1) for column in columns})
        heading, *table = report.wide_table([line])
        (theirs,) = [line for line in table if line[0] == "published (Xia et al., 2023), AV 40K"]
        shown = {column: number for column, number in zip(heading[2:], theirs[2:], strict=True) if number != "-"}
        assert shown == {
            "classification audio → video (official)": "52.3 (AVE, accuracy)",
            "classification video → audio": "47.7 (AVE, accuracy)",
            "localisation video → audio": "64 (AVVP, precision)",
        }
        drawn = report.figure_series([line])
        assert list(drawn)[0] == "ours, n = 1"
        theirs_drawn = drawn["published (Xia et al., 2023), AV 40K"]
        assert len(theirs_drawn) == 3 and theirs_drawn["classification", "audio → video (official)"] == (0.523, None)
        assert report.other_published([line]) is None
        both = report.published_lines([line, replace(line, method="S-MiT")])
        assert {"AV 40K, Uni-Code", "AV 40K, S-MiT"} <= set(both) and "AV 40K" not in both

    def test_numbers_of_other_data_are_in_no_line_and_no_figure(self, runs: list[Path]) -> None:
        lines = report.collect(report.single_runs(map(str, runs)))
        assert [line[0] for line in report.wide_table(lines)[1:]] == [line.label for line in lines]
        drawn = zip(report.figure_series(lines), lines, strict=True)
        assert [name.removeprefix(line.label) for name, line in drawn] == [", n = 2", ", n = 1"]
        cells = {column: replace(cell, seeds=1 + place) for place, (column, cell) in enumerate(lines[0].cells.items())}
        (name,) = report.figure_series([replace(lines[0], cells=cells)])
        assert name.endswith(f", n = 1 to {len(cells)}")
        heading, *others = report.other_published([*lines, replace(lines[0], method="S-MiT")]) or []
        place = heading.index("AVE audio → video")
        theirs = {(line[0], line[1]): line[place] for line in others}
        assert theirs["Uni-Code", "AV 40K"] == "accuracy 52.3" and theirs["S-MiT", "AV 40K"] == "accuracy 15.9"
        assert {method for method, _ in theirs} == {"Uni-Code", "S-MiT"}

    def test_published_numbers_of_every_task(self) -> None:
        def column(task: str, source: str, target: str, dataset: str) -> report.Column:
            return report.Column(task, source, target, "official", dataset=dataset)

        columns = [
            column("segmentation", "audio", "text", "AVS-S4"),
            column("retrieval", "video", "text", "retrieval"),
            column("cross-localisation", "audio", "video", "AVE→AVVP"),
        ]
        cell = report.Cell(0.5, None, 1, 0.5, 0.5)
        found = report.published_lines([report.Line("", [], dict.fromkeys(columns, cell))])
        shown = {
            name: {one.task: report.shown_published(several) for one, several in line.items()}
            for name, line in found.items()
        }
        assert shown == {
            "AVT 40K": {"segmentation": "78 (AVS-S4, mIoU; F-score 87.1)", "cross-localisation": "52.4 (AVE→AVVP, F1)"},
            "VT 24K": {"retrieval": "21.9 (retrieval, R@10; R@5 10.3)"},
        }

    def test_a_number_is_beside_its_own_data_set_only(self) -> None:
        """The data set is found by its name, which a packed store keeps; the built-in data are none of the paper's."""
        for task, name, dataset in (
            ("classification", "talking-digits", None),
            ("classification", "ave", "AVE"),
            ("localisation", "ave", None),
            ("classification", "vggsound-avel40k", None),
            ("classification", "mine", None),
            ("cross-localisation", "ave-avvp", "AVE→AVVP"),
        ):
            assert report.published_as(task, name) == dataset

    def test_the_other_numbers_of_ours(self) -> None:
        metrics = {"f_score": Estimate(0.25), "official_f_score": Estimate(0.75), "text->audio R@5": Estimate(0.125)}
        retrieved = Row("retrieval", "video", "text", 0.5, 0.6, 0.1, anchor="audio", metrics=metrics)
        masked = Row("segmentation", "audio", "text", 0.5, 0.6, 0.1, metrics=metrics)
        rows = (retrieved, masked, replace(masked, protocol="official"), replace(masked, metrics={}))
        assert [str(report.cell_of([row])) for row in rows] == [
            "50.0 (R@5 12.5)",
            "50.0 (F-score 25.0)",
            "50.0 (F-score 75.0)",
            "50.0",
        ]

    def test_files(self, runs: list[Path], tmp_path: Path) -> None:
        (runs[1] / "plots" / "retrieval.pdf").write_bytes(b"%PDF")
        assert report.main([*map(str, runs), "--out", str(tmp_path / "report"), "--format=svg"]) == 0
        text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
        assert "segmentation audio → video (data elsewhere)" in text
        ours, theirs = text.split("## Published numbers of other data sets")
        assert "published" not in ours and "52.3" not in ours and "| Uni-Code | AV 40K | accuracy 47.7 |" in theirs
        assert (tmp_path / "report" / "report.svg").stat().st_size > 1000
        assert "All runs: Uni-Code, recommended, width 16, " in ours
        assert "\n[retrieval of code_matching_weight 0.0]" in ours and "](1-retrieval.pdf)" in ours
        lines = list(csv.DictReader((tmp_path / "report" / "report.csv").open()))
        ours = [line for line in lines if line["task"] == "segmentation"]
        assert [(line["score"], line["seeds"], line["std"]) for line in ours] == [("0.5", "1", "")]
        assert not any("published" in line["run"] for line in lines)
        assert "| 50.0 (precision 41.0) |" in text
        ours = [line for line in lines if (line["task"], line["measure"]) == ("localisation", "precision")]
        assert [line["score"] for line in ours if line["seeds"]] == ["0.41"]
        for shown in text.split("](")[1:]:
            assert (tmp_path / "report" / shown.split(")")[0]).is_file()

    @pytest.mark.parametrize("make", [lambda path, secret: path.symlink_to(secret), lambda path, _: os.mkfifo(path)])
    def test_a_picture_that_is_none_of_the_run(
        self, make: Callable[[Path, Path], None], runs: list[Path], tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("of this machine")
        picture = runs[1] / "plots" / "timeline-of-others.png"
        make(picture, tmp_path / "secret")
        try:
            with pytest.raises(CheckpointError, match="timeline-of-others.png must be a file of the run itself"):
                report.main([*map(str, runs), "--out", str(tmp_path / "report")])
        finally:
            picture.unlink()
        assert not (tmp_path / "report").exists()

    def test_doubtful_scores_are_named(self, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        file = runs[1] / "summary.json"
        kept = file.read_text()
        summary = json.loads(kept)
        chance = {**summary["rows"][0], "score": 0.1, "same_modality": 0.1, "chance": 0.5}
        warnings = ["the codebook \x1b[31mhas collapsed", "classification: not above chance, as older versions said"]
        file.write_text(json.dumps({**summary, "rows": [chance], "warnings": warnings}))
        try:
            assert report.main([str(runs[1]), "--out", str(tmp_path / "report")]) == 0
        finally:
            file.write_text(kept)
        said = capsys.readouterr().out
        assert "Doubtful scores:\n\n- " in said and "the codebook \\x1b[31mhas collapsed" in said
        assert "not above chance even if trained and tested on the same modality" in said
        assert said.count("not above chance") == 1

    def test_nothing_is_overwritten(self, runs: list[Path], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="out must be a folder that does not exist yet"):
            report.main([str(runs[1]), "--out", str(tmp_path)])

    def test_a_run_without_scores_is_named_and_nothing_is_left(self, store: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        train(words(data=store, out=run, **{**PAIR, "validations": 0, "probe_tasks": "none"}))
        with pytest.raises(CheckpointError, match=f"run must have scores, '{run}' has none"):
            report.main([str(run), "--out", str(tmp_path / "report")])
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_a_run_counts_once(self, runs: list[Path], tmp_path: Path) -> None:
        linked, copied = tmp_path / "linked", tmp_path / "copied"
        linked.symlink_to(runs[0])
        assert report.single_runs([str(runs[0]), str(linked)]) == report.single_runs([str(runs[0])])
        shutil.copytree(report.single_runs([str(runs[0])])[0], copied)
        with pytest.raises(CheckpointError, match="must differ in their seed, .* both have seed"):
            report.collect(report.single_runs([str(runs[0]), str(copied)]))

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="run must be a run folder"):
            report.main([str(tmp_path), "--out", str(tmp_path / "report")])
