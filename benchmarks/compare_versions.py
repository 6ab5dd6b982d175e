"""CPU time of a default step beside that of another checkout: `python benchmarks/compare_versions.py FOLDER`.

FOLDER has the package with its extension. Processes of both checkouts alternate; each measures the median step on
random features with one thread. The pairs and the median ratio go to results/versions-cpu.json.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from unicode_fast.files.writing import write_text

ROOT = Path(__file__).resolve().parent.parent
PAIRS = 10
# Only names that both versions have.
STEPS = """
import statistics, sys, time, torch, unicode_fast
from unicode_fast import Modality, preset
from unicode_fast.train import Trainer

assert unicode_fast.__file__.startswith(sys.argv[1]), unicode_fast.__file__
torch.set_num_threads(1)
kinds = {"audio": Modality("vector", (128,)), "video": Modality("grid", (7, 7, 16)), "text": Modality("words", (128,))}
trainer = Trainer(preset("recommended"), kinds, torch.device("cpu"))
features = {name: torch.rand(80, 10, *kind.shape) for name, kind in kinds.items()}
mask = {name: torch.arange(10).expand(80, 10) < (9 if name == "text" else 10) for name in kinds}
times = []
for _ in range(12):
    begun = time.process_time()
    trainer.train_step(features, mask, 1e-3)
    times.append(time.process_time() - begun)
print(statistics.median(times[2:]))
"""


def seconds(folder: Path) -> float:
    variables = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STEPS, str(folder)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables, cwd="/").stdout)


def main() -> None:
    other = Path(sys.argv[1]).resolve()
    pairs = [(seconds(other), seconds(ROOT)) for _ in range(PAIRS)]
    head = ["git", "rev-parse", "HEAD"]
    commits = [subprocess.check_output(head, cwd=folder, text=True).strip() for folder in (other, ROOT)]
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    ratio = statistics.median(ours / theirs for theirs, ours in pairs)
    result = {"before": commits[0], "commit": commits[1], "ratio": ratio, "cpu_seconds": pairs, "date": date}
    write_text(ROOT / "benchmarks" / "results" / "versions-cpu.json", json.dumps(result, indent=1) + "\n")
    print(f"{ratio:.3f} of the CPU time of a default step in {commits[0][:12]}, median of {PAIRS} pairs")


if __name__ == "__main__":
    main()
