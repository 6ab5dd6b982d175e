"""Time to make the built-in data: `python benchmarks/make_data.py`.

It makes each data set in a temporary folder, in its own process, and writes results/data-made.json.
"""

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from unicode_fast.files.writing import write_json
from unicode_fast.training.runs import git_commit

RESULTS = Path(__file__).resolve().parent / "results" / "data-made.json"
DATASETS = ("talking-digits", "talking-numbers")


def main() -> None:
    seconds = {}
    for name in DATASETS:
        with tempfile.TemporaryDirectory() as cache:
            begin = time.perf_counter()
            command = [sys.executable, "-m", "unicode_fast.data", "check", name]
            subprocess.run(command, env={**os.environ, "UNICODE_FAST_CACHE": cache}, check=True)
            seconds[name] = time.perf_counter() - begin
    made = {"seconds": seconds, "device": f"{platform.machine()} CPU", "cores": os.cpu_count(), "commit": git_commit()}
    write_json(RESULTS, made)


if __name__ == "__main__":
    main()
