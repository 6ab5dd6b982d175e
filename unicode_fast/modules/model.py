"""The Uni-Code model: from features by modality to codes and reconstructions by modality."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unicode_fast.config import FRAME_METHODS, Config, MethodConfig, Modality
from unicode_fast.modules import host
from unicode_fast.modules.absent import with_a_position
from unicode_fast.modules.alignment import Alignment
from unicode_fast.modules.club import ClubNetwork
from unicode_fast.modules.codebook import Codebook, straight_through
from unicode_fast.modules.cpc import CrossCPC
from unicode_fast.modules.decoders import make_decoder
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.modules.feature_norm import FeatureNorm, Moments
from unicode_fast.modules.lexicon import Lexicon
from unicode_fast.modules.precision import autocast_context
from unicode_fast.ops import BatchShard, EmaConfig


class Encoded(NamedTuple):
    """The codes of one modality: index (B, T) int64 and vector (B, T, D), the codewords."""

    index: Tensor  # type: ignore[assignment]
    vector: Tensor


class EncodedClip(NamedTuple):
    """The codes of one window of a file.

    Attributes:
        start_s: its beginning in seconds of the file; step t is the second from start_s + t on.
        codes: by modality, index (T,) and vector (T, D); a modality that the file lacks is missing. T is at most ten,
            of captions the number of words.
    """

    start_s: float
    codes: dict[str, Encoded]


class Specific(NamedTuple):
    """The modality-specific features of one modality.

    specific: input of the decoder, with the codeword; club: (B, T, Y), their form for CLUB; target: of the decoder;
    more: (B, T, ...) features that only the losses of some methods read, of the whole batch.
    """

    specific: Tensor
    club: Tensor
    target: Tensor
    more: tuple[Tensor, ...] = ()


class CodebookBatch(NamedTuple):
    """What a codebook is initialised and updated with, by modality: features (B, T, D), codes and mask (B, T)."""

    features: dict[str, Tensor]
    index: dict[str, Tensor]  # type: ignore[assignment]
    mask: dict[str, Tensor] | None


@dataclass(frozen=True)
class ModelOutput:
    """Inputs of the losses and of the codebook update, by modality.

    Attributes:
        mask: (B, T) bool, or None where every position is valid. A clip without a valid position lacks the modality.
        semantic: z, (B, T, D).
        club: the specific features for CLUB, (B, T, Y).
        index: (B, T).
        codeword: (B, T, D), without gradient.
        quantised: (B, T, D), with the straight-through gradient.
        decoded: in the shape of the input, or of the LSTM output for words; its dtype may be that of `precision`.
        specific: input of the decoders beside the quantised vectors.
        target: of the reconstruction, in the shape of `decoded`.
        moments: of z before its normalisation, with `feature_norm` "batch".
        words: input word vectors of sentences, (B, T, E), where there is a lexicon.
        more: as in `Specific`.
        observed: what the method's `Alignment.observe` gives, such as a teacher's features.
        levels: outputs of further levels by name, in models that have them.
        clips: these clips in the batch.
    """

    mask: dict[str, Tensor] | None
    semantic: dict[str, Tensor] = field(default_factory=dict)
    club: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)
    codeword: dict[str, Tensor] = field(default_factory=dict)
    quantised: dict[str, Tensor] = field(default_factory=dict)
    decoded: dict[str, Tensor] = field(default_factory=dict)
    specific: dict[str, Tensor] = field(default_factory=dict)
    target: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    words: dict[str, Tensor] = field(default_factory=dict)
    more: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    observed: dict[str, Tensor] = field(default_factory=dict)
    levels: dict[str, ModelOutput] = field(default_factory=dict)
    clips: slice = field(default_factory=lambda: slice(None))


class UniCode(nn.Module):
    """Encoders, decoders, shared codebook, Cross-CPC and CLUB networks of any two or more modalities.

    `unicode_fast.make_model` makes the model of any method.

    Args:
        modalities: kind and shape by name; their order is that of the sequential EMA.
        config: a complete configuration, usually from `preset`.
        alignment: what the method adds; None adds nothing.

    Attributes:
        trained_on: digest of the training data of a model from a checkpoint, if known.
        preprocessor: how the features of its training data were computed from media, in the form of
            `media.Preprocessor.as_dict`; None if unknown.

    Raises:
        ValueError: fewer than two modalities, sizes that do not fit together, or a method that needs another model.
        TypeError: a modality is no Modality, or `config` no Config.
    """

    def __init__(
        self, modalities: Mapping[str, Modality], config: Config, alignment: type[Alignment] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(modalities, Mapping):
            raise TypeError(f"modalities must be a mapping from names to Modality, got {type(modalities).__name__}")
        if not isinstance(config, Config):
            raise TypeError(f"config must be a Config, such as preset gives, got {type(config).__name__}")
        if type(self) is UniCode and alignment is None and config.method.method not in FRAME_METHODS:
            raise ValueError(
                f"config must be of a method that needs no more than a UniCode, got method {config.method.method!r}; "
                "unicode_fast.make_model makes its model"
            )
        if len(modalities) < 2:
            raise ValueError(f"modalities must name at least two, got {list(modalities)}")
        for name, modality in modalities.items():
            if not isinstance(modality, Modality):
                raise TypeError(f"modality {name!r} must be a Modality, got {type(modality).__name__}")
            if (
                not isinstance(name, str)
                or not name.isidentifier()
                or hasattr(nn.ModuleDict, name)
                or name == "training"
            ):
                raise ValueError(
                    f"modalities must have names of letters, digits and underscores that torch does not use itself, "
                    f"got {name!r}"
                )
        self.modalities = dict(modalities)
        self.names = tuple(modalities)
        self.config = config
        self.trained_on: str | None = None
        self.preprocessor: dict[str, Any] | None = None
        self.build()
        self.alignment = (alignment or Alignment)(modalities, config)
        self.alignment.attach(self)
        self.to(getattr(torch, config.train.dtype))
        # The tensors in a file of this configuration; modules may be exchanged later.
        self.shapes = {name: value.shape for name, value in self.state_dict().items()}

    def build(self) -> None:
        """Makes the modules; a model with others overrides it."""
        modalities, config = self.modalities, self.config
        sizes, method = config.model, config.method
        self.encoders = nn.ModuleDict({name: ModalityEncoder(kind, sizes) for name, kind in modalities.items()})
        self.decoders = nn.ModuleDict(
            {name: make_decoder(kind, sizes, word_target=method.word_target) for name, kind in modalities.items()}
        )
        self.norms = nn.ModuleDict(
            {name: FeatureNorm(sizes.width) for name in modalities} if method.feature_norm == "batch" else {}
        )
        self.codebook = Codebook(
            self.names,
            sizes.codewords,
            sizes.width,
            update_rule(method, config.train.seed),
            partner="attended" if method.ema_partner == "attended" else "aligned",
            initial_count=method.ema_initial_count,
        )
        self.cpc = CrossCPC(self.names, sizes, method, config.train)
        self.club = nn.ModuleDict(
            {
                name: ClubNetwork(
                    sizes.width,
                    sizes.grid_club_width if kind.kind == "grid" else sizes.vector_specific_width,
                    sizes.club_hidden_width,
                )
                for name, kind in modalities.items()
            }
        )
        words = [name for name, modality in modalities.items() if modality.kind == "words"]
        grounded = words if method.grounding_weight and len(words) < len(modalities) else []
        self.lexicon = nn.ModuleDict({name: Lexicon(modalities[name].shape[-1], sizes.codewords) for name in grounded})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of features, parameters and codewords."""
        return self.codebook.codebook.dtype

    def _encoder(self, name: str) -> ModalityEncoder:
        return cast(ModalityEncoder, self.encoders[name])

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.codebook.codebook.device

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """M, the size of the codebook; several sizes where a code is a tuple of choices, the first counted highest."""
        return (self.config.model.codewords,)

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """(M, D) each, whose codewords a vector of `encode` joins."""
        return (self.codebook.codebook,)

    @property
    def codewords(self) -> int:
        """The number of different codes: the product of `code_sizes`."""
        return math.prod(self.code_sizes)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of the main optimiser, in the groups whose gradients are clipped together."""
        named = [(name.split(".")[1], parameter) for name, parameter in self.encoders.named_parameters()]
        groups = {
            "words": [parameter for module, parameter in named if module == "words"],
            "encoders": [parameter for module, parameter in named if module != "words"],
            "cpc": list(self.cpc.parameters()),
            "decoders": list(self.decoders.parameters()),
            "lexicon": list(self.lexicon.parameters()),
            "alignment": [parameter for parameter in self.alignment.parameters() if parameter.requires_grad],
        }
        return {name: parameters for name, parameters in groups.items() if parameters}

    def club_parameters(self) -> list[nn.Parameter]:
        """The parameters of the optimiser of CLUB networks."""
        return list(self.club.parameters())

    def begin(self, steps: int) -> None:
        """Takes the number of steps of a run, new or resumed; a model with a schedule overrides it."""

    def forward(self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None) -> ModelOutput:
        """Encodes, quantises and decodes a batch; no buffer changes.

        Args:
            features: (B, T, ...) by modality, in the model's dtype and on its device.
            mask: (B, T) bool by modality, valid positions first; None where every position is valid. A clip without
                a valid position lacks the modality: its features may hold anything.

        Raises:
            ValueError: a modality is missing or unknown, or a shape does not fit.
            TypeError: a dtype is not the model's.
        """
        self.check(features, mask)
        output = ModelOutput(None if mask is None else dict(mask), words=self.words(features, mask))
        for name in self.names:
            valid = None if mask is None else mask[name]
            z, own = self.encode_features(name, features[name], valid)
            output.semantic[name] = self.normalise(name, z, output)
            output.specific[name], output.club[name], output.target[name], output.more[name] = own
            if self.alignment.observes:
                output.observed[name] = self.observe(name, features[name], valid)
        self.quantise(output)
        for name, vector in self.decoder_inputs(output.semantic, output, output.clips).items():
            output.decoded[name] = self.decode_vectors(name, vector, output.specific[name])
        self.decode_levels(output, output)
        return output

    @torch.no_grad()
    def observe(self, name: str, features: Tensor, mask: Tensor | None) -> Tensor:
        """What the method observes of one modality's clips, (B, ...)."""
        return self.alignment.observe(self, name, *as_read(features, mask))

    def decoder_inputs(self, vectors: Mapping[str, Tensor], whole: ModelOutput, clips: slice) -> dict[str, Tensor]:
        """What the decoders of some clips read beside specific features, by modality.

        Args:
            vectors: semantic features of the clips, (b, T, D) by modality.
            whole: the output of the whole batch.
            clips: the clips in it.
        """
        return {name: straight_through(z, whole.codeword[name][clips]) for name, z in vectors.items()}

    def decode_levels(self, output: ModelOutput, whole: ModelOutput) -> None:
        """Decodes further levels of the clips in `output`, in models that have them."""

    def codebook_batch(self, output: ModelOutput) -> CodebookBatch:
        """What the codebook is initialised and updated with."""
        return CodebookBatch(output.semantic, output.index, output.mask)

    def quantise(self, output: ModelOutput) -> None:
        """Adds the nearest codewords of the semantic features to `output`."""
        for name, found in self.codebook.quantise(output.semantic).items():
            output.index[name], output.codeword[name], output.quantised[name] = found

    def words(self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Input of the lexicons, by modality."""
        return {name: _without_padding(features[name], None if mask is None else mask[name]) for name in self.lexicon}

    def encode_features(self, name: str, features: Tensor, mask: Tensor | None) -> tuple[Tensor, Specific]:
        """Semantic features before their normalisation, (B, T, D), and specific ones; arguments are not checked."""
        return self._with_checkpoint(self._encode, name, features, mask)

    def encode_semantic(self, name: str, features: Tensor, mask: Tensor | None) -> Tensor:
        """The first result of `encode_features`, with the same dropout."""
        return self._with_checkpoint(self._encode, name, features, mask, True, False)[0]

    def encode_specific(self, name: str, features: Tensor, mask: Tensor | None) -> Specific:
        """The second result of `encode_features`, which has no dropout."""
        return self._with_checkpoint(self._encode, name, features, mask, False, True)[1]

    def normalise(self, name: str, z: Tensor, output: ModelOutput) -> Tensor:
        """Features for the codebook, (B, T, D): z, in training normalised by its moments, which `output` keeps."""
        if not self.norms:
            return z
        norm = self._norm(name)
        if not self.training:
            return norm.by_running_moments(z)
        normalised, output.moments[name] = norm(z, None if output.mask is None else output.mask[name])
        return normalised

    def _norm(self, name: str) -> FeatureNorm:
        return cast(FeatureNorm, self.norms[name])

    def decode_vectors(self, name: str, vector: Tensor, specific: Tensor) -> Tensor:
        """Reconstruction of one modality from its quantised vectors, (B, T, D), and specific features."""
        return self._with_checkpoint(self._decode, name, vector, specific)

    def _encode(
        self, name: str, features: Tensor, mask: Tensor | None, semantic: bool = True, specific: bool = True
    ) -> tuple[Tensor | None, Specific | None]:
        """Semantic and specific features of one modality, or one of the two."""
        given, mask = as_read(features, mask)
        encoder, z, own = self._encoder(name), None, None
        with autocast_context(self.config.train, self.device):
            read = encoder.read_words(given, mask)
            if semantic:
                z = encoder.encode_semantic(read, mask).to(self.dtype)
            if specific:
                decoder_input, club = encoder.encode_specific(read, mask)
                target = read if self.config.method.word_target == "lstm" else given
                own = Specific(decoder_input, club.to(self.dtype), target.to(self.dtype))
        return z, own

    def _decode(self, name: str, vector: Tensor, specific: Tensor) -> Tensor:
        with autocast_context(self.config.train, self.device):
            decoded: Tensor = self.decoders[name](vector, specific)
        return decoded

    def _with_checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """The function's result; with `activation_checkpointing` the backward pass recomputes its activations."""
        if self.config.train.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def initialise_codebook(self, rows: Sequence[Mapping[str, Tensor]], choose: Callable[[Tensor], Tensor]) -> None:
        """Sets the first codewords of a run.

        Args:
            rows: features of some batches, (N, D) by the modalities of `codebook_batch`.
            choose: chooses codewords, (M, D), from features, (N, D).
        """
        self.codebook.initialise(choose(torch.cat([one for batch in rows for one in batch.values()])))

    @torch.no_grad()
    def update_codebook(self, output: ModelOutput, own: slice | None = None) -> None:
        """The MM-EMA update with the output of a batch; once per training step, after the backward pass.

        It also updates the running moments of the feature normalisation, and teachers and queues of the method.

        Args:
            output: of the whole batch.
            own: the clips of this rank, where ranks share the batch; each rank counts its own codes.
        """
        for name, moments in output.moments.items():
            self._norm(name).update(moments, None if output.mask is None else output.mask[name].any())
        if self.alignment.trains_codebook:
            self.codebook.step += 1
        else:
            self.update_codewords(output, own)
        self.alignment.after_step(self, output)

    def update_codewords(self, output: ModelOutput, own: slice | None) -> None:
        """The MM-EMA update of `update_codebook`."""
        (semantic, index, mask), shard = self.codebook_batch(output), None
        absent = None if mask is None else torch.stack([~mask[name].any() for name in self.codebook.names])
        if own is not None:
            clips, lengths = len(semantic[self.names[0]]), [semantic[name].shape[1] for name in self.names]
            shard = BatchShard([own.start * length for length in lengths], [clips * length for length in lengths])
            semantic, index = ({name: x[own] for name, x in values.items()} for values in (semantic, index))
            mask = None if mask is None else {name: valid[own] for name, valid in mask.items()}
        self.codebook.update(semantic, index, mask, shard=shard, absent=absent)

    @torch.no_grad()
    def encode(
        self,
        name: str,
        features: Tensor,
        mask: Tensor | None = None,
        *,
        check_values: bool = True,
        dropout: bool = False,
    ) -> Encoded:
        """Codes of one modality alone, as in evaluation mode, whatever mode the model is in.

        torch.compile compiles it into one graph; for "words", which have LSTMs, only with
        `torch._dynamo.config.allow_rnn = True`.

        Args:
            name: a modality of the model.
            features: (B, T, ...) in the model's dtype and on its device.
            mask: (B, T) bool, valid positions first; None where every position is valid.
            check_values: NaN, Inf and gaps in the mask raise an error; the check waits for the device. A compiled
                graph has no check, because it cannot raise.
            dropout: dropout in the encoder, as in training; the released probes have it.

        Raises:
            ValueError: the modality is unknown, a shape does not fit, the batch is empty, or a value is not finite.
            TypeError: the dtype is not the model's.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        self._check_one(name, features, mask)
        if check_values and not torch.compiler.is_compiling():
            finite = torch.isfinite(_without_padding(features, mask))
            if not finite.all():
                clip = int((~finite).flatten(1).any(1).nonzero()[0, 0])
                raise ValueError(f"features of {name!r} must be finite, got NaN or Inf in clip {clip} of the batch")
            if mask is not None:
                check_prefix(name, mask)
        encoder = self._encoder(name)
        with in_mode(encoder, dropout):
            read = encoder.read_words(_without_padding(features, mask), mask)
            z = encoder.encode_semantic(read, mask)
        z = self._norm(name).by_running_moments(z) if self.norms else z
        quantised = self.codebook.quantise({name: self.code_features(name, z, mask)})[name]
        return Encoded(quantised.index, quantised.codeword)

    def code_features(self, name: str, z: Tensor, mask: Tensor | None) -> Tensor:
        """The features whose nearest codewords `encode` gives, (B, T, D): z."""
        return z

    def encode_clip(self, name: str, features: Tensor) -> Encoded:
        """Codes of one clip by itself: the same bits whatever else is encoded, and however its batch is padded.

        `encode` rounds sums differently in batches of other sizes, so that a near tie of two codewords may fall
        otherwise. Here a clip is always computed alone, without padding and on one thread.

        Args:
            name: a modality of the model.
            features: (T, ...), valid positions only, in the model's dtype and on its device.

        Returns:
            index (T,) and vector (T, D).

        Raises:
            ValueError: as `encode`.
            TypeError: as `encode`.
        """
        if not isinstance(features, Tensor):
            raise TypeError(f"features of {name!r} must be a Tensor, got {type(features).__name__}")
        with one_thread():
            # A copy: the bits of a product may depend on the alignment of its operands.
            found = self.encode(name, features.unsqueeze(0).clone(memory_format=torch.contiguous_format))
        return Encoded(found.index[0], found.vector[0])

    def encode_file(self, file: str | os.PathLike[str], caption: str | None = None) -> list[EncodedClip]:
        """Codes of a media file, with the backbones that computed the features of the model's training data.

        Args:
            file: video, sound or a picture.
            caption: words of the file; None or empty for none.

        Returns:
            The codes of each window of ten seconds, of each modality by `encode_clip`.

        Raises:
            ValueError: the model has no preprocessor, or a backbone differs from that of the training.
            FileNotFoundError: there is no such file.
            MediaError: it cannot be decoded.
            MissingPackageError: a package is not installed.
        """
        # Imported here because media and codes are above the modules.
        from unicode_fast.codes.files import encode_file

        return encode_file(self, file, caption)

    def vectors(self, codes: Tensor) -> Tensor:
        """Vectors of codes, the same as those that `encode` returns with them.

        Args:
            codes: (...) int64 in [0, `codewords`), on the model's device.

        Returns:
            (..., D), of the codebook's dtype; codewords of several codebooks are joined.

        Raises:
            TypeError: the codes are no int64 Tensor.
            ValueError: a code is out of range, or they are on another device.
        """
        parts = self.choices(codes).unbind(-1)
        books = self.codebooks
        chosen = parts if len(parts) > 1 else parts * len(books)
        return torch.cat([book[part] for book, part in zip(books, chosen, strict=True)], -1)

    def choices(self, codes: Tensor) -> Tensor:
        """The choice of a code in each codebook, (..., len(`code_sizes`)) int64; arguments and errors of `vectors`."""
        if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
            raise TypeError(f"codes must be an int64 Tensor, got {getattr(codes, 'dtype', type(codes).__name__)}")
        if codes.device != self.device:
            raise ValueError(f"codes must be on {self.device} as the model is, got {codes.device}")
        wrong = codes[(codes < 0) | (codes >= self.codewords)]
        if wrong.numel():
            raise ValueError(f"codes must be in [0, {self.codewords}), got {int(wrong[0])}")
        parts = []
        for size in reversed(self.code_sizes):
            parts.append(codes % size)
            codes = codes // size
        return torch.stack(parts[::-1], -1)

    @torch.no_grad()
    def decode(
        self, name: str, codes: Tensor, like: Tensor | Mapping[str, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """Features of a modality from codes, with the modality-specific features of a clip that it shall be like.

        The codes may be those of the clip, of another clip, or of another modality.

        Args:
            name: a modality of the model.
            codes: (B, T) int64.
            like: (B, T, ...) features of that modality, or a mapping with them.
            mask: (B, T) bool, valid positions of `like` first; None where every position is valid.

        Returns:
            (B, T, ...) in the shape of the features; of words with `word_target` "lstm" the output of their LSTM.

        Raises:
            ValueError: the modality is unknown or has no decoder of codes, a code is out of range, or a shape does not
                fit.
            TypeError: a dtype does not fit.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        if isinstance(like, Mapping) and name not in like:
            raise ValueError(f"like must have features of {name!r}, got {', '.join(map(str, like)) or 'none'}")
        features = like[name] if isinstance(like, Mapping) else like
        self._check_one(name, features, mask)
        vector = self.decoder_vectors(name, codes)
        if codes.shape != features.shape[:2]:
            raise ValueError(f"codes must have the shape {tuple(features.shape[:2])} of like, got {tuple(codes.shape)}")
        if mask is not None:
            check_prefix(name, mask)
        with in_mode(self._encoder(name), training=False):
            specific = self.encode_specific(name, features, mask).specific
        return self.decode_vectors(name, vector, specific).to(self.dtype)

    def decoder_vectors(self, name: str, codes: Tensor) -> Tensor:
        """What the decoder of a modality reads of codes, (..., D); a model whose decoder reads others overrides it."""
        return self.vectors(codes)

    def check(self, features: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None) -> None:
        """Raises the errors of `forward` about names, shapes, dtypes and devices of a batch; reads no values."""
        for given, what in ((features, "features"), (mask, "mask")):
            if given is None and what == "mask":
                continue
            if not isinstance(given, Mapping):
                raise TypeError(f"{what} must be a mapping from modalities to tensors, got {type(given).__name__}")
            if set(given) != set(self.names):
                raise ValueError(
                    f"{what} must hold the modalities {', '.join(self.names)}, got {', '.join(map(str, given))}"
                )
        for name in self.names:
            self._check_one(name, features[name], None if mask is None else mask[name])
        sizes = {name: features[name].shape[0] for name in self.names}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"features must hold the same clips in every modality, got batch sizes {sizes}")
        lengths = {name: features[name].shape[1] for name in self.names}
        if self.config.method.unequal_lengths == "refuse" and len(set(lengths.values())) > 1:
            raise ValueError(
                "features must have the same T in every modality under unequal_lengths='refuse' "
                f"(preset official), got {lengths}"
            )

    def _check_one(self, name: str, features: Tensor, mask: Tensor | None) -> None:
        shape = self.modalities[name].shape
        if not isinstance(features, Tensor):
            raise TypeError(f"features of {name!r} must be a Tensor, got {type(features).__name__}")
        if features.dim() != 2 + len(shape) or tuple(features.shape[2:]) != shape:
            expected = ", ".join(map(str, ("B", "T", *shape)))
            raise ValueError(f"features of {name!r} must have shape ({expected}), got {tuple(features.shape)}")
        if 0 in features.shape[:2]:
            raise ValueError(f"features of {name!r} must have B and T of at least 1, got {tuple(features.shape)}")
        if features.dtype != self.dtype:
            raise TypeError(f"features of {name!r} must be {self.dtype} as the model is, got {features.dtype}")
        if features.device != self.device:
            raise ValueError(f"features of {name!r} must be on {self.device} as the model is, got {features.device}")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask of {name!r} must be bool, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.shape != features.shape[:2] or mask.device != features.device:
            raise ValueError(
                f"mask of {name!r} must have shape {tuple(features.shape[:2])} on {features.device}, "
                f"got {tuple(mask.shape)} on {mask.device}"
            )


def update_rule(method: MethodConfig, seed: int) -> EmaConfig:
    """The update rule of the codebook from a configuration."""
    return EmaConfig(
        decay=method.ema_decay,
        epsilon=method.ema_epsilon,
        own_weight=1.0 if method.ema_partner == "none" else method.ema_own_weight,
        update=method.ema_update,
        smoothing=method.ema_smoothing,
        reset_after=method.reset_after,
        reset_unless=method.reset_unless,
        reset_source=method.reset_source,
        reset_noise=method.reset_noise,
        reset_active_within=method.reset_active_within,
        reset_ema=method.reset_ema,
        seed=seed,
    )


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Puts a module and its submodules into training or evaluation mode, and restores the mode of each."""
    others = [child for child in module.modules() if child.training != training]
    for child in others:
        child.training = training
    try:
        yield
    finally:
        for child in others:
            child.training = not training


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch's operations inside on one thread; on a CPU their bits then do not depend on the number of cores.

    Small products on one thread are faster too: a second thread costs more time than it saves, several times more on
    busy cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def as_read(features: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Features with zeros as padding, and the mask of an encoder; on a CPU None where every position is valid."""
    features = _without_padding(features, mask)
    if mask is None or (host.is_on_host(mask) and mask.all()):
        return features, None
    return features, with_a_position(mask)


def _without_padding(features: Tensor, mask: Tensor | None) -> Tensor:
    """Features with zeros at padded positions."""
    if mask is None:
        return features
    return torch.where(mask.view(*mask.shape, *[1] * (features.dim() - 2)), features, 0)


def check_prefix(name: str, mask: Tensor) -> None:
    """Checks that each clip has a valid position, and no padding before it.

    Raises:
        ValueError: a clip has no valid position, or a gap.
    """
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError(f"mask of {name!r} must mark at least one position of each clip, valid positions first")
