"""The oracle itself: layers against torch's, entry and parameter counts, quantiser and losses by hand."""

import io
import math
from itertools import product

import numpy as np
import official_layers as layers
import official_oracle as oracle
import pytest
import torch
from compare import assert_close
from official_checkpoint import (
    MODALITIES,
    SMALL,
    Array,
    State,
    adam,
    checkpoint,
    cpc_shapes,
    decoder_shapes,
    encoder_shapes,
    features,
    map_arrays,
    mi_shapes,
    shapes,
    text_lstm_shapes,
)
from official_tolerances import BY_HAND, LAYER
from torch import Tensor, nn

CLIPS, POSITIONS = 3, 5


@pytest.fixture(scope="module")
def saved() -> dict:
    return checkpoint("AVT", 1, widths=SMALL)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Array]:
    return features("AVT", CLIPS, POSITIONS, seed=2, widths=SMALL)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def loaded(module: nn.Module, state: State, prefix: str = "") -> nn.Module:
    """The module in float64 and eval mode, with exactly the entries under the prefix."""
    entries = {name.removeprefix(prefix): torch.from_numpy(v) for name, v in state.items() if name.startswith(prefix)}
    module.double().load_state_dict(entries)
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
    def test_text_lstm(self, saved: dict, inputs: dict[str, Array]) -> None:
        state = saved["Text_ar_lstm_parameters"]
        module = nn.LSTM(SMALL.words, SMALL.text_direction, 2, batch_first=True, bidirectional=True)
        expected, _ = loaded(module, state)(torch.from_numpy(inputs["text"]))
        check(layers.bidirectional_lstm(state, inputs["text"]), expected)

    def test_prediction_context(self, saved: dict) -> None:
        state, z = saved["CPC_parameters"], normal(CLIPS, POSITIONS, SMALL.width)
        module = loaded(nn.LSTM(SMALL.width, SMALL.context, 2, batch_first=True), state, "audio_ar_lstm.")
        predictor = loaded(nn.Linear(SMALL.context, SMALL.width), state, "audio_predictors.0.")
        outputs, _ = module(torch.from_numpy(z))
        check(layers.lstm(state, "audio_ar_lstm.", z), outputs)
        check(oracle.predict(state, "audio", z, 2), predictor(outputs[:, 2]))

    @pytest.mark.parametrize("modality", ["audio", "text"])
    def test_temporal_relation(self, saved: dict, modality: str) -> None:
        state, prefix = saved["Encoder_parameters"], f"{modality}_self_att."
        width = {"audio": SMALL.audio, "text": SMALL.text}[modality]
        layer = nn.TransformerEncoderLayer(SMALL.width, layers.HEADS, SMALL.feed_forward)
        module = nn.Module()
        module.encoder_layer = layer
        module.encoder = nn.TransformerEncoder(layer, 2)
        module.affine_matrix = nn.Linear(width, SMALL.width)
        loaded(module, state, prefix)
        x = normal(CLIPS, POSITIONS, width)
        expected = module.encoder(module.affine_matrix(torch.from_numpy(x)).transpose(0, 1)).transpose(0, 1)
        check(layers.temporal_relation(state, modality, x), expected)

    @pytest.mark.parametrize("padding", [0, 1])
    @pytest.mark.parametrize("bias", [True, False])
    def test_convolution(self, padding: int, bias: bool) -> None:
        state = {"layer.weight": normal(4, 3, 3, 3)} | ({"layer.bias": normal(4)} if bias else {})
        x = normal(2, 3, 5, 7)
        weights = [torch.from_numpy(value) for value in state.values()]
        expected = nn.functional.conv2d(torch.from_numpy(x), *weights, padding=padding)
        check(layers.convolution(state, "layer", x, padding=padding), expected)

    @pytest.mark.parametrize("kernel", [1, 3])
    def test_transposed_convolution(self, kernel: int) -> None:
        state = {"layer.weight": normal(3, 4, kernel, kernel), "layer.bias": normal(4)}
        x = normal(2, 3, 5, 7)
        weights = [torch.from_numpy(value) for value in state.values()]
        expected = nn.functional.conv_transpose2d(torch.from_numpy(x), *weights)
        check(layers.transposed_convolution(state, "layer", x), expected)

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
        assert specific.shape == (CLIPS, POSITIONS, 3, 3, size)
        check(specific, maps.permute(0, 2, 3, 1).unflatten(0, (CLIPS, POSITIONS)))
        check(layers.club_feature(state, specific), module.feed_forward(pooled).unflatten(0, (CLIPS, POSITIONS)))

    def test_video_semantic(self, saved: dict, inputs: dict[str, Array]) -> None:
        module = loaded(SpatialAttention(), saved["Encoder_parameters"], "video_semantic_encoder.")
        expected = module(torch.from_numpy(inputs["video"]))
        check(layers.video_semantic(saved["Encoder_parameters"], inputs["video"]), expected)

    def test_video_decoder(self, saved: dict) -> None:
        state, first, second = saved["Decoder_parameters"], SMALL.decoder_first, SMALL.decoder_second
        module = nn.Module()
        module.inverse_conv_block = nn.Sequential(
            nn.ConvTranspose2d(SMALL.width + SMALL.video_map, first, 3),
            ResidualStack(first),
            nn.ConvTranspose2d(first, second, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(second, SMALL.video, 1),
        )
        module.video_linear = nn.Linear(SMALL.width, SMALL.width)
        loaded(module, state, "Video_decoder.")
        code, specific = normal(CLIPS, POSITIONS, SMALL.width), normal(CLIPS, POSITIONS, 3, 3, SMALL.video_map, seed=1)
        frames = torch.from_numpy(specific).flatten(0, 1).permute(0, 3, 1, 2)
        tiled = module.video_linear(torch.from_numpy(code).flatten(0, 1))[:, :, None, None].expand(-1, -1, 3, 3)
        expected = module.inverse_conv_block(torch.cat([tiled, frames], dim=1)).permute(0, 2, 3, 1)
        check(layers.decode_video(state, code, specific), expected.unflatten(0, (CLIPS, POSITIONS)))

    def test_audio_and_text_decoders_and_specific_encoders(self, saved: dict) -> None:
        code, x = normal(CLIPS, POSITIONS, SMALL.width), normal(CLIPS, POSITIONS, SMALL.audio, seed=1)
        encoder, decoder = (map_arrays(saved[f"{key}_parameters"], torch.from_numpy) for key in ("Encoder", "Decoder"))
        name = "Audio_encoder.audio_linear"
        specific = torch.relu(torch.from_numpy(x) @ encoder[f"{name}.weight"].T + encoder[f"{name}.bias"])
        check(layers.vector_specific(saved["Encoder_parameters"], "audio", x), specific)
        first, second = "Audio_decoder.audio_linear", "Audio_decoder.audio_rec"
        expected = torch.from_numpy(code) @ decoder[f"{first}.weight"].T + decoder[f"{first}.bias"]
        expected = torch.cat([expected, specific], -1) @ decoder[f"{second}.weight"].T + decoder[f"{second}.bias"]
        check(layers.decode_vector(saved["Decoder_parameters"], "audio", code, specific.numpy()), expected)

    def test_mi_net(self, saved: dict) -> None:
        hidden, state = SMALL.mi_hidden, saved["Video_mi_net_parameters"]
        sizes = (SMALL.width, hidden, hidden, hidden, SMALL.club_feature)
        parts = [part for i in range(4) for part in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU())]
        module = loaded(nn.Sequential(*parts[:-1]), state, "p_mu.")
        x = normal(CLIPS, POSITIONS, SMALL.width)
        check(layers.mlp(state, "p_mu", x), module(torch.from_numpy(x)))


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

    @pytest.mark.parametrize("variant", MODALITIES)
    def test_checkpoint_has_the_listed_shapes(self, variant: str) -> None:
        saved = checkpoint(variant, widths=SMALL)
        for key, entries in shapes(variant, SMALL).items():
            assert {name: value.shape for name, value in saved[key].items()} == entries
            assert {value.dtype for value in saved[key].values()} == {np.dtype(np.float64)}

    def test_seeds(self) -> None:
        first, again, other = (checkpoint("AT", seed, widths=SMALL)["Decoder_parameters"] for seed in (3, 3, 4))
        assert all(np.array_equal(first[name], again[name]) for name in first)
        assert not any(np.array_equal(first[name], other[name]) for name in first)

    def test_torch_reads_the_file_without_unpickling_code(self, saved: dict) -> None:
        file = io.BytesIO()
        torch.save(map_arrays(saved, torch.from_numpy), file)
        file.seek(0)
        assert torch.load(file, weights_only=True).keys() == saved.keys()

    def test_torch_adam_takes_the_optimiser_state(self) -> None:
        state = {"net": {"0.weight": normal(2, 3), "0.bias": normal(2)}}
        optimizer = torch.optim.Adam([nn.Parameter(torch.from_numpy(value)) for value in state["net"].values()])
        saved = map_arrays(adam(state, 1e-3, np.random.default_rng(0)), torch.from_numpy)
        optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


def quantiser(embedding: list[float], count: list[float], idle: list[float] | None = None) -> oracle.Quantiser:
    """One-dimensional codewords, sums equal to the codewords."""
    vectors = np.array(embedding)[:, None]
    return oracle.Quantiser(vectors, np.array(count), vectors.copy(), np.array(idle or [0.0] * len(embedding)))


def approximately(value: float) -> object:
    return pytest.approx(value, rel=BY_HAND.relative, abs=BY_HAND.absolute)


class TestQuantiserByHand:
    def test_two_modalities_are_averaged_one_after_the_other(self) -> None:
        before = quantiser([2.0, 4.0], [1.0, 1.0])
        z = {"audio": np.array([[[1.0], [3.0]]]), "video": np.array([[[5.0], [9.0]]])}
        index = {"audio": np.array([[0, 0]]), "video": np.array([[0, 1]])}
        after = oracle.update_average(before, z, index)
        smoothed = [2 * (n + 1e-5) / (2 + 2e-5) for n in (0.99 + 0.02, 0.99)]
        count = [0.99 * smoothed[0] + 0.01, 0.99 * smoothed[1] + 0.01]
        count = [sum(count) * (n + 1e-5) / (sum(count) + 2e-5) for n in count]
        # Audio: own sums 4 and 0, partner sums 14 and 0. Video: own sums 5 and 9, partner sums 1 and 3.
        weight = [0.99 * 2 + 0.01 * (4 + 14) / 2, 0.99 * 4]
        weight = [0.99 * weight[0] + 0.01 * (5 + 1) / 2, 0.99 * weight[1] + 0.01 * (9 + 3) / 2]
        assert after.ema_count.tolist() == approximately(count)
        assert after.ema_weight[:, 0].tolist() == approximately(weight)
        assert after.embedding[:, 0].tolist() == approximately([o / n for o, n in zip(weight, count, strict=True)])

    def test_each_of_two_partners_gets_a_quarter(self) -> None:
        z = {name: np.array([[[value]]]) for name, value in (("audio", 100.0), ("video", 20.0), ("text", 4.0))}
        index = {"audio": np.array([[0]]), "video": np.array([[1]]), "text": np.array([[2]])}
        after = oracle.update_average(quantiser([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), z, index)
        own = [50 + 5 + 1, 10 + 25 + 1, 2 + 25 + 5]
        expected = [0.01 * value * 0.99**later for value, later in zip(own, (2, 1, 0), strict=True)]
        assert after.ema_weight[:, 0].tolist() == approximately(expected)

    def test_one_pass_form(self, saved: dict) -> None:
        before = oracle.quantiser_of(saved)
        codewords = len(before.embedding)
        z = {m: normal(4, 10, SMALL.width, seed=seed) for seed, m in enumerate(MODALITIES["AVT"])}
        index = {m: np.random.default_rng(seed).integers(0, codewords, (4, 10)) for seed, m in enumerate(z)}
        after = oracle.update_average(before, z, index)
        total, shrink = before.ema_count.sum(), []
        for _ in z:
            total = 0.99 * total + 0.01 * 40
            shrink.append(total / (total + codewords * 1e-5))
        count, weight = 0.99**3 * np.prod(shrink) * before.ema_count, 0.99**3 * before.ema_weight
        for place, modality in enumerate(z):
            later = 0.99 ** (2 - place)
            hits = np.bincount(index[modality].ravel(), minlength=codewords)
            count = count + later * np.prod(shrink[place:]) * (0.01 * hits + 1e-5)
            partner = sum(z[other] for other in z if other != modality) / 2
            weight = weight + later * 0.01 * oracle.sums_by_codeword(
                index[modality], (z[modality] + partner) / 2, codewords
            )
        assert_close(torch.from_numpy(after.ema_count), count, LAYER)
        assert_close(torch.from_numpy(after.embedding), weight / count[:, None], LAYER)

    def test_idle_counters_and_reset(self) -> None:
        # After this forward: 0 used, 1 idle for 100 (not active), 2 for 99 (active), 3 for 300 (stays), 4 for 301.
        before = quantiser([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6, [300.0, 99.0, 98.0, 299.0, 300.0, 400.0])
        random = oracle.Draws(np.array([0, 0, 0, 0, 0.49, 0.5]), np.full((6, 1), 0.5), {}, 1)
        after = oracle.reset(before, {"audio": np.array([[0]]), "video": np.array([[0]])}, random)
        assert after.embedding[:, 0].tolist() == [1, 2, 3, 4, 1 + 0.5 / 1024, 3 + 0.5 / 1024]
        assert after.unactivated_count.tolist() == [0, 100, 99, 300, 0, 0]
        assert np.array_equal(after.ema_weight, before.ema_weight)
        assert before.embedding[4, 0] == 5

    def test_nearest_takes_the_lowest_of_equals(self) -> None:
        codebook = np.array([[3.0], [1.0], [-1.0], [1.0]])
        assert oracle.nearest(np.array([[[0.0], [5.0], [0.9]]]), codebook).tolist() == [[1, 0, 1]]
        assert oracle.distances(np.array([[[0.0]]]), codebook)[0, 0].tolist() == [3, 1, 1, 1]


class TestLossesByHand:
    def test_commitment_of_two_and_three_modalities(self) -> None:
        z = {"audio": np.array([[[1.0]]]), "video": np.array([[[2.0]]]), "text": np.array([[[4.0]]])}
        code = {"audio": np.array([[[0.0]]]), "video": np.array([[[5.0]]]), "text": np.array([[[1.0]]])}
        three = oracle.commitments(z, code)
        assert three["audio"] == approximately(0.5 * 1 + 0.125 * (16 + 0))
        assert three["text"] == approximately(0.5 * 9 + 0.125 * (16 + 1))
        del z["text"], code["text"]
        two = oracle.commitments(z, code)
        assert two == {"audio": approximately(0.5 * 1 + 0.25 * 16), "video": approximately(0.5 * 9 + 0.25 * 4)}

    def test_distribution_is_a_mean_of_softmaxes(self) -> None:
        share = oracle.distribution(np.array([[[0.0], [3.0]]]), np.array([[0.0], [1.0]]))
        odds = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))]
        assert share[0, 0] == approximately(sum(odds) / 2)

    def test_code_matching_of_one_clip(self) -> None:
        share = np.array([[0.3, 0.7]])
        assert oracle.code_matching(share, share) == pytest.approx(math.log(1 + 1e-5), rel=1e-9)

    def test_code_matching_term_by_term(self) -> None:
        first, second = np.array([[0.25, 0.75], [0.5, 0.5]]), np.array([[0.9, 0.1], [0.2, 0.8]])
        score = [[0.0, 0.0], [0.0, 0.0]]
        for i, j, k in product(range(2), repeat=3):
            score[i][j] += first[i, k] * math.log(second[j, k] + 1e-10) + second[i, k] * math.log(first[j, k] + 1e-10)
        smallest = min(map(min, score))
        exponential = [[math.exp(value - smallest) for value in row] for row in score]
        expected = -sum(math.log(exponential[i][i] / (sum(exponential[i]) + 1e-5)) for i in range(2)) / 2
        assert oracle.code_matching(first, second) == approximately(expected)

    def test_prediction_normalises_over_the_predictions(self) -> None:
        scores = np.array([[1.0, 2.0], [3.0, 5.0]])
        expected = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2
        assert oracle.prediction_loss(scores, np.eye(2)) == approximately(expected)

    def test_prediction_reads_up_to_a_position_and_predicts_the_next(self, saved: dict) -> None:
        state, names = saved["CPC_parameters"], {"audio": "audio", "video": "video"}
        z = {m: normal(4, 6, SMALL.width, seed=seed) for seed, m in enumerate(names)}
        before = oracle.cross_prediction(state, names, z, 2)
        z["audio"][:, 4:] += 1
        assert oracle.cross_prediction(state, names, z, 2) == before
        z["audio"][0, 3] += 1
        after = oracle.cross_prediction(state, names, z, 2)
        assert {pair for pair in before if after[pair] != before[pair]} == {("audio", "audio"), ("audio", "video")}

    def test_mutual_information_and_likelihood(self) -> None:
        state = {f"p_mu.{layer}.weight": np.eye(1) for layer in (0, 2, 4, 6)}
        state |= {f"p_mu.{layer}.bias": np.zeros(1) for layer in (0, 2, 4, 6)}
        # The log-variance is tanh(x - 2): it depends on the position.
        state |= {name.replace("p_mu", "p_logvar"): value for name, value in state.items()}
        state["p_logvar.6.bias"] = np.array([-2.0])
        x, y = np.array([[[1.0], [3.0]], [[2.0], [2.0]]]), np.array([[[1.0], [1.0]], [[4.0], [0.0]]])
        # Squared errors averaged over time: own 2 and 4, with the other clip 9 and 1; both variances average to 1.
        estimate = oracle.mutual_information(state, x, y, np.array([1, 0]))
        assert estimate == approximately(((9 - 2) + (1 - 4)) / 2 / 2)
        assert oracle.mutual_information(state, x, y, np.array([0, 1])) == 0
        rows = [(0, -math.tanh(1)), (4, math.tanh(1)), (4, 0), (4, 0)]
        expected = sum(error / math.exp(spread) + spread for error, spread in rows) / 2 / 4
        assert oracle.negative_log_likelihood(state, x, y) == approximately(expected)


class TestForward:
    @pytest.mark.parametrize("variant", MODALITIES)
    def test_terms_of_the_total(self, variant: str) -> None:
        saved, modalities = checkpoint(variant, 5, widths=SMALL), MODALITIES[variant]
        random = oracle.draws(modalities, 4, oracle.quantiser_of(saved), seed=1)
        result = oracle.forward(saved, features(variant, 4, 10, widths=SMALL), random)
        losses, pairs = result["losses"], list(product(modalities, repeat=2))
        assert list(losses["prediction"]) == pairs
        assert len(losses["code_matching"]) == len(modalities) * (len(modalities) - 1) // 2
        expected = sum(sum(losses[term].values()) for term in ("reconstruction", "commitment", "mutual_information"))
        expected += sum(losses["prediction"][pair] * (0.1 if pair[0] == pair[1] else 1) for pair in pairs)
        expected += sum(losses["code_matching"].values()) / 2
        assert result["total"] == pytest.approx(expected, rel=1e-13)
        assert all(np.isfinite(value) for term in losses.values() for value in term.values())

    def test_all_positions_of_the_release_are_drawn(self, saved: dict) -> None:
        before = oracle.quantiser_of(saved)
        positions = {oracle.draws(("audio", "video"), 2, before, seed=seed).cpc_step for seed in range(100)}
        assert positions == set(range(1, 9))

    def test_losses_use_the_codebook_before_the_update(self, saved: dict, inputs: dict[str, Array]) -> None:
        random = oracle.draws(MODALITIES["AVT"], CLIPS, oracle.quantiser_of(saved), positions=POSITIONS)
        result = oracle.forward(saved, inputs, random)
        old, new = oracle.quantiser_of(saved).embedding, result["quantiser"].embedding
        assert not np.array_equal(old, new)
        assert np.array_equal(result["code"]["audio"], old[result["index"]["audio"]])

    def test_a_file_without_text_lstm_takes_the_text_sequence(self, saved: dict, inputs: dict[str, Array]) -> None:
        words = oracle.encode(saved, "text", inputs["text"])
        minimal = {"Encoder_parameters": saved["Encoder_parameters"], "epoch": 0}
        sequence = oracle.encode(minimal, "text", words["input"])
        assert np.array_equal(sequence["z"], words["z"])

    def test_kept_offsets_make_the_total_smooth(self, saved: dict, inputs: dict[str, Array]) -> None:
        random = oracle.draws(MODALITIES["AVT"], CLIPS, oracle.quantiser_of(saved), positions=POSITIONS)
        result = oracle.forward(saved, inputs, random)
        moved = {m: value + 1e-7 * normal(*value.shape) for m, value in inputs.items()}
        again = oracle.forward(saved, moved, random, offset=result["offset"])
        change = again["quantised"]["audio"] - result["quantised"]["audio"]
        assert 0 < np.abs(change).max() < 1e-5
