"""The default run on the C++ backend and on the reference.

`python benchmarks/compare_backends.py` compares the codes of all clips and the losses of the first steps. The status is
1 where codes differ. Both take the same backend of Cross-CPC: its backends add in another order.

`python benchmarks/compare_backends.py --tables` compares the summaries of two finished runs with --seeds 3 in
benchmarks/results/: default-run.json and, with UNICODE_FAST_BACKEND=reference, default-run-reference.json. The status
is 1 where a score differs by more than the sum of both standard deviations over seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from unicode_fast import backend, preset
from unicode_fast.data import Batches, open_dataset
from unicode_fast.files.writing import write_json
from unicode_fast.train import total_steps
from unicode_fast.training.checks import check_store
from unicode_fast.training.runs import choose_device, git_commit, versions
from unicode_fast.training.trainer import Trainer, initialise_codebook, learning_rate

RESULTS = Path(__file__).resolve().parent / "results"


def first_steps(steps: int) -> list[tuple[dict[str, torch.Tensor], dict[str, float]]]:
    """Codes before each step, and losses of the step."""
    config = preset("recommended")
    dataset = open_dataset(config.data)
    device = choose_device(config.train.device)
    trainer = Trainer(config, check_store(config, dataset), device)
    clips = dataset.split("train").restrict(trainer.model.names)
    batches = Batches(clips, config.train.batch_size, config.train.seed, drop_last=True, dtype=torch.float32)
    initialise_codebook(trainer, batches, device)
    found = []
    for step in range(steps):
        batch = batches.batch(step).to(device)
        with torch.no_grad():
            codes = trainer.model.eval()(batch.features, batch.mask).index
        rate = learning_rate(config, step, total_steps(config, batches), batches.steps_per_epoch)
        result = trainer.train_step(batch.features, batch.mask, rate)
        found.append((codes, {name: term.item() for name, term in result.terms.items()}))
    return found


def compare_tables() -> int:
    """Prints each pair of scores; 1 where a pair differs by more than the spread over seeds."""
    fast, slow = (json.loads((RESULTS / f"default-run{name}.json").read_text())["rows"] for name in ("", "-reference"))
    status = 0
    for row, other in zip(fast, slow, strict=True):
        agree = abs(row["score"] - other["score"]) <= row["std"] + other["std"]
        status |= not agree
        scores = " and ".join(f"{100 * found['score']:.1f} ± {100 * found['std']:.1f} %" for found in (row, other))
        print(f"{row['task']:14} {row['from']:5} -> {row['to']:5} {scores}{'' if agree else ': apart'}")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="compare the finished runs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "backends.json")
    arguments = parser.parse_args()
    if arguments.tables:
        return compare_tables()
    fast = first_steps(arguments.steps)
    others = dict.fromkeys(backend.IMPLEMENTATIONS.keys() - {"cross_info_nce"}, ("reference",))
    backend.IMPLEMENTATIONS.update(others)
    slow = first_steps(arguments.steps)
    differing, largest = 0, 0.0
    for (codes, terms), (other_codes, other_terms) in zip(fast, slow, strict=True):
        differing += sum(int((codes[name] != other_codes[name]).sum()) for name in codes)
        for name, term in terms.items():
            largest = max(largest, abs(term - other_terms[name]) / max(abs(other_terms[name]), 1e-6))
    result = {
        "steps": arguments.steps,
        "codes_that_differ": differing,
        "largest_relative_difference_of_a_loss": largest,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_json(arguments.out, result)
    print(result)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
