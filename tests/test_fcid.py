"""FCID against the oracle of its formulas, its checkpoints, and what the release does not have: masks, ranks, pairs."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fcid_oracle
import numpy as np
import official_oracle as oracle
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from compare import assert_close, same
from fcid_oracle import Array, State
from official_checkpoint import TIED, map_arrays
from official_tolerances import DIRECTIONAL, OFFICIAL
from tolerances import SHARED_BATCH

import unicode_fast
from unicode_fast import CmgFileError, Modality, ResetDraws, from_cmg, losses, preset, to_cmg
from unicode_fast.compat import convert
from unicode_fast.compat.cmg_names import used_entries
from unicode_fast.data import write_store
from unicode_fast.evaluate import main as evaluate
from unicode_fast.methods import Draws, Losses, make_method, make_model
from unicode_fast.methods.fcid import COARSE, FcidModel
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:the file has no decoders")
CLIPS, POSITIONS, CPC_STEP = 5, 6, 2
NAMES = ("audio", "video", "text")
KINDS = {
    "audio": Modality("vector", (TIED.audio,)),
    "video": Modality("grid", (7, 7, TIED.video)),
    "text": Modality("words", (TIED.words,)),
}


def content(networks: dict[str, State], **more: Any) -> dict[str, Any]:
    """A file of the release."""
    entries = map_arrays(fcid_oracle.file_entries(networks["encoder"]), torch.from_numpy)
    return {"Encoder_parameters": entries, "epoch": 3, "total_step": 2000, **more}


def our_names(names: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """Names in the model of all entries of the oracle's networks, by network and name there."""
    timed = {name: KINDS[name] for name in ("audio", "video")}
    used = used_entries(timed)
    found = {("cpc", entry): name for entry, name in used["CPC_parameters"].items()}
    found |= {("decoder", entry): name for entry, name in used["Decoder_parameters"].items()}
    for network in (*timed, "coarse-timed", "coarse-words"):
        for part, ours in (("p_mu", "mean"), ("p_logvar", "log_variance")):
            for layer, kind in np.ndindex(4, 2):
                entry = f"{2 * layer}.{('weight', 'bias')[kind]}"
                found[f"mi {network}", f"{part}.{entry}"] = f"club.{network}.{ours}.{entry}"
    for name in names:
        for theirs, ours in (("simple_linear", "code"), ("simple_rec", "output")):
            for kind in ("weight", "bias"):
                found["coarse_decoder", f"{name}.{theirs}.{kind}"] = f"coarse_decoders.{name}.{ours}.{kind}"
    groups = {"va2vat.linear": "timed.project", "va_gen_encoder.input_linear": "timed.general"}
    groups |= {"va_spe_encoder.input_linear": "timed.specific", "t2vat.linear": "words.project"}
    groups |= {"t_gen_encoder.input_linear": "words.general", "t_spe_encoder.input_linear": "words.specific"}
    for theirs, ours in groups.items():
        found |= {("encoder", f"{theirs}.{kind}"): f"coarse.{ours}.{kind}" for kind in ("weight", "bias")}
    for name in names:
        for kind in ("weight", "bias"):
            found["encoder", f"{name}_self_att.affine_matrix.{kind}"] = f"encoders.{name}.temporal.affine.{kind}"
    return found


class Case:
    """Networks, the model with them, a batch, and what the oracle makes of it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.networks = names, fcid_oracle.states(7)
        model = from_cmg(content(self.networks))
        if names != NAMES:
            model = without_text(model)
        assert isinstance(model, FcidModel)
        self.model, state = model, model.state_dict()
        for (network, entry), name in our_names(names).items():
            if name in state:
                state[name].copy_(torch.from_numpy(self.networks[network][entry]))
        inputs = fcid_oracle.features(CLIPS, POSITIONS, seed=3)
        self.inputs = {name: inputs[name] for name in names}
        self.tensors = map_arrays(self.inputs, torch.from_numpy)
        generator = np.random.default_rng(5)
        rows = {"audio": CLIPS, "video": CLIPS, "coarse-timed": 2 * CLIPS, "coarse-words": CLIPS}
        self.permutation = {network: generator.permutation(number) for network, number in rows.items()}
        self.expected = self.forward(self.networks)

    def forward(self, networks: dict[str, State], offset: dict[str, Array] | None = None) -> dict[str, Any]:
        return fcid_oracle.forward(networks, self.inputs, self.permutation, CPC_STEP, offset=offset)

    @property
    def losses(self) -> Losses:
        # Contexts may end at 1 to T - 2; the middle of the share of CPC_STEP.
        position = torch.tensor((CPC_STEP - 1 + 0.5) / (POSITIONS - 2))
        draws = Draws(position, map_arrays(self.permutation, torch.from_numpy))
        return make_method(self.model).losses(self.model(self.tensors), draws)


def without_text(model: torch.nn.Module) -> torch.nn.Module:
    """The model of audio and video with the same parameters."""
    kinds = {name: KINDS[name] for name in ("audio", "video")}
    other = make_model(kinds, model.config).eval()
    state = other.state_dict()
    for name, value in model.state_dict().items():
        if name in state:
            state[name].copy_(value[:2] if name == "codebook.idle" else value)
    return other


@pytest.fixture(scope="module", params=["audio,video,text", "audio,video"])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(tuple(request.param.split(",")))


class TestOracle:
    def test_features_and_codes(self, case: Case) -> None:
        output, expected = case.model(case.tensors), case.expected
        coarse = output.levels[COARSE]
        for name in case.names:
            assert_close(output.semantic[name], expected["z"][name], OFFICIAL, f"z of {name}")
            assert_close(coarse.target[name], expected["h"][name], OFFICIAL, f"h of {name}")
            assert_close(coarse.semantic[name], expected["g"][name], OFFICIAL, f"g of {name}")
            assert_close(coarse.club[name], expected["c"][name], OFFICIAL, f"c of {name}")
            assert np.array_equal(coarse.index[name].numpy(), expected["index"][name])
            assert_close(coarse.codeword[name], expected["code"][name], OFFICIAL, f"q of {name}")

    def test_every_term(self, case: Case) -> None:
        found, expected = case.losses, case.expected["terms"]
        assert set(found.terms) == set(expected)
        for name, value in expected.items():
            assert_close(found.terms[name], np.array(value), OFFICIAL, name)
        assert_close(found.total, np.array(sum(expected.values())), OFFICIAL, "total")

    def test_gradient_of_the_total(self, case: Case) -> None:
        """The coarse level's gradient reaches z, and its moving targets; codes let g alone through."""
        case.model.zero_grad()
        case.losses.total.backward()
        parameters, step = dict(case.model.named_parameters()), 1e-8
        generator, directions, derivative = np.random.default_rng(0), {}, 0.0
        for (network, entry), name in our_names(case.names).items():
            if name in parameters and not name.startswith("club"):
                direction = generator.standard_normal(case.networks[network][entry].shape)
                directions[network, entry] = direction
                derivative += float((parameters[name].grad * torch.from_numpy(direction)).sum())
        totals = []
        for sign in (1, -1):
            moved = {network: dict(state) for network, state in case.networks.items()}
            for (network, entry), direction in directions.items():
                moved[network][entry] = moved[network][entry] + sign * step * direction
            totals.append(sum(case.forward(moved, case.expected["offset"])["terms"].values()))
        assert derivative == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=DIRECTIONAL.relative)

    def test_likelihood_steps_fit_all_club_networks(self, case: Case) -> None:
        method, model = make_method(case.model), case.model
        output = model(case.tensors)
        for network, expected in case.expected["likelihood"].items():
            given, specific, _ = method._club_features(output)
            found = losses.club_likelihood(*model.club[network](given[network]), specific[network])
            assert_close(found, np.array(expected), OFFICIAL, network)
        total = sum(
            losses.club_likelihood(*net(given[name].detach()), specific[name].detach())
            for name, net in model.club.items()
        )
        gradients = torch.autograd.grad(total, list(model.club.parameters()))
        method.fit_club(output, torch.optim.SGD(model.club.parameters(), lr=0.0))
        for (name, parameter), gradient in zip(model.club.named_parameters(), gradients, strict=True):
            assert_close(parameter.grad, gradient, OFFICIAL, name)

    def test_codebook_update(self, case: Case) -> None:
        model, expected = copy.deepcopy(case.model), case.expected
        before = oracle.quantiser_of({"Encoder_parameters": case.networks["encoder"]})
        random = oracle.draws(case.names, CLIPS, before, seed=4)
        after = oracle.reset(oracle.update_average(before, expected["g"], expected["index"]), expected["index"], random)
        features, index, _ = model.codebook_batch(model(case.tensors))
        draws = ResetDraws(torch.from_numpy(random.choice), torch.from_numpy(random.noise))
        model.codebook.update(features, index, draws=draws)
        assert_close(model.codebook.codebook, after.embedding, OFFICIAL, "codebook")
        assert_close(model.codebook.ema_count, after.ema_count, OFFICIAL, "counts")
        assert np.array_equal(model.codebook.idle.amin(0).numpy(), after.unactivated_count)

    def test_encode_gives_a_code_to_each_second_and_one_to_a_sentence(self, case: Case) -> None:
        encoder = case.networks["encoder"]
        for name, features in case.tensors.items():
            encoded = case.model.encode(name, features)
            if name == "text":
                expected = fcid_oracle.clip_code(encoder, name, case.inputs[name])[:, None].repeat(POSITIONS, 1)
            else:
                expected = fcid_oracle.split_codes(encoder, name, case.inputs[name])
            assert np.array_equal(encoded.index.numpy(), expected)
            assert torch.equal(encoded.vector, case.model.codebook.codebook[encoded.index])


class TestFile:
    def test_entries_and_total_of_the_release(self) -> None:
        shapes = fcid_oracle.encoder_entries(fcid_oracle.RELEASED)
        assert len(shapes) == 116
        assert sum(math.prod(shape) for shape in shapes.values()) == 78_420_001

    def test_modalities_and_configuration(self) -> None:
        model = from_cmg(content(fcid_oracle.states(7)))
        assert isinstance(model, FcidModel)
        assert model.modalities == KINDS
        assert (model.config.method.method, model.config.preset, model.dtype) == ("fcid", "official", torch.float64)
        assert from_cmg(content(fcid_oracle.states(7)), torch.float32).dtype == torch.float32

    def test_released_sizes_give_the_preset(self) -> None:
        zeros = {
            name: torch.zeros(()).expand(shape)
            for name, shape in fcid_oracle.encoder_entries(fcid_oracle.RELEASED).items()
        }
        with torch.device("meta"):
            expected = make_model(
                {
                    "audio": Modality("vector", (128,)),
                    "video": Modality("grid", (7, 7, 512)),
                    "text": Modality("words", (768,)),
                },
                preset("official", "paper", "fcid"),
            )
        entries = fcid_oracle.file_entries(zeros)
        found = {ours: tuple(entries[theirs].shape) for theirs, ours in names_in_files().items()}
        del found["codebook.idle"]
        assert found == {name: tuple(expected.state_dict()[name].shape) for name in found}

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda file: file.update(CPC_parameters={}), "keys of the release only, got CPC_parameters too"),
            (
                lambda file: file["Encoder_parameters"].pop("va2vat.linear.bias"),
                "must be an FCID checkpoint of CMG: 'va2vat.linear.bias' is missing in Encoder_parameters$",
            ),
            (
                lambda file: file["Encoder_parameters"].update({"a2vat.linear.bias": torch.zeros(16).double()}),
                "'a2vat.linear.bias' is surplus",
            ),
            (
                lambda file: file["Encoder_parameters"].update({"t2vat.linear.bias": torch.zeros(9).double()}),
                r"'t2vat.linear.bias' in .* must have shape \(16,\), got \(9,\)",
            ),
            (
                lambda file: file["Encoder_parameters"].update({"t_self_att.affine_matrix.weight": torch.zeros(3)}),
                "must have 2 dimensions",
            ),
            (
                lambda file: file["Encoder_parameters"]["va2vat.linear.bias"].fill_(math.nan),
                "'va2vat.linear.bias' in .* must hold finite numbers",
            ),
            (
                lambda file: file["Encoder_parameters"].pop("Cross_quantizer_coarse.embedding"),
                "must hold 'Cross_quantizer.embedding', which is missing",
            ),
            (lambda file: file.pop("Encoder_parameters"), "must hold the key 'Encoder_parameters', got epoch"),
        ],
    )
    def test_other_files_are_refused(self, spoil: Callable[[dict[str, Any]], object], message: str) -> None:
        file = copy.deepcopy(content(fcid_oracle.states(7)))
        spoil(file)
        with pytest.raises(CmgFileError, match=message):
            from_cmg(file)

    def test_missing_networks_are_named(self) -> None:
        with pytest.warns(UserWarning, match="the file has no decoders, Cross-CPC and CLUB networks"):
            from_cmg(content(fcid_oracle.states(7)))

    def test_is_not_written_back(self) -> None:
        with pytest.raises(ValueError, match="model must be of Uni-Code's architecture to be written, got FcidModel"):
            to_cmg(from_cmg(content(fcid_oracle.states(7))))

    @pytest.mark.usefixtures("short_probes", "no_pictures")
    def test_converted_model_does_the_tasks(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        networks, run, store = fcid_oracle.states(7), tmp_path / "run", tmp_path / "store"
        torch.save(content(networks), tmp_path / "FCID.pt")
        assert convert.main(["--from-cmg", str(tmp_path / "FCID.pt"), str(run)]) == 0
        assert "note: the file has no decoders" in capsys.readouterr().out
        model, inputs = unicode_fast.load(run), fcid_oracle.features(24, POSITIONS)
        codes = fcid_oracle.split_codes(networks["encoder"], "video", inputs["video"])
        assert np.array_equal(model.encode("video", torch.from_numpy(inputs["video"])).index.numpy(), codes)
        label = np.zeros((24, POSITIONS, 4), np.float32)
        label[np.arange(24), :, np.arange(24) % 3] = 1
        arrays = {name: value.astype(np.float32) for name, value in inputs.items()}
        arrays |= {f"{name}.label": label for name in ("audio", "video")} | {"class": np.arange(24) % 3}
        write_store(store, "small", KINDS, ["zero", "one", "two"], dict.fromkeys(("train", "val", "test"), arrays))
        for task, source, target in (
            ("classification", "audio", "video"),
            ("classification", "video", "text"),
            ("localisation", "video", "audio"),
            ("retrieval", "video", "audio"),
        ):
            flags = {"data": store, "task": task, "from": source, "to": target}
            assert evaluate([str(run), *(f"--{name}={value}" for name, value in flags.items())]) == 0
            assert task in capsys.readouterr().out


def names_in_files() -> dict[str, str]:
    from unicode_fast.compat.fcid_names import used_entries

    return used_entries()


def trainer(name: str = "recommended", modalities: str = "audio,video,text", **fields: object) -> Trainer:
    config = preset(name, method="fcid").replace_all(**{**tiny.SIZES, "dropout": 0.0, "dtype": "float64", **fields})
    return Trainer(config, {key: tiny.MODALITIES[key] for key in modalities.split(",")}, torch.device("cpu"))


class TestOurVersion:
    def test_padding_has_no_effect_and_lengths_may_differ(self) -> None:
        own = trainer().model.eval()
        features = tiny.batch(own, positions=4, lengths={"text": 3})
        mask = {name: torch.ones(value.shape[:2], dtype=torch.bool) for name, value in features.items()}
        mask["audio"][0, 2:] = mask["video"][1, 3:] = mask["text"][2, 1:] = False
        padded = {
            name: torch.where(mask[name].view(*mask[name].shape, *[1] * (value.dim() - 2)), value, 9.0)
            for name, value in features.items()
        }
        longer = {name: torch.cat([value, value[:, :2]], 1) for name, value in padded.items()}
        longer_mask = {name: torch.cat([valid, torch.zeros_like(valid[:, :2])], 1) for name, valid in mask.items()}
        method = make_method(own)
        first, second = (method.losses(own(*given)) for given in ((features, mask), (longer, longer_mask)))
        assert set(first.terms) == set(second.terms)
        for name, term in first.terms.items():
            # Cross-CPC draws the end of a context from the longest clip.
            assert_close(second.terms[name], term, SHARED_BATCH, name)
        for name in own.names:
            codes = own.encode(name, features[name], mask[name]).index
            again = own.encode(name, longer[name], longer_mask[name]).index
            assert torch.equal(codes[mask[name]], again[longer_mask[name]])

    def test_club_in_closed_form_has_all_pairs_of_clips(self) -> None:
        own = trainer(club_floor=False, club_weight=1.0, club_reduction="sum")
        output = own.model(tiny.batch(own.model))
        terms = own.method.alignment(output)
        coarse = output.levels[COARSE]
        g, c = (torch.cat([part[name][:, 0] for name in ("audio", "video")]) for part in (coarse.semantic, coarse.club))
        mean, log_variance = own.model.club["coarse-timed"](g)
        pairs = -((mean[:, None] - c[None]).square() / (2 * log_variance.exp()[:, None])).sum(-1)
        expected = (pairs.diagonal() - pairs.mean(1)).mean()
        assert_close(terms["club.coarse-timed"], expected, SHARED_BATCH, "club")

    def test_info_nce_in_both_directions(self) -> None:
        own = trainer()
        coarse = own.model(tiny.batch(own.model)).levels[COARSE]
        g = {name: value[:, 0].detach().numpy() for name, value in coarse.semantic.items()}
        pairs = [(one, "text") for one in ("audio", "video")]
        expected = sum(fcid_oracle.info_nce(g[a], g[b]) + fcid_oracle.info_nce(g[b], g[a]) for a, b in pairs) / 2
        found = own.method._between_clips(coarse)
        assert_close(found, np.array(expected), SHARED_BATCH, "InfoNCE")

    def test_fixed_targets_have_no_gradient(self) -> None:
        outputs = {}
        for target in ("moving", "fixed"):
            own = trainer(fcid_target=target)
            outputs[target] = own.model(tiny.batch(own.model)).levels[COARSE].target["audio"]
        assert outputs["moving"].requires_grad and not outputs["fixed"].requires_grad
        assert torch.equal(outputs["moving"], outputs["fixed"])

    @pytest.mark.parametrize("modalities", ["audio,text", "audio,video,depth"])
    @pytest.mark.parametrize("name", ["official", "paper", "recommended"])
    def test_other_modalities(self, modalities: str, name: str) -> None:
        own = trainer(name, modalities, club_floor=False)
        before = {key: value.clone() for key, value in own.model.state_dict().items()}
        features = tiny.batch(own.model)
        for _ in range(3):
            result = own.train_step(features, None, 1e-3)
        assert all(bool(torch.isfinite(term)) for term in result.terms.values())
        after = own.model.state_dict()
        unchanged = {key.split(".")[0] for key, value in after.items() if torch.equal(value, before[key])}
        # With one timed modality Cross-CPC has its self term alone, whose weight in `paper` is 0.
        assert unchanged == ({"cpc"} if (name, modalities) == ("paper", "audio,text") else set())
        assert all(own.model.encode(key, value).index.shape == value.shape[:2] for key, value in features.items())

    def test_words_alone_are_refused(self) -> None:
        kinds = {"text": Modality("words", (4,)), "title": Modality("words", (4,))}
        with pytest.raises(ValueError, match="must have one with a time axis, got text, title of kind words"):
            make_model(kinds, preset("recommended", method="fcid"))

    def test_fields_of_the_word_lstm_are_not_read(self) -> None:
        with pytest.raises(ValueError, match="word_width is not read where method is 'fcid'"):
            preset("recommended", method="fcid").replace(word_width=8)


FORMS = {"recommended": {}, "official": {}, "official masks": {"unequal_lengths": "means"}}


def trained(form: str, ranks: DistContext, **fields: object) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    own, terms = trainer(form.split()[0], reset_after=1, **FORMS[form], **fields), []
    for step, clips in enumerate((8, 7)):
        features, mask = tiny.batch(own.model, clips, seed=step), None
        if "masks" in form:
            mask = {name: tiny.mask_of([1 + (n + step) % 5 for n in range(clips)], 5) for name in NAMES}
        rows = ranks.bounds(clips)
        given = [
            None if values is None else {name: value[rows] for name, value in values.items()}
            for values in (features, mask)
        ]
        terms.append(own.train_step(*given, 1e-3, ranks.shard(clips)).terms)
    return own.model.state_dict(), terms


def compare(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    for name, value in expected[0].items():
        assert_close(found[0][name], value, SHARED_BATCH, name)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            assert_close(ours[name], value, SHARED_BATCH, name)


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_are_the_whole_batch(form: str) -> None:
    compare(trained(form, DistContext(), micro_batches=3), trained(form, DistContext()))


def check_rank(rank: int, folder: str, truths: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for form, truth in truths.items():
        compare(trained(form, DistContext(rank, 2)), truth)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    truths = {form: trained(form, DistContext()) for form in FORMS}
    mp.start_processes(check_rank, args=(str(tmp_path), truths), nprocs=2, start_method="fork")


@pytest.mark.parametrize("modalities", ["audio,video,text", "audio,video"])
def test_resumes_bit_for_bit(modalities: str) -> None:
    own, other = (trainer(modalities=modalities, dropout=0.1) for _ in range(2))
    batches = [tiny.batch(own.model, seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        own.train_step(batch, None, 1e-3)
    saved = copy.deepcopy({"model": own.model.state_dict(), **own.state()})
    for batch in batches[2:]:
        own.train_step(batch, None, 1e-3)
    other.restore(saved)
    for batch in batches[2:]:
        other.train_step(batch, None, 1e-3)
    assert same(own.model.state_dict(), other.model.state_dict())
