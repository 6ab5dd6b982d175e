"""Effects of single choices of the recommended preset: `python benchmarks/compare_choices.py FOLDER`.

Each variant changes fields of the configuration, trains on the built-in data, and is probed on the validation split.
The test split decides no choice. Rows of benchmarks/results/choices.json are not measured again, so an interrupted
comparison resumes. FOLDER holds the run folders. An existing run folder means that another process trains the variant;
after an interruption it must be removed.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unicode_fast import preset
from unicode_fast.config import ADDED_FIELDS, Config
from unicode_fast.data import ClipSet, Store, open_dataset
from unicode_fast.files.locks import exclusive
from unicode_fast.files.writing import write_json, write_text
from unicode_fast.methods import UniCodeMethod
from unicode_fast.modules import UniCode
from unicode_fast.tasks import Evaluator, Row
from unicode_fast.train import pretrain
from unicode_fast.training.checks import check_store
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import choose_device, versions
from unicode_fast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "choices.json"
Fields = Mapping[str, object]
# The preset before codes were shared; lines that begin with "before" change one rule of it.
BEFORE: Fields = {**ADDED_FIELDS, "commitment_partner": 1.0, "reconstruction_weight": 1.0}
# The start of the comparison; lines that begin with "start" change one rule of it.
START: Fields = {**BEFORE, "cpc_scale": "sqrt_width", "club_weight": 1.0}
VARIANTS: dict[str, Fields] = {
    "recommended": {},
    "features are not normalised": {"feature_norm": "none"},
    "the partners' share in commitment is 1": {"commitment_partner": 1.0},
    "commitment to all partners, words too": {"commitment_partners": "all"},
    "without assignment by second": {"assignment_weight": 0.0},
    "without grounding of words": {"grounding_weight": 0.0},
    "grounding weighs 0.1": {"grounding_weight": 0.1},
    "grounding weighs 1": {"grounding_weight": 1.0},
    "reconstruction weighs 1": {"reconstruction_weight": 1.0},
    "presence in sentences in the place of grounding, 0.3": {"grounding_weight": 0.0, "presence_weight": 0.3},
    "plain EMA, no partners": {"ema_partner": "none"},
    "the own feature weighs 0.2 in MM-EMA": {"ema_own_weight": 0.2},
    "codewords by k-means": {"codebook_init": "kmeans"},
    "without code matching": {"code_matching_weight": 0.0},
    "without CLUB": {"club_estimator": "none"},
    "before: commitment to all partners at 1, nothing normalised, no assignment, no grounding": BEFORE,
    "before, features normalised": {**BEFORE, "feature_norm": "batch"},
    "before, the partners' share in commitment is 10": {**BEFORE, "commitment_partner": 10.0},
    "before, assignment by second": {**BEFORE, "assignment_weight": 1.0},
    "before, code matching at temperature 0.3 weighs 2": {
        **BEFORE,
        "code_matching_temperature": 0.3,
        "code_matching_weight": 2.0,
    },
    "before, codewords stay only while all modalities use them": {**BEFORE, "reset_unless": "all"},
    "before, CLUB weighs 1": {**BEFORE, "club_weight": 1.0},
    "before, without CLUB": {**BEFORE, "club_estimator": "none"},
    "before, Cross-CPC at temperature 0.5": {**BEFORE, "cpc_temperature": 0.5},
    "before, Cross-CPC at temperature 0.5, without CLUB": {
        **BEFORE,
        "cpc_temperature": 0.5,
        "club_estimator": "none",
    },
    "start: Cross-CPC scores divided by sqrt(D), CLUB weighs 1": START,
    "start, 5 inner steps of CLUB": {**START, "club_inner_steps": 5},
    "start, CLUB weighs 0.1": {**BEFORE, "cpc_scale": "sqrt_width"},
    "start, without CLUB": {**BEFORE, "cpc_scale": "sqrt_width", "club_estimator": "none"},
    "start, CLUB may go below zero": {**START, "club_floor": False},
    "start, Cross-CPC softmax over predictions only": {**START, "cpc_softmax_over": "predictions"},
    "start, Cross-CPC without self terms": {**START, "cpc_self_weight": 0.0},
    "start, without code matching": {**START, "code_matching_weight": 0.0},
    "start, plain EMA, no partners": {**START, "ema_partner": "none"},
    "start, without reset": {**START, "reset_after": 0},
    "start, codewords by k-means": {**START, "codebook_init": "kmeans"},
    "start, dropout 0": {**START, "dropout": 0.0},
}
TASKS = ("classification", "localisation")
UNTRIED = (
    "Not tried, because they have no field: a codebook compared by cosine, code matching on hard codes, Cross-CPC on "
    "quantised features, and an annealed start."
)


class ValidationOnly:
    """A data set for the evaluator, with the validation split in place of the test split."""

    def __init__(self, dataset: Store) -> None:
        self.dataset = dataset

    def clips(self, split: str, modality: str) -> ClipSet:
        """Clips of a split with a modality."""
        return self.dataset.clips("val" if split == "test" else split, modality)

    def __getattr__(self, name: str) -> Any:
        """All other attributes are the data set's."""
        return getattr(self.dataset, name)


def measure(config: Config, folder: Path) -> dict[str, object]:
    """Trains and probes one variant."""
    dataset = open_dataset(config.data)
    device = choose_device(config.train.device)
    trainer = Trainer(config, check_store(config, dataset), device)
    progress = pretrain(trainer, dataset, folder, None, DistContext())
    evaluator = Evaluator(trainer.model.eval(), ValidationOnly(dataset), config.train.seed)
    rows = evaluator.table(TASKS)
    return {
        "steps": trainer.step,
        "seed": config.train.seed,
        "seconds_per_step": progress["seconds"] / trainer.step,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "scores": {key_of(row): row.score for row in rows},
        "token": {key_of(row): row.token._asdict() for row in rows if row.token},
        "content_token": {key_of(row): row.content_token._asdict() for row in rows if row.content_token},
        "sharing": {words: found.as_dict() for words, found in evaluator.sharing().items()},
        "reconstruction": reconstruction(trainer.model, dataset, "val"),
    }


def key_of(row: Row) -> str:
    """Task and direction."""
    return f"{row.task} {row.direction}"


@torch.no_grad()
def reconstruction(model: UniCode, dataset: Store, split: str) -> dict[str, float]:
    """Mean squared error by modality on a split."""
    batches = dataset.batches(split, model.names, 100, drop_last=False, dtype=model.dtype)
    method, weight = UniCodeMethod(model.eval()), model.config.method.reconstruction_weight
    found: dict[str, list[float]] = {}
    for number in range(batches.steps_per_epoch):
        batch = batches.batch(number).to(model.device)
        for name, error in method.reconstruction(model(batch.features, batch.mask)).items():
            found.setdefault(name.removeprefix("reconstruction."), []).append(float(error) / weight)
    return {name: float(np.mean(errors)) for name, errors in found.items()}


def folder_name(name: str, seed: int) -> str:
    """Name of the folder of a variant's run."""
    return f"{re.sub('[^a-zA-Z0-9.]+', '-', name)}-{seed}"


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and standard deviation of several values."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def unmeasured(variants: Mapping[str, Fields], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Variants without a row."""
    return [name for name in variants if all(row["variant"] != name for row in rows)]


@contextmanager
def results(path: Path, variants: Mapping[str, Fields]) -> Iterator[list[dict[str, Any]]]:
    """All rows of a file; changes to them are written at the end, by one process at a time."""
    with exclusive(path.with_name(f".{path.name}.lock"), print):
        rows = json.loads(path.read_text()) if path.exists() else []
        yield rows
        rows.sort(key=lambda row: (list(variants).index(row["variant"]), row["seed"]))
        write_json(path, rows)


# Keys in a row, by heading.
COLUMNS: dict[str, tuple[str, ...]] = {
    "classification a→v": ("scores", "classification audio->video"),
    "v→a": ("scores", "classification video->audio"),
    "localisation a→v": ("scores", "localisation audio->video"),
    "v→a ": ("scores", "localisation video->audio"),
    "tokens: classification a→v": ("token", "classification audio->video", "score"),
    "v→a  ": ("token", "classification video->audio", "score"),
    "text→a": ("content_token", "classification text->audio", "score"),
    "text→v": ("content_token", "classification text->video", "score"),
    "localisation a→v ": ("token", "localisation audio->video", "score"),
    "v→a   ": ("token", "localisation video->audio", "score"),
    "a shared in events": ("sharing", "all words", "shared_event_uses", "audio"),
    "v shared in events": ("sharing", "all words", "shared_event_uses", "video"),
}


def number_at(row: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """A number of a row; None where an older row lacks it."""
    found: Any = row
    for key in keys:
        found = found.get(key) if found is not None else None
    return found


def write_table() -> None:
    """Writes docs/choices.md from all finished rows."""
    rows = json.loads(RESULTS.read_text())
    heads = ["variant", "seeds", *COLUMNS, "reconstruction", "s/step"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in VARIANTS:
        mine = [row for row in rows if row["variant"] == name]
        if mine:
            cells = [name, str(len(mine))]
            for keys in COLUMNS.values():
                values = [value for row in mine if (value := number_at(row, keys)) is not None]
                cells.append(shown([100 * value for value in values]) if len(values) == len(mine) else "-")
            errors = [sum(row["reconstruction"].values()) for row in mine if "reconstruction" in row]
            cells.append(f"{statistics.mean(errors):.3f}" if errors else "-")
            cells.append(f"{statistics.mean(row['seconds_per_step'] for row in mine):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    steps = ", ".join(map(str, sorted({row["steps"] for row in rows})))
    made = (
        f"Zero-shot scores in per cent on the validation split after {steps} steps on the built-in data: mean and "
        "standard deviation over seeds. In the headings, a is audio and v is video.\n\n"
        "- **Tokens**: scores of probes that read only which codes a clip uses, text by its content words.\n"
        "- **Shared in events**: share of uses on shared codewords, in seconds with an event ([Sharing](sharing.md)).\n"
        "- **Reconstruction**: sum of the mean squared errors of the three modalities.\n"
        "- **s/step**: seconds a step on one thread, on a machine that runs two lines at a time.\n\n"
        "Localisation differs by several points between seeds. Lines without tokens are older than token scores. The "
        "preset trains 1000 steps; after 600, some lines exceed its own, most of all in text.\n\n"
        "Lines that begin with *before* change one rule of an earlier preset, without the terms for sharing. It does "
        "not normalise features and has no assignment or grounding; commitment to all partners and reconstruction "
        "have weight 1. Lines that begin with *start* change one rule of the configuration from which that preset was "
        "chosen. It also divides Cross-CPC's scores by sqrt(D) and gives CLUB the weight 1."
    )
    table = "\n".join(lines)
    missing = unmeasured(VARIANTS, rows)
    if missing:
        table += f"\n\nNot measured yet with today's preset: {'; '.join(missing)}."
    text = f"# Choices of the recommended preset\n\n{made}\n\n{table}\n\n{UNTRIED}\n"
    write_text(ROOT / "docs" / "choices.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="*", default=list(VARIANTS), help="names of variants [all]")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"variants must be among {', '.join(VARIANTS)}, got {name!r}")
    for seed in arguments.seeds:
        for name in arguments.variants:
            folder = arguments.folder / folder_name(name, seed)
            with results(RESULTS, VARIANTS) as rows:
                found = [row["steps"] for row in rows if (row["variant"], row["seed"]) == (name, seed)]
            done = bool(found)
            if done and found[0] != arguments.steps:
                parser.error(f"steps must be {found[0]} as in the row of {name!r}, got {arguments.steps}")
            if done or folder.exists():
                continue
            folder.mkdir(parents=True)
            changes = {**VARIANTS[name], "steps": arguments.steps, "seed": seed, "validations": 0}
            found = measure(preset("recommended").replace_all(**changes), folder)
            with results(RESULTS, VARIANTS) as rows:
                rows.append({"variant": name, "fields": dict(VARIANTS[name]), **found})
            write_table()


if __name__ == "__main__":
    main()
