"""Accuracy with labels: `python benchmarks/upper_bound.py [DATA] [--steps N] [--seeds N]`.

Each encoder of the recommended preset is trained with the classes of the training clips: features, semantic encoder,
maximum over the clip's positions, linear classifier. No codebook and no other modality is used. The step is chosen on
validation clips of the same modality; accuracies are those of the test split. They are upper bounds of zero-shot
scores, because the same encoder is trained with labels of the tested modality. results/upper-bound.json holds them.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import trange

from unicode_fast import preset
from unicode_fast.config import Config, Modality
from unicode_fast.data import Store, open_dataset
from unicode_fast.files.writing import write_json
from unicode_fast.modules.encoders import ModalityEncoder
from unicode_fast.training.checks import check_store
from unicode_fast.training.runs import versions
from unicode_fast.training.trainer import learning_rate

RESULTS = Path(__file__).resolve().parent / "results" / "upper-bound.json"
VALIDATIONS = 10


class Labelled(nn.Module):
    """A modality's encoder and a classifier of clips."""

    def __init__(self, modality: Modality, config: Config, classes: int) -> None:
        super().__init__()
        self.encoder = ModalityEncoder(modality, config.model)
        self.classifier = nn.Linear(config.model.width, classes)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B, T, ...) and (B, T) to (B, classes)."""
        z = self.encoder.encode_semantic(self.encoder.read_words(features, mask), mask)
        return self.classifier(z.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1))


@torch.no_grad()
def accuracy(model: Labelled, dataset: Store, split: str, name: str) -> float:
    """Share of a split's clips with the correct class."""
    clips = dataset.clips(split, name)
    right = 0
    model.eval()
    for numbers in np.array_split(np.arange(len(clips)), -(-len(clips) // 250)):
        scores = model(*tensors(clips, name, numbers))
        right += int((scores.argmax(1).numpy() == np.asarray(clips.target)[numbers]).sum())
    return right / len(clips)


def tensors(clips, name: str, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
    """Features, zero outside the mask, and mask of some clips."""
    mask = torch.from_numpy(np.array(clips.mask[name][numbers]))
    features = torch.from_numpy(np.array(clips.features[name][numbers]))
    return torch.where(mask.view(*mask.shape, *[1] * (features.dim() - 2)), features, 0), mask


def train(config: Config, dataset: Store, name: str) -> float:
    """Test accuracy of one modality at the step with the best validation accuracy."""
    torch.manual_seed(config.train.seed)
    clips, steps = dataset.clips("train", name), config.train.steps
    model = Labelled(check_store(config, dataset)[name], config, len(clips.classes))
    optimizer = torch.optim.Adam(model.parameters(), config.train.learning_rate)
    generator = np.random.default_rng(config.train.seed)
    target = torch.from_numpy(np.array(clips.target))
    best = (-1.0, 0.0)
    order = np.concatenate(
        [generator.permutation(len(clips)) for _ in range(1 + steps * config.train.batch_size // len(clips))]
    )
    for step in trange(steps, desc=f"{name}, seed {config.train.seed}"):
        numbers = order[step * config.train.batch_size :][: config.train.batch_size]
        model.train()
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, steps, 1)
        loss = F.cross_entropy(model(*tensors(clips, name, numbers)), target[numbers])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        optimizer.step()
        if (step + 1) % max(1, steps // VALIDATIONS) == 0:
            validated = accuracy(model, dataset, "val", name)
            if validated > best[0]:
                best = (validated, accuracy(model, dataset, "test", name))
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="?", default="talking-numbers", help="name of a data set [%(default)s]")
    parser.add_argument("--steps", type=int, default=600, help="[%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    arguments = parser.parse_args()
    base = preset("recommended").replace(data=arguments.data, steps=arguments.steps)
    dataset = open_dataset(base.data)
    found = {
        name: [train(base.replace(seed=seed), dataset, name) for seed in range(arguments.seeds)]
        for name in check_store(base, dataset)
    }
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    everything[arguments.data] = {"steps": arguments.steps, "accuracy": found, "versions": versions()}
    write_json(RESULTS, everything)
    for name, accuracies in found.items():
        print(f"{name}: {100 * statistics.mean(accuracies):.1f} %")


if __name__ == "__main__":
    main()
