"""The released FCID computation in float64 NumPy, from the paper's formulas and the released code's names and shapes.

Independent of the package. Layers and losses that FCID shares with Uni-Code are those of the other oracle, so states
here have Uni-Code's names, and `file_entries` renames them. Modalities are in the order audio, video, text; the release
puts video before audio along a batch, which changes no value but the place of a clip in a permutation.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import official_layers as layers
import official_oracle as oracle
from official_checkpoint import TIED, Array, Shapes, State, Widths, checkpoint, encoder_shapes
from scipy.special import log_softmax

TIMED = ("audio", "video")
# A file holds no CLUB networks, so they have the released hidden width.
WIDTHS, RELEASED = replace(TIED, mi_hidden=128), Widths()
TEMPERATURE = 0.1
# Prefixes of the modules that FCID shares with Uni-Code, in the release.
PREFIXES = {
    "Cross_quantizer": "Cross_quantizer_coarse",
    "Video_encoder": "v_spe_encoder",
    "Audio_encoder": "a_spe_encoder",
    "video_semantic_encoder": "v_gen_encoder",
    "video_self_att": "v_self_att",
    "audio_self_att": "a_self_att",
    "text_self_att": "t_self_att",
}
COARSE = ("va2vat.linear", "va_gen_encoder.input_linear", "va_spe_encoder.input_linear") + (
    "t2vat.linear",
    "t_gen_encoder.input_linear",
    "t_spe_encoder.input_linear",
)


def encoder_entries(widths: Widths) -> Shapes:
    """Shapes of the encoder under Uni-Code's names: one temporal layer, no specific encoder of words, no LSTM."""
    shapes = {
        name: shape
        for name, shape in encoder_shapes("AVT", widths).items()
        if ".layers.1." not in name and not name.startswith("Text_encoder.")
    }
    shapes["text_self_att.affine_matrix.weight"] = (widths.width, widths.words)
    for name in COARSE:
        shapes |= {f"{name}.weight": (widths.width, widths.width), f"{name}.bias": (widths.width,)}
    return shapes


def file_entries(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The same under the names of an FCID file."""
    split = {name: name.split(".", 1) for name in encoder}
    return {f"{PREFIXES.get(split[name][0], split[name][0])}.{split[name][1]}": encoder[name] for name in encoder}


def random_linear(name: str, outputs: int, inputs: int, generator: np.random.Generator) -> State:
    weight = 2 * generator.standard_normal((outputs, inputs)) / np.sqrt(inputs)
    return {f"{name}.weight": weight, f"{name}.bias": 0.1 * generator.standard_normal(outputs)}


def states(seed: int = 0, widths: Widths = WIDTHS) -> dict[str, State]:
    """Random states by network: encoder, cpc, decoder, coarse_decoder, and mi of each CLUB network."""
    generator = np.random.default_rng([seed, 8])
    saved = checkpoint("AVT", seed, widths=widths, optimizers=False)
    encoder = {name: saved["Encoder_parameters"].get(name) for name in encoder_entries(widths)}
    encoder |= random_linear("text_self_att.affine_matrix", widths.width, widths.words, generator)
    for name in COARSE:
        encoder |= random_linear(name, widths.width, widths.width, generator)
    coarse: State = {}
    for name in ("audio", "video", "text"):
        coarse |= random_linear(f"{name}.simple_linear", widths.width, widths.width, generator)
        coarse |= random_linear(f"{name}.simple_rec", widths.width, 2 * widths.width, generator)
    result = {"encoder": encoder, "cpc": saved["CPC_parameters"], "decoder": saved["Decoder_parameters"]}
    for name in TIMED:
        result[f"mi {name}"] = saved[f"{name.title()}_mi_net_parameters"]
    sizes = (widths.width, widths.mi_hidden, widths.mi_hidden, widths.mi_hidden, widths.width)
    for name in ("coarse-timed", "coarse-words"):
        net: State = {}
        for part in ("p_mu", "p_logvar"):
            for layer in range(4):
                net |= random_linear(f"{part}.{2 * layer}", sizes[layer + 1], sizes[layer], generator)
        result[f"mi {name}"] = net
    return result | {"coarse_decoder": coarse}


def features(clips: int, positions: int, *, seed: int = 0, widths: Widths = WIDTHS) -> dict[str, Array]:
    """Inputs: audio (B, T, C), video (B, T, 7, 7, C) as after a ReLU, words (B, T, C)."""
    generator = np.random.default_rng([seed, 9])
    video = generator.standard_normal((clips, positions, 7, 7, widths.video))
    return {
        "audio": generator.standard_normal((clips, positions, widths.audio)),
        "video": np.maximum(video + generator.standard_normal((clips, positions, 1, 1, widths.video)), 0),
        "text": generator.standard_normal((clips, positions, widths.words)),
    }


def temporal(encoder: State, name: str, x: Array) -> Array:
    """Linear and one transformer layer; padding is read as it is; (B, T, C) -> z (B, T, D)."""
    read = layers.video_semantic(encoder, x) if name == "video" else x
    affine = layers.linear(encoder, f"{name}_self_att.affine_matrix", read)
    return layers.transformer_layer(encoder, f"{name}_self_att.encoder.layers.0", affine)


def coarse_features(encoder: State, name: str, z: Array) -> tuple[Array, Array, Array]:
    """Of vectors (..., D): projected h, general g, specific c. Audio and video share all three layers."""
    group, projector = ("t", "t2vat") if name == "text" else ("va", "va2vat")
    h = layers.linear(encoder, f"{projector}.linear", z)
    g, c = (layers.relu(layers.linear(encoder, f"{group}_{part}_encoder.input_linear", h)) for part in ("gen", "spe"))
    return h, g, c


def split_codes(encoder: State, name: str, x: Array) -> Array:
    """Codes of each second, (B, T), of a timed modality."""
    return oracle.nearest(
        coarse_features(encoder, name, temporal(encoder, name, x))[1], encoder["Cross_quantizer.embedding"]
    )


def clip_code(encoder: State, name: str, x: Array) -> Array:
    """The code of each clip, (B,)."""
    mean = temporal(encoder, name, x).mean(1)
    return oracle.nearest(coarse_features(encoder, name, mean)[1], encoder["Cross_quantizer.embedding"])


def coarse_mutual_information(net: State, general: Array, specific: Array, permutation: Array) -> float:
    """CLUB of vectors (N, D) as released: mean over channels, sum over clips; one divisor of all channels of a clip."""
    mean, log_variance = layers.mlp(net, "p_mu", general), np.tanh(layers.mlp(net, "p_logvar", general))
    total = 0.0
    for clip, other in enumerate(permutation):
        spread = np.exp(log_variance[clip].mean())
        own = -((mean[clip] - specific[clip]) ** 2).mean() / spread
        total += own + ((mean[clip] - specific[other]) ** 2).mean() / spread
    return float(total / 2)


def info_nce(query: Array, key: Array) -> float:
    """Cross-entropy of the diagonal of cosine similarities, the softmax over keys: query and key (B, D)."""
    query, key = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (query, key))
    return float(-np.diag(log_softmax(query @ key.T / TEMPERATURE, axis=1)).mean())


def forward(
    networks: Mapping[str, State],
    inputs: Mapping[str, Array],
    permutation: Mapping[str, Array],
    cpc_step: int,
    *,
    offset: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """One training step's forward pass without dropout: features, codes, and the weighted terms by name.

    Args:
        networks: as of `states`.
        inputs: by modality, two or three; without text, InfoNCE is that of audio and video (not in the release).
        permutation: negatives of each CLUB network; those of audio and video at the coarse level are of 2 B rows.
        cpc_step: last step that Cross-CPC reads.
        offset: straight-through offsets (code - g) to keep, as in the oracle of Uni-Code.
    """
    encoder, names = networks["encoder"], tuple(inputs)
    embedding = encoder["Cross_quantizer.embedding"]
    z = {m: temporal(encoder, m, inputs[m]) for m in names}
    specific, target = ({m: oracle.specific_features(encoder, m, inputs[m])[n] for m in TIMED} for n in (0, 1))
    h, g, c = ({m: coarse_features(encoder, m, z[m].mean(1))[n][:, None] for m in names} for n in (0, 1, 2))
    index = {m: oracle.nearest(g[m], embedding) for m in names}
    code = {m: embedding[index[m]] for m in names}
    offset = {m: code[m] - g[m] for m in names} if offset is None else offset
    terms = {}
    for m in TIMED:
        decoded = oracle.decode(networks["decoder"], m, z[m], specific[m])
        terms[f"reconstruction.{m}"] = oracle.squared_error(decoded, inputs[m])
        x, y = z[m], target[m]
        terms[f"club.{m}"] = oracle.mutual_information(networks[f"mi {m}"], x, y, permutation[m])
    for m in names:
        state = networks["coarse_decoder"]
        joined = np.concatenate([layers.linear(state, f"{m}.simple_linear", g[m] + offset[m]), c[m]], -1)
        terms[f"coarse_reconstruction.{m}"] = oracle.squared_error(
            layers.linear(state, f"{m}.simple_rec", joined), h[m]
        )
    pairs = {}
    for network, members in {"coarse-timed": TIMED, "coarse-words": ("text",)}.items():
        if set(members) <= set(names):
            general, own = (np.concatenate([part[m][:, 0] for m in members]) for part in (g, c))
            net = networks[f"mi {network}"]
            terms[f"club.{network}"] = coarse_mutual_information(net, general, own, permutation[network])
            pairs[network] = general, own
    terms |= {f"commitment.{m}": value for m, value in oracle.commitments(g, code).items()}
    shares = {m: oracle.distribution(g[m], embedding) for m in names}
    for a, b in combinations(names, 2):
        terms[f"code_matching.{a}-{b}"] = 0.5 * oracle.code_matching(shares[a], shares[b])
    found = oracle.cross_prediction(networks["cpc"], {m: m for m in TIMED}, {m: z[m] for m in TIMED}, cpc_step)
    terms["cpc"] = sum(value * (0.1 if a == b else 1) for (a, b), value in found.items())
    contrasted = [(m, "text") for m in TIMED] if "text" in names else [TIMED]
    terms["fcid"] = sum(info_nce(g[a][:, 0], g[b][:, 0]) for a, b in contrasted)
    likelihood = {m: oracle.negative_log_likelihood(networks[f"mi {m}"], z[m], target[m]) for m in TIMED}
    likelihood |= {n: oracle.negative_log_likelihood(networks[f"mi {n}"], *pair) for n, pair in pairs.items()}
    return {"z": z, "h": h, "g": g, "c": c, "index": index, "code": code, "offset": offset, "terms": terms} | {
        "likelihood": likelihood
    }
