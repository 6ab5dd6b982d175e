"""Configuration: frozen dataclasses; their field names are the command-line flags and the keys of a YAML file."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from unicode_fast.errors import few

Kind = Literal["vector", "grid", "words"]
TextPadding = Literal["masked", "read"]
# Fields that only layouts with sentences read.
TEXT_FIELDS = ("text_model", "text_whitelist", "text_padding")

# Two 3x3 convolutions without padding precede the map of a grid, so each side needs five cells.
SMALLEST_GRID = 5


def _whole(size: Any) -> int:
    try:
        return operator.index(size)
    except TypeError as error:
        raise TypeError(f"shape must hold whole numbers, got {type(size).__name__} {size!r}") from error


@dataclass(frozen=True)
class Modality:
    """Kind and shape of a modality's features at one position of a clip.

    Args:
        kind: "vector" for (C,) features, "grid" for (H, W, C) channels-last
            maps, "words" for (C,) word vectors; a bidirectional LSTM encodes
            words first.
        shape: of the features at one position, (C,) or (H, W, C).

    Raises:
        ValueError: the kind is unknown or the shape does not fit it.
    """

    kind: Kind
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not isinstance(self.shape, (tuple, list)):
            raise TypeError(f"shape must be a tuple of sizes, got {type(self.shape).__name__} {self.shape!r}")
        object.__setattr__(self, "shape", tuple(map(_whole, self.shape)))
        sides = 3 if self.kind == "grid" else 1
        if len(self.shape) != sides or min(self.shape) < 1:
            raise ValueError(f"shape of a {self.kind} modality must be {sides} positive sizes, got {self.shape}")
        if self.kind == "grid" and min(self.shape[:2]) < SMALLEST_GRID:
            raise ValueError(f"a grid must be at least {SMALLEST_GRID} x {SMALLEST_GRID}, got shape {self.shape}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and architecture of the network.

    Args:
        width: D, the shared width of semantic features and codewords.
        codewords: M, the size of the codebook.
        vector_specific_width: output of the specific encoder of vectors and words.
        word_width: output of the bidirectional LSTM over words, both directions together.
        grid_hidden_width: channels after the first convolution over grids, and inside their decoder.
        grid_specific_width: channels of the specific map of grids.
        grid_club_width: width of the vector computed from that map as input of CLUB.
        grid_semantic_width: output of the semantic encoder of grids where `grid_pooling` is "flatten".
        squeeze_width: bottleneck of the channel re-weighting of grids.
        grid_pooling: pooling of a grid's cells: "sum" (as released), "attention" with a softmax over cells, or
            "flatten", one linear layer over all cells.
        residual_skip: the skip of the residual block: its "input", or the "relu"
            of it (as released, where the activation works in place).
        temporal_layers: transformer layers per modality.
        temporal_heads: attention heads.
        feedforward_width: hidden width of a transformer layer.
        equal_layers: transformer layers start as copies of the first one (as released).
        dropout: probability of dropout in the transformer layers.
        cpc_layers: LSTM layers of the Cross-CPC context.
        cpc_bias: the predictors of Cross-CPC have a bias (as released).
        cpc_steps: K, prediction steps of Cross-CPC.
        club_hidden_width: hidden width of the CLUB networks.
    """

    width: int = 128
    codewords: int = 128
    vector_specific_width: int = 128
    word_width: int = 128
    grid_hidden_width: int = 32
    grid_specific_width: int = 64
    grid_club_width: int = 64
    grid_semantic_width: int = 256
    squeeze_width: int = 8
    grid_pooling: Literal["sum", "attention", "flatten"] = "flatten"
    residual_skip: Literal["input", "relu"] = "input"
    temporal_layers: int = 2
    temporal_heads: int = 4
    feedforward_width: int = 256
    equal_layers: bool = False
    dropout: float = 0.1
    cpc_layers: int = 1
    cpc_bias: bool = True
    cpc_steps: int = 1
    club_hidden_width: int = 64


@dataclass(frozen=True)
class MethodConfig:
    """Losses and codebook update of a method; with ModelConfig, these fields define it.

    Args:
        method: training objective, a file in unicode_fast/methods/. `preset` sets the other fields by it.
        dcid: a comparison method is trained with CLUB and Cross-CPC (DCID) of the preset.
        feature_norm: normalisation of z before the codebook: "none", or per channel by the moments of its modality in
            the "batch". The latter removes the offset between modalities.
        codebook_init: codewords start "uniform" in +-1/400, as random features of
            the "data", or as centroids of "kmeans" over the first batches.
        ema_initial_count: initial running count of every codeword.
        ema_decay: gamma of Eq. 7.
        ema_epsilon: constant of the counts' Laplace smoothing.
        ema_update: "sequential" decays once per modality (as released),
            "joint" once per batch (Eq. 7).
        ema_smoothing: "none", "transient" (only in the division) or
            "compounding" (written back to the counts, as released).
        ema_partner: vector of the other modalities in Eq. 7: "aligned" (same
            clip, same position), "attended" (softmax attention over the
            positions of the same clip) or "none" (plain EMA).
        ema_own_weight: weight of the own feature; the partners share the rest.
        unequal_lengths: modalities with different T, padding included, are an
            error ("refuse") or are compared by their "means" over time; masks
            may differ either way.
        reset_after: N_re, batches without use before a codeword is reset; 0 never resets.
        reset_unless: a codeword stays if "any" or "all" modalities used it within N_re.
        reset_source: a codeword is reset to another "codeword" in use plus noise, or to a "feature" of the batch.
        reset_noise: half width of that uniform noise.
        reset_active_within: a codeword is in use if modalities (any or all, as in
            `reset_unless`) chose it within this many batches.
        reset_ema: a reset also resets the running count and sum, so that the next update keeps the new codeword.
        reconstruction_weight: weight of the mean squared reconstruction errors.
        word_target: target of the word decoder: the "lstm" output that enters
            the encoder (as released, with gradient) or the "input" vectors.
        commitment_weight: beta of Eq. 8.
        commitment_own: factor of the distance to the own codeword.
        commitment_partner: factor of the mean distance to the partners' codewords; of their sum with method codaar.
        commitment_partners: "all" other modalities, or those with the same time
            axis ("timed"). Sentences have none: the position of a word is not a
            time in the clip.
        commitment_norm: squared errors are averaged ("mean") or added ("sum") over D.
        club_estimator: "official" (one permutation, as released),
            "closed_form" (all pairs, Eq. 5, without sampling) or "none".
        club_input: x of CLUB: the "quantised" (as released) or the "semantic" features.
        club_floor: negative estimates count as zero, because mutual information is not negative. Otherwise features
            diverge while the CLUB network lags behind.
        club_reduction: the estimate is added ("sum") or averaged ("mean") over channels.
        club_weight: weight of the CLUB estimates.
        club_inner_steps: updates of the CLUB networks per batch.
        club_learning_rate: learning rate of the CLUB networks, per update.
        cpc_weight: weight of the cross-modal terms of Cross-CPC.
        cpc_self_weight: weight of the terms within a modality, relative to the cross-modal ones.
        cpc_softmax_over: "predictions" (as released), "candidates" (Eq. 6) or "both".
        cpc_scale: scores are divided by "sqrt_width", sqrt(D), or by "one".
        cpc_temperature: additional divisor of the scores.
        cpc_earliest: smallest 0-based position at which a context may end.
        code_matching_weight: weight of the code matching loss.
        code_matching_pairing: "official" leaves the second term untransposed, "symmetric" follows the paper.
        code_matching_directions: softmax along the "rows" only, or "both".
        code_matching_temperature: divisor of the distances in the soft assignment.
        assignment_weight: weight of the assignment loss. Modalities with the same
            time axis predict, at each position, their common codeword, balanced
            over codewords.
        presence_weight: weight of the presence loss: some word of a sentence should have
            each codeword that its clip uses.
        grounding_weight: weight of the grounding losses. Words that predict the
            codewords of the other modalities share them. A linear lexicon of
            word vectors, trained at the same time, finds these words and their
            codewords.
        align_weight: weight of all terms that the method adds.
        align_temperature: divisor of cosine similarities in the method's contrastive loss; for mst its initial value.
        smit_alpha: share of the mean negative in the adaptive mean margin; 0 is InfoNCE.
        smit_margin: the margin of a softmax over columns is that of its columns ("per_direction"), or that of the rows
            ("shared").
        codis_teacher_decay: decay of the teacher's exponential moving average, per step.
        codis_epsilon: entropic regularisation of the transport plan.
        codis_iterations: Sinkhorn iterations.
        codis_gamma: temperature of the distribution over codewords.
        codis_queue: clips of former batches that the contrastive loss compares with; 0 compares within the batch.
        codis_codebook: codewords are trained by "gradient" or by "ema".
        turn_mask: share of positions that are masked and reconstructed from the other modalities' codes.
        turn_decoder: a transformer decoder over "masked" input, or "reuse" of the model's decoders, without mask.
        micu_mask: share of positions that are masked in the queries.
        micu_temperature: divisor of cosine similarities.
        jigsaw_parts: parts that a codeword is cut into; 1 leaves the jigsaw out.
        jigsaw_permutations: permutations of the parts that the jigsaw distinguishes.
        jigsaw_hidden: hidden width of the jigsaw's classifier.
        fcid_temperature: divisor of cosine similarities between clips.
        fcid_target: the target of the decoders of clips has a gradient ("moving", as released) or none ("fixed").
        hdcid_warmup: share of the run's steps before the second layer is trained.
        hdcid_weight: weight of the second layer's losses.
    """

    method: Literal[
        "uni-code", "baseline", "s-mit", "mst", "codis", "turn", "cmcm", "micu", "fcid", "codaar", "h-dcid"
    ] = "uni-code"
    dcid: bool = False
    feature_norm: Literal["none", "batch"] = "batch"

    codebook_init: Literal["uniform", "data", "kmeans"] = "data"
    ema_initial_count: float = 1.0
    ema_decay: float = 0.99
    ema_epsilon: float = 1e-5
    ema_update: Literal["joint", "sequential"] = "joint"
    ema_smoothing: Literal["none", "transient", "compounding"] = "transient"
    ema_partner: Literal["aligned", "attended", "none"] = "aligned"
    ema_own_weight: float = 0.5
    unequal_lengths: Literal["means", "refuse"] = "means"
    reset_after: int = 30
    reset_unless: Literal["any", "all"] = "any"
    reset_source: Literal["codeword", "feature"] = "feature"
    reset_noise: float = 1 / 1024
    reset_active_within: int = 100
    reset_ema: bool = True
    reconstruction_weight: float = 1.5
    word_target: Literal["lstm", "input"] = "input"
    commitment_weight: float = 0.25
    commitment_own: float = 2.0
    commitment_partner: float = 10.0
    commitment_partners: Literal["all", "timed"] = "timed"
    commitment_norm: Literal["mean", "sum"] = "mean"
    club_estimator: Literal["official", "closed_form", "none"] = "closed_form"
    club_input: Literal["quantised", "semantic"] = "semantic"
    club_floor: bool = True
    club_reduction: Literal["sum", "mean"] = "mean"
    club_weight: float = 0.1
    club_inner_steps: int = 1
    club_learning_rate: float = 1e-3
    cpc_weight: float = 1.0
    cpc_self_weight: float = 0.1
    cpc_softmax_over: Literal["predictions", "candidates", "both"] = "both"
    cpc_scale: Literal["one", "sqrt_width"] = "one"
    cpc_temperature: float = 1.0
    cpc_earliest: int = 0
    code_matching_weight: float = 0.5
    code_matching_pairing: Literal["official", "symmetric"] = "symmetric"
    code_matching_directions: Literal["rows", "both"] = "both"
    code_matching_temperature: float = 1.0
    assignment_weight: float = 1.0
    presence_weight: float = 0.0
    grounding_weight: float = 0.5
    align_weight: float = 1.0
    align_temperature: float = 0.07
    smit_alpha: float = 0.5
    smit_margin: Literal["per_direction", "shared"] = "per_direction"
    codis_teacher_decay: float = 0.995
    codis_epsilon: float = 0.05
    codis_iterations: int = 5
    codis_gamma: float = 0.1
    codis_queue: int = 0
    codis_codebook: Literal["gradient", "ema"] = "gradient"
    turn_mask: float = 0.3
    turn_decoder: Literal["masked", "reuse"] = "masked"
    micu_mask: float = 0.3
    micu_temperature: float = 0.1
    jigsaw_parts: int = 2
    jigsaw_permutations: int = 2
    jigsaw_hidden: int = 512
    fcid_temperature: float = 0.1
    fcid_target: Literal["moving", "fixed"] = "fixed"
    hdcid_warmup: float = 0.6
    hdcid_weight: float = 0.3


@dataclass(frozen=True)
class DataConfig:
    """Dataset, its modalities and splits, and the text model.

    Args:
        data: name of a built-in dataset (talking-digits, talking-digits-b, talking-digits-two or talking-numbers), the
            folder of a feature store, LAYOUT:ROOT, such as ave:/data/AVE, or webdataset:FOLDER.
        modalities: names separated by commas, or "all"; their order is that of the sequential EMA.
        easy: an easier built-in dataset for quick tests: no distractors, no shifts; talking-numbers also has one event
            per clip, no mismatches and no long tail.
        train_clips: training clips of the built-in dataset.
        val_clips: its validation clips, for choosing epochs and checkpoints.
        test_clips: its test clips, for the reported scores.
        data_seed: seed of the built-in dataset's generator.
        train_split: split for pre-training, such as "all" of vggsound-avel40k.
        text_model: BERT that encodes the sentences of a layout: a name or a folder, as transformers takes it.
        text_whitelist: file with the ids of the words to keep (the released cnt.pkl); "" keeps all.
        text_padding: the zeros after the last word of a sentence are "masked", or "read" like words (as released).
    """

    data: str = "talking-digits"
    modalities: str = "all"
    easy: bool = False
    train_clips: int = 4000
    val_clips: int = 500
    test_clips: int = 1000
    data_seed: int = 0
    train_split: str = "train"
    text_model: str = "bert-base-uncased"
    text_whitelist: str = ""
    text_padding: TextPadding = "masked"


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, precision, device, input of batches and checkpoints.

    Args:
        steps: training steps, one batch each; 0 trains for `epochs`, and a given `epochs` sets it to 0.
        epochs: passes over the training split where `steps` is 0.
        batch_size: B, clips per batch.
        keep_last_batch: the smaller last batch of an epoch is used (as released), else dropped.
        micro_batches: number of micro-batches of a batch, or of a rank's shard, of which one is in memory at a time.
            The losses still compare all clips of the batch. Each clip is encoded twice.
        activation_checkpointing: the backward pass recomputes the activations of encoders and decoders to save memory.
        learning_rate: of Adam, per step.
        warmup_steps: steps over which the learning rate rises linearly.
        schedule: "constant", "cosine" (to a hundredth), or "multistep" (halved after epochs 10, 20 and 30).
        clip_norm: largest gradient norm of each parameter group (encoders, word LSTM, Cross-CPC, decoders, lexicon).
        dtype: of features and parameters.
        precision: of the products in encoders, decoders and Cross-CPC's contexts of a float32 model in training:
            "float32", "tf32" (CUDA only) or "bfloat16". Codebook and statistics stay float32. On CUDA, products of
            losses are TF32 unless `precision` is "float32".
        channels_last: convolution weights have the memory format of their inputs, channels last.
        compile: torch.compile compiles encoders and decoders, once for all batch sizes.
        cuda_graph: a whole training step is captured once and replayed as one CUDA graph; needs one rank,
            `micro_batches` 1 and no `activation_checkpointing`.
        device: "auto" takes a GPU if there is one.
        loader: how batches reach the device: "resident" (it holds the whole training split), "prefetch", "direct" (no
            overlap) or "auto". With "prefetch" worker processes read ahead, and a thread copies during the computation.
        loader_workers: processes that read ahead; 0 reads ahead in a thread of this process.
        seed: of initial weights, order of clips, dropout, draws and probes.
        validations: number of measurements of the zero-shot accuracy on the validation split, evenly spread.
        checkpoint_seconds: longest time between two checkpoints.
        probe_tasks: tasks scored at the end of the run, separated by commas, or "none".
        rank_timeout_seconds: longest wait for another rank in a step, at least four times the second step's duration.
            After it the run of all ranks ends. Elsewhere, and in the first step, the limit is the environment
            variable UNICODE_FAST_WAIT_SECONDS (3600), and 24 times that for the tasks at the end.
    """

    steps: int = 1000
    epochs: int = 6
    batch_size: int = 80
    keep_last_batch: bool = False
    micro_batches: int = 1
    activation_checkpointing: bool = False
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    schedule: Literal["constant", "cosine", "multistep"] = "cosine"
    clip_norm: float = 0.5
    dtype: Literal["float32", "float64"] = "float32"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    device: str = "auto"
    loader: Literal["auto", "resident", "prefetch", "direct"] = "auto"
    loader_workers: int = 2
    seed: int = 0
    validations: int = 5
    checkpoint_seconds: float = 20.0
    probe_tasks: str = "classification,localisation"
    rank_timeout_seconds: float = 45.0


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run, as its folder and its checkpoints hold it."""

    preset: str = "recommended"
    size: str = "small"
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def flat(self) -> dict[str, Any]:
        """All fields in one mapping, as in a YAML file."""
        values: dict[str, Any] = {"preset": self.preset, "size": self.size}
        for section in SECTIONS:
            values.update(dataclasses.asdict(getattr(self, section)))
        return values

    def replace(self, **values: Any) -> Config:
        """A copy with fields of any section changed.

        Raises:
            ValueError: a name is no field, a value is outside its range, or other fields of the copy switch a changed
                field off. Or `method` or `dcid` changes: `preset` sets them together with the fields of the method.
            TypeError: a value has the wrong type.
        """
        copy = self.replace_all(**values)
        for name in ("method", "dcid"):
            before, value = getattr(self.method, name), getattr(copy.method, name)
            if value != before:
                raise ValueError(f"{name} must stay {before!r}, because preset(..., {name}=...) sets it, got {value!r}")
        before, after = self.flat(), copy.flat()
        for name, reason in copy.unread_fields().items():
            if after[name] != before[name]:
                raise ValueError(f"{name} {reason}, got {name} {after[name]!r} beside it")
        return copy

    def replace_all(self, **values: Any) -> Config:
        """As `replace`, but fields that others switch off may change too; for a complete set of fields."""
        sections = {section: {} for section in SECTIONS}  # type: dict[str, dict[str, Any]]
        own: dict[str, Any] = {}
        for name, value in renamed(values).items():
            if name in ("preset", "size"):
                own[name] = value
            elif name in FIELDS:
                sections[FIELDS[name]][name] = check_value(name, value)
            else:
                raise ValueError(f"configuration has no field {name!r}; fields are {', '.join(sorted(FIELDS))}")
        changed = {name: dataclasses.replace(getattr(self, name), **new) for name, new in sections.items() if new}
        return dataclasses.replace(self, **own, **changed)

    def unread_fields(self, kinds: Collection[Kind] = get_args(Kind)) -> dict[str, str]:
        """The fields that others switch off, each with the reason: "is not read where ...".

        Args:
            kinds: one for each modality.
        """
        values, unread = self.flat(), {}
        for switch, off, names in _SWITCHES:
            if values[switch] in off:
                unread.update(dict.fromkeys(names, f"is not read where {switch} is {values[switch]!r}"))
        for methods, names in _METHOD_FIELDS:
            if self.method.method not in methods:
                unread.update(dict.fromkeys(names, f"is not read where method is {self.method.method!r}"))
        if self.method.method == "codis" and self.method.codis_codebook == "gradient":
            unread.update(dict.fromkeys(_EMA_FIELDS, "is not read where codis_codebook is 'gradient'"))
        if self.train.steps:
            unread["epochs"] = f"is not read where steps is {self.train.steps}, not 0"
        for needs, names in _KIND_FIELDS:
            if not set(needs) & set(kinds):
                unread.update(dict.fromkeys(names, f"is not read where no modality is of kind {' or '.join(needs)}"))
        if sum(kind != "words" for kind in kinds) < 2:
            unread["assignment_weight"] = "is not read where fewer than two modalities have a time axis"
        return unread


# A field, those of its values that switch other fields off, and these fields.
_SWITCHES: tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...] = (
    ("grid_pooling", ("sum", "attention"), ("grid_semantic_width",)),
    ("ema_smoothing", ("none",), ("ema_epsilon",)),
    ("ema_partner", ("none",), ("ema_own_weight",)),
    ("reset_source", ("feature",), ("reset_noise", "reset_active_within")),
    (
        "reset_after",
        (0,),
        ("reset_unless", "reset_source", "reset_noise", "reset_active_within", "reset_ema"),
    ),
    ("commitment_weight", (0,), ("commitment_own", "commitment_partner", "commitment_partners", "commitment_norm")),
    ("commitment_partner", (0,), ("commitment_partners",)),
    ("club_weight", (0,), ("club_floor", "club_reduction")),
    (
        "club_estimator",
        ("none",),
        ("club_input", "club_floor", "club_reduction", "club_weight", "club_inner_steps", "club_learning_rate"),
    ),
    ("cpc_weight", (0,), ("cpc_self_weight", "cpc_softmax_over", "cpc_scale", "cpc_temperature", "cpc_earliest")),
    ("code_matching_weight", (0,), ("code_matching_pairing", "code_matching_directions", "code_matching_temperature")),
    ("turn_decoder", ("reuse",), ("turn_mask",)),
    ("jigsaw_parts", (1,), ("jigsaw_permutations", "jigsaw_hidden")),
    ("dtype", ("float64",), ("precision",)),
    ("loader", ("resident", "direct"), ("loader_workers",)),
)  # fmt: skip
# Fields of codewords that follow features by EMA.
_EMA_FIELDS = (
    "ema_partner", "ema_own_weight", "ema_update", "ema_smoothing", "ema_epsilon", "ema_initial_count", "reset_after",
    "reset_unless", "reset_source", "reset_noise", "reset_active_within", "reset_ema",
)  # fmt: skip
# Methods without parts of their own in the model.
FRAME_METHODS = ("uni-code", "baseline", "cmcm")


def _all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in get_args(get_type_hints(MethodConfig)["method"]) if name not in names)


# Methods, and the fields that only they read. Another method refuses them.
_METHOD_FIELDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_all_but("uni-code", "baseline", "cmcm", "codaar", "h-dcid"), ("align_weight",)),
    (("s-mit", "mst", "codis", "turn"), ("align_temperature",)),
    (("s-mit",), ("smit_alpha", "smit_margin")),
    (
        ("codis",),
        (
            "codis_teacher_decay", "codis_epsilon", "codis_iterations", "codis_gamma", "codis_queue", "codis_codebook",
        ),
    ),
    (("turn",), ("turn_mask", "turn_decoder")),
    (("micu",), ("micu_mask", "micu_temperature", "jigsaw_parts", "jigsaw_permutations", "jigsaw_hidden")),
    (("fcid",), ("fcid_temperature", "fcid_target")),
    (("h-dcid",), ("hdcid_warmup", "hdcid_weight")),
    (_all_but("fcid"), ("word_width", "word_target", "club_input")),
    (_all_but("codaar"), ("ema_own_weight", "ema_update", "club_estimator", "grid_club_width")),
    (_all_but("fcid", "codaar"), ("assignment_weight", "presence_weight", "grounding_weight")),
)  # fmt: skip
# The fields that Uni-Code does not read.
OTHER_METHODS_FIELDS = tuple(name for methods, names in _METHOD_FIELDS if "uni-code" not in methods for name in names)
# Kinds of modalities, and the fields that have an effect only with one of these kinds.
_KIND_FIELDS: tuple[tuple[tuple[Kind, ...], tuple[str, ...]], ...] = (
    (
        ("grid",),
        (
            "grid_hidden_width", "grid_specific_width", "grid_club_width", "grid_semantic_width", "grid_pooling",
            "squeeze_width", "residual_skip", "channels_last",
        ),
    ),
    (("vector", "words"), ("vector_specific_width",)),
    (("words",), ("word_width", "word_target", "presence_weight", "grounding_weight")),
)  # fmt: skip

SECTIONS = {"model": ModelConfig, "method": MethodConfig, "data": DataConfig, "train": TrainConfig}
FIELDS = {item.name: section for section, kind in SECTIONS.items() for item in dataclasses.fields(kind)}
_TYPES = {name: hint for kind in SECTIONS.values() for name, hint in get_type_hints(kind).items()}
# How and where a model is computed. These fields change results only by rounding and by the draws of dropout, so a run
# may resume with other values.
EXECUTION_FIELDS = (
    "micro_batches", "activation_checkpointing", "compile", "cuda_graph", "device", "loader", "loader_workers",
    "checkpoint_seconds", "rank_timeout_seconds",
)  # fmt: skip

# Where the data are. A run may resume with other values if the checksum of the data agrees.
PLACE_FIELDS = ("data", "text_model", "text_whitelist")

# Fields that files of older versions lack, each with the value that reproduces those versions. The line of a field
# stays for good. Without it, every older checkpoint and run would be refused.
ADDED_FIELDS: Mapping[str, Any] = {
    "feature_norm": "none",
    "commitment_partners": "all",
    "assignment_weight": 0.0,
    "presence_weight": 0.0,
    "grounding_weight": 0.0,
    "method": "uni-code",
    "dcid": False,
    "align_weight": 1.0,
    "align_temperature": 0.07,
    "smit_alpha": 0.5,
    "smit_margin": "per_direction",
    "codis_teacher_decay": 0.995,
    "codis_epsilon": 0.05,
    "codis_iterations": 5,
    "codis_gamma": 0.1,
    "codis_queue": 0,
    "codis_codebook": "gradient",
    "turn_mask": 0.3,
    "turn_decoder": "masked",
    "micu_mask": 0.3,
    "micu_temperature": 0.1,
    "jigsaw_parts": 2,
    "jigsaw_permutations": 2,
    "jigsaw_hidden": 512,
    "fcid_temperature": 0.1,
    "fcid_target": "moving",
    "hdcid_warmup": 0.6,
    "hdcid_weight": 0.3,
}

# Former names of fields, which configuration files, flags and saved runs may use.
RENAMED_FIELDS: Mapping[str, str] = {
    **{f"revive_{name}": f"reset_{name}" for name in ("after", "unless", "source", "noise", "active_within", "ema")},
    **{f"cmcm_{name}": f"code_matching_{name}" for name in ("weight", "pairing", "directions", "temperature")},
    **{"feed": "loader", "feed_workers": "loader_workers"},
}

# Smallest and largest value, both allowed.
RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(
        (
            "width", "vector_specific_width", "grid_hidden_width", "grid_specific_width", "grid_club_width",
            "grid_semantic_width", "squeeze_width", "temporal_heads", "feedforward_width",
            "cpc_steps", "club_hidden_width", "epochs", "train_clips", "val_clips", "test_clips",
            "micro_batches", "rank_timeout_seconds", "codis_iterations", "jigsaw_hidden",
        ),
        (1, math.inf),
    ),
    **dict.fromkeys(("codewords", "word_width", "batch_size", "jigsaw_permutations"), (2, math.inf)),
    **dict.fromkeys(
        (
            "ema_initial_count", "ema_epsilon", "reset_after", "reset_noise", "reset_active_within",
            "reconstruction_weight", "commitment_weight", "commitment_own", "commitment_partner", "club_weight",
            "club_inner_steps", "cpc_weight", "cpc_self_weight", "cpc_earliest", "code_matching_weight",
            "assignment_weight", "presence_weight", "grounding_weight", "align_weight", "codis_queue", "hdcid_weight",
            "data_seed", "steps",
            "warmup_steps", "loader_workers", "validations", "checkpoint_seconds",
        ),
        (0, math.inf),
    ),
    **dict.fromkeys(("temporal_layers", "cpc_layers"), (1, 1000)),
    "jigsaw_parts": (1, 20),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(
        (
            "ema_decay", "ema_own_weight", "dropout", "smit_alpha", "codis_teacher_decay", "turn_mask", "micu_mask",
            "hdcid_warmup",
        ),
        (0, 1),
    ),
    **dict.fromkeys(
        (
            "club_learning_rate", "cpc_temperature", "code_matching_temperature", "learning_rate", "clip_norm",
            "align_temperature", "codis_epsilon", "codis_gamma", "micu_temperature", "fcid_temperature",
        ),
        (1e-12, math.inf),
    ),
}  # fmt: skip


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping with the present names of its fields.

    Raises:
        ValueError: a field has values under both names.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        present = RENAMED_FIELDS.get(name, name)
        if present in found or (present != name and present in values):
            raise ValueError(f"{name} must not be given together with {present}, its new name, got both")
        found[present] = value
    return found


def is_whole(values: Mapping[str, Any]) -> bool:
    """Whether a flat mapping holds every field except those of ADDED_FIELDS, as the file of a run does."""
    return {"preset", "size", *FIELDS} <= {*ADDED_FIELDS, *(RENAMED_FIELDS.get(name, name) for name in values)}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the fields of ADDED_FIELDS that it lacks.

    Args:
        values: flat, as from `Config.flat`, of this version or an older one.

    Raises:
        ValueError: a field is unknown, or a field that is not in ADDED_FIELDS is missing.
    """
    values, known = renamed(values), ("preset", "size", *FIELDS)
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"configuration must hold fields of this version only, got {few(unknown)}")
    if not is_whole(values):
        missing = [name for name in known if name not in values and name not in ADDED_FIELDS]
        raise ValueError(f"configuration must hold every field except those of ADDED_FIELDS, lacks {few(missing)}")
    return {**ADDED_FIELDS, **values}


def check_value(name: str, value: Any) -> Any:
    """The value of a field; integers become float where the field is one.

    Raises:
        TypeError: the type does not fit the field.
        ValueError: the value is not among the choices or outside the range.
    """
    hint = _TYPES[name]
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(hint)))}, got {_shown(value)}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError as error:
            raise ValueError(f"{name} must be a finite number, got {_shown(value)}") from error
    if hint is bool and not isinstance(value, bool):
        raise TypeError(f"{name} must be true or false, got {type(value).__name__} {_shown(value)}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"{name} must be {hint.__name__}, got {type(value).__name__} {_shown(value)}")
    if name in RANGES:
        low, high = RANGES[name]
        if not low <= value <= high or value in (math.inf, -math.inf):
            kind = "whole number" if hint is int else "finite number"
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{name} must be a {kind} {bounds}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """A value as Python writes it, cut short; for a huge integer its size."""
    if isinstance(value, int) and abs(value) >= 1 << 128:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.100}"


def modality_names(modalities: str, available: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names in a comma-separated list.

    Args:
        modalities: the list, or "all".
        available: all names.

    Raises:
        ValueError: fewer than two names, or one of them twice.
    """
    if modalities == "all":
        return available
    names = tuple(name.strip() for name in modalities.split(",") if name.strip())
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"modalities must be 'all' or name two or more different modalities, got {modalities!r}")
    return names
