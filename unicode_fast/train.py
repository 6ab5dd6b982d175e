"""Pre-training, then the table of zero-shot scores: `python -m unicode_fast.train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unicode_fast import checkpoint
from unicode_fast.cli import given_fields, make_parser, with_underscores
from unicode_fast.config import EXECUTION_FIELDS, PLACE_FIELDS, Config
from unicode_fast.data import BatchLoaderError, BatchSource, Dataset, open_loader
from unicode_fast.errors import Ending, of_command_line, postponed, run_main, say
from unicode_fast.report import plots
from unicode_fast.training import distributed
from unicode_fast.training.checks import VERIFY_HELP, check_store
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.measuring import measure, show_summary, summarise_seeds
from unicode_fast.training.run_log import run_log
from unicode_fast.training.runs import choose_device, keep_preprocessor, make_folder, read_summary, set_threads
from unicode_fast.training.start import clear, describe, held, new_run, read_content, resumed_run
from unicode_fast.training.trainer import Trainer, initialise_codebook, learning_rate

# A signal may end the workers that read batches before this process receives it.
_SIGNAL_SECONDS = 0.5
RESUME_HELP = (
    f"resume an interrupted run, unchanged or with other {', '.join(EXECUTION_FIELDS)}; "
    f"{', '.join(PLACE_FIELDS)} give the new place of the same data"
)


def pretrain(
    trainer: Trainer, dataset: Dataset, folder: Path, content: dict[str, Any] | None, ranks: DistContext
) -> dict[str, Any]:
    """Trains to the end and writes checkpoints, metrics and events to the run folder.

    All ranks train. The first rank also logs, validates and saves, while the others wait.

    Args:
        trainer: new, or restored from `content`.
        dataset: has the training split, and val if the run has validations.
        folder: the run folder.
        content: the checkpoint that is resumed, or None.
        ranks: the ranks that train together.

    Returns:
        `RunLog.progress` on the first rank, {} on the others.

    Raises:
        NonFiniteLoss: after the state has been saved as nonfinite-step-N.pt.
    """
    config, train, device = trainer.config, trainer.config.train, trainer.model.device
    batches = dataset.batches(
        config.data.train_split,
        trainer.model.names,
        train.batch_size,
        train.seed,
        drop_last=not train.keep_last_batch,
        dtype=getattr(torch, train.dtype),
    )
    total = total_steps(config, batches)
    trainer.model.begin(total)
    validate_at = {round(total * (n + 1) / train.validations) for n in range(train.validations)}
    if content is None:
        ranks.run_on_rank0(lambda: initialise_codebook(trainer, batches, device, ranks.size))
        ranks.broadcast_parameters(trainer.model)
    with (
        open_loader(batches, device, train.loader, workers=train.loader_workers, end=total, own=ranks.bounds) as loader,
        # With several ranks, a signal to one rank ends all of them at once.
        postponed("this step is ended and saved") if ranks.size == 1 else contextlib.nullcontext(Ending()) as ending,
        run_log(trainer, dataset, folder, content, ranks, total) as log,
    ):
        while trainer.step < total and not ending.requested:
            step = trainer.step
            with ranks.step(step + 1, device):
                try:
                    batch = loader.batch(step)  # (B, T, ...) by modality
                except BatchLoaderError:
                    if ending.within(_SIGNAL_SECONDS):
                        break
                    raise
                save = ranks.agree(log is not None and log.save_is_due)
                rate = learning_rate(config, step, total, batches.steps_per_epoch)
                result = trainer.train_step(batch.features, batch.mask, rate, ranks.shard(batches.size(step)))
            if log is not None:
                log.record(batches.ids(step, batch), result)
            if trainer.step in validate_at:
                ranks.run_on_rank0(log.validate if log else None, f"validating after step {trainer.step}")
            elif save:
                ranks.run_on_rank0(log.save if log else None, f"saving after step {trainer.step}")
    return log.progress if log else {}


def total_steps(config: Config, batches: BatchSource) -> int:
    """Number of training steps of a run."""
    return config.train.steps or config.train.epochs * batches.steps_per_epoch


def run(
    config: Config,
    dataset: Dataset,
    folder: Path,
    ranks: DistContext,
    resume_step: int | None = None,
    kind: str = "png",
) -> dict[str, Any]:
    """Pre-trains in a run folder, new or resumed, measures the tasks, and writes summary and pictures.

    Args:
        config: of the run.
        dataset: from `open_run_data`.
        folder: an existing run folder with config.yaml.
        ranks: the ranks that train together.
        resume_step: step of the checkpoint that is resumed; None takes the last, if there is one.
        kind: format of the pictures, one of `plots.FORMATS`.

    Returns:
        The content of summary.json.
    """
    started = time.monotonic()
    ranks.begin(config.train.rank_timeout_seconds)
    device = ranks.device(choose_device(config.train.device))
    modalities = check_store(config, dataset)
    content = ranks.run_on_rank0(lambda: read_content(folder, resume_step, config, modalities, dataset, ranks))
    trainer = Trainer(config, modalities, device)
    trainer.model.preprocessor = dataset.preprocessor
    if content is not None:
        trainer.restore(content)
    if ranks.first:
        clear(folder, content, resume_step)
        keep_preprocessor(folder, dataset)
    if config.train.compile:
        say("the first step compiles encoders and decoders and takes longer", file=sys.stderr)
    seconds = time.monotonic() - started
    progress = pretrain(trainer, dataset, folder, content, ranks)
    return ranks.run_on_rank0(lambda: measure(trainer, dataset, folder, progress, seconds, kind), "measuring")


def run_seeds(
    config: Config, dataset: Dataset, folder: Path, seeds: Sequence[int], ranks: DistContext, kind: str = "png"
) -> dict[str, Any]:
    """One run for each seed in its own subfolder, except those that have finished; mean and spread above them.

    Returns:
        The content of the summary.json above the seeds.
    """
    summaries = [run_seed(config.replace(seed=seed), dataset, folder / f"seed-{seed}", ranks, kind) for seed in seeds]
    return ranks.run_on_rank0(lambda: summarise_seeds(folder, seeds, summaries, kind))


def run_seed(config: Config, dataset: Dataset, folder: Path, ranks: DistContext, kind: str) -> dict[str, Any]:
    """The summary of one seed of several, which is trained now unless it has finished."""
    if ranks.run_on_rank0((folder / checkpoint.SUMMARY).exists):
        return ranks.run_on_rank0(lambda: read_summary(folder))
    say(f"seed {config.train.seed}: {folder}", file=sys.stderr)
    if not ranks.run_on_rank0(folder.exists):
        ranks.run_on_rank0(lambda: make_folder(folder, config))
    with held(folder, ranks):
        return run(config, dataset, folder, ranks, kind=kind)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.train --help`."""
    with distributed.join() as ranks:
        return train(argv, ranks)


def train(argv: Sequence[str] | None, ranks: DistContext) -> int:
    """The command line on one rank."""
    parser = make_parser(
        "train", "Pre-train Uni-Code or another method, then measure how its codes transfer between modalities."
    )
    parser.add_argument("--out", help="new folder of the run [runs/<UTC time>-<preset>-<seed>]")
    parser.add_argument("--resume", metavar="RUN", help=RESUME_HELP)
    parser.add_argument("--resume_step", type=int, help="step of the checkpoint to resume from [the last]")
    parser.add_argument("--seeds", type=int, default=1, help="train with this many seeds; mean and spread in the table")
    parser.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    parser.add_argument("--format", default="png", help=plots.FORMAT_HELP)
    arguments = parser.parse_args(with_underscores(argv))
    with of_command_line():
        plots.check_format(arguments.format)
    begin = new_run if arguments.resume is None else resumed_run
    with begin(arguments, given_fields(arguments), ranks) as (folder, config, seeds, dataset):
        if dataset is None:
            summary = ranks.run_on_rank0(lambda: read_summary(folder))
            say(f"run {folder} has finished already", file=sys.stderr)
        else:
            describe(folder, config, seeds, dataset)
            if ranks.size == 1:
                set_threads(folder, new=arguments.resume is None)
            try:
                if seeds:
                    summary = run_seeds(config, dataset, folder, seeds, ranks, arguments.format)
                else:
                    summary = run(config, dataset, folder, ranks, arguments.resume_step, arguments.format)
            except KeyboardInterrupt:
                saved = [f"step {step} is saved; " for step in checkpoint.steps_in(folder)[-1:]]
                say(f"{''.join(saved)}to go on: --resume {shlex.quote(str(folder))}", file=sys.stderr)
                raise
    show_summary(summary, folder, seeds)
    return 0


if __name__ == "__main__":
    run_main(main)
