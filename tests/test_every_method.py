"""What holds for each method: steps, masks, lengths, micro-batches, ranks, resumed runs, and its place in tables."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tiny
import torch
import torch.multiprocessing as mp
from compare import assert_close
from test_distributed import State, compare, meet
from tolerances import SHARED_BATCH
from torch.utils._python_dispatch import TorchDispatchMode

from unicode_fast import checkpoint, load, preset
from unicode_fast.config import FRAME_METHODS, MethodConfig
from unicode_fast.methods import METHODS, Alignment, UniCodeMethod, make_method, make_model, recipe_of, row_name
from unicode_fast.methods.registry import check_method, rules_of
from unicode_fast.modules import UniCode, host
from unicode_fast.report.published import published
from unicode_fast.training.checks import check_run
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.metrics_logger import StepResult
from unicode_fast.training.step import backward, micro_batches
from unicode_fast.training.trainer import Trainer

FORMS = [(name, dcid) for name, recipe in METHODS.items() for dcid in (False, True)[: 1 + recipe.combines]]
TITLES = [row_name(*form) for form in FORMS]
each_form = pytest.mark.parametrize("form", FORMS, ids=TITLES)
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")
# Clips of the batches; two ranks do not share the last one evenly.
BATCHES = (8, 5)


def trainer_of(form: tuple[str, bool], names: str = "audio,video,text", **fields: object) -> Trainer:
    # With this seed no layer of the small model has only inactive units, and no estimate of CLUB is at its floor.
    given = {"dropout": 0.0, "dtype": "float64", "batch_size": 8, "steps": 4, "seed": 7, **fields}
    if form != ("codis", False):
        given.setdefault("reset_after", 1)
    return tiny.trainer("recommended", names, method=form[0], dcid=form[1], **given)


def batch_of(owner: UniCode, step: int, masked: bool = True, **lengths: int) -> tuple[State, State | None]:
    """Features and masks of a batch; `lengths` are positions by modality."""
    clips = BATCHES[step % len(BATCHES)]
    features = tiny.batch(owner, clips, lengths=lengths, seed=step)
    generator = torch.Generator().manual_seed(step)
    positions = {name: values.shape[1] for name, values in features.items()}
    mask = {
        name: tiny.mask_of(torch.randint(1, number + 1, (clips,), generator=generator).tolist(), number)
        for name, number in positions.items()
    }
    return features, mask if masked else None


def trained(
    trainer: Trainer, steps: range = range(len(BATCHES)), ranks: DistContext | None = None
) -> tuple[State, list[StepResult]]:
    """The state of the model after some steps, and their results."""
    results = []
    for step in steps:
        features, mask = batch_of(trainer.model, step)
        clips = len(features["audio"])
        own = slice(None) if ranks is None else ranks.bounds(clips)
        own_features = {name: values[own] for name, values in features.items()}
        own_mask = {name: valid[own] for name, valid in (mask or {}).items()}
        results.append(trainer.train_step(own_features, own_mask, 1e-3, None if ranks is None else ranks.shard(clips)))
    return copy.deepcopy(trainer.model.state_dict()), results


class Reads(TorchDispatchMode):
    """Counts operators, and lists those whose result or shape depends on the values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.found = 0, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.number += 1
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in WAITS:
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@each_form
class TestSteps:
    @pytest.mark.parametrize("names", ["audio,video", "audio,video,text"])
    def test_terms_and_gradients_are_finite(self, form: tuple[str, bool], names: str) -> None:
        """Every parameter of the main optimiser that a term reaches has a gradient other than zero."""
        trainer = trainer_of(form, names)
        _, results = trained(trainer, range(3))
        assert all(torch.isfinite(term) for result in results for term in result.terms.values())
        trained_ones = {id(one) for group in trainer.model.parameter_groups().values() for one in group}
        for name, parameter in trainer.model.named_parameters():
            if id(parameter) in trained_ones and not self.is_idle(name, trainer):
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    @staticmethod
    def is_idle(name: str, trainer: Trainer) -> bool:
        """Whether no term reaches a parameter: of CLUB or Cross-CPC where they are off, or of a context of one step."""
        method = trainer.config.method
        return (
            (method.club_estimator == "none" and "club_head" in name)
            or (method.cpc_weight == 0 and name.startswith("cpc."))
            or "weight_hh" in name
        )

    def test_one_clip(self, form: tuple[str, bool]) -> None:
        """The last batch of an epoch may have one."""
        trainer = trainer_of(form, batch_size=2)
        features, mask = batch_of(trainer.model, 0)
        one = [{name: values[:1] for name, values in tensors.items()} for tensors in (features, mask or {})]
        result = trainer.train_step(one[0], one[1], 1e-3)
        assert all(torch.isfinite(term) for term in result.terms.values())
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    def test_its_own_terms(self, form: tuple[str, bool]) -> None:
        """A method differs from the Baseline by terms, or by what the codebook learns from."""
        trainer, baseline = trainer_of(form), trainer_of(("baseline", False))
        own, plain = (set(trained(one, range(1))[1][0].terms) for one in (trainer, baseline))
        assert form[0] == "baseline" or own - plain
        assert all(name.startswith(("club", "cpc")) for name in own - plain) == (form[0] == "baseline")

    def test_padding_has_no_effect(self, form: tuple[str, bool]) -> None:
        results = []
        for filled in (0.0, 1e3):
            trainer = trainer_of(form)
            features, mask = batch_of(trainer.model, 0)
            for name, valid in (mask or {}).items():
                features[name][~valid] = filled
            results.append((trainer.train_step(features, mask, 1e-2).terms, trainer.model.state_dict()))
        for name, term in results[0][0].items():
            assert_close(results[1][0][name], term, SHARED_BATCH, name)
        for name, value in results[0][1].items():
            assert_close(results[1][1][name].double(), value.double(), SHARED_BATCH, name)

    def test_unequal_lengths(self, form: tuple[str, bool]) -> None:
        trainer = trainer_of(form)
        for step in range(2):
            features, _ = batch_of(trainer.model, step, masked=False, text=3)
            result = trainer.train_step(features, None, 1e-2)
        assert all(torch.isfinite(term) for term in result.terms.values())
        assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())

    def test_micro_batches_are_the_batch_or_refused(self, form: tuple[str, bool]) -> None:
        if not recipe_of(form[0]).micro_batches:
            config = tiny.config("recommended", method=form[0], micro_batches=2)
            with pytest.raises(ValueError, match=f"^micro_batches must be 1 with method '{form[0]}', got 2$"):
                check_run(config)
            return
        compare(trained(trainer_of(form, micro_batches=3)), trained(trainer_of(form)))

    def test_a_step_reads_no_value(self, form: tuple[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU that would wait for the device, and a CUDA graph could not capture it. Optimisers are left out."""
        trainer = trainer_of(form, dtype="float32")
        features, mask = batch_of(trainer.model, 0)
        trainer.train_step(features, mask, 1e-2)
        for name in ("is_on_host", "has_operators"):
            monkeypatch.setattr(host, name, lambda _: False)
        monkeypatch.setattr(trainer.club_optimizer, "step", lambda: None)
        with Reads() as reads:
            output, _ = backward(trainer.method, trainer.club_optimizer, micro_batches(features, mask, 1))
            trainer.model.update_codebook(output)
        assert reads.number > 100 and reads.found == []

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not available")
    def test_a_graphed_step_on_a_gpu(self, form: tuple[str, bool]) -> None:
        """Equal to the plain step over several batches, teachers and queues included."""
        ends = []
        for graphed in (False, True):
            trainer = trainer_of(form, device="cuda", cuda_graph=graphed)
            for step in range(4):
                given = batch_of(trainer.model, 2 * step)
                batch = [{name: values.cuda() for name, values in (tensors or {}).items()} for tensors in given]
                trainer.train_step(*batch, 1e-2)
            ends.append(trainer.model.state_dict())
        for name, value in ends[0].items():
            assert_close(ends[1][name].double(), value.double(), SHARED_BATCH, name)

    def test_a_resumed_run_ends_as_the_whole(self, form: tuple[str, bool], tmp_path: Path) -> None:
        fields = {"dtype": "float32", "dropout": 0.3}
        whole, resumed = trainer_of(form, **fields), trainer_of(form, **fields)
        trained(whole, range(2))
        checkpoint.save(tmp_path / "model.pt", whole.model, whole.state())
        expected = trained(whole, range(2, 4))[0]
        # Restores the generator of dropout, too.
        resumed.restore(checkpoint.read(tmp_path / "model.pt"))
        for name, value in trained(resumed, range(2, 4))[0].items():
            assert torch.equal(value, expected[name]), name

    def test_an_exported_model_gives_the_same_codes(self, form: tuple[str, bool], tmp_path: Path) -> None:
        trainer = trainer_of(form, dtype="float32")
        trained(trainer, range(2))
        checkpoint.export(trainer.model, tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors")
        assert type(again) is type(trainer.model) and again.config == trainer.config
        features, mask = batch_of(again, 0)
        for name in again.names:
            found = [one.encode(name, features[name], mask[name]) for one in (again, trainer.model)]
            assert torch.equal(found[0].index, found[1].index) and torch.equal(found[0].vector, found[1].vector)

    def test_a_vector_depends_on_the_index_alone(self, form: tuple[str, bool]) -> None:
        """Probes train on a table of the vectors in use."""
        trainer = trainer_of(form, dtype="float32")
        trained(trainer, range(2))
        features, mask = batch_of(trainer.model, 0)
        for name in trainer.model.names:
            index, vector = trainer.model.encode(name, features[name], mask[name])
            index, vector = index[mask[name]], vector[mask[name]]
            for code in index.unique():
                assert (vector[index == code] == vector[index == code][0]).all()


def check_rank(rank: int, folder: str, truths: list[tuple[State, list[StepResult]]]) -> None:
    ranks = meet(rank, 2, folder)
    for form, truth in zip(FORMS, truths, strict=True):
        compare(trained(trainer_of(form), ranks=ranks), truth)


def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    truths = [trained(trainer_of(form)) for form in FORMS]
    mp.spawn(check_rank, (str(tmp_path), truths), nprocs=2)


def fields_of_methods() -> Iterator[tuple[str, str]]:
    """Fields that some methods do not read, each with such a method."""
    for method in METHODS:
        unread = preset("recommended", method=method).unread_fields()
        for field in dataclasses.fields(MethodConfig):
            if "method is" in unread.get(field.name, ""):
                yield field.name, method


class TestRecipes:
    def test_every_name_of_the_field_has_one(self) -> None:
        assert list(METHODS) == list(get_args(get_type_hints(MethodConfig)["method"]))

    def test_table_1_is_complete(self) -> None:
        assert {number.method for number in published() if number.table == 1} < set(TITLES)

    def test_a_rule_names_a_field_that_the_method_reads_or_turns_it_off(self) -> None:
        for name, dcid in FORMS:
            config, standard = preset("recommended", method=name, dcid=dcid), preset("recommended")
            unread = config.unread_fields()
            rules = rules_of(name, dcid)
            assert {rules[field] for field in rules if field in unread} <= {0.0, "none"}, (name, dcid)
            assert config.method.method == name and config.method.dcid == dcid
            same = {**standard.flat(), **rules, "method": name, "dcid": dcid}
            assert config.flat() == same

    @pytest.mark.parametrize(("field", "method"), list(fields_of_methods()))
    def test_a_field_of_another_method(self, field: str, method: str) -> None:
        config = preset("recommended", method=method)
        value = config.flat()[field]
        other = next((one for one in get_args(get_type_hints(MethodConfig)[field]) if one != value), None)
        if other is None:
            other = (
                not value if isinstance(value, bool) else value / 2 or 1.0 if isinstance(value, float) else value + 1
            )
        with pytest.raises(ValueError, match=f"^{field} is not read where method is '{method}', got "):
            config.replace(**{field: other})

    def test_a_prefix_names_the_method_that_reads_a_field(self) -> None:
        prefixes = {"smit_": "s-mit", "jigsaw_": "micu", "hdcid_": "h-dcid"}
        prefixes |= {f"{name}_": name for name in ("codis", "turn", "micu", "fcid")}
        for field in dataclasses.fields(MethodConfig):
            for prefix, reader in prefixes.items():
                if field.name.startswith(prefix):
                    refused = [name for name in METHODS if (field.name, name) in set(fields_of_methods())]
                    assert refused == [name for name in METHODS if name != reader], field.name

    def test_dcid_is_refused_where_a_method_has_no_such_form(self) -> None:
        for name, recipe in METHODS.items():
            if recipe.combines:
                assert preset("recommended", method=name, dcid=True).method.dcid
            else:
                with pytest.raises(
                    ValueError, match=f"^dcid must be false with method '{name}', because .*, got true$"
                ):
                    preset("recommended", method=name, dcid=True)

    def test_a_method_may_refuse_graphs_and_micro_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        recipe = dataclasses.replace(METHODS["cmcm"], graphable=False, micro_batches=False)
        monkeypatch.setitem(METHODS, "cmcm", recipe)  # type: ignore[arg-type]
        for fields, message in (
            ({"cuda_graph": True}, "cuda_graph must be false with method 'cmcm', got true"),
            ({"micro_batches": 2}, "micro_batches must be 1 with method 'cmcm', got 2"),
        ):
            config = tiny.config(method="cmcm", **fields)
            with pytest.raises(ValueError, match=f"^{message}$"):
                check_method(config)
        with pytest.raises(ValueError, match="^micro_batches must be 1 with method 'cmcm', got 2$"):
            tiny.trainer(method="cmcm", micro_batches=2)

    def test_fields_that_a_method_turns_off(self) -> None:
        baseline, codis = (preset("recommended", method=name) for name in ("baseline", "codis"))
        with pytest.raises(ValueError, match="^cpc_temperature is not read where cpc_weight is 0.0, got "):
            baseline.replace(cpc_temperature=2.0)
        with pytest.raises(ValueError, match="^reset_after is not read where codis_codebook is 'gradient', got "):
            codis.replace(reset_after=5)
        preset("recommended", method="codis", dcid=True).replace(reset_after=5)

    def test_method_and_dcid_come_with_a_preset(self) -> None:
        with pytest.raises(
            ValueError, match=r"^method must stay 'uni-code', because preset\(..., method=...\) sets it"
        ):
            preset("recommended").replace(method="s-mit")
        with pytest.raises(
            ValueError, match="^dcid must be false with method 'uni-code', because only baseline, .*, got true$"
        ):
            preset("recommended", dcid=True)
        with pytest.raises(ValueError, match="^method must be one of uni-code, baseline, .*, got 'clip'$"):
            preset("recommended", method="clip")

    def test_a_model_without_the_parts_of_its_method(self) -> None:
        config = tiny.config("recommended", method="s-mit")
        modalities = {name: tiny.MODALITIES[name] for name in ("audio", "video")}
        with pytest.raises(ValueError, match="^config must be of a method .*, got method 's-mit'; .*make_model makes"):
            UniCode(modalities, config)
        model = UniCode(modalities, config, Alignment)
        with pytest.raises(ValueError, match="^model must be one of make_model for the method 's-mit', got a UniCode$"):
            make_method(model)
        assert type(make_method(make_model(modalities, config))) is UniCodeMethod

    @pytest.mark.parametrize("method", ["fcid", "codaar", "h-dcid"])
    def test_losses_of_another_method(self, method: str) -> None:
        model = tiny.model(method=method)
        with pytest.raises(ValueError, match=f"^model must be of .*, got method '{method}'; .*make_method"):
            UniCodeMethod(model)
        assert type(make_method(model)) is recipe_of(method).method

    def test_methods_that_a_plain_model_suits(self) -> None:
        plain = [name for name, one in METHODS.items() if one.model is UniCode and one.alignment is None]
        assert plain == list(FRAME_METHODS)
