"""How long the README's first command takes: `python benchmarks/install_time.py [PYTHON]`.

In a temporary folder, from a clone of what is committed: first as it is, so that all that pip finds nowhere on this
machine's disk is downloaded, then from a second clone and from files on the disk alone. The second also runs what is
installed. Needs some 15 GB while it lasts; writes results/install.json.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from pathlib import Path

from unicode_fast.files.writing import write_json
from unicode_fast.training.runs import git_commit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "install.json"
ASK = "import json, platform, torch; print(json.dumps([platform.python_version(), torch.__version__]))"


def gigabytes(folder: Path) -> float:
    """What the files of a folder occupy on the disk, each once, in units of 10^9 bytes."""
    files = [path.lstat() for path in folder.rglob("*")]
    return sum({file.st_ino: file.st_blocks * 512 for file in files}.values()) / 1e9


def parts_of(command: str) -> tuple[str, str]:
    """What the README's command does to install, and what it runs then."""
    install, _, run = command.strip().rpartition(" && ")
    return install, run


def seconds_of(command: str, checkout: Path) -> float:
    """How long a shell command takes in a fresh clone, or in the one that is there."""
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, checkout], check=True)
    begin = time.perf_counter()
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=checkout, check=True)
    return time.perf_counter() - begin


def download(checkout: Path, folder: Path) -> None:
    """Put what an installation consists of, and was built with, into a folder."""
    pip = [checkout / ".venv" / "bin" / "pip"]
    installed = subprocess.check_output([*pip, "freeze", "--all", "--exclude-editable"], text=True).split("\n")[:-1]
    build = re.search(r"^requires = (\[.*\])", (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    assert build is not None
    for packages in ([*installed, "--no-deps"], json.loads(build[1])):
        subprocess.run([*pip, "download", "-q", "--dest", folder, *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="?", default="python3", help="in place of the command's python3")
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    arguments = parser.parse_args()
    python = arguments.python
    readme = subprocess.check_output([ROOT / ".ci" / "readme-command", "run-command"], text=True)
    install, run = parts_of(readme.replace("python3 -m venv", f"{python} -m venv"))
    os.environ.pop("PYTHONPATH", None)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        files, first, second = Path(folder, "files"), Path(folder, "first"), Path(folder, "second")
        os.environ |= {"PIP_CACHE_DIR": str(Path(folder, "cache")), "UNICODE_FAST_CACHE": str(Path(folder, "data"))}
        seconds["downloading"] = seconds_of(install, first)
        download(first, files)
        os.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(files)}
        seconds["downloaded"] = seconds_of(install, second)
        seconds["run"] = seconds_of(run, second)
        version, torch = json.loads(subprocess.check_output([second / ".venv" / "bin" / "python", "-c", ASK]))
        sizes = {"download": gigabytes(files), "disk": gigabytes(second / ".venv")}
    found = {"seconds": seconds, "gigabytes": sizes, "python": version, "torch": torch}
    device = {"device": f"{platform.machine()} CPU", "cores": os.cpu_count()}
    date = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": git_commit()}
    write_json(RESULTS, {**found, **device, **date, "note": arguments.note})


if __name__ == "__main__":
    main()
