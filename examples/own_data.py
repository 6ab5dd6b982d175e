"""Own data, from arrays to scores: `python examples/own_data.py mine --clips 400 --steps 100`."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path, help="a new folder for data, store and run")
parser.add_argument("--clips", type=int, default=400)
parser.add_argument("--steps", type=int, default=100)
arguments = parser.parse_args()
data, store, run = (arguments.folder / name for name in ("data", "store", "run"))

# One array a clip and modality, and a table of the clips. Replace these lines by your own features.
generator = np.random.default_rng(0)
walks = {"radar": generator.normal(size=(4, 40)), "depth": generator.normal(size=(4, 9, 9, 3))}
lines = ["id,split,class"]
for name in walks:
    (data / name).mkdir(parents=True)
for clip in range(arguments.clips):
    kind, length = clip // 4 % 4, 5 + clip % 3
    for name, shown in walks.items():
        noise = generator.normal(size=(length, *shown.shape[1:]))
        np.save(data / name / f"take{clip}.npy", (shown[kind] + noise).astype("float32"))  # (T, ...)
    lines.append(f"take{clip},{('train', 'train', 'val', 'test')[clip % 4]},{('walk', 'run', 'jump', 'fall')[kind]}")
(data / "clips.csv").write_text("\n".join(lines))


def command(*words: str | Path) -> None:
    """Run `python -m unicode_fast...` and stop where it fails."""
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


# A store is checked, checksummed and memory-mapped. Training reads clips:FOLDER too, but more slowly.
command("unicode_fast.data", "pack", f"clips:{data}", store)
# Half of the clips are for training; a batch must not be larger.
sizes = {"steps": arguments.steps, "warmup_steps": arguments.steps // 10, "batch_size": min(80, arguments.clips // 2)}
flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
command("unicode_fast.train", "--data", store, "--out", run, "--probe_tasks", "classification", *flags)
command("unicode_fast.evaluate", run, "--task", "classification", "--from", "radar", "--to", "depth")
