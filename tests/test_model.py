"""The model: any set of modalities, masks, lengths, presets' traits."""

import math

import pytest
import tiny
import torch
from tolerances import FLOAT64

from unicode_fast import (
    PRESETS,
    Config,
    Encoded,
    Modality,
    NearestCodeword,
    PreparedCodebook,
    UniCode,
    nearest_codeword,
    preset,
)
from unicode_fast.config import FIELDS
from unicode_fast.methods import Draws, UniCodeMethod
from unicode_fast.modules.codebook import attended
from unicode_fast.modules.encoders import GridSemanticEncoder, GridSpecificEncoder, ResidualBlock, WordEncoder
from unicode_fast.training.metrics_logger import StepResult

SETS = ["audio,video", "audio,text", "video,text", "audio,video,text", "audio,video,text,depth"]


def total(owner: UniCode, features: dict, mask: dict | None = None, draws: Draws | None = None) -> dict[str, float]:
    output = owner(features, mask)
    return {name: term.item() for name, term in UniCodeMethod(owner).losses(output, draws).terms.items()}


def finite(result: StepResult) -> bool:
    return all(math.isfinite(term.item()) for term in result.terms.values())


class TestSets:
    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("names", SETS)
    def test_any_set_trains(self, name: str, names: str) -> None:
        trainer = tiny.trainer(name, names)
        features = tiny.batch(trainer.model)
        before = trainer.model.codebook.codebook.clone()
        result = trainer.train_step(features, None, 1e-3)
        assert finite(result)
        assert not torch.equal(trainer.model.codebook.codebook, before)
        assert trainer.model.codebook.step == 1

    @pytest.mark.parametrize("name", PRESETS)
    @pytest.mark.parametrize("positions", [1, 2])
    def test_very_short_clips_train(self, name: str, positions: int) -> None:
        trainer = tiny.trainer(name)
        assert finite(trainer.train_step(tiny.batch(trainer.model, positions=positions), None, 1e-3))

    @pytest.mark.parametrize("name", ["paper", "recommended"])
    def test_unequal_lengths_train(self, name: str) -> None:
        trainer = tiny.trainer(name)
        features = tiny.batch(trainer.model, lengths={"text": 3})
        assert finite(trainer.train_step(features, None, 1e-3))

    def test_official_refuses_unequal_lengths(self) -> None:
        owner = tiny.model("official")
        with pytest.raises(ValueError, match="same T.*official.*'text': 3"):
            owner(tiny.batch(owner, lengths={"text": 3}))

    @pytest.mark.parametrize("name", ["words", "sound_2"])
    def test_names_of_modalities(self, name: str) -> None:
        kinds = {name: Modality("vector", (3,)), "text": Modality("words", (4,))}
        owner = UniCode(kinds, tiny.config())
        lstm = sum(parameter.numel() for parameter in owner.encoders["text"].words.parameters())
        assert sum(parameter.numel() for parameter in owner.parameter_groups()["words"]) == lstm

    @pytest.mark.parametrize("name", ["train", "keys", "training", "a-b"])
    def test_names_that_torch_uses_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"got {name!r}"):
            UniCode({name: Modality("vector", (3,)), "text": Modality("words", (4,))}, tiny.config())

    def test_one_modality_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at least two"):
            UniCode({"audio": Modality("vector", (3,))}, preset("recommended"))


class TestMasks:
    @pytest.mark.parametrize("name", PRESETS)
    def test_padding_changes_nothing(self, name: str) -> None:
        """A padded batch has the losses and the codebook of the same batch cut to its length."""
        owner = tiny.model(name, dtype="float64", dropout=0.0).train()
        long, mask = tiny.batch(owner, positions=7), {key: tiny.mask_of([5] * 6, 7) for key in owner.names}
        short = {key: value[:, :5].clone() for key, value in long.items()}
        for value in long.values():
            value[:, 5:] = math.nan
        order = torch.tensor([1, 2, 3, 4, 5, 0])
        draws = Draws(torch.tensor(0.6, dtype=torch.float64), dict.fromkeys(owner.names, order))
        padded, cut = total(owner, long, mask, draws), total(owner, short, None, draws)
        for key in cut:
            assert padded[key] == pytest.approx(cut[key], **FLOAT64), key
        twin = tiny.model(name, dtype="float64", dropout=0.0).train()
        owner.update_codebook(owner(long, mask))
        twin.update_codebook(twin(short))
        for ours, theirs in zip(owner.codebook.state(), twin.codebook.state(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def test_clips_too_short_for_cpc_are_left_out(self) -> None:
        owner = tiny.model("recommended", dtype="float64", dropout=0.0, feature_norm="none")
        features = tiny.batch(owner)
        draws = Draws(torch.tensor(0.99, dtype=torch.float64))
        mask = {key: tiny.mask_of([5, 5, 5, 5, 2, 2], 5) for key in owner.names}
        four = {key: value[:4] for key, value in features.items()}
        assert total(owner, features, mask, draws)["cpc"] == pytest.approx(
            total(owner, four, None, draws)["cpc"], **FLOAT64
        )

    def test_recognised_is_a_share_of_the_clips_and_steps_that_count(self) -> None:
        owner = tiny.model("recommended", dtype="float64", dropout=0.0, cpc_steps=2)
        features, position = tiny.batch(owner), torch.tensor(0.0, dtype=torch.float64)
        mask = {key: tiny.mask_of([5, 5, 5, 5, 2, 1], 5) for key in owner.names}
        four = {key: value[:4] for key, value in features.items()}
        found = owner.cpc(owner(features, mask).semantic, mask, position).recognised
        alone = owner.cpc(owner(four).semantic, None, position).recognised
        # Two steps are predicted: four clips count for both, one for the first only.
        assert found.shape == alone.shape == (3, 3)
        assert ((found * 9 - (found * 9).round()).abs() < 1e-9).all()
        assert ((alone * 8 - (alone * 8).round()).abs() < 1e-9).all()
        assert found.max() <= 1 and found.sum() > 0

    def test_clips_of_one_step_contrast_their_means_padded_or_not(self) -> None:
        owner = tiny.model("recommended", dtype="float64", dropout=0.0)
        features = tiny.batch(owner)
        mask = {key: tiny.mask_of([1] * 6, 5) for key in owner.names}
        one = {key: value[:, :1] for key, value in features.items()}
        padded = total(owner, features, mask)["cpc"]
        assert padded == pytest.approx(total(owner, one)["cpc"], **FLOAT64)
        assert padded > 0

    def test_word_encoder_starts_backwards_at_the_last_word(self) -> None:
        torch.manual_seed(0)
        encoder, words = WordEncoder(4, 6).double(), torch.randn(3, 5, 4, dtype=torch.float64)
        mask = tiny.mask_of([5, 3, 1], 5)
        whole = encoder(words, mask)
        for clip, length in enumerate([5, 3, 1]):
            alone = encoder(words[clip : clip + 1, :length])
            torch.testing.assert_close(whole[clip : clip + 1, :length], alone, rtol=1e-12, atol=1e-14)


class TestTraits:
    def test_sum_pooling_is_the_sum_over_positions(self) -> None:
        sizes = tiny.config("official").model
        encoder, grids = GridSemanticEncoder((5, 5, 4), sizes).double(), torch.rand(2, 3, 5, 5, 4, dtype=torch.float64)
        mean = grids.mean((2, 3))
        scale = torch.sigmoid(encoder.excite(torch.relu(encoder.squeeze(mean))))
        torch.testing.assert_close(encoder(grids), 25 * mean * (1 + scale), rtol=1e-12, atol=0)

    def test_attention_pooling_is_a_weighted_mean(self) -> None:
        encoder = GridSemanticEncoder((5, 5, 4), tiny.config("paper", grid_pooling="attention").model)
        grids = torch.ones(1, 1, 5, 5, 4)
        scale = torch.sigmoid(encoder.excite(torch.relu(encoder.squeeze(torch.ones(1, 1, 4)))))
        torch.testing.assert_close(encoder(grids), 1 + scale)

    @pytest.mark.parametrize(("skip", "value"), [("relu", 0.0), ("input", -1.0)])
    def test_residual_skip(self, skip: str, value: float) -> None:
        block = ResidualBlock(2, skip)
        torch.nn.init.zeros_(block.narrow.weight)
        seen = torch.full((1, 2, 1, 1), value if skip == "relu" else 0.0)
        torch.testing.assert_close(block(torch.full((1, 2, 1, 1), -1.0)), seen)

    def test_equal_layers(self) -> None:
        for equal in (True, False):
            owner = tiny.model("official", equal_layers=equal, temporal_layers=2)
            first, second = owner.encoders["audio"].temporal.layers
            assert torch.equal(first.linear1.weight, second.linear1.weight) is equal

    def test_dtype_of_official_is_float64(self) -> None:
        assert tiny.model("official").dtype == torch.float64
        assert tiny.model("recommended").dtype == torch.float32

    def test_commitment_weights(self) -> None:
        """Own 2 beta, partners beta together (official); beta and beta/2 (paper); squared norm or mean."""
        for name, own, partner, norm in (("official", 0.5, 0.25, "mean"), ("paper", 0.25, 0.125, "sum")):
            owner = tiny.model(name, dtype="float64", commitment_norm=norm).eval()
            output = owner(tiny.batch(owner))
            terms = UniCodeMethod(owner).losses(output).terms
            z, codes = output.semantic, output.codeword

            def distance(key: str, other: str, z: dict = z, codes: dict = codes, norm: str = norm) -> torch.Tensor:
                squared = (z[key] - codes[other]).square()
                return squared.sum(-1).mean() if norm == "sum" else squared.mean()

            expected = own * distance("audio", "audio") + partner / 2 * (
                distance("audio", "video") + distance("audio", "text")
            )
            assert terms["commitment.audio"].item() == pytest.approx(expected.item(), **FLOAT64)

    def test_attended_partner(self) -> None:
        query, keys = torch.randn(2, 3, 4).double(), torch.randn(2, 5, 4).double()
        mask = tiny.mask_of([5, 2], 5)
        for b in range(2):
            for t in range(3):
                weights = [math.exp((query[b, t] @ keys[b, s]).item() / 2) if mask[b, s] else 0 for s in range(5)]
                expected = sum(w * keys[b, s] for s, w in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(attended(query, keys, mask)[b, t], expected, rtol=1e-12, atol=1e-12)

    def test_cpc_position_covers_the_released_range(self) -> None:
        """t in {1..8} for ten steps, one prediction step; the paper's range starts at the first step."""
        for name, first in (("official", 1), ("paper", 0)):
            owner = tiny.model(name)
            clock = torch.arange(10, dtype=owner.dtype).view(1, 10, 1).expand(2, 10, 16)
            semantic = dict.fromkeys(owner.names, clock)
            targets = {
                int(owner.cpc._predictions(semantic, None, torch.tensor(n / 400, dtype=torch.float64))[0][0, 0, 0, 0])
                for n in range(400)
            }
            assert targets == set(range(first + 1, 10))

    def test_straight_through_gradient(self) -> None:
        owner = tiny.model()
        z = torch.randn(2, 3, 16, requires_grad=True)
        quantised = owner.codebook.quantise({"audio": z})["audio"]
        assert torch.equal(quantised.codeword, owner.codebook.codebook[quantised.index])
        (quantised.vector * 3).sum().backward()
        assert torch.equal(z.grad, torch.full_like(z, 3.0))


class TestEncode:
    @pytest.mark.parametrize("name", PRESETS)
    def test_no_buffer_changes_in_eval_mode(self, name: str) -> None:
        owner = tiny.model(name).eval()
        before = {key: value.clone() for key, value in owner.state_dict().items()}
        features = tiny.batch(owner)
        owner(features)
        for key in owner.names:
            owner.encode(key, features[key])
        assert all(torch.equal(before[key], value) for key, value in owner.state_dict().items())

    def test_agrees_with_forward(self) -> None:
        owner = tiny.model().eval()
        features = tiny.batch(owner)
        output = owner(features)
        for key in owner.names:
            encoded = owner.encode(key, features[key])
            assert encoded.index.shape == (6, 5)
            assert torch.equal(encoded.index, output.index[key])
            assert torch.equal(encoded.vector, output.codeword[key])

    def test_is_in_evaluation_mode_whatever_the_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        owner = tiny.model(dropout=0.5).eval()
        features = tiny.batch(owner)
        expected = {key: owner.encode(key, features[key]) for key in owner.names}
        owner.train()
        owner.encoders["audio"].temporal.eval()
        modes, random_numbers = [part.training for part in owner.modules()], torch.get_rng_state()
        for key in owner.names:
            assert torch.equal(owner.encode(key, features[key]).index, expected[key].index)
            assert torch.equal(owner.encode(key, features[key]).vector, expected[key].vector)
        assert torch.equal(torch.get_rng_state(), random_numbers)

        def fail(*_: object) -> None:
            raise RuntimeError

        monkeypatch.setattr(owner.encoders["video"], "encode_semantic", fail)
        with pytest.raises(RuntimeError):
            owner.encode("video", features["video"])
        assert [part.training for part in owner.modules()] == modes

    def test_with_dropout(self) -> None:
        """As `forward` in training mode, drawn from torch's generator; the mode stays."""
        owner = tiny.model(dropout=0.5, feature_norm="none", names="audio,video").eval()
        features = tiny.batch(owner)
        torch.manual_seed(1)
        first = owner.encode("audio", features["audio"], dropout=True).index
        assert not any(part.training for part in owner.modules())
        torch.manual_seed(1)
        assert torch.equal(owner.train()(features).index["audio"], first)
        assert not torch.equal(owner.encode("audio", features["audio"]).index, first)

    def test_compiles_to_one_graph(self) -> None:
        owner = tiny.model().train()
        features = tiny.batch(owner)
        for key in ("audio", "text"):
            with torch._dynamo.config.patch(allow_rnn=key == "text"):
                encode = torch.compile(owner.encode, fullgraph=True, backend="eager")
                assert_same(encode(key, features[key]), owner.encode(key, features[key]))
        assert all(part.training for part in owner.modules())

    @pytest.mark.slow
    def test_compiles_with_inductor(self) -> None:
        owner = tiny.model().eval()
        features, mask = tiny.batch(owner), tiny.mask_of([5, 4, 3, 5, 5, 2], 5)
        encode = torch.compile(owner.encode, fullgraph=True)
        for key in ("audio", "video"):
            for given in (None, mask):
                assert_same(encode(key, features[key], given), owner.encode(key, features[key], given))


@pytest.mark.parametrize(("clips", "by_channel"), [(1, True), (200, False)])
def test_a_convolution_copies_the_smaller_of_weights_and_maps(clips: int, by_channel: bool) -> None:
    """On a CPU the map has its channels first where the weights have more elements; results are those of either."""
    torch.manual_seed(0)
    encoder = GridSpecificEncoder(16, preset("recommended").model).double()
    grids = torch.randn(clips, 2, 7, 7, 16, dtype=torch.float64)
    layouts = []
    encoder.convolutions[0].register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[0].is_contiguous()))
    maps, vectors = encoder(grids)
    assert layouts == [by_channel]
    expected = encoder.convolutions(grids.flatten(0, 1).permute(0, 3, 1, 2).contiguous())
    torch.testing.assert_close(maps, expected.permute(0, 2, 3, 1).unflatten(0, (clips, 2)), rtol=1e-10, atol=1e-12)
    assert vectors.shape[:2] == (clips, 2)


def assert_same(found: Encoded, expected: Encoded) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_a_training_step_searches_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All modalities share a search."""
    rows = []

    def search(features: torch.Tensor, codebook: PreparedCodebook) -> NearestCodeword:
        rows.append(len(features))
        return nearest_codeword(features, codebook)

    monkeypatch.setattr("unicode_fast.modules.codebook.nearest_codeword", search)
    trainer = tiny.trainer(name)
    features = tiny.batch(trainer.model)
    trainer.train_step(features, None, 1e-3)
    assert rows == [sum(x.shape[0] * x.shape[1] for x in features.values())]


class TestConfiguration:
    def test_every_field_is_read(self) -> None:
        """A field that no code reads is an error; names are unique, so a search of the sources finds them."""
        from pathlib import Path

        import unicode_fast

        folder = Path(unicode_fast.__file__).parent
        sources = "".join(
            path.read_text() for path in folder.rglob("*.py") if path.name not in ("config.py", "presets.py")
        )
        unread = [name for name in FIELDS if f".{name}" not in sources]
        assert unread == []

    def test_presets_differ_only_in_fields(self) -> None:
        official, paper = preset("official").flat(), preset("paper").flat()
        assert official.keys() == paper.keys()
        assert isinstance(preset("recommended", "paper"), Config)
