"""The leaderboard: its rows, the record, resuming, and the claims that follow from scores."""

import json
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from PIL import Image

from unicode_fast import leaderboard, many_runs, preset
from unicode_fast.cli import check_read
from unicode_fast.config import FIELDS
from unicode_fast.files.locks import InUse
from unicode_fast.files.writing import write_json
from unicode_fast.many_runs import Record, Unit, held
from unicode_fast.methods import METHODS
from unicode_fast.presets import usual
from unicode_fast.report import leaderboard as board
from unicode_fast.tasks import Row, TokenScore
from unicode_fast.training.checks import check_flags

pytestmark = pytest.mark.usefixtures("no_pictures")

ROOT = Path(__file__).resolve().parent.parent
SMALL = {**tiny.SIZES, "steps": 2, "batch_size": 10, "probe_tasks": "classification"}


def words(**fields: object) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


def rows(there: float, back: float, localised: float | None = None) -> list[Row]:
    """Classification between audio and video, and from audio to text."""
    found = [
        Row("classification", "audio", "video", there, 1, 0.1, token=TokenScore(there / 2, 1)),
        Row("classification", "video", "audio", back, 1, 0.1, token=TokenScore(back / 2, 1)),
        Row("classification", "audio", "text", 0.3, 1, 0.1, token=TokenScore(0.1, 1)),
    ]
    return found + ([] if localised is None else [Row("localisation", "audio", "video", localised, 1, 0.1)])


def standing(label: str, *scores: float, localised: float | None = None) -> board.Standing:
    """Seeds 0, 1, ..., with the same score in both directions between audio and video."""
    by_seed = {seed: rows(score, score, localised) for seed, score in enumerate(scores)}
    return board.Standing(label, by_seed, {seed: {"seconds": 60.0 * seed} for seed in by_seed})


def planned(out: Path, **fields: object) -> leaderboard.Plan:
    parser = leaderboard.make_parser("leaderboard", "")
    parser.add_argument("--out")
    parser.add_argument("--seeds", type=int)
    return leaderboard.planned(parser.parse_args([f"--out={out}", "--seeds=3", *words(**fields)]))


class TestEntries:
    def test_every_row_of_the_paper_and_later(self) -> None:
        found = [entry.label for entry in leaderboard.entries(("audio", "video", "text"))]
        assert set(board.PUBLISHED) | set(board.LATER) | {board.RECOMMENDED, board.TOC} < set(found)
        assert found[-1] == "Uni-Code (audio and video)" and len(found) == len(set(found)) == 12 + 1 + 4 + 1 + 1
        assert len(leaderboard.entries(("audio", "video"))) == len(found) - 1

    def test_names_of_the_papers_table(self) -> None:
        from unicode_fast.report.published import published

        assert set(board.PUBLISHED) == {number.method for number in published() if number.table == 1}

    def test_runs_have_folders_of_their_own_but_toc(self) -> None:
        entries = leaderboard.entries(("audio", "video", "text"))
        by_label = {entry.label: entry.folder for entry in entries}
        assert by_label[board.TOC] == by_label[board.UNI_CODE] == "uni-code"
        assert len(set(by_label.values())) == len(entries) - 1
        assert all(re.fullmatch(r"[a-z0-9+-]+", folder) for folder in by_label.values())

    def test_losses_of_the_paper(self) -> None:
        official, fields = preset("official").flat(), leaderboard.PAPER_LOSSES
        assert fields["assignment_weight"] == fields["presence_weight"] == fields["grounding_weight"] == 0
        assert {
            name: value for name, value in official.items() if name.startswith("commitment")
        }.items() <= fields.items()

    def test_later_methods_have_them_unless_their_own_differ(self) -> None:
        found = {entry.label: entry.fields for entry in leaderboard.entries(("audio", "video"))}
        for label in board.LATER:
            rules = METHODS[label.lower()].rules
            assert {name: value for name, value in found[label].items() if name != "method"} == {
                name: value for name, value in leaderboard.PAPER_LOSSES.items() if name not in rules
            }

    def test_chosen(self) -> None:
        entries = leaderboard.entries(("audio", "video"))
        assert leaderboard.chosen_entries(entries, None) == entries
        found = leaderboard.chosen_entries(entries, "uni-code, CMCM,cmcm")
        assert [entry.label for entry in found] == ["Uni-Code", "CMCM"]
        with pytest.raises(ValueError, match=r"only must be among Baseline, S-MiT, .*, got 'singing'"):
            leaderboard.chosen_entries(entries, "CMCM,singing")

    def test_changes_of_the_call_leave_the_definition_of_a_row(self, store: Path, tmp_path: Path) -> None:
        """A flag reaches the rows whose rules and switches leave it free; also in ablate and reproduce."""
        flags = {**SMALL, "temporal_layers": 2, "cpc_weight": 0.5, "club_weight": 0.2}
        found = {entry.label: config for entry, config in planned(tmp_path, data=store, **flags).rows.items()}
        for name in (board.BASELINE, *board.COMPARED):
            method = found[name].method
            assert (method.cpc_weight, method.club_estimator) == (0, "none")
            assert method.club_weight == usual(found[name]).method.club_weight
        for name in ("Uni-Code", "DCID+S-MiT", "DCID+CMCM"):
            assert (found[name].method.cpc_weight, found[name].method.club_weight) == (0.5, 0.2)
        # The size that a recipe sets is the method's.
        assert METHODS["fcid"].rules["temporal_layers"] == found["FCID"].model.temporal_layers == 1
        assert found["Uni-Code"].model.temporal_layers == found["MICU"].model.temporal_layers == 2

    def test_a_field_of_some_methods(self, store: Path, tmp_path: Path) -> None:
        """It reaches the rows that read it, from a flag and from a file."""
        file = tmp_path / "fields.yaml"
        file.write_text("align_weight: 0.5\n")
        plan = planned(tmp_path, data=store, **SMALL, config=file, smit_alpha=0.25)
        rows = {entry.label: config.method for entry, config in plan.rows.items()}
        assert {name for name, row in rows.items() if row.smit_alpha == 0.25} == {"S-MiT", "DCID+S-MiT"}
        assert {name for name, row in rows.items() if row.align_weight == 0.5} == {
            *(f"{dcid}{name}" for dcid in ("", "DCID+") for name in ("S-MiT", "MST", "CODIS", "TURN")),
            *("MICU", "FCID"),
        }
        assert plan.base.method == planned(tmp_path, data=store, **SMALL).base.method
        assert " --smit_alpha 0.25" in plan.command() and " --align_weight 0.5" in plan.command()
        with pytest.raises(ValueError, match="fcid_target must be a field that a row of this call reads"):
            check_read({"fcid_target": "initial"}, [plan.base])

    def test_only_rules_of_methods_differ(self, store: Path, tmp_path: Path) -> None:
        """Sizes, data, steps, batches, optimiser and tasks are equal but for rules, and no run refuses its fields."""
        plan = planned(tmp_path, data=store, **{**SMALL, "temporal_layers": 2})
        assert list(plan.seeds) == [0, 1, 2] and plan.base in plan.rows.values()
        for entry, config in plan.rows.items():
            differing = {name for name, value in config.flat().items() if plan.base.flat()[name] != value}
            two = entry.label == "Uni-Code (audio and video)"
            kinds = [tiny.MODALITIES[name].kind for name in ("audio", "video", "text")[: 2 if two else 3]]
            check_flags(config, (), usual(config).flat(), kinds)
            read = differing - {"modalities", *config.unread_fields(kinds)}
            rules = METHODS[config.method.method].rules
            assert {FIELDS[name] for name in read if name not in rules} <= {"method"}, entry.label
            assert ("modalities" in differing) == two


class TestIntroduction:
    def text(self, tmp_path: Path, **fields: object) -> str:
        plan = planned(tmp_path, **{"steps": 7, **fields})
        return "\n".join(plan.introduction(Record(tmp_path / "runs.json", plan.base, "a leaderboard")))

    def test_the_command_makes_the_same_page(self, tmp_path: Path) -> None:
        assert "with 1 seed. " in self.text(tmp_path, seeds=1)
        text = self.text(tmp_path, club_weight=0.2, device="cpu")
        (command,) = re.findall(r"`python -m unicode_fast.leaderboard (--out .*?)` writes this page", text)
        assert command == "--out FOLDER --seeds 3 --club_weight 0.2 --steps 7"
        arguments = dict(zip(command.split()[4::2], command.split()[5::2], strict=True))
        assert self.text(tmp_path, **{name[2:]: value for name, value in arguments.items()}) == text
        assert "--preset paper --size" not in self.text(tmp_path, preset="paper")
        assert "--out FOLDER --seeds 3 --preset paper --steps 7`" in self.text(tmp_path, preset="paper")

    def test_what_rows_do_not_have_in_common(self, tmp_path: Path) -> None:
        text = self.text(tmp_path)
        assert "only the rules" not in text and "Encoders" not in text
        for name in ("MST", "FCID", "CoDAAR", "H-DCID"):
            recipe = METHODS[name.lower()]
            assert recipe.model is not METHODS["uni-code"].model or recipe.alignment is not None
            assert name in text
        _, official, _ = re.split(r"it differs in |\. Later", text)
        differing = dict(re.findall(r"`(\w+) (\S+)`", official))
        assert differing["reconstruction_weight"] == "1.5" and differing["club_estimator"] == "closed_form"
        assert differing["cpc_softmax_over"] == "both" and differing["code_matching_pairing"] == "symmetric"
        assert not set(leaderboard.PAPER_LOSSES) & set(differing) and "steps" not in differing

    def test_which_row_was_tuned(self, tmp_path: Path) -> None:
        assert "chosen by its scores on built-in data" in self.text(tmp_path)
        assert "chosen by its scores" not in self.text(tmp_path, preset="paper")


class TestStanding:
    def test_means(self) -> None:
        one = board.Standing("A", {0: rows(0.5, 0.7, 0.2), 4: rows(0.1, 0.2)}, {})
        assert one.means("classification") == pytest.approx({0: 50, 4: 20})
        between = {"audio->video", "video->audio"}
        assert one.means("classification", directions=between) == pytest.approx({0: 60, 4: 15})
        assert one.directions("classification") == {*between, "audio->text"}
        assert one.means("classification", tokens=True) == pytest.approx({0: 70 / 3, 4: 25 / 3})
        assert one.means("localisation") == pytest.approx({0: 20})
        # A row without token scores is no zero.
        assert one.means("localisation", tokens=True) == {}

    def test_a_row_without_steps_has_no_time_of_a_run(self) -> None:
        trained, toc = standing("A", 0.5), standing("TOC", 0.5)
        trained = replace(trained, numbers={0: {"seconds": 90.0, "step_seconds": 0.5}})
        toc = replace(toc, numbers={0: {"seconds": 3.0}})
        heading, *lines = board.summary_cells([trained, toc])
        assert [line[heading.index("minutes a run")] for line in lines] == ["1.5", "-"]

    def test_spread(self) -> None:
        # t of 0.975 with 2 degrees of freedom is 4.3027; the deviation is 1.
        assert board.spread([1.0, 2.0, 3.0]) == f"2.0 ± {4.30265 / 3**0.5:.1f}"
        assert board.spread([4.0]) == "4.0" and board.spread([]) == "-"

    def test_numbers_are_medians(self) -> None:
        assert standing("A", 0.1, 0.2, 0.3).number("seconds") == 60
        assert standing("A", 0.1).number("parameters") is None


class TestFindings:
    @pytest.mark.parametrize(
        ("one", "other", "finding"),
        [
            ((0.5, 0.52, 0.51), (0.3, 0.31, 0.32), "better"),
            ((0.3, 0.31, 0.32), (0.5, 0.52, 0.51), "worse"),
            ((0.5, 0.2, 0.3), (0.3, 0.31, 0.32), "undecided"),
            ((0.5,), (0.3, 0.31), "one seed decides nothing"),
            ((), (0.3,), "not run yet"),
        ],
    )
    def test_by_paired_seeds(self, one: tuple, other: tuple, finding: str) -> None:
        first = standing("A", *one) if one else None
        assert board.difference("A − B", first, standing("B", *other)).finding == finding

    def test_seeds_are_paired(self) -> None:
        """A spread that both rows share does not hide the difference."""
        found = board.difference("A − B", standing("A", 0.1, 0.5, 0.9), standing("B", 0.07, 0.47, 0.87))
        assert found.by_seed == pytest.approx([2, 2, 2]) and found.tokens == pytest.approx([1, 1, 1])
        assert found.finding == "better"

    def test_cells(self) -> None:
        one, other = standing("A", 0.6, 0.6, localised=0.5), standing("B", 0.3, 0.0, localised=0.4)
        heading, cells = board.difference_cells([board.difference("A − B", one, other)])
        shown = dict(zip(heading, cells, strict=True))
        assert shown["classification"] == "+30.0" and shown["tokens"] == "+15.0" and shown["localisation"] == "+10.0"
        # Half width 12.706 * 10 of differences 20 and 40.
        assert shown["95 % interval"] == "-97.1 to +157.1" and shown["finding"] == "undecided"


def text_of(paragraphs: list[str]) -> str:
    return "\n".join(paragraphs[:2])


class TestClaims:
    def all_better(self) -> dict[str, board.Standing]:
        low, high = (0.3, 0.31, 0.32), (0.5, 0.51, 0.52)
        found = {name: standing(name, *low) for name in board.COMPARED}
        return found | {f"DCID+{name}": standing(name, *high) for name in board.COMPARED}

    def test_dcid(self) -> None:
        found = self.all_better()
        assert "Yes: it is better with DCID for each of the five methods." in text_of(board.dcid_claim(found))
        del found["DCID+MST"]
        shown = text_of(board.dcid_claim(found))
        assert "Not shown for every method." in shown and "Not run yet: MST." in shown
        found["DCID+TURN"] = standing("DCID+TURN", 0.1, 0.11, 0.1)
        shown = text_of(board.dcid_claim(found))
        assert "No: it is worse with DCID for TURN." in shown and "Better: S-MiT, CODIS, CMCM." in shown

    def test_first(self) -> None:
        found = {"A": standing("A", 0.5, 0.51, 0.52), "B": standing("B", 0.3, 0.31, 0.32)}
        claim = text_of(board.first_claim(found, "A", ["B"], "two"))
        assert "### Is A first among two?" in claim and "Yes: it is better than each of them." in claim
        assert "No: it is worse than A. Its mean is number 2 of 2." in text_of(
            board.first_claim(found, "B", ["A"], "two")
        )
        missing = text_of(board.first_claim(found, "A", ["B", "C"], "three"))
        assert "Not decided. Its mean is number 1 of 2." in missing and "Not run yet: C." in missing
        found["B"] = standing("B", 0.3, 0.7, 0.9)
        assert "Not decided. Its mean is number 2 of 2." in text_of(board.first_claim(found, "A", ["B"], "two"))
        assert "C is not run yet." in text_of(board.first_claim(found, "C", ["A"], "two"))

    def test_a_pair(self) -> None:
        better = board.difference("", standing("A", 0.5, 0.51), standing("B", 0.3, 0.31))
        worse = board.difference("", standing("A", 0.3, 0.31), standing("B", 0.5, 0.51))
        assert board.pair_claim("#", better, "So.")[1] == "Yes. So."
        assert board.pair_claim("#", worse, "So.")[1] == "No: the scores are lower with it. So."
        assert board.pair_claim("#", board.difference("", None, None), "")[1].startswith("Not decided: not run yet.")

    def test_margin(self) -> None:
        """Points of the mean over directions, of which one of three has the same score in all rows."""
        found = {
            "Baseline": standing("Baseline", 0.2, 0.3),
            "near": standing("near", 0.274, 0.374),
            "far": standing("far", 0.276, 0.376),
        }
        title, text, table = board.margin_claim(found)
        assert board.MARGIN == 5 and "by 5 points" in title
        assert "Not met by: near." in text
        lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
        assert lines["near"].endswith("not met |") and "+4.9" in lines["near"]
        assert lines["far"].endswith("| met |") and "+5.1" in lines["far"]
        assert "Baseline is not run yet." in board.margin_claim({"far": found["far"]})[1]

    def test_the_margin_needs_an_interval_above_zero(self) -> None:
        found = {
            "Baseline": standing("Baseline", 0.2, 0.2),
            "wide": standing("wide", 0.21, 0.6),
            "once": standing("once", 0.9),
        }
        _, text, table = board.margin_claim(found)
        lines = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
        assert "+13.7" in lines["wide"] and lines["wide"].endswith("| not met |") and "Not met by: wide." in text
        assert lines["once"].endswith("| one seed decides nothing |")
        assert "the interval of the difference is above zero" in text

    def test_page_without_a_run(self) -> None:
        shown = board.page("# Leaderboard", ["All."], [], ["CMCM (seed 0)"], ("audio", "video", "text"), "a.png")
        assert shown == "# Leaderboard\n\nAll.\n\nNot run yet: CMCM (seed 0).\n"

    def test_uni_code_is_none_of_the_later_methods(self) -> None:
        shown = board.page("# L", [], [standing("Uni-Code", 0.5, 0.5)], [], ("audio", "video"), "a.png")
        assert "### Is Uni-Code better than the later methods?" in shown and "among the later" not in shown

    def test_a_third_modality_is_judged_between_the_others(self) -> None:
        names = ("audio", "video", "text")
        three, two = standing("Uni-Code", 0.5, 0.51), standing(board.two_modalities(names), 0.4, 0.41)
        two = replace(two, by_seed={seed: rows[:2] for seed, rows in two.by_seed.items()})
        shown = board.page("# Leaderboard", [], [three, two], [], names, "a.png")
        part = shown.partition("### Does a third modality help?")[2].partition("###")[0]
        assert part.strip().startswith("Yes. Scores are those between audio and video.")
        assert "| +10.0 |" in part


def test_picture(tmp_path: Path, no_pictures: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicode_fast.report import plots

    monkeypatch.setattr(plots.FigureCanvasAgg, "print_figure", no_pictures)
    found = [standing(f"method {number}", 0.5, 0.6, 0.7, localised=0.3) for number in range(20)]
    board.draw([*found, standing("one seed", 0.4)], tmp_path / "leaderboard.png")
    assert 5_000 < (tmp_path / "leaderboard.png").stat().st_size < 200_000
    assert min(Image.open(tmp_path / "leaderboard.png").size) > 300
    with pytest.raises(ValueError, match="scores must hold at least one method, got none"):
        plots.method_bars({}, {})


def test_whole_command_and_again(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "board"
    flags = [f"--out={out}", "--seeds=1", f"--page={tmp_path}", *words(data=store, **SMALL)]
    assert leaderboard.main([*flags, "--only=Baseline,Uni-Code + TOC"]) == 0
    page = (tmp_path / "leaderboard.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "leaderboard.md")
    runs = {run["name"]: run for run in json.loads((out / "runs.json").read_text())["runs"]}
    # TOC is measured on the run of Uni-Code, whose own row is kept too.
    assert set(runs) == {"Baseline", "Uni-Code", "Uni-Code + TOC"}
    assert runs["Uni-Code + TOC"]["fields"] == runs["Uni-Code"]["fields"]
    for plain, toc in zip(runs["Uni-Code"]["rows"], runs["Uni-Code + TOC"]["rows"], strict=True):
        assert toc["token"] == plain["token"] and toc["from"] == plain["from"]
    assert runs["Uni-Code + TOC"]["rows"] != runs["Uni-Code"]["rows"]
    assert runs["Baseline"]["parameters"] < runs["Uni-Code"]["parameters"]
    assert all(runs[name]["step_seconds"] > 0 and runs[name]["seconds"] > 0 for name in ("Baseline", "Uni-Code"))
    assert {"rows", "seconds", "threads", "versions"} <= set(runs["Uni-Code + TOC"])
    assert "CMCM (seed 0)" in page and "Baseline (seed 0)" not in page and "](leaderboard.png)" in page
    mean = statistics.fmean(row["score"] for row in runs["Baseline"]["rows"])
    assert re.search(rf"^\| Baseline \| 1 \| {100 * mean:.1f} \|", page, re.MULTILINE)
    # Recorded runs need no folders, and a page can be written without runs.
    shutil.rmtree(out / "uni-code")
    monkeypatch.setattr(many_runs, "start", lambda *_: pytest.fail("a recorded run was started"))
    assert leaderboard.main([*flags, "--only=baseline,uni-code,uni-code + toc"]) == 0
    assert leaderboard.main([*flags, "--no_runs"]) == 0
    assert (tmp_path / "leaderboard.md").read_text() == page


def test_the_page_of_the_documentation_is_that_of_the_record(tmp_path: Path) -> None:
    """Nobody writes a number by hand."""
    record = ROOT / "benchmarks" / "results" / "leaderboard.json"
    if record.exists():
        shutil.copy(record, tmp_path / "runs.json")
    assert leaderboard.main([f"--out={tmp_path}", "--no_runs"]) == 0
    page = (ROOT / "docs" / "leaderboard.md").read_text()
    assert (tmp_path / "leaderboard.md").read_text() == page
    assert ("](leaderboard.png)" in page) == record.exists() == (ROOT / "docs" / "leaderboard.png").exists()


class TestRuns:
    def plan(self, tmp_path: Path) -> leaderboard.Plan:
        base = tiny.config(steps=2)
        entries = leaderboard.entries(("audio", "video"))
        chosen = [entry for entry in entries if entry.label in ("Uni-Code", "Uni-Code + TOC", "Uni-Code (recommended)")]
        rows = {entry: base.replace_all(**entry.fields) for entry in chosen}
        return leaderboard.Plan(tmp_path, base, ("audio", "video"), rows, (0, 1))

    def test_an_interruption_leaves_whole_seeds(self, tmp_path: Path) -> None:
        plan = self.plan(tmp_path)
        record = Record(tmp_path / "runs.json", plan.base, "a leaderboard")
        units = plan.units(record, list(plan.rows))
        assert [unit.folder.relative_to(tmp_path).as_posix() for unit in units] == [
            "uni-code/seed-0",
            "uni-code-recommended/seed-0",
            "uni-code/seed-1",
            "uni-code-recommended/seed-1",
        ]
        # The row of TOC still needs the run of Uni-Code.
        record.add(units[0].config, {"rows": []}, "Uni-Code")
        assert {unit.folder for unit in plan.units(record, list(plan.rows))} == {unit.folder for unit in units}
        record.add(units[0].config, {"rows": []}, "Uni-Code + TOC")
        assert plan.units(record, list(plan.rows)) == units[1:]

    def test_a_folder_of_another_configuration(self, tmp_path: Path) -> None:
        plan = self.plan(tmp_path)
        folder = tmp_path / "uni-code" / "seed-0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(json.dumps(plan.base.replace(steps=3).flat()))
        with pytest.raises(ValueError, match="out must be new or of the same configuration, .*uni-code/seed-0"):
            plan.units(Record(tmp_path / "runs.json", plan.base), list(plan.rows))

    def test_names_tell_rows_of_one_run_apart(self, tmp_path: Path) -> None:
        base = tiny.config()
        record = Record(tmp_path / "runs.json", base, "a leaderboard")
        for name, score in (("A", 0.25), ("A + TOC", 0.5), ("A", 0.75)):
            rows = [Row("classification", "audio", "video", score, 1, 0).as_dict()]
            record.add(base, {"rows": rows}, name, parameters=7)
        read = Record(tmp_path / "runs.json", base, "a leaderboard")
        assert [run["name"] for run in read.runs] == ["A", "A + TOC"] and read.runs[0]["parameters"] == 7
        assert [row.score for row in read.find(base, "A") or []] == [0.25]
        assert read.find(base) is None

    def test_times_are_those_of_training(self, tmp_path: Path) -> None:
        record = Record(tmp_path / "runs.json", tiny.config(), "a leaderboard")
        record.add(record.config, {"rows": [], "seconds": 120.0, "threads": 1}, "A", step_seconds=0.1)
        for seed in range(3):
            record.add(record.config.replace(seed=seed), {"rows": [], "seconds": 6.0, "threads": 1}, "A + TOC")
        assert "took 2.0 minutes a run (median)" in record.times()

    def test_a_failed_run_stops_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        units = [Unit(tmp_path / name, tiny.config(steps=2)) for name in ("bad", "good")]

        class Ended:
            """A process that has ended."""

            def __init__(self, unit: Unit) -> None:
                if unit.folder.name == "good":
                    unit.folder.mkdir()
                    write_json(unit.folder / "summary.json", {})
                unit.log.write_text("loss term x became nan")

            def poll(self) -> int:
                return 0

        monkeypatch.setattr(many_runs, "start", lambda unit, _: Ended(unit))
        monkeypatch.setattr(many_runs, "_POLL_SECONDS", 0)
        failures: list[str] = []
        assert list(many_runs.run_all(units, 1, 1, "leaderboard", failures)) == units[1:]
        assert len(failures) == 1 and "bad failed: loss term x became nan" in failures[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out="], "out must be a folder, got ''"),
        (["--seeds=0"], "seeds must be at least 1, got 0"),
        (["--jobs=0"], "jobs must be at least 1, got 0"),
        (["--method=cmcm"], "method differs between rows, got one for all; --only names rows"),
        (["--steps=0"], "steps must be above 0, so that all runs have the same number, got 0"),
        (["--epochs=1"], "epochs is not read where steps is"),
        (["--only=nobody"], "only must be among"),
        (["--smit_alpha=x"], "smit_alpha must be float, got str 'x'"),
        (["--no_runs", "--record=absent.json"], "record must be an existing file beside no_runs, got 'absent.json'"),
    ],
)
def test_errors(store: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        leaderboard.main([f"--out={tmp_path / 'board'}", *words(data=store, **SMALL), *flags])


def test_a_second_call_in_the_same_folder(store: Path, tmp_path: Path) -> None:
    with held(tmp_path / "board"), pytest.raises(InUse, match="^folder .*board is in use by this process"):
        leaderboard.main([f"--out={tmp_path / 'board'}", *words(data=store, **SMALL)])


def test_a_page_of_somebody_else_stays(store: Path, tmp_path: Path) -> None:
    (tmp_path / "leaderboard.md").write_text("# Notes")
    with pytest.raises(ValueError, match="page must be a new folder or one of a leaderboard, .* is another file"):
        leaderboard.main([f"--out={tmp_path / 'x'}", f"--page={tmp_path}", *words(data=store, **SMALL)])
    assert (tmp_path / "leaderboard.md").read_text() == "# Notes"
