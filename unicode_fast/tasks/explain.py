"""What each task measures under each protocol, in words."""

from __future__ import annotations

from unicode_fast.tasks import retrieval
from unicode_fast.tasks.runner import RETRIEVAL, SEGMENTATION, check_tasks, probe_task
from unicode_fast.tasks.segmentation import task as segmentation
from unicode_fast.tasks.segmentation.backbones import LIGHT_SETTINGS, TIMM_SETTINGS
from unicode_fast.tasks.table import check_protocol

_HEADS = {
    "classification": "Linear(D, D), maximum over time, Linear(D, C)",
    "localisation": "Linear(D, D), Linear(D, C+1), each step by itself, background last",
}

_FURTHER = """\
Further numbers: micro and macro precision, recall and F1 and mean average precision (scikit-learn's), pooled over \
{rows} and C classes; 95 % percentile intervals from 1000 draws of test clips with replacement."""

_HELD_OUT = {
    "classification": """\
Target: the clip's class; the commonest foreground class of its segments where clips have none.
Loss: cross-entropy.
Score: accuracy on {tested} in the other modality.
Chance: 1 / C.
"""
    + _FURTHER.format(rows="clips"),
    "localisation": """\
Modalities: those with labels at each step; a sentence has no time axis.
Loss: binary cross-entropy with logits over all C+1 columns of the valid steps.
Score: micro-F1, true and false positives and false negatives pooled over the C foreground classes and the valid steps \
of {tested} in the other modality, at probability 0.5.
Chance: the best such F1 of a constant prediction, known from the test labels.
"""
    + _FURTHER.format(rows="valid steps")
    + " official_precision, _recall, _f1: the released code's formulas on the same predictions.",
}

# What the held_out protocol cannot know or promise.
_FEW_CLIPS = "on tests of few clips the interval of mAP, whose draws can lack a class, can miss mAP itself"
_LIMITS = {
    "classification": f"Limits: {_FEW_CLIPS}.",
    "localisation": f"Limits: {_FEW_CLIPS}.",
    "cross-classification": f"""\
Limits: splits keep apart what the probe learns from and is tested on, not what the encoder was pre-trained on: the \
audio of ucf-vggsound is VGGSound's, and its test clips may have been in the pre-training set of 40K. Moreover \
{_FEW_CLIPS}.""",
    "cross-localisation": f"""\
Limits: the training split of ave-avvp is AVE's in both modalities, so that same modality is trained on AVE as well. \
Whether a video of AVE is one of AVVP's too cannot be known from the files: AVE's clips have numbers, no names. \
Moreover {_FEW_CLIPS}.""",
}

_OFFICIAL = {
    "classification": """\
Target: each segment's argmax over the C foreground columns, then the largest class index over time; the clip's class \
where a modality has no segment labels.
Loss: cross-entropy.
Score: accuracy on the training split in the other modality: other streams of the very clips the probe was trained on.
Chance: 1 / C.""",
    "localisation": """\
Loss: binary cross-entropy with logits over all C+1 columns, plus ExpLog: - mean over segments of sum_c y_c \
log softmax(x)_c exp(-alpha_c), with C+1 alphas that start at 0.1 and are trained along, unclipped.
Score: precision of probability > 0.5 over all C+1 columns, background included, computed in each batch and averaged \
over batches by their clips (published as accuracy), on the training split in the other modality: the very clips the \
probe was trained on. Where the data set has whole lists (split "all") these take the place of the training split.
Chance: the best such precision of a constant prediction.""",
    "cross-classification": """\
Target: the clip's class.
Loss: cross-entropy.
Score: accuracy on all clips of the other domain in the other modality: its split "all", else its test split; the \
probe was trained on the training split, or "all", of the first.
Chance: 1 / C.""",
    "cross-localisation": """\
Loss: binary cross-entropy with logits over all C+1 columns, plus ExpLog as in localisation.
Score: F1 of precision and recall at probability > 0.5 over all C+1 columns, background included, each averaged over \
batches by their clips, on the test split of the other domain in the other modality; the probe was trained on the \
training split, or "all", of the first.
Chance: the best such F1 of a constant prediction.""",
}


_TOKENS = (
    "Tokens: both scores again, all alike but for a one-hot vector in the place of each codeword, so that a probe sees "
    "which codes a clip uses and nothing of where they lie."
)


def explain(task: str, protocol: str = "held_out") -> str:
    """The definition of a task's numbers, some lines to print.

    Args:
        task: one of `TASKS`.
        protocol: held_out or official.

    Raises:
        ValueError: one of them is unknown.
    """
    check_tasks([task])
    protocol = check_protocol(protocol)
    if task == RETRIEVAL:
        return _explain_retrieval(protocol)
    if task == SEGMENTATION:
        return _explain_segmentation(protocol)
    return _explain_probe(task, protocol)


def _explain_probe(task: str, protocol: str) -> str:
    kind = probe_task(task, protocol)
    rule, base = kind.rule, task.removeprefix("cross-")
    numbers = f"Adam, {rule.epochs} epochs, batches of {rule.batch_size} clips, learning rate {rule.learning_rate:g}"
    if protocol == "held_out":
        tested = "the test split of the other data set" if kind.across else "the test split"
        upper = "on the training split of the data set that it is tested on" if kind.across else "else alike"
        return "\n".join(
            [
                f"{task}, held_out protocol.",
                "Encoder: frozen, evaluation mode. A probe is trained on the codewords of one modality of the training "
                f"split and tested, unchanged, on another modality of {tested}.",
                f"Probe: {_HEADS[base]}; codewords centred and divided by one number first.",
                f"Training: {numbers}; several passes an epoch where clips are too few for {rule.least_steps} steps.",
                "Epoch: the best one on the validation split in the modality the probe is trained on. Labels of the "
                "other modality have no part in any choice: zero-shot means that there are none.",
                _HELD_OUT[base].format(tested=tested),
                f"Same modality: a probe trained and tested on the row's target modality, {upper}.",
                _TOKENS,
                "Content words: the same with only those words of a sentence that name a class, where the data say "
                "which they are, as the built-in data do.",
                _LIMITS[task],
            ]
        )
    return "\n".join(
        [
            f"{task}, official protocol: the released code's definitions. Not comparable with the held_out protocol.",
            "Encoder: weights frozen, but in training mode while the probe trains, so that its dropout changes the "
            "codes in every epoch; evaluation mode for scores. No codebook update.",
            f"Probe: {_HEADS[base]}, float64.",
            f"Training: {numbers}, halved at epochs {', '.join(map(str, rule.halve_at))}, gradient norm of the probe "
            f"clipped at {rule.clip_norm:g}; all {rule.epochs} epochs (the released loop starts after the epoch number "
            "of the pre-training checkpoint).",
            "Epoch: the best one on the clips that are scored.",
            _OFFICIAL[task],
            "Masked steps count nowhere; the released code masks none, see the field text_padding.",
            "Same modality: a probe trained and scored on the row's target modality, else alike.",
            _TOKENS,
        ]
    )


def _explain_retrieval(protocol: str) -> str:
    rule = retrieval.RetrievalRule()
    head = [
        "Encoder: frozen, evaluation mode. A clip's embedding in a modality is the mean over valid steps of its "
        "codewords; that of a modality which the model does not encode is the mean of its features, standardised by "
        "the training clips.",
        "Head: one linear projection of source embeddings and one of anchor embeddings, trained on the (source, "
        "anchor) pairs of the training split by symmetric InfoNCE over cosines; applied, unchanged, to (target, "
        "anchor) pairs of the test split. No pair with a target has been seen. Where the data set has no third "
        "modality, embeddings of source and target are compared without a head.",
        f"Training: Adam, {rule.steps} steps, batches of {rule.batch_size} pairs, learning rate "
        f"{rule.learning_rate:g}, temperature {rule.temperature:g}; the step with the best R@10 on the validation "
        "pairs of source and anchor is kept.",
        "R@K: share of queries with a relevant item among the first K by cosine. Relevant is the paired clip alone. "
        "Items of equal similarity, such as clips with the same sentence or the same codes, are in random order, and "
        "R@K and ranks are expectations over it: a copy of the paired clip's sentence is no hit, but shares its place.",
    ]
    tail = [
        f"Score: R@{retrieval.DEPTH} of target to anchor. Chance: {retrieval.DEPTH} / test clips.",
        "Same modality: a head trained on (target, anchor) pairs; without an anchor, one on (source, target) pairs.",
    ]
    if protocol == "official":
        return "\n".join(
            [
                "retrieval, official protocol: our reading of the paper's protocol, whose code is lost. Measures are "
                "the paper's, R@5 and R@10 in both directions; splits and training are those of the held_out protocol.",
                *head,
                *tail,
            ]
        )
    return "\n".join(
        [
            "retrieval, held_out protocol.",
            *head,
            *tail,
            "Further numbers: R@1, R@5, R@10 and median rank in both directions; the same where every clip of the "
            "query's class is relevant; the same of source and target embeddings without a head (untrained); 95 % "
            "percentile intervals from 1000 draws of queries with replacement.",
        ]
    )


def _explain_segmentation(protocol: str) -> str:
    network = (
        "Network: a pyramid of picture features, sums of dilated convolutions and a query block (TPAVI, dot products) "
        "on every stage, residual fusion from coarse to fine. Queries are the codewords of the frozen encoder in "
        "evaluation mode (the released code never leaves training mode, whose dropout changes them), centred and "
        "divided by one number (as released: as they are), then a linear layer along time from their steps to the "
        "frames, which starts as their mean and is trained and saved with the rest (the released code put it before "
        "the encoder, untrained, and drew it anew for testing)."
    )
    end = [
        "mIoU: mean over frames of intersection over union at probability 0.5; of a frame without foreground, the "
        "share of its pixels that are predicted empty. F: beta squared 0.3, the largest of the means over frames with "
        "foreground at 255 thresholds.",
        "Chance: the same segmenter, each clip with the query of another clip. Same modality: a segmenter trained with "
        "the target's queries.",
    ]
    if protocol == "official":
        return "\n".join(
            [
                "segmentation, official protocol: the released code's loss, schedule and averages.",
                network,
                f"Loss: binary cross-entropy on the first frame of each clip. Adam, learning rate "
                f"{segmentation.OFFICIAL_RATE:g}, batches of {segmentation.OFFICIAL_BATCH} clips, 1 epoch as the "
                "released scripts have it (AVSBench has 15).",
                "State: that of the end of the epoch. The released code keeps the best epoch by mIoU on the validation "
                "split with queries of the tested modality, but has one.",
                f"Score: mIoU. As released, mIoU is averaged over frames in batches of {segmentation.OFFICIAL_BATCH} "
                "clips, and F maximised in each batch, and both then averaged over batches.",
                *end,
            ]
        )
    light, large = (
        f"{f'{rule.steps} steps' if rule.steps else f'{rule.epochs} epochs'}, batches of {rule.batch_size} clips, "
        f"learning rate {rule.learning_rate:g}"
        for rule in (LIGHT_SETTINGS, TIMM_SETTINGS)
    )
    return "\n".join(
        [
            "segmentation, held_out protocol.",
            network,
            f"Loss: binary cross-entropy on all labelled frames. Adam; the light backbone {light}, "
            f"falling along a half cosine; one of timm {large}.",
            f"State: of {segmentation.JUDGED} in the course of training, the best mIoU on the validation split with "
            "queries of the modality it is trained with.",
            "Score: mIoU over all labelled frames of the test split with queries of the other modality.",
            *end,
            "Further numbers: F; both with shuffled queries; official_: the released code's averages over batches of 4 "
            "clips; 95 % percentile intervals from 1000 draws of test clips with replacement.",
        ]
    )
