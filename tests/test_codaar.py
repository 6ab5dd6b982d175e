"""CoDAAR beside an oracle in NumPy, written from its formulas: codes, layers, losses, blocks, cascade and resets."""

import copy
from itertools import combinations
from pathlib import Path

import numpy as np
import official_layers as layers
import official_oracle as oracle
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_close
from scipy.special import expit
from tolerances import EXACT, FLOAT64, SHARED_BATCH, Tolerance

from unicode_fast import Config, preset
from unicode_fast.data import open_dataset, open_store
from unicode_fast.methods import Draws, make_model
from unicode_fast.methods.codaar import BatchNorm, BlockCodebook, CodaarModel, cascade, own_share
from unicode_fast.modules.cpc import clip_mean
from unicode_fast.ops import EmaConfig
from unicode_fast.reference import counter_random
from unicode_fast.tasks import Evaluator
from unicode_fast.training.checks import check_run
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.trainer import Trainer, initialise_codebook

ORACLE = Tolerance(1e-10, 1e-10)
NAMES = {2: "audio,video", 3: "audio,video,text"}
ORDER = {2: ("video", "audio"), 3: ("video", "audio", "text")}
WEIGHTS = {2: (0.75, 0.25), 3: (0.6, 0.2)}
Numbers = dict[str, np.ndarray]


def config(name: str = "recommended", **fields: object) -> Config:
    fields = {"dropout": 0.0, "dtype": "float64", **fields}
    return preset(name, method="codaar").replace_all(**{**tiny.SIZES, **fields})


def modalities(names: str) -> dict:
    return {name: tiny.MODALITIES[name] for name in names.split(",")}


def trainer(name: str = "recommended", names: str = "audio,video,text", **fields: object) -> Trainer:
    return Trainer(config(name, **fields), modalities(names), torch.device("cpu"))


def model(name: str = "recommended", names: str = "audio,video,text", **fields: object) -> CodaarModel:
    made = make_model(modalities(names), config(name, **fields))
    assert isinstance(made, CodaarModel)
    return made


def masks(names: str, clips: int = 6, positions: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = {name: torch.randint(1, positions + 1, (clips,), generator=generator) for name in names.split(",")}
    return {name: tiny.mask_of(length.tolist(), positions) for name, length in lengths.items()}


# The cascade.


def cascaded(blocks: list[np.ndarray]) -> list[np.ndarray]:
    """One way from the last block to the first: each becomes the mean of all, the later ones already mixed."""
    mixed = list(blocks)
    for place in reversed(range(len(mixed))):
        mixed[place] = sum(mixed) / len(mixed)
    return mixed


def test_mixture_by_hand() -> None:
    assert cascade(2) == [[3 / 4, 1 / 4], [1 / 2, 1 / 2]]
    assert cascade(3) == [[16 / 27, 7 / 27, 4 / 27], [4 / 9, 4 / 9, 1 / 9], [1 / 3, 1 / 3, 1 / 3]]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_mixture_is_the_cascade(number: int) -> None:
    blocks = np.random.default_rng(number).normal(size=(number, 5, 4))
    found = np.einsum("mo,okd->mkd", np.array(cascade(number)), blocks)
    assert np.abs(found - np.stack(cascaded(list(blocks)))).max() < 1e-15


def test_weights_of_the_release() -> None:
    for number, (own, other) in WEIGHTS.items():
        assert own_share(number) == pytest.approx(own)
        assert (1 - own_share(number)) / (number - 1) == pytest.approx(other)


# A step beside the oracle.


def normalised(state: Numbers, name: str, maps: np.ndarray) -> np.ndarray:
    """Zero mean and unit biased variance of each channel over maps and cells, then scale and shift."""
    centred = maps - maps.mean((0, 2, 3), keepdims=True)
    normal = centred / np.sqrt((centred**2).mean((0, 2, 3), keepdims=True) + 1e-5)
    return normal * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def frames(grids: np.ndarray) -> np.ndarray:
    return grids.reshape(-1, *grids.shape[2:]).transpose(0, 3, 1, 2)


def expected_specific(state: Numbers, name: str, read: np.ndarray) -> np.ndarray:
    prefix = f"encoders.{name}"
    if name != "video":
        return layers.relu(layers.linear(state, f"{prefix}.specific.0", read))
    squeezed = layers.relu(layers.linear(state, f"{prefix}.semantic.squeeze", read.mean((2, 3))))
    scale = expit(layers.linear(state, f"{prefix}.semantic.excite", squeezed))[:, :, None, None]
    maps = frames(read * scale + read)
    for place in (0, 1):
        maps = layers.convolution(state, f"{prefix}.specific.convolutions.{place}", maps)
        maps = layers.relu(normalised(state, f"{prefix}.specific.norms.{place}", maps))
    return maps.transpose(0, 2, 3, 1).reshape(*read.shape[:2], *maps.shape[2:], -1)


def expected_decoded(state: Numbers, name: str, row: np.ndarray, specific: np.ndarray) -> np.ndarray:
    prefix = f"decoders.{name}"
    code = layers.linear(state, f"{prefix}.decoder.code", layers.linear(state, f"{prefix}.row", row))
    if name != "video":
        return layers.linear(state, f"{prefix}.decoder.output", np.concatenate([code, specific], -1))
    tiled = np.broadcast_to(code[:, :, None, None], (*specific.shape[:4], code.shape[-1]))
    prefix = f"{prefix}.decoder.convolutions"
    maps = layers.transposed_convolution(state, f"{prefix}.0", frames(np.concatenate([tiled, specific], -1)))
    active = layers.relu(maps)
    inner = layers.relu(layers.convolution(state, f"{prefix}.1.wide", active, padding=1))
    maps = layers.relu(active + layers.convolution(state, f"{prefix}.1.narrow", inner))
    maps = layers.relu(layers.transposed_convolution(state, f"{prefix}.2", maps))
    maps = layers.transposed_convolution(state, f"{prefix}.4", maps)
    return maps.transpose(0, 2, 3, 1).reshape(*row.shape[:2], *maps.shape[2:], -1)


def expected_terms(state: Numbers, z: Numbers, blocks: Numbers, index: Numbers, step: int) -> dict[str, float]:
    """Commitment, code matching and Cross-CPC."""
    names, terms = list(z), {}
    code = {name: blocks[name][index[name]] for name in names}
    for name in names:
        others = sum(0.125 * oracle.squared_error(z[name], code[other]) for other in names if other != name)
        terms[f"commitment.{name}"] = 0.5 * oracle.squared_error(z[name], code[name]) + others
    used = {name: oracle.distribution(z[name], blocks[name]) for name in names}
    for one, other in combinations(names, 2):
        terms[f"code_matching.{one}-{other}"] = 0.5 * oracle.code_matching(used[one], used[other])
    contexts = {name: layers.lstm(state, f"cpc.context.{name}.", z[name][:, : step + 1])[:, -1] for name in names}
    predictions = {name: layers.linear(state, f"cpc.predictors.{name}.0", contexts[name]) for name in names}
    terms["cpc"] = sum(
        oracle.prediction_loss(z[target][:, step + 1], predictions[source]) * (0.1 if target == source else 1)
        for target in names
        for source in names
    )
    return terms


@pytest.mark.parametrize("number", [2, 3])
def test_codes_layers_and_losses(number: int) -> None:
    own = trainer("official", NAMES[number])
    made = own.model
    with torch.no_grad():
        for parameter in made.parameters():
            # No zeros and ones, as biases and scales have at first.
            parameter.add_(torch.randn_like(parameter) * 0.05)
        made.codebook.initialise(torch.randn(12, number * 16, dtype=torch.float64))
    features = tiny.batch(made)
    output = made(features)
    state = {name: value.numpy() for name, value in made.state_dict().items()}
    z = {name: value.detach().numpy() for name, value in output.semantic.items()}
    blocks = dict(zip(ORDER[number], state["codebook.codebook"], strict=True))
    whole = np.concatenate([blocks[name] for name in ORDER[number]], -1)
    index = {name: oracle.nearest(z[name], blocks[name]) for name in z}
    losses = own.method.losses(output, Draws(cpc_position=torch.tensor(0.5, dtype=torch.float64)))
    expected = expected_terms(state, z, blocks, index, step=2)
    for name in made.names:
        assert_close(output.index[name], index[name], EXACT, f"index of {name}")
        assert_close(output.quantised[name], whole[index[name]], ORACLE, f"row of {name}")
        target = output.target[name].detach().numpy()
        decoded = expected_decoded(state, name, whole[index[name]], expected_specific(state, name, target))
        assert_close(output.decoded[name], decoded, ORACLE, f"reconstruction of {name}")
        expected[f"reconstruction.{name}"] = oracle.squared_error(decoded, target)
        encoded = made.encode(name, features[name])
        assert_close(encoded.index, index[name], EXACT, f"index of {name} alone")
        assert_close(encoded.vector, whole[index[name]], EXACT, f"vector of {name} alone")
    assert {name: pytest.approx(term.item(), **FLOAT64) for name, term in losses.terms.items()} == expected
    assert losses.total.item() == pytest.approx(sum(expected.values()), **FLOAT64)


@pytest.mark.parametrize("lengths", [{}, {"audio": 3}])
def test_commitment_with_masks(lengths: dict[str, int]) -> None:
    """Over positions valid in both modalities; with other lengths to the mean of the codewords of a clip."""
    own = trainer("paper")
    features = tiny.batch(own.model, lengths=lengths)
    mask = {
        name: masks(name, positions=value.shape[1], seed=n)[name] for n, (name, value) in enumerate(features.items())
    }
    output = own.model(features, mask)
    terms = own.method.losses(output).terms
    code = {name: own.model.codebook.of(name)[index].numpy() for name, index in output.index.items()}
    valid = {name: value.numpy() for name, value in mask.items()}
    for name, z in output.semantic.items():
        expected = 0.0
        for other in output.semantic:
            errors = []
            for clip, position in zip(*np.nonzero(valid[name]), strict=True):
                if code[other].shape[1] != z.shape[1]:
                    target = code[other][clip, valid[other][clip]].mean(0)
                elif valid[other][clip, position]:
                    target = code[other][clip, position]
                else:
                    continue
                errors.append(((z[clip, position].detach().numpy() - target) ** 2).mean())
            expected += (0.5 if other == name else 0.125) * np.mean(errors)
        assert terms[f"commitment.{name}"].item() == pytest.approx(expected, **FLOAT64)


class Expected:
    """Blocks of the release in NumPy: counts and sums by block, cascade, resets of rows that no modality chose."""

    def __init__(self, codebook: BlockCodebook) -> None:
        self.names, self.rule = codebook.names, codebook.rule
        self.embedding = list(codebook.codebook.numpy().copy())
        self.weight, self.count = list(codebook.ema_sum.numpy().copy()), list(codebook.ema_count.numpy().copy())
        self.idle = -np.ones(len(self.embedding[0]))

    def update(self, z: Numbers, index: Numbers, step: int) -> int:
        codewords = len(self.idle)
        own, other = WEIGHTS[len(self.names)]
        for place, name in enumerate(self.names):
            hits = np.bincount(index[name].ravel(), minlength=codewords)
            count = 0.99 * self.count[place] + 0.01 * hits
            self.count[place] = (count + 1e-5) / (count.sum() + codewords * 1e-5) * count.sum()
            sums = {partner: oracle.sums_by_codeword(index[name], z[partner], codewords) for partner in z}
            mixed = sum((own if partner == name else other) * sums[partner] for partner in z)
            self.weight[place] = 0.99 * self.weight[place] + 0.01 * mixed
            self.embedding[place] = self.weight[place] / self.count[place][:, None]
        self.embedding = cascaded(self.embedding)
        self.idle += 1
        self.idle[np.unique(np.concatenate([codes.ravel() for codes in index.values()]))] = 0
        active, dead = np.flatnonzero(self.idle < 100), np.flatnonzero(self.idle > self.rule.reset_after)
        drawn = counter_random.uniform(self.rule.seed, torch.tensor(step), 0, (codewords,)).numpy()
        width = self.embedding[0].shape[1]
        noise = 2 * counter_random.uniform(self.rule.seed, torch.tensor(step), 1, (codewords, width)).numpy() - 1
        for block in self.embedding:
            block[dead] = block[active[(drawn[dead] * len(active)).astype(int)]] + noise[dead] / 1024
        self.idle[dead] = 0
        return len(dead)


@pytest.mark.parametrize("number", [2, 3])
def test_blocks_cascade_and_resets(number: int) -> None:
    codebook = model("official", NAMES[number], reset_after=2).codebook
    expected, resets = Expected(codebook), 0
    generator = np.random.default_rng(0)
    for step in range(12):
        z = {name: generator.normal(size=(2, 2, 16)) for name in codebook.names}
        # Few positions: a row is idle for some steps, and then chosen by one modality or reset.
        index = {name: generator.integers(12, size=(2, 2)) for name in codebook.names}
        rows = {name: torch.tensor(np.concatenate([z[other] for other in codebook.names], -1)) for name in z}
        codebook.update(rows, {name: torch.tensor(codes) for name, codes in index.items()})
        resets += expected.update(z, index, step)
        assert_close(codebook.codebook, np.stack(expected.embedding), ORACLE, f"codebook of step {step}")
        assert_close(codebook.ema_count, np.stack(expected.count), ORACLE, f"counts of step {step}")
        assert_close(codebook.ema_sum, np.stack(expected.weight), ORACLE, f"sums of step {step}")
        assert_close(codebook.idle.amin(0), expected.idle, EXACT, f"idle counters of step {step}")
    assert resets > 3
    assert codebook.step == 12


@pytest.mark.parametrize("unless", ["any", "all"])
def test_rows_are_reset_to_one_position_of_all_modalities(unless: str) -> None:
    rule = EmaConfig(reset_after=1, reset_unless=unless, reset_source="feature", own_weight=own_share(2))
    codebook = BlockCodebook(("first", "second"), 6, 3, rule, 1.0)
    features = torch.randn(2, 4, 6)
    index = {"first": torch.arange(8).view(2, 4) % 3, "second": torch.arange(8).view(2, 4) % 2}
    for _ in range(3):
        codebook.update(dict.fromkeys(codebook.names, features), index)
    # The first modality chose rows 0 to 2, the second 0 and 1.
    idle = range(3 if unless == "any" else 2, 6)
    found = codebook.blocks.transpose(0, 1).flatten(1)
    equal = (found[:, None] == features.view(-1, 6)).all(-1).any(1)
    assert equal.tolist() == [row in idle for row in range(6)]
    assert (codebook.ema_count[:, list(idle)] == 1).all()
    assert (codebook.idle[:, list(idle)] == 0).all()


# Gradient and lengths.


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("case", ["plain", "masks", "lengths"])
def test_decoders_pass_the_gradient_to_all_modalities(number: int, case: str) -> None:
    made, names = model(names=NAMES[number]), NAMES[number]
    lengths = {"audio": 3} if case == "lengths" else {}
    mask = masks(names) if case == "masks" else None
    output = made(tiny.batch(made, lengths=lengths), mask)
    vectors = {name: value.detach().requires_grad_() for name, value in output.semantic.items()}
    rows = made.decoder_inputs(vectors, output, slice(None))
    for name in made.names:
        assert_close(rows[name], output.codeword[name], ORACLE, f"row of {name}")
        gradient = torch.randn_like(rows[name])
        found = torch.autograd.grad(rows[name], list(vectors.values()), gradient, retain_graph=True)
        for other, of_z in zip(vectors, found, strict=True):
            # The clip's mean stands for padding, and for all positions of another length.
            z, valid = vectors[other], None if mask is None or other == name else mask[other]
            mean = clip_mean(z, valid).unsqueeze(1)
            if z.shape[1] == rows[name].shape[1]:
                read = z if valid is None else torch.where(valid.unsqueeze(-1), z, mean)
            else:
                read = mean.expand(-1, rows[name].shape[1], -1)
            expected = torch.autograd.grad((read * made.codebook.part(gradient, other)).sum(), z)[0]
            assert_close(of_z, expected, ORACLE, f"gradient in {other} through the row of {name}")


@pytest.mark.parametrize("name", ["recommended", "official"])
def test_padding_has_no_effect(name: str) -> None:
    own, other = trainer(name), trainer(name)
    for step in range(3):
        features, mask = tiny.batch(own.model, seed=step), masks("audio,video,text", seed=step)
        shape = {name: (*valid.shape, *[1] * (features[name].dim() - 2)) for name, valid in mask.items()}
        padded = {name: torch.where(valid.view(shape[name]), features[name], 9.0) for name, valid in mask.items()}
        results = [each.train_step(given, mask, 1e-3) for each, given in ((own, features), (other, padded))]
        for term, value in results[0].terms.items():
            assert value.isfinite(), term
            assert_close(results[1].terms[term], value, EXACT, term)
    for key, value in own.model.state_dict().items():
        assert_close(other.model.state_dict()[key], value, EXACT, key)


def test_a_clip_beside_its_padding() -> None:
    """A mask that marks every position, and none, are equal; longer padding is."""
    made = model("paper", "audio,video")
    features, positions = tiny.batch(made, positions=4), torch.arange(6)
    longer = {name: torch.cat([value, value[:, :2]], 1) for name, value in features.items()}
    mask = {name: (positions < 4).expand(6, 6) for name in features}
    whole, padded = made(features), made(longer, mask)
    for name in features:
        assert_close(padded.decoded[name][:, :4], whole.decoded[name], ORACLE, f"reconstruction of {name}")


@pytest.mark.parametrize("names", ["audio,video", "audio,video,text", "text,depth,video,audio"])
@pytest.mark.parametrize("lengths", [{}, {"audio": 3}])
def test_every_parameter_is_trained(names: str, lengths: dict[str, int]) -> None:
    own = trainer("recommended", names)
    own.train_step(tiny.batch(own.model, lengths=lengths), None, 1e-3)
    parameters = {name for name, _ in own.model.named_parameters()}
    without = {name for name, value in own.model.named_parameters() if value.grad is None}
    assert all(value.grad is None or value.grad.isfinite().all() for value in own.model.parameters())
    # With other lengths Cross-CPC compares means, which have no context.
    assert without == ({name for name in parameters if name.startswith("cpc.context")} if lengths else set())


def test_order_of_the_blocks() -> None:
    assert model(names="text,depth,video,audio").codebook.names == ("video", "depth", "audio", "text")


# Batch normalisation.


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_is_that_of_torch(masked: bool) -> None:
    own, truth = BatchNorm(3).double(), torch.nn.BatchNorm2d(3).double()
    with torch.no_grad():
        for one, other in ((own.weight, truth.weight), (own.bias, truth.bias)):
            one.copy_(torch.randn(3))
            other.copy_(one)
    for _ in range(3):
        maps = (torch.randn(5, 3, 2, 4, dtype=torch.float64) * 3 + 1).requires_grad_()
        valid = torch.tensor([True, True, False, True, False]) if masked else None
        chosen = slice(None) if valid is None else valid
        found, expected = own(maps, valid)[chosen], truth(maps[chosen])
        assert_close(found, expected, ORACLE, "maps")
        gradient = torch.randn_like(found)
        gradients = [
            torch.autograd.grad(result, [maps, norm.weight, norm.bias], gradient)
            for result, norm in ((found, own), (expected, truth))
        ]
        for one, other in zip(*gradients, strict=True):
            assert_close(one, other, ORACLE, "gradient")
        own.update()
    assert_close(own.running_mean, truth.running_mean, ORACLE, "running mean")
    assert_close(own.running_variance, truth.running_var, ORACLE, "running variance")
    own.eval(), truth.eval()
    assert_close(own(maps, None), truth(maps), ORACLE, "maps in evaluation mode")


def test_only_a_step_changes_buffers() -> None:
    own = trainer()
    features = tiny.batch(own.model)

    def changed(call: object) -> set[str]:
        before = copy.deepcopy(dict(own.model.named_buffers()))
        call()
        return {name for name, value in own.model.named_buffers() if not torch.equal(value, before[name])}

    running = {
        f"encoders.video.specific.norms.{place}.running_{what}" for place in (0, 1) for what in ("mean", "variance")
    }
    own.model.train()
    assert not changed(lambda: [own.model.encode(name, features[name], dropout=True) for name in features])
    assert not changed(lambda: own.model(features))
    assert not changed(lambda: own.model.eval()(features))
    assert changed(lambda: own.train_step(features, None, 1e-3)) > running


# Ranks, resume, refusals, tasks.

CASES = {"official": (True, {}), "paper": (True, {}), "recommended": (False, {"text": 3})}
CLIPS = (8, 7, 5)


def trained(case: str, ranks: DistContext) -> tuple[dict, list]:
    masked, lengths = CASES[case]
    own, results = trainer(case, reset_after=1), []
    for step, clips in enumerate(CLIPS):
        bounds = ranks.bounds(clips)
        features = tiny.batch(own.model, clips, lengths=lengths, seed=step)
        mask = masks("audio,video,text", clips, seed=step) if masked else None
        features, mask = (
            None if given is None else {name: value[bounds] for name, value in given.items()}
            for given in (features, mask)
        )
        results.append(own.train_step(features, mask, 1e-3, ranks.shard(clips)).terms)
    return own.model.state_dict(), results


def run_rank(rank: int, folder: str, truths: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for case, truth in truths.items():
        found = trained(case, DistContext(rank, 2))
        for name, value in truth[0].items():
            assert_close(found[0][name], value, SHARED_BATCH if value.is_floating_point() else EXACT, name)
        for result, expected in zip(found[1], truth[1], strict=True):
            for name, value in expected.items():
                assert_close(result[name], value, SHARED_BATCH, name)
        every: list = [None, None]
        dist.all_gather_object(every, found[0])
        assert all(torch.equal(every[0][name], every[1][name]) for name in every[0])
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    truths = {case: trained(case, DistContext()) for case in CASES}
    mp.start_processes(run_rank, args=(str(tmp_path), truths), nprocs=2, start_method="fork")


def test_resume_bit_for_bit() -> None:
    whole, first, second = (trainer(dropout=0.3, reset_after=1, seed=seed) for seed in (0, 0, 0))
    batches = [tiny.batch(whole.model, seed=step) for step in range(4)]

    def steps(own: Trainer, numbers: range) -> None:
        for number in numbers:
            own.train_step(batches[number], None, 1e-3)

    torch.manual_seed(5)
    steps(whole, range(4))
    torch.manual_seed(5)
    steps(first, range(2))
    content = copy.deepcopy({"model": first.model.state_dict(), **first.state()})
    torch.manual_seed(6)
    second.restore(content)
    steps(second, range(2, 4))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("micro_batches", 2, "micro_batches must be 1 with method 'codaar', got 2"),
        ("club_estimator", "official", "club_estimator is not read where method is 'codaar'"),
        ("ema_own_weight", 0.3, "ema_own_weight is not read where method is 'codaar'"),
    ],
)
def test_refused_fields(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_run(preset("recommended", method="codaar").replace(**{field: value}))


def test_refused_partners_and_rows() -> None:
    with pytest.raises(ValueError, match="ema_partner must be 'aligned' or 'none' with method 'codaar'"):
        model(ema_partner="attended")
    codebook = model().codebook
    with pytest.raises(ValueError, match=r"rows must have shape \(12, 48\), got \(12, 16\)"):
        codebook.initialise(torch.zeros(12, 16))
    with pytest.raises(ValueError, match="rows must be finite"):
        codebook.initialise(torch.full((12, 48), torch.nan))


def test_first_codewords_are_features_of_one_position(tmp_path: Path) -> None:
    store = tiny.write(tmp_path / "store")
    own = trainer("recommended", data=str(store))
    batches = open_dataset(own.config.data).batches("train", own.model.names, 60, 0, dtype=torch.float64)
    initialise_codebook(own, batches, torch.device("cpu"))
    output = own.model.eval()(batches.batch(0).features)
    rows = torch.cat([output.semantic[name].flatten(0, 1) for name in own.model.codebook.names], -1)
    blocks = own.model.codebook.blocks.transpose(0, 1).flatten(1)
    assert ((blocks[:, None] - rows).abs().amax(2).amin(1) < 1e-12).all()


@pytest.mark.usefixtures("short_probes")
def test_tasks_read_rows_and_indices(tmp_path: Path) -> None:
    dataset = open_store(tiny.write(tmp_path / "store"))
    evaluator = Evaluator(model(dtype="float32"), dataset)
    assert evaluator.encoded("classification").codes("test", "audio").vector.shape[-1] == 3 * 16
    for task, protocol in (("classification", "held_out"), ("localisation", "official"), ("retrieval", "held_out")):
        assert 0 <= evaluator.row(task, "audio", "video", protocol).score <= 1
    assert 0 <= evaluator.row("classification", "audio", "video").token.score <= 1
