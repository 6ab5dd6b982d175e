"""Pre-training, then the table of zero-shot scores: `python -m unicode_fast.train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm

from unicode_fast import checkpoint, health
from unicode_fast.checkpoint import CheckpointError, write_config
from unicode_fast.cli import (
    added_fields,
    given_fields,
    make_parser,
    read_yaml,
    resolve,
    resolve_saved,
    standard_values,
    with_underscores,
)
from unicode_fast.config import (
    EXECUTION_FIELDS,
    PLACE_FIELDS,
    TEXT_FIELDS,
    Config,
    Kind,
    Modality,
    modality_names,
)
from unicode_fast.data import BatchSource, Dataset, Feed, FeedError, built_in, open_dataset, open_feed, verify
from unicode_fast.data.findings import classes_of, unlearnable
from unicode_fast.data.layouts import has_sentences
from unicode_fast.data.opening import absolute
from unicode_fast.errors import Ending, few, one_line, postponed, run_main, say
from unicode_fast.files.locks import alone
from unicode_fast.files.writing import remove_unfinished, write_json
from unicode_fast.modules import UniCode
from unicode_fast.presets import preset
from unicode_fast.report import pictures, plots
from unicode_fast.tasks import (
    PROBE_TASKS,
    RETRIEVAL,
    Probes,
    Row,
    Sharing,
    aggregate,
    check_partners,
    check_tasks,
    format_legend,
    format_sharing,
    format_table,
    mean_sharing,
    open_partners,
    validate,
)
from unicode_fast.training import distributed
from unicode_fast.training.acceleration import check_acceleration
from unicode_fast.training.distributed import Ranks
from unicode_fast.training.metrics_logger import LOG_EVERY, Journal, NonFiniteLoss, StepResult, read_metrics
from unicode_fast.training.runs import (
    LOCK,
    choose_device,
    git_commit,
    has_ended,
    make_folder,
    prepare_folder,
    read_summary,
    resume_folder,
    single_folders,
    versions,
)
from unicode_fast.training.trainer import Trainer, initialise_codebook, learning_rate

NO_TASKS = "none"
BUILT_IN_MODALITIES = ("audio", "video", "text")
MOVED = "--data says where they lie now"
VERIFY_HELP = "compare the checksums of a feature store again, as is done when it is opened for the first time"
RESUME_HELP = (
    f"go on with a run that was interrupted, as it was or with other {', '.join(EXECUTION_FIELDS)}; "
    f"{', '.join(PLACE_FIELDS)} say where the same data lie now"
)
# A job that is ended may lose the processes that read batches before this one hears of it.
_SIGNAL_SECONDS = 0.5


def total_steps(config: Config, batches: BatchSource) -> int:
    """Batches of pre-training."""
    return config.train.steps or config.train.epochs * batches.steps_per_epoch


def advance(trainer: Trainer, feed: Feed, ranks: Ranks) -> tuple[np.ndarray, StepResult]:
    """One step of training, and what the clips in its batch are called."""
    step, config, batches = trainer.step, trainer.config, feed.batches
    batch = feed.batch(step)
    # Not before, so that a rank whose feed hangs is behind the others.
    ranks.step = step + 1
    rate = learning_rate(config, step, total_steps(config, batches), batches.steps_per_epoch)
    result = trainer.train_step(batch.features, batch.mask, rate, ranks.shard(batches.size(step)))
    ranks.phase = "training"
    return batches.ids(step, batch), result


def advance_unless(ending: Ending, trainer: Trainer, feed: Feed, ranks: Ranks) -> tuple[np.ndarray, StepResult] | None:
    """The same; None where the batch is lost as what ends this process has ended those that read for it."""
    try:
        return advance(trainer, feed, ranks)
    except FeedError:
        if ranks.size == 1 and ending.within(_SIGNAL_SECONDS):
            return None
        raise


def choose_best(trainer: Trainer, store: Dataset, folder: Path, progress: dict[str, Any]) -> dict[str, Any]:
    """Validates, and keeps the model where it is the best so far; the line for metrics.jsonl."""
    step, found = trainer.step, validate(trainer.model, store, seed=trainer.config.train.seed)
    if progress["best"] is None or found["mean"] > progress["best"]["accuracy"]:
        progress["best"] = {"step": step, "accuracy": found["mean"]}
        best = folder / checkpoint.FOLDER / checkpoint.BEST
        checkpoint.save(best, trainer.model, {"step": step, "data": progress["data"]})
    return {"step": step, "kind": "validation", **found}


def follow(trainer: Trainer, feed: Feed, ranks: Ranks, total: int) -> dict[str, Any]:
    """What `pretrain` is on ranks after the first."""
    with feed:
        while trainer.step < total:
            advance(trainer, feed, ranks)
    return {}


class StepBar(tqdm):
    """A progress bar of steps; on a terminal its seconds go on while a step takes long, as one that compiles does."""

    def __init__(self, total: int, initial: int) -> None:
        self.ended = threading.Event()
        super().__init__(total=total, initial=initial, desc="pre-training", unit="step", dynamic_ncols=True)
        if sys.stderr.isatty():
            threading.Thread(target=self._tick, daemon=True).start()

    def __del__(self) -> None:
        """As that of tqdm, where Ctrl-C has not come before all of it was made."""
        with contextlib.suppress(AttributeError):
            super().__del__()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.ended.set()
        super().close()

    def _tick(self) -> None:
        while not self.ended.wait(1.0):
            self.refresh()


def pretrain(
    trainer: Trainer, store: Dataset, folder: Path, content: Mapping[str, Any] | None, ranks: Ranks
) -> dict[str, Any]:
    """Trains to the end and leaves checkpoints, metrics and events in the run folder.

    All ranks train; what is written, shown and measured is the work of the first, for which the others wait.

    Args:
        trainer: fresh, or restored from `content`.
        store: with the split that is trained on, and val where there are validations.
        folder: of the run.
        content: of the checkpoint that is resumed, or None.
        ranks: that train together.

    Returns:
        Plain facts for the summary: best step, its validation accuracy, seconds; on the first rank only.

    Raises:
        NonFiniteLoss: after the state has been saved as nonfinite-step-N.pt.
    """
    config, device = trainer.config, trainer.model.device
    train = config.train
    batches = store.batches(
        config.data.train_split,
        trainer.model.names,
        train.batch_size,
        train.seed,
        drop_last=not train.keep_last_batch,
        dtype=getattr(torch, train.dtype),
    )
    total = total_steps(config, batches)
    progress: dict[str, Any] = {
        "best": None,
        "seconds": 0.0,
        "bytes": 0,
        "data": store.digest(),
        "changes": [],
        **(content["progress"] if content else {}),
        "ranks": ranks.size,
    }
    if content is None:
        ranks.from_first(lambda: initialise_codebook(trainer, batches, device, ranks.size))
        ranks.copy_from_first(trainer.model)
    feed = open_feed(batches, device, train.feed, workers=train.feed_workers, end=total, own=ranks.bounds)
    if not ranks.first:
        return follow(trainer, feed, ranks, total)
    journal = Journal(
        folder, progress["bytes"], trainer.step if content else None, content["usage"] if content else None, total
    )
    validate_at = {round(total * (n + 1) / train.validations) for n in range(train.validations)}
    started, seconds_before, saved_at = time.monotonic(), progress["seconds"], time.monotonic()
    # The step of the newest checkpoint.
    saved: int | None = trainer.step if content else None

    def save(name: str | None = None) -> None:
        nonlocal saved
        progress.update(bytes=journal.flush(), seconds=seconds_before + time.monotonic() - started)
        path = folder / checkpoint.FOLDER / name if name else checkpoint.step_path(folder, trainer.step)
        extra = {**trainer.state(), "progress": progress, "usage": journal.usage_so_far()}
        with ranks.alone():
            checkpoint.save(path, trainer.model, extra)
        if name is None:
            saved = trainer.step
            checkpoint.keep_newest(folder)

    bar = StepBar(total, trainer.step)
    try:
        # Ranks that torchrun ends do so together, at once.
        with (
            postponed("this step is ended and saved") if ranks.size == 1 else contextlib.nullcontext(Ending()) as ending
        ):
            if content is None:
                save()
            while trainer.step < total and not ending.asked:
                if (taken := advance_unless(ending, trainer, feed, ranks)) is None:
                    break
                journal.record(trainer.step, trainer.optimizer.param_groups[0]["lr"], *taken)
                bar.update()
                if trainer.step % LOG_EVERY == 0:
                    bar.set_postfix(journal.shown)
                if trainer.step in validate_at:
                    journal.flush()
                    with ranks.alone():
                        journal.write(choose_best(trainer, store, folder, progress))
                    save()
                    saved_at = time.monotonic()
                elif time.monotonic() - saved_at > train.checkpoint_seconds:
                    save()
                    saved_at = time.monotonic()
            if trainer.step != saved:
                save()
            bar.set_postfix(journal.shown)
    except NonFiniteLoss as error:
        journal.pending.clear()
        name = f"{checkpoint.NON_FINITE}step-{trainer.step:08d}.pt"
        save(name)
        raise NonFiniteLoss(f"{error}; the state is saved as {folder / checkpoint.FOLDER / name}") from error
    finally:
        feed.close()
        bar.close()
        journal.close()
    return progress


def run(
    config: Config, folder: Path, resume_step: int | None = None, ranks: Ranks | None = None, kind: str = "png"
) -> dict[str, Any]:
    """Pre-trains in a run folder, or goes on with what is there, probes, and writes summary and pictures.

    Args:
        config: of the run.
        folder: exists already and holds config.yaml.
        resume_step: checkpoint to go on from; None takes the last, if there is one.
        ranks: that train together; None for this process alone.
        kind: of the pictures, one of `plots.FORMATS`.

    Returns:
        The content of summary.json.
    """
    ranks = ranks or Ranks()
    ranks.begin(config.train.rank_timeout_seconds)
    started = time.monotonic()
    device = ranks.device(choose_device(config.train.device))
    store = open_run_data(config)
    modalities = check_store(config, store)
    check_ranks(config, len(store.split(config.data.train_split)), ranks)
    ranks.phase = "starting"

    def read() -> dict[str, Any] | None:
        if resume_step is None and not checkpoint.steps_in(folder):
            if (folder / "summary.json").exists():
                raise CheckpointError(f"run {folder} has ended, but has no checkpoint any more to go on from")
            return None
        # What goes to other ranks goes by way of the CPU.
        place = device if ranks.size == 1 else torch.device("cpu")
        content = checkpoint.read_for_resume(folder, resume_step, place)
        checkpoint.check_model(content, config, modalities)
        return content

    content = ranks.from_first(read)
    trainer = Trainer(config, modalities, device)
    if content is not None:
        go_on(trainer, content, store, ranks)
        ranks.step = trainer.step
    if ranks.first:
        clear(folder, content, resume_step)
    if config.train.compile and ranks.first:
        say("encoders and decoders are compiled in the first step, which takes its time", file=sys.stderr)
    begun = time.monotonic()
    progress = pretrain(trainer, store, folder, content, ranks)
    pretraining = time.monotonic() - begun

    def conclude() -> dict[str, Any]:
        seconds = progress["seconds"] + time.monotonic() - started - pretraining
        return measure(trainer, store, folder, progress, seconds, kind)

    return ranks.from_first(conclude, "measuring")


def clear(folder: Path, content: Mapping[str, Any] | None, resume_step: int | None) -> None:
    """Readies a run folder to be written: removes what killed processes left half done, sets later work aside.

    Args:
        folder: of the run, in which no other process works.
        content: of the checkpoint that the run goes on from; None for a run from its beginning.
        resume_step: the step that was asked for; None for the last.
    """
    checkpoints = folder / checkpoint.FOLDER
    for below in (folder, folder / pictures.FOLDER, checkpoints, *checkpoints.glob(f"{checkpoint.ASIDE}-*")):
        remove_unfinished(below)
    if content is None:
        return
    step, progress = content["step"], content["progress"]
    if resume_step is not None:
        aside = checkpoint.set_aside(folder, step, progress["bytes"])
        if aside is not None:
            say(f"what the run did after step {step} is kept in {aside}", file=sys.stderr)
    checkpoint.keep_newest(folder)
    if progress["best"] and progress["best"]["step"] != checkpoint.step_of_best(folder):
        # It was replaced by a later one; validations up to that are made again, and choose it or a better one.
        progress["best"] = None


def go_on(trainer: Trainer, content: Mapping[str, Any], store: Dataset, ranks: Ranks) -> None:
    """Restores what a checkpoint holds, says which fields of the run are no longer as they were, and notes it there.

    Raises:
        CheckpointError: it is of another model, of other data, or of a stream that another number of ranks read.
    """
    progress, step, fields = content["progress"], content["step"], trainer.config.flat()
    before = checkpoint.changed_fields(content, trainer.config, trainer.model.modalities)
    check_digest(content, store)
    if not store.shares_batches and progress.get("ranks") != ranks.size:
        raise CheckpointError(
            f"ranks of a stream, each of which reads files of its own, must be as many as before, "
            f"{progress.get('ranks')}, got {ranks.size}"
        )
    changes = progress.setdefault("changes", [])
    for name, value in before.items():
        say(f"from step {step} on {name} is {fields[name]}, no longer {value}", file=sys.stderr)
        changes.append({"step": step, "field": name, "before": value, "after": fields[name]})
    trainer.restore(content)


def check_digest(content: Mapping[str, Any], store: Dataset) -> None:
    """Raise CheckpointError where data are not those that the run of a checkpoint was trained on."""
    if content["progress"]["data"] != store.digest():
        raise CheckpointError(
            f"data must be what the checkpoint of step {content['step']} was trained on, got {store!r}"
        )


def measure(  # noqa: PLR0913 - what is measured, and how it is shown
    trainer: Trainer, store: Dataset, folder: Path, progress: Mapping[str, Any], seconds: float, kind: str = "png"
) -> dict[str, Any]:
    """Probes the best model of a run that has been trained, and writes summary and pictures.

    Args:
        trainer: at the end of pre-training.
        store: that it learned from.
        folder: of the run.
        progress: what `pretrain` returned.
        seconds: of the run, without the probes.
        kind: of the pictures.

    Returns:
        The content of summary.json.
    """
    begun, config = time.monotonic(), trainer.config
    which = "best" if progress["best"] else "last"
    model = checkpoint.load(folder, which, trainer.model.device)
    tasks = config.train.probe_tasks
    partners = open_partners(config.data, tasks, store) if tasks != NO_TASKS else None
    probes = Probes(model, store, config.train.seed, partners=partners)
    rows = probes.table(tasks) if tasks != NO_TASKS else []
    measured = {row.task for row in rows}
    for task in [] if tasks == NO_TASKS else [task for task in check_tasks(tasks) if task not in measured]:
        say(f"note: {task} is left out, the data have not what it needs in two modalities; see --explain", sys.stderr)
    sharing = probes.sharing() if rows else {}
    summary = {
        "rows": [row.as_dict() for row in rows],
        **({"sharing": {name: found.as_dict() for name, found in sharing.items()}} if rows else {}),
        "warnings": warnings_of(rows, sharing, config.model.codewords) if rows else last_warnings(folder),
        "dataset": store.name,
        "checkpoint": {"used": which, **(progress["best"] or {"step": trainer.step})},
        "steps": trainer.step,
        "changes": progress["changes"],
        "seconds": seconds + time.monotonic() - begun,
        "seconds_of_pretraining": progress["seconds"],
        "threads": torch.get_num_threads(),
        "seed": config.train.seed,
        "versions": versions(),
        "git_commit": git_commit(),
    }
    if rows:
        note_shared(store)
    if config.train.probe_tasks != NO_TASKS:
        pictures.draw_run(folder, probes, store, rows, config.model.codewords, kind)
    write_json(folder / checkpoint.SUMMARY, summary)
    return summary


def warnings_of(rows: Sequence[Row], sharing: Mapping[str, Sharing], codewords: int) -> list[str]:
    """What a table and the codes of the test split, all words of a sentence among them, give reason to doubt."""
    codes = next(iter(sharing.values()))
    return [*health.collapsed(codes.codes_in_use, codes.perplexity, codewords).values(), *health.at_chance(rows)]


def last_warnings(folder: Path) -> list[str]:
    """What the last line of training in a run's metrics warns of."""
    lines = read_metrics(folder)
    last = [line for line in lines if line["kind"] == "train"][-1:]
    return last[0].get("warnings", []) if last else []


def note_shared(store: Dataset) -> None:
    """Says on the error stream where clips that are learned from are tested on."""
    for first, second in (("train", "test"), ("val", "test"), ("train", "val")):
        shared = store.shared(first, second)
        if shared:
            say(
                f"note: {len(shared)} clips of {store.path} are in {first} and in {second}, such as {shared[0]!r}: "
                "what is scored is no longer unseen",
                file=sys.stderr,
            )


def note_labels(config: Config, store: Dataset) -> None:
    """Says on the error stream where classes of clips are none that can be learned, before hours are spent on them."""
    read = splits_of(config)
    if len(read) == 1:
        return
    clips = [(name, store.split(name)) for name in ("train", "val", "test") if name in read]
    counts: dict[str, dict[str, int]] = {
        name: classes_of(part.target, part.classes) for name, part in clips if "class" in part.arrays
    }
    for finding in unlearnable(counts):
        named = f" ({few(finding.clips, room=80)})" if finding.clips else ""
        say(f"note: {finding.text}{named}", file=sys.stderr)


def run_seeds(config: Config, folder: Path, seeds: Sequence[int], ranks: Ranks, kind: str = "png") -> dict[str, Any]:
    """One run for each seed in its own subfolder, those that ended left alone; mean and spread on top.

    Returns:
        The content of the summary.json above the seeds.
    """
    summaries = []
    for seed in seeds:
        below = folder / f"seed-{seed}"
        with contextlib.ExitStack() as stack:

            def begin(below: Path = below, seed: int = seed, stack: contextlib.ExitStack = stack) -> Any:
                if (below / checkpoint.SUMMARY).exists():
                    return read_summary(below)
                if not below.exists():
                    make_folder(below, config.replace(seed=seed))
                stack.enter_context(alone(below / LOCK, f"run {below}"))
                write_config(below, config.replace(seed=seed))
                return None

            summary = ranks.from_first(begin)
            if summary is None:
                say(f"seed {seed}: {below}", file=sys.stderr)
                summary = run(config.replace(seed=seed), below, ranks=ranks, kind=kind)
        summaries.append(summary)
    return ranks.from_first(lambda: summarise_seeds(folder, seeds, summaries, kind))


def summarise_seeds(
    folder: Path, seeds: Sequence[int], summaries: Sequence[Mapping[str, Any]], kind: str = "png"
) -> dict[str, Any]:
    """Writes the summary.json above the seeds and its picture; returns its content."""
    rows = aggregate([[Row.from_dict(row) for row in summary["rows"]] for summary in summaries])
    summary = {
        "rows": [row.as_dict() for row in rows],
        **_mean_sharing(summaries),
        "warnings": [
            f"seed {seed}: {text}"
            for seed, summary in zip(seeds, summaries, strict=True)
            for text in summary.get("warnings", [])
        ],
        "seed": seeds[0],
        "seeds": list(seeds),
        "seconds": sum(summary["seconds"] for summary in summaries),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    pictures.draw_bars(folder, rows, kind)
    write_json(folder / checkpoint.SUMMARY, summary)
    return summary


def _mean_sharing(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; nothing where one of them was measured by an older version."""
    found = [summary.get("sharing", {}) for summary in summaries]
    shared = [name for name in found[0] if all(name in one for one in found)]
    means = {name: mean_sharing([Sharing(**one[name]) for one in found]).as_dict() for name in shared}
    return {"sharing": means} if means else {}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `python -m unicode_fast.train --help`."""
    with distributed.join() as ranks:
        return train(argv, ranks)


def train(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """The command line on one of the ranks that torchrun starts."""
    parser = make_parser("train", "Pre-train Uni-Code, then measure what its codes carry from modality to modality.")
    parser.add_argument("--out", help="new folder of the run [runs/<UTC time>-<preset>-<seed>]")
    parser.add_argument("--resume", metavar="RUN", help=RESUME_HELP)
    parser.add_argument("--resume_step", type=int, help="from the checkpoint of this step, not the last")
    parser.add_argument("--seeds", type=int, default=1, help="train with this many seeds; mean and spread in the table")
    parser.add_argument("--verify", action="store_true", help=VERIFY_HELP)
    parser.add_argument("--format", default="png", help=plots.FORMAT_HELP)
    arguments = parser.parse_args(with_underscores(argv))
    plots.check_format(arguments.format)
    flags = given_fields(arguments)
    with contextlib.ExitStack() as held:

        def hold(folder: Path) -> None:
            ranks.from_first(lambda: held.enter_context(alone(folder / LOCK, f"run {folder}")))

        if arguments.resume is None:
            found = begin(arguments, flags, ranks)
            hold(found.folder)
        else:
            found = resume(arguments, flags, ranks, hold)
        if found.store is None:
            summary = ranks.from_first(lambda: read_summary(found.folder))
            say(f"run {found.folder} has ended, nothing is left to do", file=sys.stderr)
        else:
            describe(found, ranks)
            try:
                if found.seeds:
                    summary = run_seeds(found.config, found.folder, found.seeds, ranks, arguments.format)
                else:
                    summary = run(found.config, found.folder, arguments.resume_step, ranks, arguments.format)
            except KeyboardInterrupt:
                saved = [f"step {step} is saved; " for step in checkpoint.steps_in(found.folder)[-1:]]
                say(f"{''.join(saved)}to go on: --resume {shlex.quote(str(found.folder))}", file=sys.stderr)
                raise
    if summary["rows"]:
        rows = [Row.from_dict(row) for row in summary["rows"]]
        say(f"{format_table(rows)}\n{format_legend(rows)}".rstrip())
        sharing = summary.get("sharing", {})
        for words, values in sharing.items():
            which = f", {words}" if len(sharing) > 1 else ""
            say(f"\ncodes on the test split{which}\n{format_sharing(Sharing(**values))}\n")
    for warning in summary.get("warnings", []):
        say(f"warning: {warning}")
    say(f"next: {next_command(found, bool(summary['rows']))}")
    return 0


class Found(NamedTuple):
    """A run that is begun or gone on with; `store` is None where nothing of it is left to do."""

    folder: Path
    config: Config
    seeds: list[int] | None
    store: Dataset | None


def begin(arguments: Namespace, flags: Mapping[str, Any], ranks: Ranks) -> Found:
    """Makes the folder of a new run, after a look at all that can be known to fail later."""
    if arguments.resume_step is not None:
        raise ValueError("resume_step needs --resume RUN")
    if arguments.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {arguments.seeds}")
    config = with_whole_paths(resolve(arguments.config, dict(flags)))
    check_run(config)
    standard = standard_values(config, arguments.config)
    if ranks.first:
        note_added_fields(arguments.config)
    check_flags(config, flags, standard)
    ranks.begin(config.train.rank_timeout_seconds)
    store = open_run_data(config)
    if arguments.verify:
        ranks.from_first(lambda: verify(store))
    modalities = check_store(config, store)
    check_flags(config, flags, standard, [modality.kind for modality in modalities.values()])
    check_ranks(config, len(store.split(config.data.train_split)), ranks)
    if ranks.first:
        note_labels(config, store)
    with torch.device("meta"):
        # Sizes that do not fit are refused before there is a folder.
        UniCode(modalities, config)
    folder = ranks.from_first(lambda: prepare_folder(arguments.out, config, arguments.seeds))
    seeds = [config.train.seed + n for n in range(arguments.seeds)] if arguments.seeds > 1 else None
    return Found(folder, config, seeds, store)


def resume(arguments: Namespace, flags: Mapping[str, Any], ranks: Ranks, hold: Callable[[Path], None]) -> Found:
    """Finds a run that is there, and notes with which other fields it goes on.

    Raises:
        CheckpointError: it is none, or data that are named are not those it was trained on.
        InUse: another process works on it.
        ValueError: a flag has a wrong value, or cannot change.
    """
    others = [name for name in ("out", "config") if getattr(arguments, name) is not None]
    others += ["seeds"] if arguments.seeds != 1 else []
    folder, config, seeds = ranks.from_first(lambda: resume_folder(arguments.resume, flags, others))
    if seeds and arguments.resume_step is not None:
        raise ValueError(f"resume_step needs the run of one seed, such as --resume {folder / f'seed-{seeds[0]}'}")
    moved = [name for name in PLACE_FIELDS if name in flags]
    if moved:
        config = with_whole_paths(config)
        unread = [name for name in moved if name in TEXT_FIELDS and not has_sentences(config.data.data)]
        if unread:
            raise ValueError(f"{unread[0]} is about layouts with sentences, got it beside data {config.data.data!r}")
    ended = arguments.resume_step is None and ranks.from_first(lambda: has_ended(folder, seeds))
    if ended and not moved:
        if flags:
            say(f"note: the run has ended, {', '.join(flags)} stay as they were", file=sys.stderr)
        return Found(folder, config, seeds, None)
    hold(folder)
    # It may have ended since.
    ended = arguments.resume_step is None and ranks.from_first(lambda: has_ended(folder, seeds))
    if ended and not moved:
        return Found(folder, config, seeds, None)
    if not ended:
        check_run(config)
    ranks.begin(config.train.rank_timeout_seconds)
    try:
        store = open_run_data(config)
    except FileNotFoundError as error:
        raise CheckpointError(f"data of run {folder} are gone, {MOVED}: {error}") from error
    if arguments.verify:
        ranks.from_first(lambda: verify(store))
    if not ended:
        check_ranks(config, len(store.split(config.data.train_split)), ranks)

    def rewrite() -> None:
        places = {name: config.flat()[name] for name in moved}
        singles = single_folders(folder, seeds) if moved else []
        for below in singles:
            if checkpoint.steps_in(below):
                check_digest(checkpoint.read_for_resume(below, arguments.resume_step, torch.device("cpu")), store)
        for below in (*singles, folder):
            write_config(below, resolve_saved(str(below / "config.yaml"), places))
        if not ended:
            write_config(folder, config)

    if flags:
        ranks.from_first(rewrite)
    return Found(folder, config, seeds, None if ended else store)


def describe(found: Found, ranks: Ranks) -> None:
    """Five lines on what begins, the run folder first."""
    config, store = found.config, found.store
    if store is None or not ranks.first:
        return
    values, standard = config.flat(), preset(config.preset, config.size).flat()
    changed = [f"{name} {value}" for name, value in values.items() if value != standard[name] and name != "data"]
    kinds = store.modalities_named(modality_names(config.data.modalities, tuple(store.modalities)))
    shapes = ", ".join(f"{name} ({kind.kind} {'x'.join(map(str, kind.shape))})" for name, kind in kinds.items())
    length = f"{config.train.steps} steps" if config.train.steps else f"{config.train.epochs} epochs"
    seeds = f"seeds {', '.join(map(str, found.seeds))}" if found.seeds else f"seed {config.train.seed}"
    for line in (
        f"run {found.folder}",
        f"data {store!r}; {shapes}",
        f"model of preset {config.preset}, size {config.size}" + (f", but {', '.join(changed)}" if changed else ""),
        f"training {length} of {config.train.batch_size} clips on {choose_device(config.train.device)}, {seeds}",
        f"configuration {found.folder / 'config.yaml'}",
    ):
        say(one_line(line))


def next_command(found: Found, measured: bool) -> str:
    """What can be done with a run that has ended."""
    folder = found.folder if measured or not found.seeds else found.folder / f"seed-{found.seeds[0]}"
    run = shlex.quote(str(folder))
    if measured:
        return f"python -m unicode_fast.report {run} --out {shlex.quote(f'{folder}-report')}"
    return f"python -m unicode_fast.evaluate {run} --task TASK --from MODALITY --to MODALITY"


def note_added_fields(file: str | None) -> None:
    """Says on the error stream which fields a configuration file of an older version lacks."""
    added = {} if file is None else added_fields(read_yaml(file))
    if added:
        values = ", ".join(f"{name} {value}" for name, value in added.items())
        say(f"note: config {file!r} is a run's of an older version, so as before {values}", file=sys.stderr)


def with_whole_paths(config: Config) -> Config:
    """The same configuration from whatever folder the run is gone on with or evaluated."""
    model, whitelist = (Path(place) for place in (config.data.text_model, config.data.text_whitelist))
    return config.replace(
        data=absolute(config.data.data),
        text_model=str(model.absolute() if model.is_dir() else config.data.text_model),
        text_whitelist=str(whitelist.absolute() if whitelist.is_file() else config.data.text_whitelist),
    )


def check_run(config: Config) -> None:
    """What can be known to fail before anything is made.

    Raises:
        ValueError: the device, what is asked of it, a task or the modalities are not there.
    """
    check_acceleration(config.train, choose_device(config.train.device))
    if config.train.probe_tasks != NO_TASKS:
        check_partners(config.data, config.train.probe_tasks)
    if config.data.data in built_in.DATASETS:
        names = modality_names(config.data.modalities, BUILT_IN_MODALITIES)
        if not set(names) <= set(BUILT_IN_MODALITIES):
            raise ValueError(f"modalities must be among {', '.join(BUILT_IN_MODALITIES)}, got {', '.join(names)}")
        if problem := health.unfilled_batch(config.data.train_clips, config.train.batch_size):
            raise ValueError(problem)


def check_flags(
    config: Config, flags: Mapping[str, Any], standard: Mapping[str, Any], kinds: Collection[Kind] = get_args(Kind)
) -> None:
    """Refuses flags, and changes of the standard values, that the rest of the configuration leaves without effect.

    Args:
        config: of the run.
        flags: those of its fields that were given one by one.
        standard: value of every field where nobody has chosen one.
        kinds: of the modalities, one each, as far as they are known.

    Raises:
        ValueError: a flag is about the built-in data, and other data are asked for; or a field is switched off
            by another, or is about a kind of modality that is not there.
    """
    if config.data.data not in built_in.DATASETS:
        unread = [name for name in ("easy", "train_clips", "val_clips", "test_clips", "data_seed") if name in flags]
        if unread:
            raise ValueError(f"{unread[0]} is about the built-in data only, got it beside data {config.data.data!r}")
    if not has_sentences(config.data.data):
        unread = [name for name in TEXT_FIELDS if name in flags]
        if unread:
            raise ValueError(f"{unread[0]} is about layouts with sentences, got it beside data {config.data.data!r}")
    values = config.flat()
    for name, reason in config.unread_fields(kinds).items():
        if name in flags or values[name] != standard[name]:
            raise ValueError(f"{name} {reason}, got {name} {values[name]!r} beside it")


def open_run_data(config: Config) -> Dataset:
    """The data of a run; all modalities of a layout where retrieval, as in evaluate, takes one more as its anchor."""
    anchored = RETRIEVAL in config.train.probe_tasks.split(",")
    return open_dataset(replace(config.data, modalities="all") if anchored else config.data)


def check_store(config: Config, store: Dataset) -> dict[str, Modality]:
    """The modalities of a run, after a look at whether its data hold what the whole run will need.

    Raises:
        ValueError: a modality or a split is missing, or there are fewer clips than a batch, or no classes.
    """
    if config.data.train_split not in store.splits:
        raise ValueError(
            f"train_split must be one of {', '.join(store.splits)} of {store.path}, got {config.data.train_split!r}"
        )
    needed_splits = splits_of(config)
    missing = [name for name in needed_splits if name not in store.splits]
    if missing:
        raise ValueError(
            f"data must have splits {', '.join(needed_splits)}, {store.path} has {', '.join(store.splits)}; "
            f"--validations 0 --probe_tasks {NO_TASKS} needs no split but the one that is trained on"
        )
    clips = store.split(config.data.train_split)
    modalities = store.modalities_named(modality_names(config.data.modalities, tuple(clips.modalities)))
    if problem := health.unfilled_batch(len(clips), config.train.batch_size):
        raise ValueError(problem)
    check_targets(config, store, needed_splits, modalities)
    steps = {clips.features[name].shape[1] for name in modalities}
    needed = config.method.cpc_earliest + 1 + config.model.cpc_steps
    if config.model.cpc_steps > 1 and min(steps) < needed:
        raise ValueError(
            f"cpc_steps must leave {needed} steps in a clip, got {config.model.cpc_steps} for {min(steps)}"
        )
    return modalities


def splits_of(config: Config) -> list[str]:
    """The splits that a run reads, first the one that it trains on."""
    probed = config.train.probe_tasks != NO_TASKS
    measured = ["train", "val", "test"] if probed else ["train", "val"] if config.train.validations else []
    return list(dict.fromkeys([config.data.train_split, *measured]))


def check_targets(config: Config, store: Dataset, splits: Sequence[str], modalities: Collection[str]) -> None:
    """Whether clips have the classes that validations and tasks of a run are about.

    Args:
        config: of the run.
        store: its data.
        splits: that the run reads.
        modalities: of the run.

    Raises:
        ValueError: they have none; the message names the flags that train without.
    """
    tasks = [] if config.train.probe_tasks == NO_TASKS else check_tasks(config.train.probe_tasks)
    asking = [task for task in tasks if task in PROBE_TASKS]
    others = [task for task in tasks if task not in asking]
    reasons, cures = [], []
    if config.train.validations:
        reasons.append("the zero-shot accuracy of validations")
        cures.append("--validations 0")
    if asking:
        reasons.append(f"the tasks {', '.join(asking)}")
        cures.append(f"--probe_tasks {','.join(others) or NO_TASKS}")
    without = []
    for split in splits:
        keys = store.split(split).arrays.keys()
        if "class" not in keys and not {f"{name}.label" for name in modalities} <= keys:
            without.append(split)
    if reasons and without:
        raise ValueError(
            f"data must have a class for each clip, or labels at each step of every modality, for "
            f"{' and '.join(reasons)}, {store.path} has neither in {', '.join(without)}; "
            f"{' '.join(cures)} trains without"
        )


def check_ranks(config: Config, clips: int, ranks: Ranks) -> None:
    """Every rank needs a clip of each batch, and every micro-batch too; a graph holds the step of one rank.

    Raises:
        ValueError: a batch has fewer, or there are several ranks and `cuda_graph`.
    """
    train, last = config.train, clips % config.train.batch_size
    if train.batch_size < ranks.size:
        raise ValueError(f"batch_size must be at least the {ranks.size} ranks, got {train.batch_size}")
    if train.keep_last_batch and 0 < last < ranks.size:
        raise ValueError(
            f"keep_last_batch must leave each of {ranks.size} ranks a clip, got {last} in the last batch of an epoch: "
            f"{clips} clips in batches of {train.batch_size}"
        )
    smallest = train.batch_size // ranks.size
    if train.micro_batches > smallest:
        raise ValueError(f"micro_batches must be at most the {smallest} clips of a rank, got {train.micro_batches}")
    if train.cuda_graph and ranks.size > 1:
        raise ValueError(f"cuda_graph needs a run of one rank, got {ranks.size}")


if __name__ == "__main__":
    run_main(main)
