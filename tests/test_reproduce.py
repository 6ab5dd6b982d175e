"""Commands of the paper's tables: every one is valid, runs on small layouts, resumes, and gives a table."""

import dataclasses
import math
import re
import shlex
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from layout_files import (
    DIGITS,
    write_ave,
    write_ave_avvp,
    write_avel,
    write_avsbench,
    write_avvp,
    write_ucf_vggsound,
)

from unicode_fast import reproduce, table_commands
from unicode_fast.cli import given_fields, make_parser
from unicode_fast.config import Modality
from unicode_fast.data import ClipSet, write_store
from unicode_fast.errors import UsageError
from unicode_fast.methods import METHODS, row_name
from unicode_fast.methods.registry import form_of
from unicode_fast.presets import PRESETS, usual
from unicode_fast.report.published import published
from unicode_fast.reproduce import amount, main
from unicode_fast.table_commands import Command, Table
from unicode_fast.tasks import retrieval
from unicode_fast.tasks.segmentation import backbones
from unicode_fast.training import estimates
from unicode_fast.training.checks import check_flags

pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")

SIZES = [f"--{name}={value}" for name, value in tiny.SIZES.items() if name != "grid_semantic_width"]
SMALL = ["--size=small", "--steps=2", "--batch_size=6", "--device=cpu", *SIZES]


def table(number: int, *words: str) -> Table:
    given = reproduce.make_own_parser().parse_args([f"--table={number}", *words])
    return Table(number, given, {"preset": "official", "size": "paper", **given_fields(given)})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, spoken: ClipSet) -> Path:
    """All data sets below one folder, as far as no sentences are read."""
    folder = tmp_path_factory.mktemp("public")
    write_avel(folder / "vggsound40k", spoken)
    write_ave(folder / "AVE", spoken)
    write_avvp(folder / "AVVP", spoken)
    write_ave_avvp(folder, spoken)
    write_ucf_vggsound(folder, spoken)
    return folder


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of the commands that run, in this process."""
    titles: list[str] = []

    def run(command: Command) -> int:
        titles.append(command.title)
        _, module, *words = command.line()
        found = import_module(module if module != "unicode_fast.data" else f"{module}.__main__")
        return int(found.main(words))

    monkeypatch.setattr(reproduce, "run_command", run)
    return titles


@pytest.mark.parametrize("number", range(1, 6))
def test_every_command_of_a_table_is_valid(number: int) -> None:
    for rules in PRESETS:
        commands = list(table(number, f"--preset={rules}").commands())
        for command in commands:
            if command.module == "train":
                flags = given_fields(make_parser("train", "").parse_args(command.words))
                check_flags(command.config, flags, usual(command.config).flat())
                assert command.config.preset == rules and not command.config.train.validations
    numbers = [one for one in published() if one.table == number]
    measured = [one for command in commands for one in command.theirs]
    trained = {one.method for one in measured}
    # Every published number of a method of this library stands beside one command.
    assert sorted(measured, key=str) == sorted((one for one in numbers if one.method in trained), key=str)
    missing = {one.method for one in numbers} - trained - {"SST", "AVS"}
    assert all(name.removeprefix("DCID+").lower() not in METHODS for name in missing)
    kinds = [command.module for command in commands]
    assert kinds == sorted(kinds, key=lambda kind: kind != "data")
    assert kinds.count("train") == len(
        {(one.pretraining, one.method) for one in numbers if one.method in trained}
        - {("AVT 40K", table_commands.LABELLED)}
    )


def test_given_fields_reach_the_rows_that_read_them() -> None:
    commands = table(2, "--size=small", "--epochs=3", "--word_width=8", "--club_inner_steps=2").commands()
    rows = {command.title: command for command in commands if command.module == "train"}
    whole, without = rows["pre-train AV 24K, Uni-Code, seed 0"], rows["pre-train AV 24K, without CLUB, seed 0"]
    assert (whole.config.train.steps, whole.config.train.epochs, whole.config.method.club_inner_steps) == (0, 3, 2)
    assert "--club_inner_steps" in whole.words and "--club_inner_steps" not in without.words
    assert "--word_width" not in whole.words and "--epochs" in without.words


def test_given_fields_leave_the_rules_of_a_method() -> None:
    commands = list(table(1, "--size=small", "--cpc_weight=0.5", "--club_weight=0.2").commands())
    rows = {command.title: command for command in commands if command.module == "train"}
    alone, with_dcid = (rows[f"pre-train AV 24K, {name}, seed 0"] for name in ("S-MiT", "DCID+S-MiT"))
    assert "--cpc_weight" not in alone.words and alone.config.method.cpc_weight == 0
    assert with_dcid.config.method.cpc_weight == 0.5 and with_dcid.config.method.club_weight == 0.2
    for command in (alone, with_dcid):
        flags = given_fields(make_parser("train", "").parse_args(command.words))
        check_flags(command.config, flags, usual(command.config).flat())


def test_fields_of_other_methods_reach_their_rows() -> None:
    commands = table(1, "--size=small", "--smit_alpha=0.25", "--only=S-MiT,Uni-Code").commands()
    rows = {command.config.method.method: command for command in commands if command.module == "train"}
    assert set(rows) == {"s-mit", "uni-code"}
    assert rows["s-mit"].config.method.smit_alpha == 0.25 and "--smit_alpha" not in rows["uni-code"].words
    with pytest.raises(ValueError, match="^smit_alpha must be a field that a row of this call reads"):
        table(1, "--smit_alpha=0.25", "--only=Uni-Code")


def test_the_rows_of_table_1_are_methods() -> None:
    for name, recipe in METHODS.items():
        for dcid in (False, True) if recipe.combines else (False,):
            row = row_name(name, dcid)
            assert form_of(row) == (name, dcid)
            if row != "Uni-Code" and row in {one.method for one in published()}:
                assert table_commands.fields_of(row) == {"method": name, **({"dcid": True} if dcid else {})}
    assert form_of("DCID+FCID") is None and form_of("SST") is None
    assert table_commands.fields_of("Uni-Code") == {} and table_commands.fields_of("SST") is None
    assert table_commands.fields_of("without CLUB") == {"club_estimator": "none"}


def test_the_plan_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--table=2", "--only=without CLUB", "--pretraining=40k", f"--root={tmp_path}", "--seconds_per_step=1.5"]
    assert main([*words, f"--out={tmp_path / 'out'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [words[2] for words in commands] == [
        f"unicode_fast.{kind}" for kind in ["data"] * 3 + ["train"] + ["evaluate"] * 4
    ]
    # 40,801 clips of 10 x (128 + 7 x 7 x 512) values of 8 bytes; 511 steps an epoch, 6 epochs.
    assert any(line.startswith(f"# vggsound-avel40k:{tmp_path}/vggsound40k: clips 40,801 audio") for line in lines)
    assert any("; 82.3 GB; as published, because root of " in line for line in lines)
    (training,) = [line for line in lines if "pre-train" in line]
    assert "3,066 steps, 1.28 h, " in training and "1.5 s, given by --seconds_per_step" in "".join(lines)
    assert any("AVE video → audio" in line and line.endswith("published 37.2") for line in lines)
    assert not (tmp_path / "out").exists()
    train = commands[3]
    assert train[train.index("--train_split") + 1] == "all" and train[train.index("--club_estimator") + 1] == "none"


def test_a_run_stops_with_what_is_missing(
    tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str], spoken: ClipSet
) -> None:
    write_ave(tmp_path / "AVE", spoken)
    (tmp_path / "AVE/labels.h5").unlink()
    with pytest.raises(FileNotFoundError, match="complete before --run, not at hand are vggsound-avel24k"):
        main(["--table=1", "--pretraining=24K", f"--root={tmp_path}", f"--out={tmp_path / 'out'}", "--run", *SMALL])
    missing = re.findall("^missing, ([a-z0-9-]+):.*", capsys.readouterr().err, re.MULTILINE)
    assert missing == ["vggsound-avel24k", "ave", "avvp"] and ran == []


def test_a_table_runs_resumes_and_is_written(
    root: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--table=2", "--only=uni-code", "--only=without CLUB", "--pretraining=24K", "--tests=AVE"]
    words += [f"--root={root}", f"--out={out}", "--run", *SMALL]
    run = reproduce.run_command

    def interrupted(command: Command) -> int:
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run(command)

    monkeypatch.setattr(reproduce, "run_command", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert [title.split(" ")[0] for title in ran] == ["check", "check", "pre-train", "AVE"]
    monkeypatch.setattr(reproduce, "run_command", run)
    before = len(ran)
    assert main(words) == 0
    assert [title.split(" ")[0] for title in ran[before:]] == ["AVE", "pre-train", "AVE", "AVE"]
    shown = (out / "table2.md").read_text()
    assert shown.rstrip() in capsys.readouterr().out
    ours, theirs = shown.split("## The paper's")
    cells = {line.split(" | ")[1]: line.split(" | ")[2:] for line in theirs.splitlines() if line.startswith("| AV 24K")}
    assert cells == {"Uni-Code": ["44", "49.7 |"], "without CLUB": ["34.9", "35.1 |"]}
    scores = re.findall(r"^\| AV 24K \| .* \| ([\d.]+) \| ([\d.]+) \|$", ours, re.MULTILINE)
    assert len(scores) == 2 and "4 of 4 evaluations have finished" in ours
    assert main(words) == 0 and len(ran) == before + 4
    assert main([*words[: -len(SMALL) - 1], *SMALL, "--seconds_per_step=1"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": finished") + printed.count(", finished") == 4
    assert f"published 44, ours {scores[0][0]}" in printed
    # A damaged row is named; another configuration is refused.
    with pytest.raises(ValueError, match=r"was trained with another steps"):
        main([*words, "--steps=3"])


def test_all_columns_of_table_3(
    root: Path, tmp_path: Path, ran: list[str], spoken: ClipSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed store has the words; the labelled modality comes from the same evaluations."""
    write_words(tmp_path / "store", spoken)
    words = [
        "--table=3",
        f"--only={table_commands.LABELLED}",
        "--only=Uni-Code",
        f"--root={root}",
        f"--out={tmp_path / 'out'}",
    ]
    flags = [
        *words,
        f"--vggsound40k={tmp_path / 'store'}",
        "--protocol=held_out",
        "--run",
        *SMALL,
        "--tests=AVE",
        "--tests=AVE→AVVP",
    ]
    assert main([*flags, "--tests=UCF↔VGG"]) == 0
    assert [title.split(" ")[0] for title in ran] == ["check"] * 4 + ["pre-train"] + ["AVE"] * 2 + ["AVE→AVVP"] * 2 + [
        "UCF↔VGG"
    ] * 2
    ours = (tmp_path / "out/table3.md").read_text().split("## The paper's")[0]
    (whole,) = re.findall(r"^\| AVT 40K \| Uni-Code \| (.*) \|$", ours, re.MULTILINE)
    (labelled,) = re.findall(r"^\| AVT 40K \| labelled modality \| (.*) \|$", ours, re.MULTILINE)
    assert "-" not in whole.split(" | ") and [cell == "-" for cell in labelled.split(" | ")] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def write_words(folder: Path, clips: ClipSet) -> None:
    """The clips with words as a store with the splits all, train, val and test."""
    kinds = {
        "audio": Modality("vector", (128,)),
        "video": Modality("grid", (7, 7, 16)),
        "text": Modality("words", (8,)),
    }
    arrays = {name: np.asarray(clips.features[name], np.float32) for name in ("audio", "video")}
    arrays["text"] = np.random.default_rng(0).normal(size=(len(clips), 10, 8)).astype(np.float32)
    arrays["class"] = np.asarray(clips.target)
    chosen = {"all": np.arange(24), "train": np.arange(12), "val": np.arange(12, 18), "test": np.arange(18, 24)}
    splits = {name: {key: array[numbers] for key, array in arrays.items()} for name, numbers in chosen.items()}
    write_store(folder, "words", kinds, clips.classes, splits)


def test_segmentation_of_table_4(
    root: Path, tmp_path: Path, ran: list[str], spoken: ClipSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sentences of both data sets are encoded by the given BERT."""
    transformers = pytest.importorskip("transformers", reason="the extra text, transformers, is not installed")
    monkeypatch.setenv("UNICODE_FAST_CACHE", str(tmp_path / "cache"))
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"somebody says the digit and writes this shows".split(),
        *DIGITS,
    ]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    transformers.BertTokenizer(str(bert / "vocab.txt")).save_pretrained(bert)
    write_avsbench(tmp_path / "avs", spoken, np.asarray(spoken.arrays["video.frames"]))
    flags = ["--table=4", "--only=Uni-Code", f"--root={root}", f"--avsbench={tmp_path / 'avs'}", f"--text_model={bert}"]
    more = ["--backbone=light", "--segmenter_steps=2", f"--out={tmp_path / 'out'}", "--run"]
    assert main([*flags, *more, *SMALL]) == 0
    assert [title.split(" ")[0] for title in ran] == ["check", "check", "pre-train", "AVS-S4", "AVS-S4"]
    ours = (tmp_path / "out/table4.md").read_text().split("## The paper's")[0]
    assert re.search(r"^\| AVT 40K \| Uni-Code \| [\d.]+ \(F-score [\d.]+\) \| [\d.]+ \(F", ours, re.MULTILINE)


def test_retrieval_of_table_5(tmp_path: Path, ran: list[str], spoken: ClipSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "RetrievalRule", partial(retrieval.RetrievalRule, steps=4, judged_every=2))
    write_words(tmp_path / "store", spoken)
    words = ["--table=5", f"--vggsound40k={tmp_path / 'store'}", f"--out={tmp_path / 'out'}", "--run", *SMALL]
    assert main(words) == 0
    assert [title.split(" ")[0] for title in ran] == ["check", *["pre-train", "retrieval", "retrieval"] * 2]
    ours = (tmp_path / "out/table5.md").read_text().split("## The paper's")[0]
    assert len(re.findall(r"^\| VT 24K \| (?:Baseline|Uni-Code) \| [\d.]+ \(R@5 [\d.]+\) \| ", ours, re.MULTILINE)) == 2


def test_a_command_runs_in_a_process_of_its_own(root: Path, tmp_path: Path) -> None:
    words = ("check", f"ave:{root / 'AVE'}", "--modalities", "audio,video")
    command = Command("data", words, "check ave", tmp_path / "checks/ave.json")
    assert not command.finished and reproduce.run_command(command) == 0 and command.finished
    other = dataclasses.replace(command, words=("check", f"avvp:{root / 'AVVP'}"))
    assert not other.finished


def test_a_failed_command_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce, "run_command", lambda command: 3)
    words = [
        "--table=1",
        "--only=CMCM",
        "--pretraining=24K",
        "--tests=AVE",
        f"--root={root}",
        f"--out={tmp_path}",
        "--run",
    ]
    with pytest.raises(RuntimeError, match=r"check vggsound-avel24k:.* ended with status 3; the same call"):
        main([*words, *SMALL])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table=1", "--only=UniCode"], "only must be among Baseline, S-MiT, .* for table 1, got 'UniCode'"),
        (["--table=1", "--tests=UCF"], "tests must be among AVE, AVVP for table 1, got 'UCF'"),
        (["--table=5", "--pretraining=40K"], "pretraining must be among VT 24K for table 5, got '40K'"),
        (["--table=1", "--method=cmcm"], "method must be left to the rows of the table, got 'cmcm'"),
        (["--only=Uni-Code"], "required: --table"),
        (["--table=1", "--only=CMCM,UniCode"], "only must be among .*, got 'UniCode'"),
        (["--table=1", "--run", "--dry_run"], "run must not be given beside dry_run"),
    ],
)
def test_wrong_flags(words: Sequence[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table=1", "--seconds_per_step=0"], "seconds_per_step must be a number above 0, got 0"),
        (["--table=1", "--seconds_per_step=nan"], "seconds_per_step must be a number above 0, got nan"),
        (["--table=4", "--backbone=pvt"], "backbone must be 'light' or the name of a model of timm, got 'pvt'"),
        (["--table=1", "--seeds=0"], "seeds must be at least 1, got 0"),
    ],
)
def test_wrong_values(words: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_import_timm", lambda: SimpleNamespace(is_model=lambda name: False))
    with pytest.raises(ValueError, match=message):
        main(words)


def test_amounts() -> None:
    assert amount([53_000.4], "h") == "53,000 h" and amount([0.251, 0.5], "GB") == "0.751 GB"
    assert amount([math.nan], "h") == "unknown h" and amount([1, math.nan], "h") == "1 h and 1 unknown"
    assert amount([], "h") == "0 h"


def test_unknown_data_have_no_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--table=4", f"--root={tmp_path}", "--seconds_per_step=1", "--backbone=light"]
    assert main([*words, "--only=Uni-Code"]) == 0
    printed = capsys.readouterr().out
    assert "clips unknown; unknown GB; as published" in printed and " 0 h" not in printed
    assert "unknown h, published mIoU 78; F-score 87.1\n" in printed and "2 unknown; run folders" in printed


def test_seconds_of_a_step_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config("official", device="cpu", batch_size=6, modalities="audio,depth")
    modalities = {name: tiny.MODALITIES[name] for name in ("audio", "depth")}
    seconds, how = estimates.seconds_per_step(config, modalities)
    assert 0 < seconds < 5 and how == "measured at start on cpu: median of 3 steps"
    # A second and a quarter of one a clip, after a first step that takes longer.
    times = iter((50.0, 1.5, 2.5))
    monkeypatch.setattr(estimates, "_timed", lambda trainer, modalities, clips: next(times))
    seconds, how = estimates.seconds_per_step(config.replace(batch_size=80), modalities)
    assert seconds == 1 + 80 / 4 and how.endswith("a line through steps of 2 and 6 clips, at 80")


def test_bytes_of_a_run_folder(tmp_path: Path) -> None:
    model = tiny.model("official", "audio,depth")
    modalities = {name: tiny.MODALITIES[name] for name in ("audio", "depth")}
    values = sum(parameter.numel() for parameter in model.parameters())
    assert estimates.run_gigabytes(tiny.config("official"), modalities) == 2 * 3 * 8 * values / 1e9
