"""Options that make a step fast: what they compute, what they leave alone, where they are refused."""

import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from functorch.compile import make_boxed_func
from test_registration import WaitCounter, refuse_to_wait
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from unicode_fast import PRESETS, Modality
from unicode_fast.cli import resolve
from unicode_fast.config import Config, TrainConfig
from unicode_fast.modules import host
from unicode_fast.modules.precision import autocast_context, float32_precision
from unicode_fast.training import acceleration
from unicode_fast.training.acceleration import check_acceleration
from unicode_fast.training.checks import check_run
from unicode_fast.training.metrics_logger import MetricsLogger, StepResult
from unicode_fast.training.trainer import Trainer

CPU = torch.device("cpu")
NAMES = ("audio", "video", "text")
STEPS = 5
# A number that float32 has too, in which a graph reads the rate.
RATE = 2.0**-8


def trainer(preset: str = "recommended", device: torch.device = CPU, **fields: object) -> Trainer:
    return tiny.trainer(preset, device=str(device), **{"reset_after": 1, **fields})


def batch(owner: Trainer, clips: int, masked: bool, seed: int = 0) -> tuple[dict, dict | None]:
    device = owner.model.device
    features = {name: x.to(device) for name, x in tiny.batch(owner.model, clips, STEPS, seed=seed).items()}
    lengths = [2, 4] + [STEPS] * (clips - 2)
    return features, {name: tiny.mask_of(lengths, STEPS).to(device) for name in NAMES} if masked else None


def losses(owner: Trainer, sizes: tuple[int, ...] = (6, 6, 9), masked: bool = True) -> list[dict[str, float]]:
    """Of some steps, with batches of these sizes."""
    found = []
    for seed, clips in enumerate(sizes):
        result = owner.train_step(*batch(owner, clips, masked, seed), RATE)
        found.append({name: term.item() for name, term in result.terms.items()})
    return found


class TestPrecision:
    def test_bfloat16_is_close_to_float32_and_not_the_same(self) -> None:
        # Without grounding, whose weights of words depend on the lexicon so far.
        fixed: dict[str, object] = {"dropout": 0.0, "grounding_weight": 0.0}
        plain, lower = losses(trainer(**fixed)), losses(trainer(**fixed, precision="bfloat16"))
        assert plain != lower
        for one, other in zip(plain, lower, strict=True):
            assert other == pytest.approx(one, rel=0.05, abs=0.02)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_what_stays_float32(self, preset: str) -> None:
        """Features that reach codebook and losses, the losses, parameters, moments, statistics."""
        owner = trainer(preset, dtype="float32", precision="bfloat16")
        features, mask = batch(owner, 6, True)
        output = owner.model.train()(features, mask)
        kept = [output.semantic, output.club, output.codeword, output.quantised, output.target]
        result = owner.train_step(features, mask, 1e-3)
        tensors = [*result.terms.values(), *owner.model.state_dict().values()]
        tensors += [x for part in kept for x in part.values()]
        tensors += [x for state in owner.optimizer.state.values() for x in state.values()]
        assert {x.dtype for x in tensors if x.is_floating_point()} == {torch.float32}
        assert output.decoded["video"].dtype == torch.bfloat16

    def test_where_products_are_lower(self) -> None:
        x = torch.randn(4, 4)
        with autocast_context(TrainConfig(precision="bfloat16"), CPU):
            assert (x @ x).dtype == torch.bfloat16
        for config in (TrainConfig(), TrainConfig(precision="bfloat16", dtype="float64")):
            with autocast_context(config, CPU):
                assert (x @ x).dtype == torch.float32

    def test_encoding_is_float32(self) -> None:
        """A model that was trained in bfloat16 gives the codes that it gives anywhere."""
        owner = trainer(precision="bfloat16")
        features, _ = batch(owner, 6, False)
        other = trainer().model.eval()
        other.load_state_dict(owner.model.eval().state_dict())
        for name in NAMES:
            first, second = (model.encode(name, features[name]) for model in (owner.model, other))
            assert torch.equal(first.index, second.index)
            assert torch.equal(first.vector, second.vector)

    @pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float32"])
    def test_the_products_of_a_gpu(self, precision: str) -> None:
        """The switches are torch's own, on machines without a GPU too, and return to what they were.

        The older ones, which Inductor reads, say the same; they raise where they contradict the newer.
        """
        switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)

        def older() -> tuple[str, bool, bool]:
            backends = torch.backends
            return torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32

        try:
            for given in ("highest", "high", "medium"):
                torch.set_float32_matmul_precision(given)
                before = [switch.fp32_precision for switch in switches], older()
                with float32_precision(TrainConfig(precision=precision), torch.device("cuda")):
                    full = precision == "float32"
                    assert {switch.fp32_precision for switch in switches} == {"ieee" if full else "tf32"}
                    assert older() == (("highest", False, False) if full else ("high", True, True))
                assert ([switch.fp32_precision for switch in switches], older()) == before
        finally:
            torch.set_float32_matmul_precision("highest")

    @pytest.mark.parametrize("precision", ["tf32", "float32"])
    def test_a_compiler_reads_them(self, precision: str) -> None:
        """As Inductor's caches do, and in tracing forward and backward."""

        def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
            read.append((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
            return make_boxed_func(module.forward)

        read: list[tuple[str, bool]] = []
        compiled = torch.compile(lambda x: nn.functional.relu(x @ x), backend=aot_autograd(fw_compiler=backend))
        x = torch.randn(4, 4, requires_grad=True)
        with float32_precision(TrainConfig(precision=precision), torch.device("cuda")):
            compiled(x).sum().backward()
        assert read == [("high", True) if precision == "tf32" else ("highest", False)] * 2

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
    def test_tf32_on_a_gpu(self) -> None:
        device = torch.device("cuda")
        plain, lower = (losses(trainer(device=device, dropout=0.0, precision=p)) for p in ("float32", "tf32"))
        for one, other in zip(plain, lower, strict=True):
            assert other == pytest.approx(one, rel=0.02, abs=0.01)


class TestChannelsLast:
    def test_the_weights_lie_so_and_compute_the_same(self) -> None:
        plain, laid_out = trainer(dropout=0.0), trainer(dropout=0.0, channels_last=True)
        convolutions = [m for m in laid_out.model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
        assert convolutions
        for first, second in zip(losses(plain), losses(laid_out), strict=True):
            assert second == pytest.approx(first, rel=1e-5)
        for module in convolutions:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        moments = laid_out.optimizer.state[convolutions[0].weight]["exp_avg"]
        assert moments.stride() == convolutions[0].weight.stride()
        assert laid_out.model.state_dict().keys() == plain.model.state_dict().keys()


class TestCompile:
    @pytest.mark.parametrize("masked", [True, False])
    def test_one_compilation_for_all_batch_sizes(self, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two sizes compile all there is; others, as many clips as steps, and evaluation in between compile nothing.

        Grids of more than one place after their convolutions, and two modalities of one shape.
        """
        torch._dynamo.reset()
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend="eager"))
        kinds = {
            "audio": Modality("vector", (6,)),
            "video": Modality("grid", (7, 7, 4)),
            "text": Modality("words", (6,)),
        }
        config = tiny.config(dropout=0.0, word_width=6, dtype="float64")
        plain, compiled = Trainer(config, kinds, CPU), Trainer(config.replace(compile=True), kinds, CPU)
        counters.clear()
        first = losses(compiled, (6, 9), masked)
        compilations = counters["stats"]["unique_graphs"]
        # Of each modality both encoders and the decoder.
        assert compilations == 9
        with torch.no_grad():
            compiled.model.eval()(*batch(compiled, 4, masked))
        second = losses(compiled, (5, 7, 6), masked)
        assert counters["stats"]["unique_graphs"] == compilations
        truth = losses(plain, (6, 9), masked) + losses(plain, (5, 7, 6), masked)
        for one, other in zip(truth, first + second, strict=True):
            assert other == pytest.approx(one, rel=1e-4, abs=1e-5)

    @pytest.mark.slow
    def test_modalities_do_not_use_up_each_others_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each has its own of passes with and without a graph, with and without a mask, of one clip and of several."""
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        monkeypatch.setattr(acceleration, "VERSIONS", 8)
        kinds = {"audio": Modality("vector", (6,)), "depth": Modality("vector", (7,))}
        owner = Trainer(tiny.config(dropout=0.1, micro_batches=2, compile=True), kinds, CPU)

        def train(seed: int) -> int:
            counters.clear()
            for masked in (False, True):
                for clips in (8, 3):
                    mask = {name: tiny.mask_of([3] * clips, STEPS) for name in kinds} if masked else None
                    owner.train_step(tiny.batch(owner.model, clips, STEPS, seed=seed), mask, RATE)
            return counters["stats"]["unique_graphs"]

        # Only temporal encoders read the mask, and decoders always have a graph.
        assert train(0) == len(kinds) * (8 + 4 + 2)
        assert train(1) == 0

    def test_more_versions_than_allowed_are_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Not a step whose first pass is compiled and whose second is not, so that they draw different dropout."""
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        monkeypatch.setattr(acceleration, "VERSIONS", 1)
        owner = trainer(micro_batches=2, compile=True)
        message = "compile needs more than 1 versions of ModalityEncoder.encode_semantic"
        with pytest.raises(RuntimeError, match=message):
            owner.train_step(*batch(owner, 6, True), RATE)

    def test_a_compiler_that_fails_is_an_error_with_a_remedy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=lambda *_: 1 / 0))
        owner = trainer(compile=True)
        with pytest.raises(RuntimeError, match="compile needs .*, --compile false turns it off: ZeroDivisionError"):
            owner.train_step(*batch(owner, 6, True), RATE)

    def test_names_and_values_stay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        plain, compiled = trainer().model.state_dict(), trainer(compile=True).model.state_dict()
        assert plain.keys() == compiled.keys()
        assert all(torch.equal(plain[name], compiled[name]) for name in plain)


class TestNoWaiting:
    @pytest.mark.parametrize("masked", [True, False])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_step_reads_nothing_back_and_sends_nothing(
        self, preset: str, masked: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The second step, as the first makes the optimisers' moments.

        With the device "meta" as default, a tensor that is made without the model's device has no numbers, and cannot
        be moved there: on a GPU it would be a copy from the host that waits.
        """
        owner = trainer(preset)
        inputs = batch(owner, 6, masked)
        owner.train_step(*inputs, 1e-3)
        monkeypatch.setattr(host, "is_on_host", lambda _: False)
        refuse_to_wait(monkeypatch)
        with WaitCounter() as counter, torch.device("meta"):
            owner.train_step(*inputs, 1e-3)
        assert counter.operations > 500
        assert not counter.waits

    @pytest.mark.parametrize("lengths", [None, [5, 5, 4, 2], [1, 1, 1, 1]])
    @pytest.mark.parametrize("position", [0.0, 0.6, 0.99])
    def test_a_mask_that_is_read_computes_the_same(
        self, lengths: list[int] | None, position: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cross-CPC, where no clip is long enough too."""
        owner = trainer(dtype="float64")
        z = {name: torch.randn(4, STEPS, 16, dtype=torch.float64, requires_grad=True) for name in NAMES}
        mask = None if lengths is None else dict.fromkeys(NAMES, tiny.mask_of(lengths, STEPS))
        found = []
        for look in (True, False):
            monkeypatch.setattr(host, "is_on_host", lambda _, look=look: look)
            loss, recognised = owner.model.cpc(z, mask, torch.tensor(position, dtype=torch.float64))
            found.append((loss, recognised, *torch.autograd.grad(loss, [*z.values()])))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_mask_without_gaps_is_none(self, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A CPU reads the mask, and computes what a device computes with the mask."""
        found = []
        for look in (True, False):
            monkeypatch.setattr(host, "is_on_host", lambda _, look=look: look)
            owner = trainer(preset, dtype="float64", dropout=0.0)
            features, mask = batch(owner, 6, True)
            mask["audio"], mask["video"] = torch.ones_like(mask["audio"]), torch.ones_like(mask["video"])
            found.append(owner.train_step(features, mask, RATE).terms)
        for name, term in found[0].items():
            torch.testing.assert_close(term, found[1][name], rtol=1e-10, atol=1e-12)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
    @pytest.mark.parametrize("masked", [True, False])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_nothing_waits_for_the_gpu(self, preset: str, masked: bool) -> None:
        owner = trainer(preset, torch.device("cuda"))
        inputs = batch(owner, 6, masked)
        owner.train_step(*inputs, 1e-3)
        torch.cuda.set_sync_debug_mode("error")
        try:
            owner.train_step(*inputs, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def changed_by(owner: Trainer) -> list[Tensor]:
    """Everything that a step changes."""
    moments = [x for o in (owner.optimizer, owner.club_optimizer) for state in o.state.values() for x in state.values()]
    return [*owner.model.state_dict().values(), *moments]


class FakeGraph:
    """A CUDA graph on a CPU: a captured step leaves no trace, a replay runs it and writes where the capture wrote."""

    owner: Trainer
    captures = 0

    def replay(self) -> None:
        new = self.owner.plain_step(*self.inputs)
        for part, kept in zip(vars(new).values(), vars(self.result).values(), strict=True):
            for name, tensor in kept.items():
                tensor.copy_(part[name])


@pytest.fixture
def graphs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    class Graph(FakeGraph):
        pass

    @contextmanager
    def capture(graph: FakeGraph) -> Iterator[None]:
        Graph.captures += 1
        before = [x.detach().clone() for x in changed_by(Graph.owner)]
        step = Graph.owner.plain_step

        def noted(*inputs: dict) -> StepResult:
            graph.inputs, graph.result = inputs, step(*inputs)
            return graph.result

        Graph.owner.graphed.step = noted
        yield
        Graph.owner.graphed.step = step
        for tensor, value in zip(changed_by(Graph.owner), before, strict=True):
            tensor.copy_(value) if not tensor.requires_grad else tensor.data.copy_(value)

    stream = mock.MagicMock()
    monkeypatch.setattr("unicode_fast.training.trainer.check_acceleration", lambda *_: None)
    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": lambda *_: stream,
        "stream": lambda _: nullcontext(),
        "current_stream": lambda *_: stream,
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return Graph


class TestGraph:
    SIZES = (6, 6, 9, 6, 9)

    @pytest.mark.parametrize("masked", [True, False])
    def test_it_is_captured_once_a_shape_and_changes_nothing(
        self, graphs_on_a_cpu: type[FakeGraph], masked: bool
    ) -> None:
        """Dropout included, and from moments that exist already, as after a resume: the bits of the plain step."""
        plain = trainer()
        truth = losses(plain, self.SIZES, masked)
        graphed = graphs_on_a_cpu.owner = trainer(cuda_graph=True)
        assert losses(graphed, self.SIZES, masked) == truth
        assert graphs_on_a_cpu.captures == 2
        assert float(graphed.optimizer.param_groups[0]["lr"]) == RATE
        for one, other in zip(changed_by(graphed), changed_by(plain), strict=True):
            assert torch.equal(one, other)

    def test_a_restored_trainer_captures_again(self, graphs_on_a_cpu: type[FakeGraph]) -> None:
        plain = trainer()
        truth = losses(plain, (6, 6, 6))[-1]
        graphed = graphs_on_a_cpu.owner = trainer(cuda_graph=True)
        losses(graphed, (6, 6))
        content = copy.deepcopy({"model": graphed.model.state_dict(), **graphed.state()})
        losses(graphed, (6,))
        graphed.restore(content)
        result = graphed.train_step(*batch(graphed, 6, True, seed=2), RATE)
        assert {name: term.item() for name, term in result.terms.items()} == truth
        assert graphs_on_a_cpu.captures == 2

    def test_the_logger_reads_the_rate_of_the_optimiser(self, graphs_on_a_cpu: type[FakeGraph], tmp_path: Path) -> None:
        owner = graphs_on_a_cpu.owner = trainer(cuda_graph=True)
        logger = MetricsLogger(tmp_path)
        for step in range(1, 22):
            result = owner.train_step(*batch(owner, 6, True), rate=step / 1000)
            logger.record(step, owner.optimizer.param_groups[0]["lr"], np.arange(6), result)
        logger.flush()
        logger.close()
        (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        assert line["learning_rate"] == pytest.approx(0.02)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_on_a_gpu(self, preset: str, precision: str) -> None:
        """Against the plain step, with a batch of another size in between; in a sync-checked mode."""
        device = torch.device("cuda")
        fields = {"dtype": "float32", "precision": precision, "dropout": 0.0}
        plain, graphed = trainer(preset, device, **fields), trainer(preset, device, **fields, cuda_graph=True)
        for one, other in zip(losses(plain, self.SIZES), losses(graphed, self.SIZES), strict=True):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-4)
        assert int(graphed.model.codebook.step) == len(self.SIZES)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
    def test_dropout_differs_from_replay_to_replay_on_a_gpu(self) -> None:
        owner = trainer(device=torch.device("cuda"), cuda_graph=True, dropout=0.5)
        inputs = batch(owner, 6, True)
        found = [float(owner.train_step(*inputs, 0.0).terms["reconstruction.audio"]) for _ in range(3)]
        assert len(set(found)) == 3


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"precision": "tf32"}, "precision 'tf32' needs device cuda, got cpu"),
            ({"cuda_graph": True}, "cuda_graph needs device cuda, got cpu"),
        ],
    )
    def test_on_a_cpu(self, fields: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            trainer(**fields)
        with pytest.raises(ValueError, match=message):
            check_run(resolve(None, {"device": "cpu", **fields}))
        check_acceleration(TrainConfig(**fields), torch.device("cuda"))

    @pytest.mark.parametrize("fields", [{"micro_batches": 2}, {"activation_checkpointing": True}])
    def test_what_cannot_be_captured(self, fields: dict) -> None:
        with pytest.raises(ValueError, match=f"cuda_graph needs {next(iter(fields))} (1|False), got (2|True)"):
            check_acceleration(TrainConfig(cuda_graph=True, **fields), torch.device("cuda"))

    def test_a_float64_model_has_no_other_precision(self) -> None:
        with pytest.raises(ValueError, match="precision is not read where dtype is 'float64'"):
            Config().replace(dtype="float64", precision="bfloat16")
