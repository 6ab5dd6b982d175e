"""The layers of the released Uni-Code model in float64 NumPy, one small function each, run in eval mode.

`state` is always a whole state dict, `name` the prefix of the layer's entries in it.
"""

from collections.abc import Sequence

import numpy as np
from official_checkpoint import Array, State
from scipy.special import expit, softmax

HEADS = 4
NORM_EPSILON = 1e-5


def relu(x: Array) -> Array:
    """max(x, 0)."""
    return np.maximum(x, 0)


def linear(state: State, name: str, x: Array) -> Array:
    """The layer x W^T + b, without b where the file has none."""
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def layer_norm(state: State, name: str, x: Array) -> Array:
    """Zero mean and unit biased variance over the last axis, then scale and shift."""
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + NORM_EPSILON)
    return normal * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state: State, name: str, x: Array) -> Array:
    """Four linear layers with ReLUs between them, the MI nets' shape."""
    for layer in (0, 2, 4):
        x = relu(linear(state, f"{name}.{layer}", x))
    return linear(state, f"{name}.6", x)


def lstm_layer(state: State, suffix: str, x: Array, *, prefix: str = "") -> Array:
    """One direction of one LSTM layer from zero state; x (B, T, C) -> (B, T, H). Gates in the order i, f, g, o."""
    weight_ih, weight_hh, bias_ih, bias_hh = (
        state[f"{prefix}{entry}_{suffix}"] for entry in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    hidden = cell = np.zeros((len(x), weight_hh.shape[1]))
    outputs = []
    for step in range(x.shape[1]):
        gates = x[:, step] @ weight_ih.T + bias_ih + hidden @ weight_hh.T + bias_hh
        write, keep, value, read = np.split(gates, 4, axis=1)
        cell = expit(keep) * cell + expit(write) * np.tanh(value)
        hidden = expit(read) * np.tanh(cell)
        outputs.append(hidden)
    return np.stack(outputs, axis=1)


def lstm(state: State, prefix: str, x: Array) -> Array:
    """Two unidirectional layers; x (B, T, C) -> (B, T, H)."""
    for layer in ("l0", "l1"):
        x = lstm_layer(state, layer, x, prefix=prefix)
    return x


def bidirectional_lstm(state: State, x: Array) -> Array:
    """Two bidirectional layers over all positions, padding included; x (B, T, C) -> (B, T, 2 H), forward half first."""
    for layer in ("l0", "l1"):
        backward = lstm_layer(state, f"{layer}_reverse", x[:, ::-1])[:, ::-1]
        x = np.concatenate([lstm_layer(state, layer, x), backward], axis=-1)
    return x


def convolution(state: State, name: str, x: Array, *, padding: int = 0) -> Array:
    """Cross-correlation of maps x (N, C, H, W) with a kernel (out, C, k, k), stride 1."""
    weight = state[f"{name}.weight"]
    kernel = weight.shape[-1]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))  # (N, C, H', W', k, k)
    y = np.tensordot(patches, weight, axes=([1, 4, 5], [1, 2, 3])).transpose(0, 3, 1, 2)
    return y + state[f"{name}.bias"][:, None, None] if f"{name}.bias" in state else y


def transposed_convolution(state: State, name: str, x: Array) -> Array:
    """Every input position adds its kernel (C, out, k, k) to the output; (N, C, H, W) -> (N, out, H+k-1, W+k-1)."""
    weight = state[f"{name}.weight"]
    clips, _, height, width = x.shape
    kernel = weight.shape[-1]
    y = np.zeros((clips, weight.shape[1], height + kernel - 1, width + kernel - 1))
    for row in range(kernel):
        for column in range(kernel):
            part = np.tensordot(x, weight[:, :, row, column], axes=([1], [0])).transpose(0, 3, 1, 2)
            y[:, :, row : row + height, column : column + width] += part
    return y + state[f"{name}.bias"][:, None, None]


def residual_stack(state: State, name: str, x: Array) -> Array:
    """Block relu(x) + W2 relu(W1 relu(x)), whose first ReLU works in place on its skip path too, then relu."""
    x = relu(x)
    inner = convolution(state, f"{name}.stack.0.res_block.1", x, padding=1)
    return relu(x + convolution(state, f"{name}.stack.0.res_block.3", relu(inner)))


def attention(state: State, name: str, x: Array) -> Array:
    """Self-attention with four heads over the positions of each clip, without mask; x (B, T, D)."""
    projected = x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]
    clips, positions, width = x.shape
    heads = projected.reshape(clips, positions, 3, HEADS, width // HEADS)
    query, key, value = np.moveaxis(heads, (2, 3), (0, 2))  # each (B, heads, T, D / heads)
    scores = query @ key.swapaxes(-1, -2) / np.sqrt(width // HEADS)
    mixed = (softmax(scores, axis=-1) @ value).swapaxes(1, 2).reshape(clips, positions, width)
    return linear(state, f"{name}.out_proj", mixed)


def transformer_layer(state: State, name: str, x: Array) -> Array:
    """Post-norm encoder layer: attention, then feed-forward with ReLU, each added and normalised; x (B, T, D)."""
    x = layer_norm(state, f"{name}.norm1", x + attention(state, f"{name}.self_attn", x))
    inner = linear(state, f"{name}.linear2", relu(linear(state, f"{name}.linear1", x)))
    return layer_norm(state, f"{name}.norm2", x + inner)


def temporal_relation(state: State, modality: str, x: Array) -> Array:
    """Linear, then two transformer layers without positions, mask or last norm; x (B, T, C) -> z (B, T, D)."""
    x = linear(state, f"{modality}_self_att.affine_matrix", x)
    for layer in (0, 1):
        x = transformer_layer(state, f"{modality}_self_att.encoder.layers.{layer}", x)
    return x


def _frames(x: Array) -> Array:
    """Frames with channels first: (B, T, H, W, C) -> (B T, C, H, W)."""
    return x.reshape(-1, *x.shape[2:]).transpose(0, 3, 1, 2)


def _clips(maps: Array, leading: Sequence[int]) -> Array:
    """Back again: (B T, C, H, W) -> (B, T, H, W, C)."""
    maps = maps.transpose(0, 2, 3, 1)
    return maps.reshape(*leading, *maps.shape[1:])


def video_specific(state: State, video: Array) -> Array:
    """Specific map of each frame; (B, T, 7, 7, C) -> (B, T, 3, 3, map width)."""
    name = "Video_encoder.conv_stack"
    maps = relu(convolution(state, f"{name}.0", _frames(video)))
    maps = relu(convolution(state, f"{name}.2", maps))
    maps = residual_stack(state, f"{name}.5", convolution(state, f"{name}.4", maps))
    return _clips(maps, video.shape[:2])


def club_feature(state: State, specific: Array) -> Array:
    """Vector that stands for the specific map in CLUB; (B, T, 3, 3, map width) -> (B, T, feature width)."""
    pooled = specific.mean((2, 3))
    return linear(state, "Video_encoder.feed_forward.2", relu(linear(state, "Video_encoder.feed_forward.0", pooled)))


def video_semantic(state: State, video: Array) -> Array:
    """Channel re-weighting, then a sum over positions; (B, T, 7, 7, C) -> (B, T, C).

    The spatial attention's softmax runs over an axis of length one: all its 49 weights are 1, its three layers idle.
    """
    name = "video_semantic_encoder.se_layer"
    weight = expit(linear(state, f"{name}.2", relu(linear(state, f"{name}.0", video.mean((2, 3))))))
    weight = weight[:, :, None, None, :]
    return (video * weight + video).sum((2, 3))


def vector_specific(state: State, modality: str, x: Array) -> Array:
    """Specific feature of audio or of the text sequence: relu(Linear); (B, T, C) -> (B, T, specific width)."""
    return relu(linear(state, f"{modality.title()}_encoder.{modality}_linear", x))


def decode_vector(state: State, modality: str, code: Array, specific: Array) -> Array:
    """Audio or text from its code (B, T, D) and its specific feature (B, T, S); -> (B, T, C)."""
    name = f"{modality.title()}_decoder.{modality}"
    return linear(state, f"{name}_rec", np.concatenate([linear(state, f"{name}_linear", code), specific], axis=-1))


def decode_video(state: State, code: Array, specific: Array) -> Array:
    """Video from its code (B, T, D), repeated on the grid, and its specific map; -> (B, T, 7, 7, C)."""
    name = "Video_decoder.inverse_conv_block"
    tiled = linear(state, "Video_decoder.video_linear", code)[:, :, None, None, :]
    tiled = np.broadcast_to(tiled, (*specific.shape[:4], tiled.shape[-1]))
    maps = transposed_convolution(state, f"{name}.0", _frames(np.concatenate([tiled, specific], axis=-1)))
    maps = transposed_convolution(state, f"{name}.2", residual_stack(state, f"{name}.1", maps))
    return _clips(transposed_convolution(state, f"{name}.4", relu(maps)), code.shape[:2])
