"""TOC: scores against a double loop, selected channels, and rows measured with them."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from unicode_fast.data import open_dataset
from unicode_fast.errors import UsageError
from unicode_fast.evaluate import main as evaluate
from unicode_fast.report import tables
from unicode_fast.tasks import EncodedDataset, Evaluator, probe_task
from unicode_fast.tasks.channels import (
    Selected,
    TocRule,
    choose_channels,
    select,
    sweep,
    toc_channels,
    toc_scores,
    used_rows,
)
from unicode_fast.train import main as train

pytestmark = pytest.mark.usefixtures("short_probes", "no_pictures")


def by_loops(codebook: torch.Tensor, first: float, second: float) -> torch.Tensor:
    """-w1 times the mean product over ordered pairs, plus w2 times the unbiased variance, channel by channel."""
    rows, scores = codebook.tolist(), []
    for channel in range(codebook.shape[1]):
        values = [row[channel] for row in rows]
        count, mean = len(values), sum(values) / len(values)
        similar = sum(a * b for i, a in enumerate(values) for j, b in enumerate(values) if i != j) / (count**2 - count)
        scores.append(-first * similar + second * sum((value - mean) ** 2 for value in values) / (count - 1))
    return torch.tensor(scores, dtype=torch.float64)


class TestScores:
    @pytest.mark.parametrize("weights", [(0.7, 0.3), (0.7, 0.0), (0.0, 1.0), (2.0, 5.0)])
    @pytest.mark.parametrize("shift", [0.0, 3.0])
    def test_double_loop(self, weights: tuple[float, float], shift: float) -> None:
        codebook = torch.randn(13, 9, dtype=torch.float64) + shift
        difference = (toc_scores(codebook, weights) - by_loops(codebook, *weights)).abs().max()
        assert difference < 1e-13 * max(1, shift**2)

    def test_float32_loses_nothing_beside_a_large_mean(self) -> None:
        codebook = torch.randn(40, 6) + 100
        exact = by_loops(codebook.double(), 0.0, 1.0)
        assert (toc_scores(codebook, (0.0, 1.0)) - exact).abs().max() < 1e-11

    def test_of_some_codewords(self) -> None:
        codebook, rows = torch.randn(10, 4, dtype=torch.float64), torch.arange(10) % 3 > 0
        assert torch.equal(toc_scores(codebook, rows=rows), toc_scores(codebook[rows]))
        assert not torch.equal(toc_scores(codebook, rows=rows), toc_scores(codebook))

    def test_dead_channels_of_a_rectified_codebook_come_first_without_the_variance(self) -> None:
        codebook = torch.rand(20, 8, dtype=torch.float64)
        codebook[:, [2, 5]] = 0
        assert toc_channels(codebook, 2, weights=(0.7, 0.0)).tolist() == [2, 5]
        # The largest possible score of a channel without a negative value is near 0; variance alone puts them last.
        assert set(toc_channels(codebook, 2, (0, 1), (0.0, 0.3)).tolist()) == {2, 5}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"codebook": torch.zeros(3)}, r"codebook must have shape \(M, D\), and rows \(M,\), got \(3,\)"),
            ({"rows": torch.ones(3, dtype=torch.bool)}, r"got \(4, 5\) with rows \(3,\)"),
            ({"rows": torch.arange(4) < 1}, "at least two codewords that are read, got 1"),
            ({"weights": (0.7,)}, r"weights must be two finite numbers of at least 0, not both 0, got \(0.7,\)"),
            ({"weights": (0.0, 0.0)}, r"weights must be .*, not both 0, got \(0.0, 0.0\)"),
            ({"weights": (0.7, float("nan"))}, "weights must be two finite"),
            ({"weights": (-0.7, 0.3)}, "weights must be two finite"),
        ],
    )
    def test_errors(self, change: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            toc_scores(**{"codebook": torch.zeros(4, 5), **change})


class TestChannels:
    def test_highest_then_lowest(self) -> None:
        codebook = torch.randn(12, 8, dtype=torch.float64)
        order = by_loops(codebook, 0.7, 0.3).argsort(descending=True).tolist()
        assert toc_channels(codebook, 4).tolist() == order[:4]
        assert toc_channels(codebook, 4, (3, 1)).tolist() == [*order[:3], order[-1]]
        assert toc_channels(codebook, 4, (1, 1)).tolist() == [*order[:2], order[-1], order[-2]]
        assert sorted(toc_channels(codebook, 8, (1, 1)).tolist()) == list(range(8))

    def test_equal_scores(self) -> None:
        """The first channels are taken, each once."""
        assert toc_channels(torch.ones(4, 6), 3).tolist() == [0, 1, 2]
        assert toc_channels(torch.ones(4, 6), 6, (1, 1)).tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize(
        ("channels", "lowest", "message"),
        [
            (9, (1, 0), "channels must be from 1 to the codebook's width 8, got 9"),
            (0, (1, 0), "channels must be from 1 to the codebook's width 8, got 0"),
            (6, (3, 1), "channels must be a multiple of 4 for shares 3:1, got 6"),
            (4, (0, 0), "lowest must be two shares of at least 0, not both 0, got 0:0"),
            (4, (2, -1), "lowest must be two shares of at least 0, not both 0, got 2:-1"),
        ],
    )
    def test_errors(self, channels: int, lowest: tuple[int, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            toc_channels(torch.randn(5, 8), channels, lowest)

    def test_the_released_sweep_at_other_widths(self) -> None:
        assert sweep(256) == [64, 128, 144, 168, 196, 224]
        assert sweep(16) == [4, 8, 9, 10, 12, 14]
        assert sweep(16, (3, 1)) == [4, 8, 12]
        assert sweep(1) == [1]


class TestRule:
    def test_of_flags(self) -> None:
        assert TocRule.from_text("64") == TocRule(64, (1, 0), (0.7, 0.3), "all")
        assert TocRule.from_text("auto", "3:1", "0.7,0", "used") == TocRule(None, (3, 1), (0.7, 0.0), "used")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (("0",), "toc_channels must be a whole number of at least 1, or auto, got '0'"),
            (("8.5",), "toc_channels must be a whole number"),
            (("8", "3"), "toc_lowest must be two whole numbers such as 3:1, not both 0, got '3'"),
            (("8", "0:0"), "toc_lowest must be"),
            (("8", "1:-1"), "toc_lowest must be"),
            (("8", None, "0.7"), "toc_weights must be two numbers such as 0.7,0.3, not both 0, got '0.7'"),
            (("8", None, "0,0.0"), "toc_weights must be two numbers such as 0.7,0.3, not both 0, got '0,0.0'"),
            (("8", None, "nan,1"), "toc_weights must be"),
            (("8", None, None, "some"), "toc_rows must be one of all, used, got 'some'"),
        ],
    )
    def test_errors(self, values: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TocRule.from_text(*values)


class TestSelected:
    def test_equal_index_and_some_channels(self, store: Path) -> None:
        model = tiny.model()
        features, channels = tiny.batch(model)["audio"], torch.tensor([3, 0, 7])
        index, vector = model.encode("audio", features)
        found = Selected(model, channels).encode("audio", features)
        assert torch.equal(found.index, index) and torch.equal(found.vector, vector[..., channels])

    def test_all_channels_give_the_rows_of_the_model(self, store: Path) -> None:
        """Up to the order of channels: the released order is by score, here it is that of the codebook."""
        model, dataset = tiny.model(names="audio,video"), open_dataset(tiny.config(data=str(store)).data)
        whole = Evaluator(model, dataset).row("classification", "audio", "video")
        assert Evaluator(Selected(model, torch.arange(16)), dataset).row("classification", "audio", "video") == whole
        few = Evaluator(Selected(model, torch.arange(4)), dataset).row("classification", "audio", "video")
        assert few.token == whole.token and few.token is not None

    def test_the_released_protocol(self, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its probes encode batches anew with dropout, through the selection too."""
        task = probe_task("classification", "official")
        monkeypatch.setattr(type(task), "rule", probe_task("classification").rule)
        model, dataset = tiny.model(names="audio,video"), open_dataset(tiny.config(data=str(store)).data)
        rows = [
            Evaluator(Selected(model, channels), dataset).row("classification", "audio", "video", "official")
            for channels in (torch.tensor([1, 2]), torch.arange(16))
        ]
        assert all(0 <= row.score <= 1 for row in rows)

    def test_used_codewords(self, store: Path) -> None:
        model, dataset = tiny.model(names="audio,video"), open_dataset(tiny.config(data=str(store)).data)
        encoded = EncodedDataset(model, dataset)
        [used] = used_rows(encoded)
        chosen = {int(code) for name in ("audio", "video") for code in encoded.codes("train", name).index.flatten()}
        assert set(used.nonzero()[:, 0].tolist()) == chosen and 2 <= len(chosen) < 12
        found = select(model, dataset, TocRule(4, rows="used"), probe_task("classification"), "audio", 0)
        expected = toc_channels(model.codebook.codebook, 4, rows=used)
        assert torch.equal(found.channels, expected)

    @pytest.mark.parametrize(("method", "parts", "sizes"), [("h-dcid", 2, 2), ("codaar", 2, 1)])
    def test_several_codebooks(self, store: Path, method: str, parts: int, sizes: int) -> None:
        """Each is selected by its own scores; a vector of `encode` has its channels in the order of the codebooks."""
        model, dataset = (
            tiny.model(names="audio,video", method=method).eval(),
            open_dataset(tiny.config(data=str(store)).data),
        )
        found = select(model, dataset, TocRule(4, (3, 1)), probe_task("classification"), "audio", 0)
        whole, chosen = (one.encode("video", tiny.batch(model)["video"]) for one in (model, found))
        assert whole.vector.shape[-1] == parts * 16 and torch.equal(whole.index, chosen.index)
        index = whole.index if sizes == 1 else torch.stack([whole.index // 12, whole.index % 12])
        vectors = [book[index if sizes == 1 else index[place]] for place, book in enumerate(model.codebooks)]
        assert torch.equal(torch.cat(vectors, -1), whole.vector)
        narrow = [
            vector[..., toc_channels(book, 4, (3, 1))] for vector, book in zip(vectors, model.codebooks, strict=True)
        ]
        assert torch.equal(torch.cat(narrow, -1), chosen.vector)
        used = used_rows(EncodedDataset(model, dataset))
        assert len(used) == sizes and all(2 <= int(rows.sum()) <= 12 for rows in used)
        select(model, dataset, TocRule(4, rows="used"), probe_task("classification"), "audio", 0)

    def test_choice_by_validation_of_the_source(self, store: Path) -> None:
        """One choice hides the class, the other has it."""
        model, dataset = tiny.model(names="audio,video"), open_dataset(tiny.config(data=str(store)).data)
        with torch.no_grad():
            model.codebook.codebook[:, :8] = 0.25
        encoded, task = EncodedDataset(model, dataset), probe_task("classification")
        blind, seeing = torch.arange(8), torch.arange(8, 16)
        for candidates in ([blind, seeing], [seeing, blind]):
            assert choose_channels(encoded, task, "audio", candidates, 0) is seeing
        found = select(model, dataset, TocRule(None), task, "audio", 0)
        assert len(found.channels) in sweep(16)
        with pytest.raises(ValueError, match="candidates must be at least one choice of channels, got none"):
            choose_channels(encoded, task, "audio", [], 0)


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    fields = {**tiny.SIZES, "steps": 2, "batch_size": 10, "validations": 0, "probe_tasks": "none"}
    train([f"--out={folder}", f"--data={store}", *(f"--{name}={value}" for name, value in fields.items())])
    return folder


DIRECTION = ["--task=classification", "--from=audio", "--to=video"]


class TestCommand:
    def test_rows_and_their_report(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        evaluate([str(run), *DIRECTION])
        evaluate([str(run), *DIRECTION, "--toc_channels=8", "--toc_lowest=3:1", "--toc_rows=used"])
        evaluate([str(run), *DIRECTION, "--toc-channels=8", "--toc-lowest=1:0", "--toc-weights=0.7,0.3"])
        evaluate([str(run), *DIRECTION, "--toc_channels=auto"])
        assert "note: the probe reads 8 of 16 channels" in capsys.readouterr().err
        flags = [json.loads(file.read_text())["flags"] for file in (run / "evaluations").glob("*.json")]
        expected = [
            {},
            {"toc_channels": "8", "toc_lowest": "3:1", "toc_rows": "used"},
            {"toc_channels": "8"},
            {"toc_channels": "auto"},
        ]
        assert len(flags) == 4 and all(those in flags for those in expected)
        shown = [str(column) for column in tables.rows_of(run)]
        assert "classification audio → video (toc_channels 8, toc_lowest 3:1, toc_rows used)" in shown
        assert "classification audio → video (toc_channels 8)" in shown

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--toc_channels=17"], "^toc_channels must be from 1 to the codebook's width 16, got 17"),
            (["--toc_channels=7", "--toc_lowest=1:1"], "^toc_channels must be a multiple of 2 for shares 1:1, got 7"),
            (["--toc_lowest=1:1"], "toc_lowest needs toc_channels, got none"),
            (["--toc_rows=used"], "toc_rows needs toc_channels, got none"),
            (["--toc_channels=4", "--toc_weights=1"], "toc_weights must be two numbers"),
            (["--toc_channels=4", "--task=retrieval"], "toc_channels needs a task with a linear probe, got retrieval"),
            (["--toc_channels=4", "--task=segmentation"], "with a linear probe, got segmentation"),
        ],
    )
    def test_errors(self, run: Path, flags: list[str], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            evaluate([str(run), *DIRECTION, *flags])
