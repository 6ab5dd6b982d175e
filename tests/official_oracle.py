"""The released Uni-Code computation from a checkpoint, in float64 NumPy: codes, losses and codebook update.

Independent of the package. Dimensions: B clips, T positions, N = B T rows, M codewords, D width. Modalities are in
the order audio, video, text. For two modalities, where the release does not run, the rules of all three are followed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import official_layers as layers
from official_checkpoint import IDLE_LIMIT, MODALITIES, Array, State, cpc_name
from scipy.special import log_softmax, softmax

DECAY = 0.99
SMOOTHING = 1e-5
BETA = 0.25
OWN_SHARE = 0.5
ACTIVE_WITHIN = 100
RESET_NOISE = 1 / 1024
LOG_OFFSET = 1e-10
SUM_OFFSET = 1e-5
CODE_MATCHING_WEIGHT = 0.5
SELF_PREDICTION_WEIGHT = 0.1


@dataclass(frozen=True)
class Draws:
    """Everything random of one step.

    Attributes:
        choice: (M,) uniforms in [0, 1); a reset codeword k copies the active one at rank floor(choice[k] * actives).
        noise: (M, D) uniforms in [-1, 1), to be scaled by 1/1024.
        permutation: Modality -> (B,) permutation of the clips, the negatives of CLUB.
        cpc_step: Last step that the predictors have read, 1 to T - 2; the one after it is predicted.
    """

    choice: Array
    noise: Array
    permutation: dict[str, Array]
    cpc_step: int


class Quantiser(NamedTuple):
    """Buffers of the quantiser: vectors (M, D), N (M,), O (M, D), forwards since a codeword's last use (M,)."""

    embedding: Array
    ema_count: Array
    ema_weight: Array
    unactivated_count: Array


def draws(names: tuple[str, ...], clips: int, quantiser: Quantiser, *, seed: int = 0, positions: int = 10) -> Draws:
    """Random draws with the distribution of the release."""
    generator = np.random.default_rng([seed, 2])
    codewords, width = quantiser.embedding.shape
    return Draws(
        choice=generator.random((codewords,)),
        noise=generator.uniform(-1, 1, (codewords, width)),
        permutation={modality: generator.permutation(clips) for modality in names},
        cpc_step=int(generator.integers(1, positions - 1)),
    )


def quantiser_of(checkpoint: Mapping[str, Any]) -> Quantiser:
    """Quantiser buffers of a checkpoint."""
    return Quantiser(*(checkpoint["Encoder_parameters"][f"Cross_quantizer.{name}"] for name in Quantiser._fields))


def squared_error(x: Array, y: Array) -> float:
    """Mean over all elements of (x - y)^2."""
    return float(((x - y) ** 2).mean())


def distances(z: Array, embedding: Array) -> Array:
    """Euclidean distances by direct differences; (..., D), (M, D) -> (..., M)."""
    rows = z.reshape(-1, z.shape[-1])
    result = np.stack([np.sqrt(((row - embedding) ** 2).sum(-1)) for row in rows])
    return result.reshape(*z.shape[:-1], len(embedding))


def nearest(z: Array, embedding: Array) -> Array:
    """Index of the closest codeword, the lowest one of equals; (B, T, D), (M, D) -> (B, T)."""
    rows = z.reshape(-1, z.shape[-1])
    index = [((row - embedding) ** 2).sum(-1).argmin() for row in rows]
    return np.array(index, dtype=np.int64).reshape(z.shape[:-1])


def sums_by_codeword(index: Array, z: Array, codewords: int) -> Array:
    """(M, D): sum of the vectors of z (B, T, D) at the positions whose code is k."""
    result = np.zeros((codewords, z.shape[-1]))
    np.add.at(result, index.ravel(), z.reshape(-1, z.shape[-1]))
    return result


def update_average(quantiser: Quantiser, z: dict[str, Array], index: dict[str, Array]) -> Quantiser:
    """Exponential moving average, one modality after the other, the smoothed count being written back each time.

    N <- g N + (1 - g) n_m;  N <- n (N + eps) / (n + M eps) with n = sum N;
    O <- g O + (1 - g) [S(m, m) / 2 + mean over the other m' of S(m, m') / 2];  E <- O / N.
    """
    embedding, count, weight, idle = quantiser
    codewords = len(embedding)
    for modality in z:
        hits = np.bincount(index[modality].ravel(), minlength=codewords)
        count = DECAY * count + (1 - DECAY) * hits
        total = count.sum()
        count = total * (count + SMOOTHING) / (total + codewords * SMOOTHING)
        sums = {partner: sums_by_codeword(index[modality], z[partner], codewords) for partner in z}
        others = sum(sums[partner] for partner in z if partner != modality) / (len(z) - 1)
        weight = DECAY * weight + (1 - DECAY) * (OWN_SHARE * sums[modality] + (1 - OWN_SHARE) * others)
        embedding = weight / count[:, None]
    return Quantiser(embedding, count, weight, idle)


def reset(quantiser: Quantiser, index: dict[str, Array], random: Draws) -> Quantiser:
    """Idle counters, and idle codewords replaced by noisy copies of active ones; N and O stay as they are."""
    embedding, count, weight, idle = quantiser
    idle = idle + 1
    idle[np.unique(np.concatenate([codes.ravel() for codes in index.values()]))] = 0
    active = np.flatnonzero((idle >= 0) & (idle < ACTIVE_WITHIN))
    dead = np.flatnonzero(idle > IDLE_LIMIT)
    source = active[np.floor(random.choice[dead] * len(active)).astype(int)]
    reset = embedding.copy()
    reset[dead] = embedding[source] + RESET_NOISE * random.noise[dead]
    idle[dead] = 0
    return Quantiser(reset, count, weight, idle)


def commitments(z: dict[str, Array], code: dict[str, Array]) -> dict[str, float]:
    """Per modality 2 beta MSE to the own code, and beta MSE to the others' codes, shared equally between them."""
    return {
        modality: 2 * BETA * squared_error(z[modality], code[modality])
        + BETA * float(np.mean([squared_error(z[modality], code[other]) for other in z if other != modality]))
        for modality in z
    }


def distribution(z: Array, embedding: Array) -> Array:
    """(B, M): mean over time of softmax over codewords of minus the distance."""
    return softmax(-distances(z, embedding), axis=-1).mean(1)


def code_matching(first: Array, second: Array) -> float:
    """L_cmcm of one pair of distributions (B, M), with the second product untransposed as in the release."""
    score = first @ np.log(second + LOG_OFFSET).T + second @ np.log(first + LOG_OFFSET).T
    exponential = np.exp(score - score.min())
    return float(-np.log(np.diag(exponential) / (exponential.sum(1) + SUM_OFFSET)).mean())


def mutual_information(state: State, x: Array, y: Array, permutation: Array) -> float:
    """CLUB estimate as released: x (B, T, D), y (B, T, C), squared errors and log-variances averaged over time."""
    mean, log_variance = layers.mlp(state, "p_mu", x), np.tanh(layers.mlp(state, "p_logvar", x))
    variance = np.exp(log_variance.mean(1))  # (B, C)
    positive = -((mean - y) ** 2).mean(1) / variance
    negative = -((mean - y[permutation]) ** 2).mean(1) / variance
    return float((positive.sum(-1) - negative.sum(-1)).mean() / 2)


def negative_log_likelihood(state: State, x: Array, y: Array) -> float:
    """What an MI net minimises: mean over rows of sum_c [(mu - y)^2 / exp(logvar) + logvar] / 2."""
    mean, log_variance = layers.mlp(state, "p_mu", x), np.tanh(layers.mlp(state, "p_logvar", x))
    return float((((mean - y) ** 2 / np.exp(log_variance) + log_variance).sum(-1) / 2).mean())


def predict(state: State, name: str, z: Array, step: int) -> Array:
    """Prediction (B, D) of position step + 1 from the positions 0 to step of z (B, T, D)."""
    context = layers.lstm(state, f"{name}_ar_lstm.", z[:, : step + 1])[:, -1]
    return layers.linear(state, f"{name}_predictors.0", context)


def prediction_loss(target: Array, prediction: Array) -> float:
    """Cross-CPC of one pair: rows are targets (B, D), the softmax runs over the predictions (B, D) of the batch."""
    return float(-np.diag(log_softmax(target @ prediction.T, axis=1)).mean())


def cross_prediction(
    state: State, names: dict[str, str], z: dict[str, Array], step: int
) -> dict[tuple[str, str], float]:
    """Cross-CPC of every (target, source) pair, unweighted; `names` are the modalities' names in `state`."""
    predictions = {source: predict(state, names[source], z[source], step) for source in z}
    return {
        (target, source): prediction_loss(z[target][:, step + 1], predictions[source]) for target in z for source in z
    }


def encode(checkpoint: Mapping[str, Any], modality: str, feature: Array) -> dict[str, Array]:
    """One modality alone: its `input`, `z` (B, T, D), `index` (B, T), `code` (B, T, D).

    Text is words (B, T, 768), or the text sequence (B, T, 256) where the file has no text LSTM; both are float64.
    """
    if modality == "text" and "Text_ar_lstm_parameters" in checkpoint:
        feature = layers.bidirectional_lstm(checkpoint["Text_ar_lstm_parameters"], feature)
    state = checkpoint["Encoder_parameters"]
    semantic = layers.video_semantic(state, feature) if modality == "video" else feature
    z = layers.temporal_relation(state, modality, semantic)
    index = nearest(z, state["Cross_quantizer.embedding"])
    return {"input": feature, "z": z, "index": index, "code": state["Cross_quantizer.embedding"][index]}


def specific_features(state: State, modality: str, feature: Array) -> tuple[Array, Array]:
    """What the decoder gets, and what CLUB compares with the code; the same thing except for video."""
    if modality != "video":
        specific = layers.vector_specific(state, modality, feature)
        return specific, specific
    specific = layers.video_specific(state, feature)
    return specific, layers.club_feature(state, specific)


def decode(state: State, modality: str, code: Array, specific: Array) -> Array:
    """Reconstruction of a modality from code and specific feature."""
    if modality == "video":
        return layers.decode_video(state, code, specific)
    return layers.decode_vector(state, modality, code, specific)


def total_loss(losses: Mapping[str, Mapping[Any, float]]) -> float:
    """Sum of all terms: self predictions weigh 0.1, code matching 0.5, everything else 1; likelihoods are not in it."""
    prediction = sum(
        value * (SELF_PREDICTION_WEIGHT if target == source else 1)
        for (target, source), value in losses["prediction"].items()
    )
    plain = sum(sum(losses[term].values()) for term in ("reconstruction", "commitment", "mutual_information"))
    return plain + prediction + CODE_MATCHING_WEIGHT * sum(losses["code_matching"].values())


def forward(
    checkpoint: Mapping[str, Any],
    features: Mapping[str, Array],
    random: Draws,
    *,
    offset: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """One training step's forward pass without dropout, up to the total loss and the updated quantiser.

    Args:
        checkpoint: As of `official_checkpoint.checkpoint`.
        features: Modality -> feature; their set determines the variant of the file.
        random: The step's draws.
        offset: Straight-through offsets (code - z) to keep instead of this pass's own. With those of another pass a
            finite difference of the total has the gradient of the release, which lets z alone through.

    Returns:
        By modality: `input` (audio and video as given, the text sequence), `z`, `index`, `code`, `offset`,
        `quantised` (z + offset), `specific`, `club_target`, `decoded`, `distribution`. `losses`: term -> modality or
        pair -> value, unweighted except for the commitment's own weights; pairs of `prediction` are (target, source).
        `total`: the loss. `averaged`, `quantiser`: the buffers after the moving average, and after reset too.
    """
    modalities = next(names for names in MODALITIES.values() if set(names) == set(features))
    variant = next(key for key, names in MODALITIES.items() if names == modalities)
    encoder, decoder, before = (
        checkpoint["Encoder_parameters"],
        checkpoint["Decoder_parameters"],
        quantiser_of(checkpoint),
    )
    encoded = {m: encode(checkpoint, m, features[m]) for m in modalities}
    result: dict[str, Any] = {key: {m: encoded[m][key] for m in modalities} for key in encoded["audio"]}
    source, z, index, code = (result[key] for key in ("input", "z", "index", "code"))
    offset = {m: code[m] - z[m] for m in modalities} if offset is None else offset
    quantised = {m: z[m] + offset[m] for m in modalities}
    specific, target = ({m: specific_features(encoder, m, source[m])[part] for m in modalities} for part in (0, 1))
    decoded = {m: decode(decoder, m, quantised[m], specific[m]) for m in modalities}
    shares = {m: distribution(z[m], before.embedding) for m in modalities}
    nets = {m: checkpoint[f"{m.title()}_mi_net_parameters"] for m in modalities}
    names = {m: cpc_name(variant, m) for m in modalities}
    losses: dict[str, dict[Any, float]] = {
        "reconstruction": {m: squared_error(decoded[m], source[m]) for m in modalities},
        "commitment": commitments(z, code),
        "mutual_information": {
            m: mutual_information(nets[m], quantised[m], target[m], random.permutation[m]) for m in modalities
        },
        "likelihood": {m: negative_log_likelihood(nets[m], quantised[m], target[m]) for m in modalities},
        "prediction": cross_prediction(checkpoint["CPC_parameters"], names, z, random.cpc_step),
        "code_matching": {(x, y): code_matching(shares[x], shares[y]) for x, y in combinations(modalities, 2)},
    }
    averaged = update_average(before, z, index)
    result |= {"offset": offset, "quantised": quantised, "specific": specific, "club_target": target}
    result |= {"decoded": decoded, "distribution": shares, "losses": losses, "total": total_loss(losses)}
    return result | {"averaged": averaged, "quantiser": reset(averaged, index, random)}
