"""H-DCID: layer 2 against NumPy, its gradient in its target, the warm start, pairs of codes and their tables."""

from pathlib import Path

import numpy as np
import official_layers as layers
import official_oracle as oracle
import pytest
import tiny
import torch
import torch.multiprocessing as mp
from compare import assert_close
from matplotlib.figure import Figure
from official_tolerances import OFFICIAL
from test_distributed import State, compare, meet
from test_every_method import batch_of, trained, trainer_of
from tolerances import EXACT, SHARED_BATCH

from unicode_fast import checkpoint
from unicode_fast.methods import Draws, make_method
from unicode_fast.methods.h_dcid import SECOND, HDcidModel
from unicode_fast.modules import ModelOutput
from unicode_fast.tasks import probe
from unicode_fast.train import main
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.trainer import Trainer

FORM = ("h-dcid", False)
Array = np.ndarray


def official(names: str = "audio,video,text", **fields: object) -> Trainer:
    """A trainer of the official preset with the heads and layers of the released file."""
    given = {"dropout": 0.0, "temporal_heads": layers.HEADS, "temporal_layers": 2, "hdcid_warmup": 0.0, **fields}
    return tiny.trainer("official", names, method="h-dcid", **given)


def spread(model: HDcidModel, seed: int = 3) -> HDcidModel:
    """The model with codewords of the scale of features."""
    generator = torch.Generator().manual_seed(seed)
    for codebook in (model.codebook, model.second.codebook):
        codebook.initialise(torch.randn(codebook.codebook.shape, generator=generator, dtype=torch.float64))
    return model


def released_names(model: HDcidModel) -> State:
    """The parameters of layer 2 under names that the oracle's layers read."""
    state = {name: value.detach().numpy() for name, value in model.second.state_dict().items()}
    renamed = {}
    for name, value in state.items():
        part, modality, *rest = name.split(".")
        inner = ".".join(rest)
        inner = inner.replace("temporal.affine", "temporal.affine_matrix").replace("mean.", "p_mu.")
        inner = inner.replace("log_variance.", "p_logvar.")
        if part == "encoders":
            renamed[f"{modality}.{inner}"] = value
        elif part == "decoders":
            renamed[f"{modality}.decoder.{inner}"] = value
        elif part == "club":
            renamed[f"{modality}.club.{inner}"] = value
        elif name.startswith("cpc.context"):
            renamed[f"{rest[0]}_ar_lstm.{'.'.join(rest[1:])}"] = value
        elif name.startswith("cpc.predictors"):
            renamed[f"{rest[0]}_predictors.{'.'.join(rest[1:])}"] = value
        else:
            renamed[name] = value
    return renamed


def below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def by_numpy(
    state: State, specific: dict[str, Array], permutation: dict[str, Array], last: int
) -> dict[str, dict[str, float] | float]:
    """Losses of layer 2 from layer 1's specific features (B, T, Y), by the formulas of the release."""
    z, own, code, decoded = {}, {}, {}, {}
    for name, y in specific.items():
        z[name] = layers.linear(state, f"{name}.temporal.affine_matrix", y)
        for layer in (0, 1):
            z[name] = layers.transformer_layer(state, f"{name}.temporal.layers.{layer}", z[name])
        own[name] = np.maximum(y @ state[f"{name}.specific.0.weight"].T + state[f"{name}.specific.0.bias"], 0)
        code[name] = state["codebook.codebook"][oracle.nearest(z[name], state["codebook.codebook"])]
        projected = layers.linear(state, f"{name}.decoder.code", code[name])
        decoded[name] = layers.linear(state, f"{name}.decoder.output", np.concatenate([projected, own[name]], -1))
    pairs = oracle.cross_prediction(state, {name: name for name in z}, z, last)
    return {
        "reconstruction": {m: float(((decoded[m] - specific[m]) ** 2).mean()) for m in z},
        "commitment": oracle.commitments(z, code),
        "club": {m: oracle.mutual_information(below(state, f"{m}.club."), code[m], own[m], permutation[m]) for m in z},
        "cpc": sum(value * (0.1 if one == other else 1) for (one, other), value in pairs.items()),
    }


@pytest.mark.parametrize("names", ["audio,video", "audio,video,text"])
def test_losses_of_layer_2(names: str) -> None:
    """Layer 1 gives random specific features, because those of a new model hardly differ."""
    model = spread(official(names, hdcid_weight=0.7).model)
    position, last = torch.tensor(0.55, dtype=torch.float64), 1 + int(0.55 * 5)
    generator = np.random.default_rng(4)
    permutation = {name: generator.permutation(6) for name in model.names}
    draws = Draws(position, {name: torch.from_numpy(order) for name, order in permutation.items()})
    output = model(tiny.batch(model, 6, 7))
    specific = {name: generator.standard_normal(y.shape) for name, y in output.club.items()}
    for name, y in specific.items():
        output.club[name] = torch.from_numpy(y)
        output.more[name] = model._encode_second(name, output.club[name], None)
    model.quantise(output)
    terms = make_method(model).losses(output, draws).terms
    found = {name.removeprefix(f"{SECOND}."): term for name, term in terms.items() if name.startswith(f"{SECOND}.")}
    expected = by_numpy(released_names(model), specific, permutation, last)
    flat = {"cpc": expected.pop("cpc")}
    flat |= {f"{kind}.{name}": value for kind, values in expected.items() for name, value in values.items()}
    assert set(found) == set(flat)
    for name, value in flat.items():
        assert_close(found[name], np.array(0.7 * value), OFFICIAL, name)
    assert all(abs(value) > 1e-6 for value in flat.values())


def test_the_reconstruction_of_layer_2_has_a_gradient_in_its_target() -> None:
    model = official().model
    first = model(tiny.batch(model))
    leaves = {name: y.detach().requires_grad_() for name, y in first.club.items()}
    level = model.second.output(ModelOutput(None, club=leaves, more=first.more))
    torch.stack(list(make_method(model).second.reconstruction(level).values())).sum().backward()
    for name, y in leaves.items():
        # The features that the decoder reads come from `more`.
        assert_close(y.grad, 2 * (y - level.decoded[name]).detach() / y.numel(), OFFICIAL, name)


def parameters_of(trainer: Trainer) -> State:
    return {name: value.detach().clone() for name, value in trainer.model.second.named_parameters()}


@pytest.mark.parametrize("preset", ["recommended", "official"])
def test_layer_2_trains_after_the_warm_start(preset: str) -> None:
    """Until then layer 1 trains as with weight 0, and codebook 2 follows its features."""
    fields = {"dropout": 0.0, "steps": 4, "method": "h-dcid"}
    own, without = (tiny.trainer(preset, **fields, hdcid_warmup=0.5, **more) for more in ({}, {"hdcid_weight": 0.0}))
    assert own.model.second_from == 2
    start, codewords = parameters_of(own), own.model.second.codebook.codebook.clone()
    for step in range(3):
        features, _ = batch_of(own.model, step, masked=False)
        terms = own.train_step(features, None, 1e-3).terms
        without.train_step(features, None, 1e-3)
        second = [term for name, term in terms.items() if name.startswith(SECOND)]
        assert all((term == 0).all() for term in second) == (step < 2)
        first = {name: value for name, value in own.model.state_dict().items() if not name.startswith(SECOND)}
        same = [torch.equal(value, without.model.state_dict()[name]) for name, value in first.items()]
        assert all(same) == (step < 2)
        changed = {name for name, value in parameters_of(own).items() if not torch.equal(value, start[name])}
        parts = {name.split(".")[0] for name in changed}
        assert parts == (set() if step < 2 else {"encoders", "decoders", "cpc", "club"})
        assert not torch.equal(own.model.second.codebook.codebook, codewords)


def test_the_warm_start_is_a_share_of_a_run(
    tmp_path: Path, short_probes: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its end is kept in the checkpoint; epochs count too. What the run shows says whether it is of layer 1 or both."""
    titles: dict[str, list[str]] = {}

    def keep(figure: Figure, path: Path) -> None:
        titles[path.stem] = [axis.get_title() for axis in figure.axes]

    monkeypatch.setattr("unicode_fast.report.plots.save_figure", keep)
    monkeypatch.setattr("unicode_fast.health.LEAST_PERPLEXITY", 1000.0)
    store, out = tiny.write(tmp_path / "store"), tmp_path / "run"
    fields = {**tiny.SIZES, "method": "h-dcid", "epochs": 2, "batch_size": 10, "validations": 1}
    assert main([f"--{name}={value}" for name, value in {**fields, "data": store, "out": out}.items()]) == 0
    saved = checkpoint.read(out / "checkpoints" / "step-00000012.pt")["model"]
    assert saved["second_from"] == 7 and saved["codebook.step"] == 12
    assert titles["code-usage"][0].startswith("12 codewords (layer 1 of 2):")
    assert titles["codebook-health"][1] == "perplexity of the use (layer 1 of 2)"
    said = capsys.readouterr()
    assert "codes on the test split, pairs of codewords of layers 1 and 2" in said.out
    assert "of 144 pairs of codewords in use" in said.out and "of 12 codewords of layer 1 in use" in said.err


def test_a_resumed_run_crosses_the_end_of_the_warm_start(tmp_path: Path) -> None:
    fields = {"dtype": "float32", "dropout": 0.3, "steps": 6, "hdcid_warmup": 0.5}
    whole, resumed = trainer_of(FORM, **fields), trainer_of(FORM, **fields)
    whole.model.begin(8)
    trained(whole, range(2))
    checkpoint.save(tmp_path / "model.pt", whole.model, whole.state())
    expected = trained(whole, range(2, 6))[0]
    resumed.restore(checkpoint.read(tmp_path / "model.pt"))
    found, results = trained(resumed, range(2, 6))
    assert [bool(result.terms[f"{SECOND}.cpc"] > 0) for result in results] == [False, False, True, True]
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


# Where z2 is normalised, the bias before it has a gradient of rounding errors. A small weight keeps them below Adam's
# epsilon.
FORMS_OF_RANKS: tuple[dict[str, object], ...] = (
    {"hdcid_warmup": 0.25, "feature_norm": "none"},
    {"hdcid_warmup": 0.0, "hdcid_weight": 0.03, "club_estimator": "official", "club_floor": False},
)


def check_rank(rank: int, folder: str, truths: list[tuple[State, list[StepResult]]]) -> None:
    ranks = meet(rank, 2, folder)
    for fields, truth in zip(FORMS_OF_RANKS, truths, strict=True):
        compare(trained(trainer_of(FORM, **fields), range(3), ranks), truth)


def test_two_ranks_train_the_layers_of_one(tmp_path: Path) -> None:
    truths = [trained(trainer_of(FORM, **fields), range(3)) for fields in FORMS_OF_RANKS]
    assert truths[0][1][0].terms[f"{SECOND}.cpc"] == 0 < truths[0][1][2].terms[f"{SECOND}.cpc"]
    mp.start_processes(check_rank, args=(str(tmp_path), truths), nprocs=2, start_method="fork")


@pytest.mark.parametrize("lengths", [{}, {"text": 3}])
def test_padding_has_no_effect_on_layer_2(lengths: dict[str, int]) -> None:
    results = []
    for filled in (0.0, 1e3):
        own = trainer_of(FORM, hdcid_warmup=0.0)
        features, mask = batch_of(own.model, 0, **lengths)
        for name, valid in (mask or {}).items():
            features[name][~valid] = filled
        terms = own.train_step(features, mask, 1e-2).terms
        assert all(torch.isfinite(term) for term in terms.values())
        results.append({**terms, **own.model.state_dict()})
    for name, value in results[0].items():
        assert_close(results[1][name], value, SHARED_BATCH if value.is_floating_point() else EXACT, name)


def test_a_code_is_a_pair() -> None:
    model = spread(trainer_of(FORM, dtype="float32").model).eval()
    size = model.config.model.codewords
    features, mask = batch_of(model, 0)
    output = model(features, mask)
    assert model.code_sizes == (size, size) and model.codewords == size**2
    assert min(len(output.levels[SECOND].index["audio"].unique()), len(output.index["audio"].unique())) > 1
    for name in model.names:
        index, vector = model.encode(name, features[name], mask[name])
        first, second = output.index[name], output.levels[SECOND].index[name]
        valid = mask[name]
        assert torch.equal(index[valid], (first * size + second)[valid])
        expected = torch.cat([model.codebook.codebook[first], model.second.codebook.codebook[second]], -1)
        assert torch.equal(vector[valid], expected[valid])


def test_tables_of_many_codes_hold_used_codes_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from unicode_fast.data import open_store
    from unicode_fast.tasks.encoded import EncodedDataset
    from unicode_fast.tasks.metrics.sharing import measure_sharing

    model = spread(trainer_of(FORM, dtype="float32").model)
    size = model.config.model.codewords
    data = open_store(tiny.write(tmp_path / "store"))
    clips = data.clips("test", "audio")
    whole, sharing = probe.encode_split(model, clips, "audio"), measure_sharing(EncodedDataset(model, data), "test")
    monkeypatch.setattr(probe, "MOST_ROWS", size)
    few = probe.encode_split(model, clips, "audio", batch_size=5)
    assert whole.codes is None and few.codes is not None
    assert torch.equal(few.codes, whole.index.unique()) and len(few.table) == len(few.codes)
    assert measure_sharing(EncodedDataset(model, data), "test") == sharing
    chosen = torch.tensor([3, 1, 20])
    for one, other in ((few, whole), (few.select(chosen), whole.select(chosen))):
        assert torch.equal(one.code, other.code) and torch.equal(one.vector, other.vector)
        tokens = one.tokens(model.code_sizes).vector
        assert torch.equal(tokens, other.tokens(model.code_sizes).vector)
        assert torch.equal(tokens[..., :size].argmax(-1), one.code // size)
        assert torch.equal(tokens[..., size:].argmax(-1), one.code % size) and (tokens.sum(-1) == 2).all()
    assert len(few.select(chosen).table) == len(few.code[chosen].unique())
