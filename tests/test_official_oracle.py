"""What the oracle shortens of the released video encoders, and the entry and parameter counts of the release.

All else of the oracle is compared with the package in test_official_preset.py.
"""

import math

import official_layers as layers
import pytest
import torch
from compare import assert_close
from official_checkpoint import (
    MODALITIES,
    SMALL,
    Array,
    State,
    checkpoint,
    cpc_shapes,
    decoder_shapes,
    encoder_shapes,
    features,
    mi_shapes,
    shapes,
    text_lstm_shapes,
)
from official_tolerances import LAYER
from torch import Tensor, nn

CLIPS, STEPS = 3, 5


@pytest.fixture(scope="module")
def saved() -> dict:
    return checkpoint("AVT", 1, widths=SMALL)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    return features("AVT", CLIPS, STEPS, seed=2, widths=SMALL)


def loaded(module: nn.Module, state: State, prefix: str = "") -> nn.Module:
    """The module in float64 and eval mode, with exactly the entries under the prefix."""
    part = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in state.items() if name.startswith(prefix)}
    module.double().load_state_dict(part)
    return module.requires_grad_(False).eval()


def check(actual: Array, expected: Tensor) -> None:
    assert_close(torch.from_numpy(actual), expected, LAYER)


class ResidualStack(nn.Module):
    """As released: the block is a list of modules whose first ReLU overwrites the block's input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        block = nn.Module()
        block.res_block = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1, bias=False),
        )
        self.stack = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.stack:
            x = x + block.res_block(x)
        return torch.relu(x)


class SpatialAttention(nn.Module):
    """The video semantic encoder with all its layers, softmax over the singleton axis included."""

    def __init__(self) -> None:
        super().__init__()
        self.se_layer = nn.Sequential(
            nn.Linear(SMALL.video, SMALL.squeeze, bias=False),
            nn.ReLU(),
            nn.Linear(SMALL.squeeze, SMALL.video, bias=False),
            nn.Sigmoid(),
        )
        self.affine_video_ave = nn.Linear(SMALL.video, SMALL.spatial_attention)
        self.affine_video_self = nn.Linear(SMALL.video, SMALL.spatial_attention)
        self.ave_v_att = nn.Linear(SMALL.spatial_attention, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.flatten(0, 1).flatten(1, 2)  # (B T, 49, C)
        frames = frames * self.se_layer(frames.mean(1))[:, None] + frames
        query = torch.relu(self.affine_video_ave(frames.mean(1)))[:, None]
        key = torch.relu(self.affine_video_self(frames))
        weight = torch.softmax(torch.tanh(self.ave_v_att(key * query)).transpose(1, 2).transpose(1, 2), dim=-1)
        return (weight * frames).sum(1).unflatten(0, x.shape[:2])


class TestLayersAgainstTorch:
    def test_video_specific_and_its_club_feature(self, saved: dict, inputs: dict[str, Array]) -> None:
        state, first, size = saved["Encoder_parameters"], SMALL.video_first, SMALL.video_map
        module = nn.Module()
        module.conv_stack = nn.Sequential(
            nn.Conv2d(SMALL.video, first, 3),
            nn.ReLU(),
            nn.Conv2d(first, size, 3),
            nn.ReLU(),
            nn.Conv2d(size, size, 1),
            ResidualStack(size),
        )
        module.feed_forward = nn.Sequential(
            nn.Linear(size, SMALL.club_hidden), nn.ReLU(), nn.Linear(SMALL.club_hidden, SMALL.club_feature)
        )
        loaded(module, state, "Video_encoder.")
        maps = module.conv_stack(torch.from_numpy(inputs["video"]).flatten(0, 1).permute(0, 3, 1, 2))
        pooled = nn.functional.avg_pool2d(maps, 3, stride=1).flatten(1)
        specific = layers.video_specific(state, inputs["video"])
        assert specific.shape == (CLIPS, STEPS, 3, 3, size)
        check(specific, maps.permute(0, 2, 3, 1).unflatten(0, (CLIPS, STEPS)))
        check(layers.club_feature(state, specific), module.feed_forward(pooled).unflatten(0, (CLIPS, STEPS)))

    def test_video_semantic(self, saved: dict, inputs: dict[str, Array]) -> None:
        module = loaded(SpatialAttention(), saved["Encoder_parameters"], "video_semantic_encoder.")
        expected = module(torch.from_numpy(inputs["video"]))
        check(layers.video_semantic(saved["Encoder_parameters"], inputs["video"]), expected)


class TestNames:
    @pytest.mark.parametrize(
        ("variant", "encoder", "cpc", "decoder"), [("AV", 102, 20, 22), ("AT", 84, 20, 16), ("AVT", 142, 30, 30)]
    )
    def test_entry_counts(self, variant: str, encoder: int, cpc: int, decoder: int) -> None:
        counts = [len(entries) for entries in shapes(variant).values()]
        assert counts == [encoder, cpc, 16, 16, 16, 16, decoder]

    def test_parameter_counts(self) -> None:
        def count(entries: dict[str, tuple[int, ...]]) -> int:
            return sum(math.prod(shape) for name, shape in entries.items() if "Cross_quantizer" not in name)

        assert count(encoder_shapes("AV")) == 77_622_785
        assert count(encoder_shapes("AT")) == 4_936_192
        assert count(encoder_shapes("AVT")) == 80_123_649
        assert count(decoder_shapes("AVT")) == 37_402_663
        assert count(text_lstm_shapes()) == 1_314_816
        assert [count(cpc_shapes(variant)) for variant in ("AV", "AT", "AVT")] == [2_236_928, 2_236_928, 3_355_392]
        assert [count(mi_shapes(modality)) for modality in MODALITIES["AVT"]] == [197_888, 263_936, 197_888]

    def test_audio_text_files_its_text_predictor_under_video(self) -> None:
        assert {name.split("_")[0] for name in cpc_shapes("AT")} == {"video", "audio"}
