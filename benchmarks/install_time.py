"""Time of the README's first command: `python benchmarks/install_time.py [PYTHON]`.

The command installs a clone of the last commit in a temporary folder, with all downloads. It then installs a second
clone from files on the disk alone, and runs it. The script needs about 15 GB of the disk and writes
results/install.json.
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
QUERY = "import json, platform, torch; print(json.dumps([platform.python_version(), torch.__version__]))"


def gigabytes(folder: Path) -> float:
    """Disk space of the files of a folder, each counted once, in units of 10^9 bytes."""
    files = [path.lstat() for path in folder.rglob("*")]
    return sum({file.st_ino: file.st_blocks * 512 for file in files}.values()) / 1e9


def split_command(command: str) -> tuple[str, str]:
    """The installation and the run of the README's command."""
    install, _, run = command.strip().rpartition(" && ")
    return install, run


def seconds_of(command: str, checkout: Path) -> float:
    """Time in seconds of a shell command in a clone; a missing clone is made first."""
    if not checkout.exists():
        subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, checkout], check=True)
    begin = time.perf_counter()
    subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=checkout, check=True)
    return time.perf_counter() - begin


def download(checkout: Path, folder: Path) -> None:
    """Download all packages of an installation and of its build to a folder."""
    pip = [checkout / ".venv" / "bin" / "pip"]
    installed = subprocess.check_output([*pip, "freeze", "--all", "--exclude-editable"], text=True).split("\n")[:-1]
    build = re.search(r"^requires = (\[.*\])", (checkout / "pyproject.toml").read_text(), re.MULTILINE)
    assert build is not None
    for packages in ([*installed, "--no-deps"], json.loads(build[1])):
        subprocess.run([*pip, "download", "-q", "--dest", folder, *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="?", default="python3", help="replaces the command's python3")
    parser.add_argument("--note", default="", help="other load of the machine")
    arguments = parser.parse_args()
    python = arguments.python
    readme = subprocess.check_output([ROOT / ".ci" / "readme-command", "run-command"], text=True)
    install, run = split_command(readme.replace("python3 -m venv", f"{python} -m venv"))
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
        version, torch = json.loads(subprocess.check_output([second / ".venv" / "bin" / "python", "-c", QUERY]))
        sizes = {"download": gigabytes(files), "disk": gigabytes(second / ".venv")}
    found = {"seconds": seconds, "gigabytes": sizes, "python": version, "torch": torch}
    device = {"device": f"{platform.machine()} CPU", "cores": os.cpu_count()}
    date = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": git_commit()}
    write_json(RESULTS, {**found, **device, **date, "note": arguments.note})


if __name__ == "__main__":
    main()
