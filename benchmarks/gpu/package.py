"""The package as links into this checkout, with kernels/ inside and room for an extension."""

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def link_package(folder: Path) -> Path:
    """Makes the package `unicode_fast` in `folder`, for PYTHONPATH, without an extension; returns its own folder.

    Raises:
        FileExistsError: the folder has another unicode_fast.
    """
    package = folder / "unicode_fast"
    if package.exists() and not (package / "__init__.py").is_symlink():
        raise FileExistsError(f"folder must hold no other unicode_fast than a package of links, got {folder}")
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in (ROOT / "unicode_fast").iterdir():
        if path.name != "__pycache__" and not path.name.startswith("_C."):
            (package / path.name).symlink_to(path)
    (package / "kernels").symlink_to(ROOT / "kernels")
    return package
