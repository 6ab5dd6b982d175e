"""Makes the archive of a tiny store, two runs over it and an export, with the version of the package that is imported.

In a checkout of the version: `PYTHONPATH=.:tests OMP_NUM_THREADS=1 python .../make_run.py NAME.zip`.
"""

import os
import sys
import tempfile
import zipfile
from pathlib import Path

import tiny

import unicode_fast
from unicode_fast import export, load, train
from unicode_fast.training.checks import open_run_data
from unicode_fast.training.distributed import DistContext
from unicode_fast.training.runs import prepare_folder

SIZES = {
    "width": 4, "codewords": 8, "vector_specific_width": 4, "word_width": 4, "grid_hidden_width": 2,
    "grid_specific_width": 2, "grid_club_width": 2, "grid_semantic_width": 4, "temporal_heads": 1,
    "feedforward_width": 4, "club_hidden_width": 2,
}  # fmt: skip
STEPS, INTERRUPTED_AT = 8, 4
KEPT = (
    "store/*.npy", "store/manifest.json", "model.safetensors", "*/config.yaml", "*/metrics.jsonl", "*/summary.json",
    "finished/checkpoints/best.pt", f"interrupted/checkpoints/step-{INTERRUPTED_AT:08d}.pt",
)  # fmt: skip


class Interrupted(Exception):
    pass


def stop_at(step: int) -> None:
    """From now on a run ends before this step as one that is killed does."""
    whole = train.Trainer.train_step

    def train_step(self: train.Trainer, *arguments: object, **options: object) -> object:
        if self.step == step:
            raise Interrupted
        return whole(self, *arguments, **options)

    train.Trainer.train_step = train_step


def make() -> None:
    """Writes store, runs and export into the current folder."""
    tiny.write(Path("store"), {"train": 12, "val": 6, "test": 9})
    # A path that means the same store wherever the archive is unpacked, in its folder.
    config = tiny.config(
        **SIZES, data="store", steps=STEPS, batch_size=4, validations=2, checkpoint_seconds=1000.0, warmup_steps=2,
        learning_rate=3e-3, revive_after=2, probe_tasks="classification", feed="resident", device="cpu",
    )  # fmt: skip
    train.run(config, open_run_data(config), prepare_folder("finished", config), DistContext())
    export(load("finished", "last"), "model.safetensors")
    stop_at(INTERRUPTED_AT)
    try:
        train.run(config, open_run_data(config), prepare_folder("interrupted", config), DistContext())
    except Interrupted:
        return


def main() -> None:
    archive = Path(sys.argv[1]).absolute()
    print(unicode_fast.__file__)  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make()
        with zipfile.ZipFile(archive, "x", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            for path in sorted({path for pattern in KEPT for path in Path().glob(pattern)}):
                file.writestr(zipfile.ZipInfo(path.as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    main()
