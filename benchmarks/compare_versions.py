"""Time of a training step beside that of another checkout.

`python benchmarks/compare_versions.py FOLDER [FIELD=VALUE ...]`; FOLDER has the package with its extension. Processes
of both checkouts alternate; each measures the median step on random features, in float32 with all cores. The fields
are set in this checkout only, for a configuration that equals that of the other one. The pairs and the median ratio of
each size go to results/versions-cpu.json.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

from unicode_fast.files.writing import write_text

ROOT = Path(__file__).resolve().parent.parent
# Size of the preset, clips, channels of video and text, pairs of processes, and steps of each.
SIZES = {"default size": ("small", 80, 16, 128, 8, 12), "published sizes, 4 clips": ("paper", 4, 512, 768, 3, 4)}
# Only names that both versions have.
STEPS = """
import json, statistics, sys, time, torch, unicode_fast
from unicode_fast import Modality, preset
from unicode_fast.train import Trainer

folder, size, clips, cells, words, _, steps, fields = json.loads(sys.argv[1])
assert unicode_fast.__file__.startswith(folder), unicode_fast.__file__
cpp = unicode_fast.available_backends()["nearest_codeword"]["cpp"]
assert cpp == "available", cpp
torch.manual_seed(0)
shapes = {"audio": ("vector", (128,)), "video": ("grid", (7, 7, cells)), "text": ("words", (words,))}
kinds = {name: Modality(*shape) for name, shape in shapes.items()}
trainer = Trainer(preset("recommended", size).replace_all(**fields), kinds, torch.device("cpu"))
features = {name: torch.rand(clips, 10, *kind.shape) for name, kind in kinds.items()}
mask = {name: torch.arange(10).expand(clips, 10) < (9 if name == "text" else 10) for name in kinds}
times = []
for _ in range(2 + steps):
    begun = time.perf_counter()
    terms = trainer.train_step(features, mask, 1e-3).terms
    times.append(time.perf_counter() - begun)
print(json.dumps([statistics.median(times[2:]), float(sum(terms.values()))]))
"""


def measured(folder: Path, size: str, fields: dict[str, object]) -> list[float]:
    """Median seconds of a step, and the loss after the last one."""
    command = [sys.executable, "-c", STEPS, json.dumps([str(folder), *SIZES[size], fields])]
    variables = {**os.environ, "PYTHONPATH": str(folder)}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=variables, cwd="/").stdout)


def main() -> None:
    other = Path(sys.argv[1]).resolve()
    fields = {name: yaml.safe_load(value) for name, _, value in (given.partition("=") for given in sys.argv[2:])}
    head = ["git", "rev-parse", "HEAD"]
    before, commit = (subprocess.check_output(head, cwd=folder, text=True).strip() for folder in (other, ROOT))
    rows = []
    for size, (*_, number, _) in SIZES.items():
        pairs = [(measured(other, size, {}), measured(ROOT, size, fields)) for _ in range(number)]
        ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in pairs)
        rows.append({"size": size, "ratio": ratio, "seconds_and_loss": pairs})
        print(f"{size}: {ratio:.2f} times as fast as {before[:12]}, median of {number} pairs", flush=True)
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    result = {"before": before, "commit": commit, "fields": fields, "cores": cores, "rows": rows, "date": date}
    write_text(ROOT / "benchmarks" / "results" / "versions-cpu.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
