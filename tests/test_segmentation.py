"""Masks that depend on the query: the measures by their definitions, the network by its formula, learning."""

import math
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from look_up import LookUp
from sklearn.metrics import fbeta_score, jaccard_score
from task_tolerances import MAPS, MASKS
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from unicode_fast.checkpoint import CheckpointError
from unicode_fast.config import Modality
from unicode_fast.data import ClipSet
from unicode_fast.tasks import BackboneChoice, Bootstrap, EncodedDataset, Segmentation
from unicode_fast.tasks.metrics.masks import (
    MaskScores,
    frame_scores,
    joined,
    measured_masks,
    official_mask_scores,
)
from unicode_fast.tasks.segmentation.backbones import LIGHT_SETTINGS, TIMM_SETTINGS, make_pyramid
from unicode_fast.tasks.segmentation.segmenter import (
    DilatedSum,
    Fusion,
    QueryBlock,
    ResidualUnit,
    Segmenter,
    load_segmenter,
)
from unicode_fast.tasks.segmentation.task import another_clip, tiled

SIDE, FRAMES = 8, 3
COUNTS = {"train": 96, "val": 24, "test": 24}
STEPS = 100


class TwoSquares:
    """A dark and a bright square side by side; queries name one of them by the codes 0 to 4 or 5 to 9."""

    def __init__(self, *, channels: int = 1, labelled: dict[str, int] | None = None) -> None:
        self.modalities = {"audio": Modality("vector", (1,)), "text": Modality("vector", (1,))}
        self.classes, self.splits = ["dark", "bright"], list(COUNTS)
        self.channels, self.labelled = channels, labelled or {}

    def clips(self, split: str, modality: str) -> ClipSet:
        clips, generator = COUNTS[split], np.random.default_rng(self.splits.index(split))
        target, left = generator.integers(2, size=(2, clips))
        frames = generator.integers(0, 20, (clips, FRAMES, SIDE, SIDE))
        mask = np.zeros((clips, FRAMES, SIDE, SIDE), np.uint8)
        # The first square is dark, so that the query names the left one where it is the target.
        for clip in range(clips):
            for square, columns in enumerate((slice(0, 3), slice(5, 8))):
                bright = square != left[clip]
                frames[clip, :, 2:6, columns] += 180 if bright else 80
                mask[clip, :, 2:6, columns] = bright == target[clip]
        frames = frames.astype(np.uint8)
        shown = frames if self.channels == 1 else np.repeat(frames[..., None], self.channels, -1)
        arrays = {
            "class": target,
            "video.frames": shown,
            "video.mask": mask[:, : self.labelled.get(split, FRAMES)],
        }
        for name, steps in (("audio", 3), ("text", 4)):
            code = 5 * target[:, None] + generator.integers(5, size=(clips, steps))
            arrays[name] = code[..., None].astype(np.float32)
        return ClipSet(arrays, self.modalities, self.classes, np.arange(clips))


def measured(store: TwoSquares | None = None, seed: int = 0, steps: int = STEPS) -> Segmentation:
    return Segmentation(EncodedDataset(LookUp(), store or TwoSquares()), seed, steps=steps)


@pytest.fixture(scope="module")
def trained() -> Segmentation:
    return measured()


def masks(seed: int, frames: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities on thresholds and between them, and truth that depends on them, some of it empty."""
    generator = np.random.default_rng(seed)
    truth = generator.random((frames, 6, 5)) < generator.choice([0.0, 0.2, 0.6], frames)[:, None, None]
    noisy = np.clip(generator.random(truth.shape) * 0.7 + 0.3 * truth, 0, 1).astype(np.float32)
    steps = np.round(noisy * 254) / 254
    return np.where(generator.random(truth.shape) < 0.5, noisy, steps).astype(np.float32), truth


def released_measures(probability: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Both measures of one batch, frame by frame and threshold by threshold, as the released code defines them."""
    predicted, target = torch.from_numpy(probability), torch.from_numpy(truth).float()
    iou, curves = [], []
    for p, y in zip(predicted, target, strict=True):
        chosen = (p > 0.5).float()
        if y.sum() == 0:
            iou.append(float(((1 - y) * (1 - chosen)).sum() / (y.numel() + 1e-7)))
            continue
        iou.append(float((chosen * y).sum() / (torch.maximum(chosen, y).sum() + 1e-7)))
        curve = []
        for threshold in torch.linspace(0, 1 - 1e-10, 255):
            above = (p >= threshold).float()
            hits = (above * y).sum()
            precision, recall = hits / (above.sum() + 1e-20), hits / (y.sum() + 1e-20)
            f = 1.3 * precision * recall / (0.3 * precision + recall)
            curve.append(0.0 if torch.isnan(f) else float(f))
        curves.append(curve)
    return float(np.mean(iou)), float(np.mean(curves, 0).max()) if curves else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_the_released_ones_where_there_is_one_batch(seed: int) -> None:
    probability, truth = masks(seed)
    clip = np.repeat(np.arange(4), 3)
    scores = frame_scores(probability, truth, clip)
    expected = released_measures(probability, truth)
    assert (scores.miou, scores.f_score) == pytest.approx(expected, abs=MASKS.absolute)
    assert official_mask_scores(scores, 4) == pytest.approx(expected, abs=MASKS.absolute)


def test_official_averages_depend_on_the_batch_and_ours_do_not() -> None:
    probability, truth = masks(5, frames=15)
    clip = np.repeat(np.arange(5), 3)
    scores = frame_scores(probability, truth, clip)
    for batch_size in (2, 4):
        frames = 3 * batch_size
        batches = [
            released_measures(probability[start : start + frames], truth[start : start + frames])
            for start in range(0, 15, frames)
        ]
        assert official_mask_scores(scores, batch_size) == pytest.approx(np.mean(batches, 0), abs=MASKS.absolute)
    assert official_mask_scores(scores, 2)[1] != pytest.approx(official_mask_scores(scores, 4)[1], abs=1e-3)
    chunks = [frame_scores(probability[start::4], truth[start::4], clip[start::4]) for start in range(4)]
    assert (joined(chunks).miou, joined(chunks).f_score) == pytest.approx((scores.miou, scores.f_score))


def test_measures_are_those_of_scikit_learn() -> None:
    probability, truth = masks(1)
    scores = frame_scores(probability, truth, np.arange(len(truth)))
    thresholds = torch.linspace(0, 1 - 1e-10, 255).numpy()
    for frame in np.flatnonzero(~scores.empty):
        flat, target = probability[frame].ravel(), truth[frame].ravel()
        assert scores.iou[frame] == pytest.approx(jaccard_score(target, flat > 0.5, zero_division=0))
        for place in range(0, 255, 25):
            expected = fbeta_score(target, flat >= thresholds[place], beta=math.sqrt(0.3), zero_division=0)
            assert scores.f[frame, place] == pytest.approx(expected)


def test_empty_frames_by_hand() -> None:
    probability = np.zeros((2, 2, 2), np.float32)
    probability[1, 0, 0] = 0.9
    scores = frame_scores(probability, np.zeros((2, 2, 2), bool), np.arange(2))
    assert scores.iou.tolist() == [1.0, 0.75] and scores.empty.all() and scores.f_score == 0.0


def test_intervals_are_over_clips() -> None:
    probability, truth = masks(2, frames=12)
    scores = frame_scores(probability, truth, np.repeat(np.arange(4), 3))
    found = measured_masks(scores, Bootstrap(4, 0), 4)
    for name in ("miou", "f_score"):
        assert found[name].low is not None and found[name].low <= found[name].value <= found[name].high  # type: ignore[operator]
    same = MaskScores(*(np.concatenate([array[:3]] * 4) for array in scores[:3]), np.repeat(np.arange(4), 3))
    estimate = measured_masks(same, Bootstrap(4, 0), 4)["miou"]
    assert estimate.interval == pytest.approx((estimate.value, estimate.value))


def test_a_query_block_is_its_quadratic_formula() -> None:
    """The released block multiplies theta phi^T first, one number for each two pixels of all frames, then g."""
    torch.manual_seed(0)
    block = QueryBlock(6, 5, 0.7)
    maps, query = torch.randn(2, 3, 6, 4, 4), torch.randn(2, 3, 5)
    x = maps.permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, F·h·w, C)
    everywhere = block.align(query)[:, :, None].expand(-1, -1, 16, -1).flatten(1, 2)
    attention = block.theta(x) @ block.phi(everywhere).transpose(1, 2) / x.shape[1]
    y = block.expand(attention @ block.g(x))
    y = block.batch_norm(y.transpose(1, 2)).transpose(1, 2)
    expected = block.layer_norm(y + x).view(2, 3, 4, 4, 6).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(block(maps, query), expected, rtol=MAPS.relative, atol=MAPS.absolute)


def test_it_segments_the_named_square_by_an_untrained_modality(trained: Segmentation) -> None:
    row = trained.row("audio", "text")
    assert (row.task, row.source, row.target) == ("segmentation", "audio", "text")
    assert min(row.score, row.same_modality) > 0.8
    # Half of the shuffled queries name the right square.
    assert row.chance < 0.65
    assert row.same_interval is not None and row.same_interval[0] <= row.same_modality <= row.same_interval[1]
    assert row.interval == row.metrics["miou"].interval and row.chance == row.metrics["shuffled_miou"].value
    assert {"f_score", "official_miou", "official_f_score", "shuffled_f_score"} <= set(row.metrics)


def test_training_repeats_bit_for_bit_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    states = [measured(seed=seed, steps=4).segmenter("text", "text").state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_the_state_is_chosen_by_queries_of_the_training_modality() -> None:
    """Only the official protocol reads validation clips in another modality."""
    judged: list[tuple[str, str]] = []

    class Watched(Segmentation):
        def scores(
            self, segmenter: Segmenter, query: str, split: str = "test", *, shuffled: bool = False
        ) -> MaskScores:
            judged.append((split, query))
            return super().scores(segmenter, query, split, shuffled=shuffled)

    watched = Watched(EncodedDataset(LookUp(), TwoSquares()), steps=2)
    assert watched.segmenter("audio", "audio") is watched.segmenter("audio", "audio", "sound")
    assert set(judged) == {("val", "audio")}
    judged.clear()
    watched.segmenter("audio", "text", "official")
    assert set(judged) == {("val", "audio"), ("val", "text")}


@pytest.mark.parametrize(("protocol", "frames"), [("held_out", 2), ("official", 1)])
def test_the_loss_reads_labelled_frames(monkeypatch: pytest.MonkeyPatch, protocol: str, frames: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def loss(logits: Tensor, truth: Tensor) -> Tensor:
        shapes.append(tuple(truth.shape))
        return binary_cross_entropy_with_logits(logits, truth)

    monkeypatch.setattr("unicode_fast.tasks.segmentation.task.binary_cross_entropy_with_logits", loss)
    measured(TwoSquares(labelled={"train": 2}), steps=1).segmenter("audio", "audio", protocol)
    batch = {"held_out": LIGHT_SETTINGS.batch_size, "official": 4}[protocol]
    assert shapes == [(batch, frames, SIDE, SIDE)]


def test_the_head_is_that_of_avsbench() -> None:
    """Sums of dilated convolutions with small first weights; units whose first ReLU is in place; corners aligned."""
    assert TIMM_SETTINGS.dilations == (3, 6, 12, 18) and TIMM_SETTINGS.query_share == 0
    torch.manual_seed(0)
    reduce = DilatedSum(16, 8, TIMM_SETTINGS.dilations, TIMM_SETTINGS.dilated_deviation)
    assert [branch.dilation for branch in reduce.branches] == [(3, 3), (6, 6), (12, 12), (18, 18)]
    assert float(torch.cat([branch.weight.flatten() for branch in reduce.branches]).std()) == pytest.approx(
        0.01, rel=0.1
    )
    maps = torch.randn(2, 16, 20, 20)
    assert torch.allclose(reduce(maps), sum(branch(maps) for branch in reduce.branches))
    fusion, coarse, fine = Fusion(8, 2, first=False), torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)

    def unit(owner: ResidualUnit, given: torch.Tensor) -> torch.Tensor:
        relu, kept = torch.nn.ReLU(inplace=True), given.clone()
        return owner.second(relu(owner.first(relu(kept)))) + kept

    assert fusion.lateral is not None
    merged = unit(fusion.merge, coarse + unit(fusion.lateral, fine))
    expected = torch.nn.functional.interpolate(merged, scale_factor=2, mode="bilinear", align_corners=True)
    assert torch.allclose(fusion(coarse, fine), expected, atol=1e-6)


def test_official_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unicode_fast.tasks.segmentation.task._half_cosine", None)  # its rate is constant
    rule = Segmentation(EncodedDataset(LookUp(), TwoSquares())).rule("official")
    assert (rule.batch_size, rule.learning_rate, rule.epochs, rule.steps, rule.decay) == (4, 1e-4, 1, 0, False)
    row = measured(steps=2).row("audio", "text", "official")
    assert row.score == row.metrics["official_miou"].value and row.interval is None
    assert row.protocol == "official"


@pytest.mark.parametrize(("protocol", "times"), [("held_out", 5), ("official", 1)])
def test_the_official_epoch_is_judged_at_its_end(protocol: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def score(self: Segmentation, segmenter: Segmenter, judge: str, protocol: str) -> float:
        judged.append(judge)
        return 0.0

    monkeypatch.setattr(Segmentation, "_judged", score)
    own = measured(steps=10)
    own.segmenter("audio", "audio", protocol)
    assert judged.count("audio") == times


def test_a_shorter_query_is_repeated_from_its_start() -> None:
    encoded = EncodedDataset(LookUp(), TwoSquares())
    codes = encoded.codes("test", "audio")
    found = tiled(codes, np.array([3, 1]), 7)
    assert torch.equal(found, codes.vector[[3, 1]][:, [0, 1, 2, 0, 1, 2, 0]])


def test_every_clip_has_the_query_of_another_one() -> None:
    other = another_clip(30, 0)
    assert sorted(other) == list(range(30)) and (other != np.arange(30)).all()


def test_a_segmenter_is_saved_and_loaded_with_its_time_projection(trained: Segmentation, tmp_path: Path) -> None:
    trained.save(tmp_path / "segmenter.safetensors", "audio", "text")
    kept, own = trained.segmenter_of("audio", "text"), measured(steps=1)
    assert not torch.equal(kept.time.weight, torch.full_like(kept.time.weight, 1 / 4))
    own.load(tmp_path / "segmenter.safetensors", "audio", "text")
    loaded = own.segmenter_of("audio", "text")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in kept.state_dict().items())
    assert own.scores(loaded, "text").miou == trained.scores(kept, "text").miou
    with pytest.raises(ValueError, match="source of the segmenter in .* must be 'text', got 'audio'"):
        own.load(tmp_path / "segmenter.safetensors", "text", "audio")
    with pytest.raises(FileExistsError, match="segmenter file must not exist yet"):
        trained.save(tmp_path / "segmenter.safetensors", "audio", "text")
    content = (tmp_path / "segmenter.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="short' is damaged or of other sizes"):
        load_segmenter(tmp_path / "short", LIGHT_SETTINGS, {})
    with pytest.raises(FileNotFoundError):
        load_segmenter(tmp_path / "none", LIGHT_SETTINGS, {})


def test_bad_data_are_refused() -> None:
    class Without(TwoSquares):
        def clips(self, split: str, modality: str) -> ClipSet:
            clip_set = super().clips(split, modality)
            return ClipSet({"audio": clip_set.arrays["audio"]}, self.modalities, self.classes, clip_set.index)

    with pytest.raises(ValueError, match="data for segmentation must hold arrays '<name>.frames' and '<name>.mask'"):
        measured(Without())
    segmenter = Segmenter("light", channels=1, frames=2, query_steps=3, query_width=4, settings=LIGHT_SETTINGS)
    with pytest.raises(ValueError, match="frames must have sides that are multiples of 4, got 6 x 8"):
        segmenter(torch.zeros(1, 2, 6, 8, 1, dtype=torch.uint8), torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match="weights are for a backbone of timm"):
        BackboneChoice("light", "somewhere")
    with pytest.raises(ValueError, match="probability and truth must have one shape"):
        frame_scores(np.zeros((2, 3, 3), np.float32), np.zeros((2, 3, 4), bool), np.arange(2))


def test_missing_timm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    command = re.escape(f"pip install 'unicode_fast[segmentation]' torch=={version('torch')}")
    with pytest.raises(ModuleNotFoundError, match=f"needs the extra 'segmentation'.*{command}"):
        make_pyramid("pvt_v2_b5", 3)


def test_a_torchvision_of_another_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    words = re.escape(f"torchvision that was built for torch {torch.__version__}")
    with pytest.raises(ImportError, match=f"{words}.*operator torchvision::nms does not exist"):
        make_pyramid("pvt_v2_b5", 3)


def timm_or_skip() -> ModuleType:
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    return timm


def _original_stage(found: re.Match[str]) -> str:
    return {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[found[2]] + str(int(found[1]) + 1)


class TestTimm:
    def test_the_published_head_on_a_pyramid_of_timm(self) -> None:
        """The whole path from 224 pixels to a mask of 224, with the smallest model of the family of pvt_v2_b5."""
        timm_or_skip()
        encoded, choice = EncodedDataset(LookUp(), TwoSquares(channels=3)), BackboneChoice("pvt_v2_b0")
        segmenter = Segmenter(
            choice.name, channels=3, frames=2, query_steps=4, query_width=16, settings=choice.settings
        ).eval()
        assert segmenter.backbone.strides == (4, 8, 16, 32)
        with torch.no_grad():
            logits = segmenter(torch.zeros(1, 2, 64, 96, 3, dtype=torch.uint8), torch.zeros(1, 4, 16))
        assert logits.shape == (1, 2, 64, 96)
        with pytest.raises(ValueError, match="frames must have sides that are multiples of 32, got 8 x 8"):
            Segmentation(encoded, backbone=choice, steps=1).segmenter("audio", "audio")

    def test_pyramids_have_the_published_widths(self) -> None:
        timm = timm_or_skip()
        assert timm.is_model("pvt_v2_b5")
        assert make_pyramid("pvt_v2_b1", 3).widths == (64, 128, 320, 512)

    @pytest.mark.parametrize("suffix", ["pth", "safetensors"])
    def test_weights_come_from_a_file_or_folder(self, tmp_path: Path, suffix: str) -> None:
        from safetensors.torch import save_file

        timm = timm_or_skip()
        whole = timm.create_model("pvt_v2_b0", pretrained=False)
        state = {name: value.contiguous() for name, value in whole.state_dict().items()}
        file = tmp_path / f"weights.{suffix}"
        torch.save(state, file) if suffix == "pth" else save_file(state, file)
        pyramid = make_pyramid("pvt_v2_b0", 3)
        pyramid.load_weights(str(tmp_path))  # type: ignore[operator]
        name = "stages.1.blocks.0.attn.q.weight"
        assert torch.equal(pyramid.state_dict()["model." + name.replace("stages.", "stages_")], state[name])
        # Names of the PVT v2 release.
        original = {
            re.sub(r"^stages\.(\d)\.(downsample|blocks|norm)", _original_stage, key)
            .replace("patch_embed.", "patch_embed1.")
            .replace("dwconv", "dwconv.dwconv"): value
            for key, value in state.items()
        }
        torch.save(original, tmp_path / "original.pth")
        again = make_pyramid("pvt_v2_b0", 3)
        again.load_weights(str(tmp_path / "original.pth"))  # type: ignore[operator]
        assert all(torch.equal(value, pyramid.state_dict()[key]) for key, value in again.state_dict().items())
        with pytest.raises(ValueError, match="weights must hold every layer of the backbone"):
            make_pyramid("pvt_v2_b1", 3).load_weights(str(file))  # type: ignore[operator]

    def test_bad_choices_are_refused(self, tmp_path: Path) -> None:
        timm_or_skip()
        with pytest.raises(ValueError, match="backbone must be 'light' or the name of a model of timm, got 'none'"):
            make_pyramid("none", 3)
        with pytest.raises(ValueError, match="frames must have 3 channels for the backbone 'pvt_v2_b0', got 1"):
            make_pyramid("pvt_v2_b0", 1)
        with pytest.raises(FileNotFoundError, match="backbone weights must be a file, or a folder with one"):
            make_pyramid("pvt_v2_b0", 3).load_weights(str(tmp_path))  # type: ignore[operator]
