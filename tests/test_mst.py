"""MST: its loss beside loops, shared layers beside layers with copied weights, one name for each tensor."""

import copy
import dataclasses
import functools
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cases import ON_HOST
from compare import assert_close, to_float64
from tolerances import EXACT, SHARED_BATCH
from torch import Tensor

from unicode_fast import Modality, UniCode, backend, checkpoint, to_cmg
from unicode_fast.methods import make_method, make_model, mst
from unicode_fast.modules import transformer
from unicode_fast.modules.model import in_mode
from unicode_fast.training.acceleration import accelerate
from unicode_fast.training.trainer import Trainer

NAMES = "audio,video,text"
PARTS = ("self_attn", "linear1", "linear2")


def model(names: str = NAMES, name: str = "recommended", **fields: object) -> UniCode:
    return tiny.model(name, names, **{"method": "mst", "temporal_layers": 2, **fields})


def trainer(names: str = NAMES, **fields: object) -> Trainer:
    return tiny.trainer("recommended", names, method="mst", temporal_layers=2, **fields)


def untied(tied: UniCode, **options: object) -> UniCode:
    """A model without shared layers that has the weights of one with them."""
    other = model(",".join(tied.names), method="baseline", **options)
    state, given = other.state_dict(), tied.state_dict()
    for name in state:
        key = name
        if ".temporal.layers." in name and ".norm" not in name:
            key = f"alignment.shared.{name.split('.temporal.layers.')[1]}"
        state[name] = given[key]
    other.load_state_dict(state)
    return other


def loss_by_loops(owner: UniCode, semantic: dict[str, Tensor], mask: dict[str, Tensor] | None) -> float:
    scale, losses = math.exp(owner.alignment.log_scale.item()), []
    pooled = {}
    for name, z in semantic.items():
        lengths = [z.shape[1]] * len(z) if mask is None else mask[name].sum(1).tolist()
        means = np.array([to_float64(clip)[:length].mean(0) for clip, length in zip(z, lengths, strict=True)])
        pooled[name] = means / np.linalg.norm(means, axis=1, keepdims=True)
    for one, other in combinations(semantic, 2):
        scores = scale * np.array([[a @ b for b in pooled[other]] for a in pooled[one]])
        for table in (scores, scores.T):
            rows = [-row[i] + math.log(sum(math.exp(value) for value in row)) for i, row in enumerate(table)]
            losses.append(sum(rows) / len(rows))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("names", ["audio,video", NAMES])
@pytest.mark.parametrize("masked", [False, True])
def test_loss(names: str, masked: bool) -> None:
    owner = model(names, dtype="float64", align_weight=0.7)
    features = tiny.batch(owner, lengths={"video": 4, "text": 7})
    lengths = {"audio": [5, 2, 1, 5, 3, 4], "video": [1, 4, 4, 2, 4, 3], "text": [7, 6, 1, 2, 3, 7]}
    mask = {name: tiny.mask_of(lengths[name], features[name].shape[1]) for name in owner.names} if masked else None
    output = owner(features, mask)
    if mask is not None:
        for name, z in output.semantic.items():
            z.data[~mask[name]] = 1e6  # padding may hold anything
    term = make_method(owner).alignment(output)["mst"]
    assert float(term) == pytest.approx(0.7 * loss_by_loops(owner, output.semantic, mask), rel=1e-12)
    term.backward()
    assert owner.alignment.log_scale.grad.isfinite()
    assert all(shared.grad.isfinite().all() and shared.grad.any() for shared in owner.alignment.shared.parameters())


def gradients(owner: UniCode, mask: dict[str, Tensor], training: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Semantic features of a batch, and the gradients of a function of them in the parameters of temporal layers."""
    torch.manual_seed(3)
    with in_mode(owner, training):
        z = [owner.encode_features(name, x, mask[name])[0] for name, x in tiny.batch(owner).items()]
    torch.stack([values.sin().sum() for values in z]).sum().backward()
    return z, {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_layers_with_copied_weights(dtype: str, training: bool) -> None:
    """The same features, draws of dropout included; a shared weight has the sum of the copies' gradients."""
    owner = model(dtype=dtype, dropout=0.3)
    other = untied(owner, dtype=dtype, dropout=0.3)
    mask = {name: tiny.mask_of([5, 4, 3, 2, 1, 5], 5) for name in owner.names}
    z, own = gradients(owner, mask, training)
    expected, copied = gradients(other, mask, training)
    tolerance = SHARED_BATCH if dtype == "float64" else SHARED_BATCH._replace(relative=1e-4, absolute=1e-4)
    for found, truth in zip(z, expected, strict=True):
        assert_close(found, truth, EXACT)
    for name, gradient in own.items():
        if not name.startswith("alignment."):
            assert_close(gradient, copied[name], tolerance, name)
        elif name.startswith("alignment.shared."):
            part = name.removeprefix("alignment.shared.")
            copies = [copied[f"encoders.{key}.temporal.layers.{part}"] for key in owner.names]
            assert_close(gradient, torch.stack(copies).sum(0), tolerance, name)
    assert sum(name.startswith("alignment.shared.") for name in own) == 2 * 8
    with torch.no_grad():
        features = tiny.batch(owner)
        for key in owner.names:
            found, truth = (one.encode(key, features[key], mask[key]).vector for one in (owner, other))
            assert_close(found, truth, EXACT)


def test_dropout_follows_the_encoder() -> None:
    """`encode` has none, though the module that owns the shared attention is in training mode."""
    owner = model(dtype="float64", dropout=0.9).train()
    features = tiny.batch(owner)["audio"]
    found = owner.encode("audio", features)
    assert owner.alignment.shared[0]["self_attn"].training
    assert torch.equal(found.index, owner.eval().encode("audio", features).index)
    encoder, z = owner.encoders["audio"], []
    for mode in (True, False):
        owner.train(mode)
        with in_mode(encoder, False):
            z.append(encoder.encode_semantic(features))
    assert torch.equal(*z)


@pytest.mark.skipif(ON_HOST or not backend.compiled(), reason="the C++ extension is not there")
def test_cpu_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer of each modality takes the operator of attention."""
    owner, called = model(), []

    class Counted:
        def __getattr__(self, name: str) -> object:
            called.append(name)
            return getattr(torch.ops.unicode_fast_layers, name)

    monkeypatch.setattr(transformer, "_OPERATORS", Counted())
    owner.train()(tiny.batch(owner))
    assert called.count("attention") == 2 * len(owner.names)


def test_every_tensor_has_one_name() -> None:
    owner, baseline = model(), model(method="baseline")
    state = owner.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values() if tensor.numel()}) == len(state)
    assert not [name for name in state if name.startswith("encoders.") and any(part in name for part in PARTS)]
    layer = sum(
        p.numel() for part in PARTS for p in getattr(baseline.encoders["audio"].temporal.layers[0], part).parameters()
    )
    without = sum(p.numel() for p in baseline.parameters()) - sum(p.numel() for p in owner.parameters())
    assert without == 2 * 2 * layer - 1  # two layers of two further modalities; the scale
    groups = owner.parameter_groups()
    assert len(groups["alignment"]) == 2 * 8 + 1
    parameters = [parameter for group in groups.values() for parameter in group]
    assert len(set(parameters)) == len(parameters)


def test_copies_are_independent_and_tied() -> None:
    owner = model()
    other = copy.deepcopy(owner)
    shared = other.alignment.shared[1]["linear1"].weight
    for encoder in other.encoders.values():
        assert encoder.temporal.layers[1].linear1.weight is shared
    shared.data.zero_()
    assert owner.alignment.shared[1]["linear1"].weight.any()
    moved = other.double()
    assert moved.encoders["text"].temporal.layers[0].self_attn.in_proj_weight.dtype == torch.float64


def test_export(tmp_path: Path) -> None:
    owner = model().eval()
    checkpoint.export(owner, tmp_path / "model.safetensors")
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    for name, features in tiny.batch(owner).items():
        assert torch.equal(owner.encode(name, features).index, loaded.encode(name, features).index)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in owner.state_dict().items())
    layers = [encoder.temporal.layers[1] for encoder in loaded.encoders.values()]
    assert all(layer.linear2 is loaded.alignment.shared[1]["linear2"] for layer in layers)


def test_the_released_form_has_no_shared_layers() -> None:
    config = tiny.config("official", method="mst", temporal_layers=2, temporal_heads=4)
    owner = make_model({"audio": tiny.MODALITIES["audio"], "video": Modality("grid", (7, 7, 4))}, config)
    message = "got method 'mst' without encoders.audio.temporal.layers.0.self_attn"
    with pytest.raises(ValueError, match=message):
        to_cmg(owner)


def test_equal_layers_of_the_official_preset() -> None:
    first, second = model(name="official").alignment.shared
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    first, second = model().alignment.shared
    assert not torch.equal(first["linear1"].weight, second["linear1"].weight)


@pytest.mark.parametrize(
    ("temperature", "start"), [(0.07, math.log(1 / 0.07)), (0.5, math.log(2)), (0.001, math.log(100))]
)
def test_scale(temperature: float, start: float) -> None:
    owner = trainer(align_temperature=temperature, dtype="float64")
    scale = owner.model.alignment.log_scale
    assert float(scale) == pytest.approx(start, rel=1e-6)
    scale.data.fill_(7.0)
    owner.train_step(tiny.batch(owner.model), None, 0.0)
    assert float(scale) == pytest.approx(math.log(100), rel=1e-12)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled encoders read the shared weights as they are at each call, with their gradient."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = (model("audio,depth", temporal_layers=1, dtype="float64", dropout=0.0) for _ in range(2))
    accelerate(compiled, dataclasses.replace(compiled.config.train, compile=True))
    mask = tiny.mask_of([5, 4, 3, 2, 1, 5], 5)
    for _ in range(2):
        for name, features in tiny.batch(plain).items():
            found, expected = (one.encode_semantic(name, features, mask) for one in (compiled, plain))
            assert_close(found, expected, SHARED_BATCH, name)
            found.square().sum().backward()
            expected.square().sum().backward()
        for one, other in zip(compiled.alignment.parameters(), plain.alignment.parameters(), strict=True):
            if one.grad is not None:
                assert_close(one.grad, other.grad, SHARED_BATCH)
                one.data -= 0.1 * one.grad
                other.data -= 0.1 * other.grad
    assert sum(one.grad is not None for one in compiled.alignment.parameters()) == 8


def test_symmetric_info_nce_by_hand() -> None:
    scores = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    # Rows: log 4 and log 2; columns: log 2 and log 4.
    expected = (math.log(4) + math.log(2) + math.log(2) + math.log(4)) / 4
    assert float(mst.symmetric_info_nce(scores)) == pytest.approx(expected, rel=1e-15)
