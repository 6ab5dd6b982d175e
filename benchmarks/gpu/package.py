"""The package as links into this checkout, so that an extension can lie beside its modules and kernels/ is within."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def link_package(folder: Path) -> Path:
    """Make the package `unicode_fast` in `folder`, for PYTHONPATH, without an extension; returns its own folder.

    Raises:
        FileExistsError: there is one whose modules are no links.
    """
    package = folder / "unicode_fast"
    if any(path.is_file() and not path.is_symlink() for path in package.glob("*.py")):
        raise FileExistsError(f"the folder of a package of links must hold no other unicode_fast, got {folder}")
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "unicode_fast").iterdir():
        if path.name != "__pycache__" and not path.name.startswith("_C."):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return package
