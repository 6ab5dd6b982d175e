"""Names, shapes and random contents of a checkpoint as the released Uni-Code pre-training writes it, and inputs for it.

Everything here is NumPy and nothing is taken from the package, so that the package can be checked against it.
The entries and their shapes are those of haihuangcode/CMG; `Widths` shrinks them for quick tests, the names stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = np.ndarray
Shapes = dict[str, tuple[int, ...]]
State = dict[str, Array]

# In the order in which the quantiser updates the codebook.
MODALITIES = {"AV": ("audio", "video"), "AT": ("audio", "text"), "AVT": ("audio", "video", "text")}
GRID = 7
MAP = 3
EPSILON = 1e-8
IDLE_LIMIT = 300


@dataclass(frozen=True)
class Widths:
    """Every width of the released model; the defaults are the released ones."""

    audio: int = 128
    video: int = 512
    words: int = 768
    text_direction: int = 128
    audio_specific: int = 256
    text_specific: int = 256
    video_first: int = 1024
    video_map: int = 2048
    club_hidden: int = 1024
    club_feature: int = 512
    squeeze: int = 64
    spatial_attention: int = 256
    width: int = 256
    feed_forward: int = 1024
    codewords: int = 400
    context: int = 256
    mi_hidden: int = 128
    decoder_first: int = 1024
    decoder_second: int = 512
    classes: int = 141

    @property
    def text(self) -> int:
        """Width of the text sequence: both directions of the LSTM."""
        return 2 * self.text_direction

    def specific(self, modality: str) -> int:
        """Width of the specific feature that the mutual information of a modality is estimated with."""
        return {"audio": self.audio_specific, "video": self.club_feature, "text": self.text_specific}[modality]


SMALL = Widths(
    audio=6,
    video=10,
    words=11,
    text_direction=7,
    audio_specific=9,
    text_specific=13,
    video_first=12,
    video_map=15,
    club_hidden=14,
    club_feature=17,
    squeeze=4,
    spatial_attention=5,
    width=16,
    feed_forward=24,
    codewords=19,
    context=18,
    mi_hidden=8,
    decoder_first=20,
    decoder_second=21,
    classes=3,
)

# The same with the widths equal that are equal in the release and one number in our configuration.
TIED = replace(
    SMALL,
    text_specific=SMALL.audio_specific,
    club_hidden=2 * SMALL.club_feature,
    context=SMALL.width,
    decoder_first=SMALL.video_first,
    decoder_second=SMALL.video,
)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _convolution(name: str, shape: tuple[int, int, int], *, transposed: bool = False) -> Shapes:
    first, second, kernel = shape
    return {
        f"{name}.weight": (first, second, kernel, kernel),
        f"{name}.bias": (second if transposed else first,),
    }


def _residual_stack(name: str, width: int) -> Shapes:
    block = f"{name}.stack.0.res_block"
    return {f"{block}.1.weight": (width, width, 3, 3), f"{block}.3.weight": (width, width, 1, 1)}


def _lstm_layer(sizes: tuple[int, int], suffix: str, prefix: str = "") -> Shapes:
    inputs, hidden = sizes
    shapes: Shapes = {"weight_ih": (4 * hidden, inputs), "weight_hh": (4 * hidden, hidden)}
    shapes |= {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
    return {f"{prefix}{name}_{suffix}": shape for name, shape in shapes.items()}


def _transformer_layer(name: str, width: int, feed_forward: int) -> Shapes:
    return {
        f"{name}.self_attn.in_proj_weight": (3 * width, width),
        f"{name}.self_attn.in_proj_bias": (3 * width,),
        **_linear(f"{name}.self_attn.out_proj", width, width),
        **_linear(f"{name}.linear1", feed_forward, width),
        **_linear(f"{name}.linear2", width, feed_forward),
        **{f"{name}.norm{number}.{kind}": (width,) for number in (1, 2) for kind in ("weight", "bias")},
    }


def _temporal_relation(modality: str, inputs: int, widths: Widths) -> Shapes:
    shapes: Shapes = {}
    # The template that both layers were copied from stays registered and is never used.
    for layer in ("encoder_layer", "encoder.layers.0", "encoder.layers.1"):
        shapes |= _transformer_layer(f"{modality}_self_att.{layer}", widths.width, widths.feed_forward)
    return shapes | _linear(f"{modality}_self_att.affine_matrix", widths.width, inputs)


def _video_encoder(widths: Widths) -> Shapes:
    name = "Video_encoder"
    return {
        **_convolution(f"{name}.conv_stack.0", (widths.video_first, widths.video, 3)),
        **_convolution(f"{name}.conv_stack.2", (widths.video_map, widths.video_first, 3)),
        **_convolution(f"{name}.conv_stack.4", (widths.video_map, widths.video_map, 1)),
        **_residual_stack(f"{name}.conv_stack.5", widths.video_map),
        **_linear(f"{name}.feed_forward.0", widths.club_hidden, widths.video_map),
        **_linear(f"{name}.feed_forward.2", widths.club_feature, widths.club_hidden),
    }


def _video_semantic_encoder(widths: Widths) -> Shapes:
    name = "video_semantic_encoder"
    return {
        f"{name}.se_layer.0.weight": (widths.squeeze, widths.video),
        f"{name}.se_layer.2.weight": (widths.video, widths.squeeze),
        **_linear(f"{name}.affine_video_ave", widths.spatial_attention, widths.video),
        **_linear(f"{name}.affine_video_self", widths.spatial_attention, widths.video),
        **_linear(f"{name}.ave_v_att", 1, widths.spatial_attention),
    }


def encoder_shapes(variant: str, widths: Widths = Widths()) -> Shapes:
    """Entries of `Encoder_parameters`: 102 for AV, 84 for AT, 142 for AVT."""
    modalities = MODALITIES[variant]
    shapes: Shapes = _video_encoder(widths) if "video" in modalities else {}
    shapes |= _linear("Audio_encoder.audio_linear", widths.audio_specific, widths.audio)
    if "text" in modalities:
        shapes |= _linear("Text_encoder.text_linear", widths.text_specific, widths.text)
    vectors, counts = (widths.codewords, widths.width), (widths.codewords,)
    buffers: Shapes = {"embedding": vectors, "ema_count": counts, "ema_weight": vectors, "unactivated_count": counts}
    shapes |= {f"Cross_quantizer.{name}": shape for name, shape in buffers.items()}
    if "video" in modalities:
        shapes |= _video_semantic_encoder(widths)
    inputs = {"video": widths.video, "text": widths.text, "audio": widths.audio}
    for modality, width in inputs.items():
        if modality in modalities:
            shapes |= _temporal_relation(modality, width, widths)
    return shapes


def text_lstm_shapes(widths: Widths = Widths()) -> Shapes:
    """Entries of `Text_ar_lstm_parameters`: 16."""
    shapes: Shapes = {}
    for layer, inputs in enumerate((widths.words, widths.text)):
        for suffix in (f"l{layer}", f"l{layer}_reverse"):
            shapes |= _lstm_layer((inputs, widths.text_direction), suffix)
    return shapes


def cpc_name(variant: str, modality: str) -> str:
    """Modality name in `CPC_parameters`: the audio-text run files its text under the name of the first argument."""
    return "video" if variant == "AT" and modality == "text" else modality


def cpc_shapes(variant: str, widths: Widths = Widths()) -> Shapes:
    """Entries of `CPC_parameters`: 30 for AVT, else 20."""
    names = [name for name in ("video", "audio", "text") if name in {cpc_name(variant, m) for m in MODALITIES[variant]}]
    shapes: Shapes = {}
    for name in names:
        for layer, inputs in enumerate((widths.width, widths.context)):
            shapes |= _lstm_layer((inputs, widths.context), f"l{layer}", f"{name}_ar_lstm.")
    for name in names:
        shapes |= _linear(f"{name}_predictors.0", widths.width, widths.context)
    return shapes


def mi_shapes(modality: str, widths: Widths = Widths()) -> Shapes:
    """Entries of `Audio_mi_net_parameters` and its like: 16."""
    sizes = (widths.width, widths.mi_hidden, widths.mi_hidden, widths.mi_hidden, widths.specific(modality))
    shapes: Shapes = {}
    for net in ("p_mu", "p_logvar"):
        for layer in range(4):
            shapes |= _linear(f"{net}.{2 * layer}", sizes[layer + 1], sizes[layer])
    return shapes


def _video_decoder(widths: Widths) -> Shapes:
    name, first, second = "Video_decoder.inverse_conv_block", widths.decoder_first, widths.decoder_second
    joined = widths.width + widths.video_map
    return {
        **_convolution(f"{name}.0", (joined, first, 3), transposed=True),
        **_residual_stack(f"{name}.1", first),
        **_convolution(f"{name}.2", (first, second, 3), transposed=True),
        **_convolution(f"{name}.4", (second, widths.video, 1), transposed=True),
        **_linear("Video_decoder.video_linear", widths.width, widths.width),
    }


def decoder_shapes(variant: str, widths: Widths = Widths()) -> Shapes:
    """Entries of `Decoder_parameters`: 22 for AV, 16 for AT, 30 for AVT."""
    modalities = MODALITIES[variant]
    shapes: Shapes = _video_decoder(widths) if "video" in modalities else {}
    for modality, size in (("audio", widths.audio), ("text", widths.text)):
        if modality in modalities:
            name, joined = f"{modality.title()}_decoder.{modality}", widths.width + widths.specific(modality)
            shapes |= _linear(f"{name}_rec", size, joined) | _linear(f"{name}_linear", widths.width, widths.width)
    for modality in ("video", "text", "audio"):
        if modality in modalities:
            name = f"{modality}_semantic_decoder"
            shapes |= _linear(f"{name}.linear", widths.width, widths.width)
            shapes |= _linear(f"{name}.event_classifier", widths.classes, widths.width)
    return shapes


def shapes(variant: str, widths: Widths = Widths()) -> dict[str, Shapes]:
    """Every state dict of the file; the script builds text LSTM and all three MI nets whatever the variant."""
    return {
        "Encoder_parameters": encoder_shapes(variant, widths),
        "CPC_parameters": cpc_shapes(variant, widths),
        "Text_ar_lstm_parameters": text_lstm_shapes(widths),
        "Video_mi_net_parameters": mi_shapes("video", widths),
        "Text_mi_net_parameters": mi_shapes("text", widths),
        "Audio_mi_net_parameters": mi_shapes("audio", widths),
        "Decoder_parameters": decoder_shapes(variant, widths),
    }


def _gain(name: str) -> float:
    """Factor on 1/sqrt(inputs) that keeps activations near 1: none saturates and none is the same in every clip."""
    if name.startswith("video_self_att.affine_matrix"):
        return 2 / GRID**2  # its input is a sum over positions
    if name.startswith("text_self_att.affine_matrix"):
        return 4.0  # an LSTM's output is well below 1
    if "conv" in name or "p_mu" in name:
        return 1.5
    return 2.0 if any(part in name for part in ("in_proj", "weight_ih", "weight_hh")) else 1.0


def _random_entry(name: str, shape: tuple[int, ...], scale: float, generator: np.random.Generator) -> Array:
    values = generator.standard_normal(shape)
    if len(shape) == 1:
        values *= 0.1
        return values + 1 if "norm" in name and name.endswith("weight") else values
    inputs = np.prod(shape[2:], dtype=int) * (shape[0] if "inverse_conv_block" in name else shape[1])
    values *= scale * _gain(name) / np.sqrt(inputs)
    return values


def _quantiser(widths: Widths, generator: np.random.Generator) -> State:
    """A codebook at the scale of the features, with old codewords on both sides of the idle limit."""
    embedding = generator.standard_normal((widths.codewords, widths.width))
    count = generator.uniform(0.5, 5.0, widths.codewords)
    noise = 0.01 * generator.standard_normal(embedding.shape)
    idle = generator.choice([-1, 0, 5, 99, 100, 299, 300, 301], widths.codewords).astype(float)
    idle[:2] = 0, IDLE_LIMIT
    values = {"embedding": embedding, "ema_count": count}
    values |= {"ema_weight": (embedding + noise) * count[:, None], "unactivated_count": idle}
    return {f"Cross_quantizer.{name}": value for name, value in values.items()}


def _has_gradient(name: str) -> bool:
    """Adam keeps no state for a parameter that never received a gradient."""
    return "_self_att.encoder_layer." not in name and "_semantic_decoder." not in name


def adam(states: dict[str, State], learning_rate: float, generator: np.random.Generator) -> dict[str, Any]:
    """State of torch's Adam over the parameters of `states`, numbered in order; quantiser buffers are none of them."""
    entries = [item for state in states.values() for item in state.items() if "Cross_quantizer" not in item[0]]
    state = {
        number: {
            "step": np.array(500.0, dtype=np.float32),
            "exp_avg": 1e-3 * generator.standard_normal(value.shape),
            "exp_avg_sq": 1e-6 * generator.random(value.shape),
        }
        for number, (name, value) in enumerate(entries)
        if _has_gradient(name)
    }
    group = {"lr": learning_rate, "betas": (0.9, 0.999), "eps": EPSILON, "weight_decay": 0, "amsgrad": False}
    group |= {"maximize": False, "foreach": None, "capturable": False, "initial_lr": learning_rate}
    return {"state": state, "param_groups": [{**group, "params": list(range(len(entries)))}]}


def checkpoint(
    variant: str, seed: int = 0, *, scale: float = 1.0, widths: Widths = Widths(), optimizers: bool = True
) -> dict[str, Any]:
    """A file of the released pre-training with random, well-scaled float64 contents.

    Args:
        variant: "AV", "AT" or "AVT".
        seed: Of every value.
        scale: Factor on all matrices and kernels.
        widths: Sizes; the default needs 0.8 GB without and 2.4 GB with the optimisers' states.
        optimizers: Whether the Adam states are there.

    Returns:
        State dicts name -> float64 array under the keys of `shapes`, the four Adam states, `epoch` and `total_step`.
    """
    generator = np.random.default_rng(seed)
    result: dict[str, Any] = {
        key: {name: _random_entry(name, shape, scale, generator) for name, shape in entries.items()}
        for key, entries in shapes(variant, widths).items()
    }
    result["Encoder_parameters"] |= _quantiser(widths, generator)
    if optimizers:
        main = ("Text_ar_lstm", "Encoder", "CPC", "Decoder")
        groups = {"optimizer": [f"{name}_parameters" for name in main]}
        groups |= {f"optimizer_{m}_mi_net": [f"{m.title()}_mi_net_parameters"] for m in ("video", "text", "audio")}
        for key, members in groups.items():
            rate = 4e-4 if key == "optimizer" else 1e-3
            result[key] = adam({member: result[member] for member in members}, rate, generator)
    return result | {"epoch": 2, "total_step": 1500}


def features(variant: str, clips: int, steps: int, *, seed: int = 0, widths: Widths = Widths()) -> dict[str, Array]:
    """Inputs of the model: audio (B, T, C), video (B, T, 7, 7, C) as after a ReLU, text words (B, T, C)."""
    generator = np.random.default_rng([seed, 1])
    shape_of = {"audio": (widths.audio,), "video": (GRID, GRID, widths.video), "text": (widths.words,)}
    values = {m: generator.standard_normal((clips, steps, *shape_of[m])) for m in MODALITIES[variant]}
    if "video" in values:
        content = generator.standard_normal((clips, steps, 1, 1, widths.video))
        values["video"] = np.maximum(values["video"] + content, 0)
    return values


def map_arrays(tree: Any, function: Callable[[Array], Any]) -> Any:  # noqa: ANN401
    """The same nest of dictionaries, lists and tuples with `function` applied to every array, for example to torch."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_arrays(value, function) for key, value in tree.items()}
    return [map_arrays(value, function) for value in tree] if isinstance(tree, list) else tree
