"""Compiles csrc/ for a GPU of another machine, as setup.py would: `python benchmarks/gpu/compile_objects.py FOLDER`.

It runs under the torch of the objects. Objects that are up to date are not compiled again.
UNICODE_FAST_CUDA=0 leaves csrc/cuda out.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
ARCHITECTURES = "9.0a"


def compile_objects(folder: Path) -> dict[str, Any]:
    """Objects of all of csrc/ below `folder`, and the extension that they make here.

    Returns:
        The objects, without that of the module, which needs the Python of the other machine; and their versions.
    """
    import torch

    import setup as build

    # Objects hold neither debug symbols nor folders of this machine.
    places = {ROOT: ".", Path(torch.__file__).parent: "torch"}
    with_cuda = os.environ.setdefault("UNICODE_FAST_CUDA", "1") != "0"
    os.environ |= {
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURES,
        "CFLAGS": " ".join(["-g0", *(f"-ffile-prefix-map={here}={there}" for here, there in places.items())]),
    }
    from setuptools import Distribution

    os.chdir(ROOT)
    # Without options of pyproject.toml, which old versions of setuptools cannot read.
    made = Distribution({"name": "unicode_fast", **build.extension_options(os.environ)})
    command = made.get_command_obj("build_ext")
    command.build_temp, command.build_lib = str(folder / "objects"), str(folder / "package")
    command.ensure_finalized()
    command.run()
    sources = [Path(source) for source in build.source_files(ROOT, with_cuda=with_cuda)]
    objects = [folder / "objects" / source.with_suffix(".o") for source in sources if source.stem != "extension"]
    made = {"objects": [str(path.resolve()) for path in objects], "torch": str(torch.__version__)}
    if not with_cuda:
        return {**made, "cuda": None, "architectures": None}
    toolkit = build.find_toolkit(os.environ)
    nvcc = str(toolkit.home / "bin" / "nvcc")
    return {**made, "cuda": toolkit.version, "architectures": ARCHITECTURES, "nvcc": nvcc}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    print(json.dumps(compile_objects(parser.parse_args().folder.resolve())))


if __name__ == "__main__":
    main()
