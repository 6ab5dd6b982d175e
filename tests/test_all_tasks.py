"""All tasks on the built-in data at a small size, from the command line; tasks between two data sets."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from look_up import NAMES, LookUp
from task_tolerances import LEARNED, SEPARATED

from unicode_fast import tasks
from unicode_fast.config import DataConfig, Modality
from unicode_fast.data import ClipSet, Dataset, Store, open_store, write_store
from unicode_fast.data.lazy import LazyArray
from unicode_fast.errors import UsageError
from unicode_fast.evaluate import file_stem, make_parser
from unicode_fast.evaluate import main as evaluate
from unicode_fast.report import pictures, plots
from unicode_fast.tasks import Evaluator, Row, open_transfer, retrieval, runner
from unicode_fast.tasks.encoded import check_classes
from unicode_fast.tasks.metrics import scores as metrics
from unicode_fast.tasks.probe import ProbeRule
from unicode_fast.tasks.segmentation import backbones
from unicode_fast.train import main as train

pytestmark = pytest.mark.usefixtures("short_probes")

CLASSES, POSITIONS = 4, 6
SMALL = {
    **tiny.SIZES,
    "steps": 4,
    "batch_size": 20,
    "validations": 1,
    "train_clips": 40,
    "val_clips": 15,
    "test_clips": 15,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with all tasks in its table, on built-in data with few voices."""
    folder = tmp_path_factory.mktemp("all")
    with tiny.quick_speech() as patch:
        patch.setenv("UNICODE_FAST_CACHE", str(folder / "cache"))
        patch.setattr(backbones, "LIGHT_SETTINGS", dataclasses.replace(backbones.LIGHT_SETTINGS, steps=4))
        patch.setattr(retrieval, "RetrievalRule", partial(retrieval.RetrievalRule, steps=20, judged_every=10))
        values = {**SMALL, "probe_tasks": ",".join(tasks.TASKS), "out": folder / "run"}
        assert train([f"--{name}={value}" for name, value in values.items()]) == 0
        yield folder / "run"


def rows_of(run: Path) -> list[Row]:
    return [Row.from_dict(row) for row in json.loads((run / "summary.json").read_text())["rows"]]


def test_a_run_measures_all_tasks(run: Path) -> None:
    rows = rows_of(run)
    assert list(dict.fromkeys(row.task for row in rows)) == list(tasks.TASKS)
    directions = {task: sum(row.task == task for row in rows) for task in tasks.TASKS}
    assert directions == {
        "classification": 6,
        "localisation": 2,
        "cross-classification": 6,
        "cross-localisation": 2,
        "open-classification": 6,
        "cross-open-classification": 6,
        "segmentation": 2,
        "retrieval": 6,
    }
    assert {row.direction for row in rows if row.task == "segmentation"} == {"audio->text", "text->audio"}
    assert all(0 <= score <= 1 for row in rows for score in (row.score, row.same_modality, row.chance))
    for name in ("segmentation", "retrieval", "zero-shot", "timeline"):
        content = (run / "plots" / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) < 200_000


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_single_row_repeats_with_interval_and_other_metrics(
    run: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = next(row for row in rows_of(run) if row.task == task)
    out = tmp_path / "row.json"
    words = [str(run), f"--task={task}", f"--from={expected.source}", f"--to={expected.target}", f"--out={out}"]
    assert evaluate(words) == 0
    row = Row.from_dict(json.loads(out.read_text()))
    assert dataclasses.replace(row, metrics={}) == expected and not expected.metrics
    assert row.interval is not None and row.interval[0] <= row.score <= row.interval[1]
    assert row.interval in [estimate.interval for estimate in row.metrics.values()]
    assert row.score in [estimate.value for estimate in row.metrics.values()]
    shown = capsys.readouterr().out
    assert f"bootstrap interval over {row.clips} test clips" in shown and all(name in shown for name in row.metrics)
    drawn = run / "plots" / f"{task}-{row.source}-{row.target}-held-out.png"
    assert drawn.exists() == (task in pictures.DRAWN) == (f"examples: {drawn}" in shown)


def test_a_row_takes_the_place_of_the_one_under_the_old_name_of_its_protocol(run: Path) -> None:
    words = [str(run), "--task=classification", "--from=audio", "--to=text"]
    assert evaluate([*words, "--protocol=sound"]) == 0
    new, old = (run / "evaluations" / f"classification-audio-text-{name}.json" for name in ("held-out", "sound"))
    content = new.read_text()
    old.write_text(content)
    official = new.with_name("classification-audio-text-official.json")
    assert evaluate([*words, "--protocol=official"]) == 0 and old.exists() and official.exists()
    assert evaluate(words) == 0 and new.read_text() == content and not old.exists() and official.exists()


@pytest.mark.parametrize("task", ["cross-localisation", "open-classification", "segmentation", "retrieval"])
def test_official_rows(run: Path, task: str, tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    target = "video" if task.endswith("localisation") else "text"
    words = [str(run), f"--task={task}", "--from=audio", f"--to={target}", f"--out={out}", "--protocol=official"]
    assert evaluate(words) == 0
    row = Row.from_dict(json.loads(out.read_text()))
    assert row.protocol == "official" and 0 <= row.score <= 1
    assert row.score in [estimate.value for estimate in row.metrics.values()]


def test_another_domain_is_named(run: Path, tmp_path: Path) -> None:
    """The default domain, the opposite direction, and a data set with other classes."""
    rows = []
    for name, more in (("a", []), ("b", ["--to-data=talking-digits-b"]), ("c", ["--data=talking-digits-b"])):
        words = [str(run), "--task=cross-classification", "--from=audio", "--to=text", f"--out={tmp_path / name}"]
        assert evaluate([*words, *more]) == 0
        rows.append(json.loads((tmp_path / name).read_text()))
    assert rows[0] == rows[1] != rows[2]
    other = tiny.write(tmp_path / "other")
    words = [str(run), "--task=cross-classification", "--from=audio", "--to=text"]
    with pytest.raises(ValueError, match="classes of both data sets must be the same .*only the source has '0'"):
        evaluate([*words, f"--to-data={other}"])


def test_a_segmenter_is_saved_and_loaded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(run), "--task=segmentation", "--from=text", "--to=audio"]
    kept = tmp_path / "segmenter.safetensors"
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        # What was measured is kept where the picture fails.
        patch.setitem(pictures.DRAWN, "segmentation", lambda *_: 1 / 0)
        evaluate([*words, f"--save-segmenter={kept}", f"--out={first}"])
    assert evaluate([*words, f"--load-segmenter={kept}", f"--out={second}", f"--pictures={tmp_path / 'drawn'}"]) == 0
    assert first.read_text() == second.read_text()
    assert (tmp_path / "drawn" / "segmentation.png").exists()
    # The row of a segmenter with other training does not replace the row.
    found = [file.name for file in (run / "evaluations").glob("segmentation-text-audio-held-out*load-segmenter*.json")]
    assert len(found) == 1


def test_flags_that_a_task_does_not_read_are_refused(run: Path, tmp_path: Path) -> None:
    words = [str(run), "--from=audio", "--to=text"]
    for more, message in (
        (["--anchor=video"], "anchor needs task retrieval, got classification"),
        (["--backbone=light"], "backbone needs task segmentation, got classification"),
        (["--to-data=talking-digits-b"], "to_data is for cross-classification and cross-localisation"),
        (["--known=3"], "known needs task open-classification or cross-open-classification, got classification"),
        (["--task=open-classification", "--known=0"], "known must be at least 1, got 0"),
        (["--task=open-classification", "--known=10"], "known must be at least 1 and below the 10 classes .*, got 10"),
        (["--pictures=here"], "pictures needs task segmentation or retrieval, got classification"),
        (["--format=pdf"], "format needs task segmentation or retrieval, got classification"),
        (["--task=retrieval", "--format=gif"], "format must be one of png, pdf, svg, got 'gif'"),
        (["--task=segmentation", "--load-segmenter=x", "--save-segmenter=y"], "save_segmenter needs training"),
        (["--task=segmentation", "--load-segmenter=x"], "load_segmenter must be a file of --save_segmenter, got 'x'"),
        (["--task=segmentation", "--backbone-weights=x"], "weights are for a backbone of timm"),
        (["--seed=-3"], "seed must be at least 0, got -3"),
        (["--task=retrieval", "--anchor=text"], "anchor must be one of video, got 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate([*words, *more])


def test_rows_of_other_flags_have_files_of_their_own(tmp_path: Path) -> None:
    row = Row("segmentation", "audio", "text", 0.5, 0.6, 0.1)
    flags = (
        [],
        ["--text_whitelist=cnt.pkl"],
        ["--text_padding=read"],
        ["--text_model=large"],
        ["--backbone=pvt_v2_b5"],
        ["--backbone=pvt_v2_b5", "--backbone_weights=pvt.pth"],
        ["--known=3"],
        ["--seed=3"],
        ["--data=" + "folder/" * 40 + "one"],
        ["--data=" + "folder/" * 40 + "two"],
    )
    names = {file_stem(row, make_parser().parse_args([str(tmp_path), *more])) for more in flags}
    assert len(names) == len(flags) and max(map(len, names)) == 220


def test_a_second_data_set_is_for_built_in_data_or_named(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "store")
    for task in ("segmentation", "cross-localisation"):
        with pytest.raises(ValueError, match=f"probe_tasks must be classification, .*got '{task}'"):
            train([f"--data={path}", f"--probe_tasks={task}", "--batch_size=10", f"--out={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match="to_data must name the test data set of cross-local.* got None"):
        open_transfer(DataConfig(data=str(path)), "cross-localisation", open_store(path))
    assert not (tmp_path / "run").exists()


class Domains:
    """Five codes for each class; the data set has one domain, or two with one modality each."""

    def __init__(self, seed: int = 0, *, splits: tuple[str, ...] = ("train", "val", "test"), shifted: bool = False):
        self.modalities = {name: Modality("vector", (1,)) for name in NAMES}
        self.name, self.classes = "domains", [str(number) for number in range(CLASSES)]
        self.splits, self.seed, self.shifted = list(splits), seed, shifted
        self.requested: list[tuple[str, str]] = []

    def clips(self, split: str, modality: str) -> ClipSet:
        """Every modality has separate clips, and another number of them."""
        self.requested.append((split, modality))
        count = {"train": 200, "val": 60, "test": 60, "all": 90}[split] + 4 * NAMES.index(modality)
        generator = np.random.default_rng([self.seed, NAMES.index(modality), len(split)])
        target = generator.permutation(np.arange(count) % CLASSES)
        start = generator.integers(0, 3, (count, 1))
        shown = (np.arange(POSITIONS) >= start) & (np.arange(POSITIONS) < start + 3)
        meaning = np.where(shown, (target[:, None] + self.shifted) % CLASSES, CLASSES)
        label = np.eye(CLASSES + 1, dtype=np.uint8)[np.where(shown, target[:, None], CLASSES)]
        code = meaning * 5 + generator.integers(5, size=meaning.shape)
        arrays = {modality: code[..., None].astype(np.float32), f"{modality}.label": label}
        return ClipSet(arrays, {modality: Modality("vector", (1,))}, self.classes, np.arange(count))


@pytest.mark.parametrize("task", ["cross-classification", "cross-localisation"])
def test_a_probe_is_tested_on_the_other_data_set(
    task: str, short_probes: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of the second domain mean the next class, so a probe of the first domain fails there."""
    monkeypatch.setattr(ProbeRule, "passes", short_probes)
    source, target = Domains(), Domains(1, shifted=True)
    row = Evaluator(LookUp(), source, transfer={task: target}).row(task, "audio", "video")
    assert row.score < 1 - SEPARATED < SEPARATED < row.same_modality
    assert ("test", "video") in target.requested and ("test", "video") not in source.requested
    assert {("train", "audio"), ("val", "audio")} <= set(source.requested)
    assert Evaluator(LookUp(), source, transfer={task: Domains(1)}).row(task, "audio", "video").score > SEPARATED


@pytest.mark.parametrize(
    ("task", "trained", "tested"),
    [("cross-classification", "all", "all"), ("cross-localisation", "all", "test"), ("localisation", "all", "all")],
)
def test_the_official_protocol_takes_whole_lists(task: str, trained: str, tested: str) -> None:
    store = Domains(splits=("train", "val", "test", "all"))
    kind, evaluator = runner.probe_task(task, "official"), Evaluator(LookUp(), store)
    store.requested.clear()
    row = evaluator.row(task, "audio", "video", "official", details=True)
    # The test split is checked for labels; nothing is read from train and val.
    assert {split for split, _ in store.requested} == {"test", trained, tested}
    labels = store.clips(tested, "video")
    assert row.chance == kind.chance(labels, "video")
    without = Evaluator(LookUp(), Domains()).row(task, "audio", "video", "official")
    assert without.score != row.score


def test_unpaired_modalities_of_one_data_set(short_probes: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip lists of different lengths, classes from segment labels."""
    monkeypatch.setattr(ProbeRule, "passes", short_probes)
    for task in tasks.DEFAULT_TASKS:
        assert Evaluator(LookUp(), Domains()).row(task, "audio", "video").score > LEARNED


def test_the_official_score_across_data_sets_is_f1() -> None:
    kind = runner.probe_task("cross-localisation", "official")
    logits, truth = torch.randn(10, 5, 3), torch.rand(10, 5, 3) < 0.4
    mask = torch.ones(10, 5, dtype=torch.bool)
    expected = metrics.official_scores((logits > 0).numpy(), truth.numpy(), mask.numpy(), 80)
    assert kind.score(logits, truth, mask) == expected.f1 != expected.precision


def test_constant_official_f1_by_hand() -> None:
    # Columns in 4, 2 and 0 of four segments have six labels. The first has P 1 and R 4/6, both have P 6/8 and R 1.
    truth = np.array([[[1, 1, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]])
    assert metrics.official_constant_f1(truth, np.ones((1, 4), bool), 80) == pytest.approx(12 / 14)


def test_the_class_of_a_clip_is_the_commonest_of_its_segments() -> None:
    label = np.eye(4, dtype=np.uint8)[[[0, 2, 2, 3], [3, 3, 3, 1], [2, 0, 3, 3]]]
    assert metrics.clip_target(label).tolist() == [2, 1, 0]
    assert metrics.official_target(label).tolist() == [2, 1, 2]
    with pytest.raises(
        ValueError, match="labels must mark a foreground class in each clip to classify, none in clip 1"
    ):
        metrics.clip_target(np.eye(4, dtype=np.uint8)[[[0, 3], [3, 3]]])


def test_classes_that_differ_are_named() -> None:
    check_classes(["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="only the source has 'b'; only the target has 'c', 'd'"):
        check_classes(["a", "b"], ["a", "c", "d"])
    with pytest.raises(ValueError, match="class 0 is 'a' in the source and 'b' in the target"):
        check_classes(["a", "b"], ["b", "a"])


def test_a_store_has_the_clips_of_a_modality(tmp_path: Path) -> None:
    store = open_store(tiny.write(tmp_path / "store"))
    assert np.array_equal(store.clips("val", "audio").features["video"], store.split("val").features["video"])
    with pytest.raises(
        ValueError, match=r"modality must be one of \['audio', 'video', 'text'\] in split 'val', got 'smell'"
    ):
        store.clips("val", "smell")
    with pytest.raises(ValueError, match="split must be one of"):
        store.clips("all", "audio")


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("protocol", tasks.PROTOCOLS)
def test_every_task_explains_itself(task: str, protocol: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate([f"--task={task}", f"--protocol={protocol}", "--explain"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{task}, {protocol} protocol")
    for words in ("Chance:", "Same modality:", "Score:"):
        assert words in text
    assert ("Limits: " in text) is (protocol == "held_out" and task in tasks.PROBE_TASKS)


def test_explanations_alone_need_no_run(capsys: pytest.CaptureFixture[str]) -> None:
    for run in ([], ["nowhere"]):
        assert evaluate([*run, "--explain"]) == 0
        assert capsys.readouterr().out.startswith("classification, held_out protocol")
    with pytest.raises(UsageError, match="run must be a run folder"):
        evaluate(["--from=audio", "--to=video"])


def test_pictures_refuse_what_does_not_fit() -> None:
    frames = np.zeros((2, 8, 8), np.uint8)
    with pytest.raises(ValueError, match="truth and probability must have the shape of frames"):
        plots.segmentation_overlays(frames, np.zeros((2, 8, 9), bool), {}, ["", ""], {})
    with pytest.raises(ValueError, match="results and marks must have the same length for each of 1 queries"):
        plots.retrieval_examples([plots.ShownClip("one")], [[plots.ShownClip("two")]], [["pair", "class"]])


def test_overlays_outline_masks_and_tint_probabilities() -> None:
    frames, truth = np.zeros((1, 4, 4), np.uint8), np.zeros((1, 4, 4), bool)
    truth[0, 1, 1:3] = True
    figure = plots.segmentation_overlays(frames, truth, {"audio": truth.astype(float)}, ["seven"], {"audio": [0.625]})
    top, below = figure.axes
    # Two pixels side by side have six edges.
    assert len(top.collections[0].get_segments()) == len(below.collections[0].get_segments()) == 6
    assert len(top.images) == 1 and (below.images[1].get_array()[..., 3] > 0).sum() == 2
    assert (top.get_title(), below.get_title()) == ("seven", "IoU 62 %")
    assert [text.get_text() for text in figure.legends[0].get_texts()][0] == "outline of the true mask"


def test_retrieval_examples_frame_the_pair(tmp_path: Path) -> None:
    results = [plots.ShownClip(np.ones((5, 3))), plots.ShownClip("a sentence"), plots.ShownClip(np.ones((5, 4, 4)))]
    figure = plots.retrieval_examples([plots.ShownClip("seven", "rank 2")], [results], [["class", "pair", ""]], "title")
    colours = [axis.spines["left"].get_edgecolor() for axis in figure.axes]
    assert len(set(colours)) == 4
    plots.save_figure(figure, tmp_path / "found.png")
    assert 2_000 < (tmp_path / "found.png").stat().st_size < 200_000


def read_when_indexed(store: Store) -> Dataset:
    """The same data set; all arrays except classes and lengths are read when indexed."""
    splits = {}
    for split in store.splits:
        clips = store.split(split)
        read = {key: array if key == "class" else LazyArray.of(array) for key, array in clips.arrays.items()}
        splits[split] = [dataclasses.replace(clips, arrays=read)]
    return Dataset(store.path, store.name, store.modalities, store.classes, splits)


def test_own_stores_and_arrays_that_are_read_when_indexed(tmp_path: Path) -> None:
    """Segmentation runs on a user's feature store with frames and masks."""
    splits = tiny.learnable_splits({"train": 12, "val": 6, "test": 6})
    generator = np.random.default_rng(0)
    for arrays in splits.values():
        count = len(arrays["class"])
        arrays["video.frames"] = generator.integers(0, 255, (count, 5, 8, 8)).astype(np.uint8)
        arrays["video.mask"] = generator.integers(0, 2, (count, 5, 8, 8)).astype(np.uint8)
    write_store(tmp_path / "store", "own", {name: tiny.MODALITIES[name] for name in NAMES}, ["a", "b", "c"], splits)
    store, rows = open_store(tmp_path / "store"), []
    for data in (store, read_when_indexed(store)):
        evaluator = Evaluator(tiny.model(names="audio,text"), data, segmenter_steps=1)
        evaluator.retrieval.rule = retrieval.RetrievalRule(steps=4)
        assert evaluator.modalities("segmentation") == ["audio", "text"]
        rows.append([evaluator.row(task, "audio", "text") for task in ("classification", "segmentation", "retrieval")])
        for row in rows[-1][1:]:
            pictures.DRAWN[row.task](tmp_path / f"{row.task}.png", evaluator, row)
    assert rows[0] == rows[1]
    one, other = (
        Evaluator(tiny.model(), data).row("localisation", "audio", "video")
        for data in (store, read_when_indexed(store))
    )
    assert one == other
