"""Entries of haihuangcode/CMG's pre-training files: their names in our model, and the shapes of unused ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unicode_fast.config import Modality

# Sizes of a shape: numbers, or names. All sizes of one name must be equal.
Shape = tuple[int | str, ...]

ENCODER = "Encoder_parameters"
WORDS = "Text_ar_lstm_parameters"
CPC = "CPC_parameters"
DECODER = "Decoder_parameters"
# All modalities of the release, in the order of its EMA, and the sets of its variants.
MODALITIES = ("audio", "video", "text")
VARIANTS = (("audio", "video"), ("audio", "text"), ("audio", "video", "text"))
OTHER_KEYS = (
    "optimizer",
    *(f"optimizer_{name}_mi_net" for name in MODALITIES),
    "epoch",
    "total_step",
)
IDLE = "Cross_quantizer.unactivated_count"

_LAYER = (
    "self_attn.in_proj_weight",
    "self_attn.in_proj_bias",
    "self_attn.out_proj.weight",
    "self_attn.out_proj.bias",
    *(f"{layer}.{kind}" for layer in ("linear1", "linear2", "norm1", "norm2") for kind in ("weight", "bias")),
)
_LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
TEMPORAL_LAYERS = 2
LSTM_LAYERS = 2
# Classes of the released classifiers, which enter no loss.
CLASSES = 141


def club_key(modality: str) -> str:
    """Key of the networks that estimate mutual information."""
    return f"{modality.title()}_mi_net_parameters"


PARAMETER_KEYS = (ENCODER, CPC, WORDS, *map(club_key, MODALITIES), DECODER)


def used_entries(modalities: Mapping[str, Modality]) -> dict[str, dict[str, str]]:
    """The names of all used entries in our model's state, by key and name in the file."""
    entries: dict[str, dict[str, str]] = {ENCODER: quantiser_entries(), CPC: {}, DECODER: {}}
    for name, modality in modalities.items():
        entries[ENCODER] |= encoder_entries(name)
        entries[CPC] |= _cpc(name, tuple(modalities))
        entries[DECODER] |= _decoder(name)
        entries[club_key(name)] = _club(name)
        if modality.kind == "words":
            entries[WORDS] = _word_lstm(name)
    return entries


def unused_entries(modalities: Sequence[str], width: int, channels: int) -> dict[str, dict[str, Shape]]:
    """Unused entries beside `templates`: attention with equal weights for all positions, idle classifiers.

    Args:
        modalities: of the file.
        width: D.
        channels: of the video grid.

    Returns:
        Shapes by key and name in the file.
    """
    encoder: dict[str, Shape] = {}
    if "video" in modalities:
        name = "video_semantic_encoder"
        for layer in ("affine_video_ave", "affine_video_self"):
            encoder |= {f"{name}.{layer}.weight": ("attention", channels), f"{name}.{layer}.bias": ("attention",)}
        encoder |= {f"{name}.ave_v_att.weight": (1, "attention"), f"{name}.ave_v_att.bias": (1,)}
    decoder: dict[str, Shape] = {}
    for modality in modalities:
        name = f"{modality}_semantic_decoder"
        decoder |= {f"{name}.linear.weight": (width, width), f"{name}.linear.bias": (width,)}
        decoder |= {f"{name}.event_classifier.weight": ("classes", width)}
        decoder |= {f"{name}.event_classifier.bias": ("classes",)}
    return {ENCODER: encoder, DECODER: decoder}


def templates(modalities: Sequence[str]) -> dict[str, str]:
    """Entries of the layer from which the transformer layers were copied, and the matching entry of the first copy."""
    return {
        f"{name}_self_att.encoder_layer.{entry}": f"{name}_self_att.encoder.layers.0.{entry}"
        for name in modalities
        for entry in _LAYER
    }


def idle_entries(key: str, width: int) -> dict[str, Shape]:
    """Entries under the key of a modality outside the file's variant, which the release saves too."""
    if key == WORDS:
        shapes: dict[str, Shape] = {}
        for suffix in _directions():
            inputs = "words" if suffix.startswith("l0") else "both"
            shapes |= {f"weight_ih_{suffix}": ("gates", inputs), f"weight_hh_{suffix}": ("gates", "hidden")}
            shapes |= {f"bias_ih_{suffix}": ("gates",), f"bias_hh_{suffix}": ("gates",)}
        return shapes
    sizes: tuple[int | str, ...] = (width, "hidden", "hidden", "hidden", "specific")
    shapes = {}
    for net in ("p_mu", "p_logvar"):
        for layer in range(4):
            name = f"{net}.{2 * layer}"
            shapes |= {f"{name}.weight": (sizes[layer + 1], sizes[layer]), f"{name}.bias": (sizes[layer + 1],)}
    return shapes


def _both(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}


def quantiser_entries() -> dict[str, str]:
    """The names of the quantiser's entries in our model's state."""
    names = {"embedding": "codebook", "ema_count": "ema_count", "ema_weight": "ema_sum", "unactivated_count": "idle"}
    return {f"Cross_quantizer.{theirs}": f"codebook.{ours}" for theirs, ours in names.items()}


def encoder_entries(name: str, layers: int = TEMPORAL_LAYERS) -> dict[str, str]:
    """The names of the entries of a modality's encoders in our model's state, with this number of temporal layers."""
    ours = f"encoders.{name}"
    entries = _both(f"{name}_self_att.affine_matrix", f"{ours}.temporal.affine")
    for layer in range(layers):
        for entry in _LAYER:
            theirs = f"{name}_self_att.encoder.layers.{layer}.{entry}"
            entries[theirs] = f"{ours}.temporal.layers.{layer}.{entry}"
    if name != "video":
        return entries | _both(f"{name.title()}_encoder.{name}_linear", f"{ours}.specific.0")
    entries["video_semantic_encoder.se_layer.0.weight"] = f"{ours}.semantic.squeeze.weight"
    entries["video_semantic_encoder.se_layer.2.weight"] = f"{ours}.semantic.excite.weight"
    for layer in (0, 2, 4):
        entries |= _both(f"Video_encoder.conv_stack.{layer}", f"{ours}.specific.convolutions.{layer}")
    entries |= _residual_block("Video_encoder.conv_stack.5", f"{ours}.specific.convolutions.5")
    for layer in (0, 2):
        entries |= _both(f"Video_encoder.feed_forward.{layer}", f"{ours}.specific.club_head.{layer}")
    return entries


def _residual_block(theirs: str, ours: str) -> dict[str, str]:
    block = f"{theirs}.stack.0.res_block"
    return {f"{block}.1.weight": f"{ours}.wide.weight", f"{block}.3.weight": f"{ours}.narrow.weight"}


def _directions() -> list[str]:
    return [f"l{layer}{direction}" for layer in range(LSTM_LAYERS) for direction in ("", "_reverse")]


def _word_lstm(name: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for suffix in _directions():
        layer, reverse = suffix[1], suffix.endswith("_reverse")
        ours = f"encoders.{name}.words.{'backward' if reverse else 'forward'}_layers.{layer}"
        entries |= {f"{weight}_{suffix}": f"{ours}.{weight}_l0" for weight in _LSTM}
    return entries


def _cpc(name: str, modalities: tuple[str, ...]) -> dict[str, str]:
    # The audio-text variant reuses the audio-video classes and saves its text under the name of their first argument.
    theirs = "video" if name == "text" and "video" not in modalities else name
    entries = {
        f"{theirs}_ar_lstm.{weight}_l{layer}": f"cpc.context.{name}.{weight}_l{layer}"
        for layer in range(LSTM_LAYERS)
        for weight in _LSTM
    }
    return entries | _both(f"{theirs}_predictors.0", f"cpc.predictors.{name}.0")


def _club(name: str) -> dict[str, str]:
    entries: dict[str, str] = {}
    for theirs, ours in (("p_mu", "mean"), ("p_logvar", "log_variance")):
        for layer in (0, 2, 4, 6):
            entries |= _both(f"{theirs}.{layer}", f"club.{name}.{ours}.{layer}")
    return entries


def _decoder(name: str) -> dict[str, str]:
    ours = f"decoders.{name}"
    entries = _both(f"{name.title()}_decoder.{name}_linear", f"{ours}.code")
    if name != "video":
        return entries | _both(f"{name.title()}_decoder.{name}_rec", f"{ours}.output")
    for layer in (0, 2, 4):
        entries |= _both(f"Video_decoder.inverse_conv_block.{layer}", f"{ours}.convolutions.{layer}")
    return entries | _residual_block("Video_decoder.inverse_conv_block.1", f"{ours}.convolutions.1")
