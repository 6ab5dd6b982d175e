"""What each task measures under each protocol, in words."""

from __future__ import annotations

from unicode_fast.tasks.runner import probe_task

_HEADS = {
    "classification": "Linear(D, D), maximum over time, Linear(D, C)",
    "localisation": "Linear(D, D), Linear(D, C+1), each step by itself, background last",
}

_SOUND = {
    "classification": """\
Loss: cross-entropy with the clip's class.
Score: accuracy on the test split in the other modality.
Chance: 1 / C.""",
    "localisation": """\
Modalities: those with labels at each step; a sentence has no time axis.
Loss: binary cross-entropy with logits over all C+1 columns of the valid steps.
Score: micro-F1, true and false positives and false negatives pooled over the C foreground classes and the valid steps \
of the test split in the other modality, at probability 0.5.
Chance: the best such F1 of a constant prediction, known from the test labels.""",
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
probe was trained on.
Chance: the best such precision of a constant prediction.""",
}


def explain(task: str, protocol: str = "sound") -> str:
    """The definition of a task's numbers, some lines to print.

    Args:
        task: classification or localisation.
        protocol: sound or official.

    Raises:
        ValueError: one of them is unknown.
    """
    kind = probe_task(task, protocol)
    rule = kind.rule
    numbers = f"Adam, {rule.epochs} epochs, batches of {rule.batch_size} clips, learning rate {rule.learning_rate:g}"
    if protocol == "sound":
        return "\n".join(
            [
                f"{task}, sound protocol.",
                "Encoder: frozen, evaluation mode. A probe is trained on the codewords of one modality of the training "
                "split and tested, unchanged, on another modality of the test split.",
                f"Probe: {_HEADS[task]}; codewords centred and divided by one number first.",
                f"Training: {numbers}; several passes an epoch where clips are too few for {rule.least_steps} steps.",
                "Epoch: the best one on the validation split in the modality the probe is trained on. Labels of the "
                "other modality have no part in any choice: zero-shot means that there are none.",
                _SOUND[task],
                "Same modality: a probe trained and tested on the row's target modality, else alike.",
            ]
        )
    return "\n".join(
        [
            f"{task}, official protocol: the released code's definitions. Not comparable with the sound protocol.",
            "Encoder: weights frozen, but in training mode while the probe trains, so that its dropout changes the "
            "codes in every epoch; evaluation mode for scores. No codebook update.",
            f"Probe: {_HEADS[task]}, float64.",
            f"Training: {numbers}, halved at epochs {', '.join(map(str, rule.halve_at))}, gradient norm of the probe "
            f"clipped at {rule.clip_norm:g}; all {rule.epochs} epochs (the released loop starts after the epoch number "
            "of the pre-training checkpoint).",
            "Epoch: the best one on the clips that are scored.",
            _OFFICIAL[task],
            "Padded steps count nowhere; the released code has none.",
            "Same modality: a probe trained and scored on the row's target modality, else alike.",
        ]
    )
