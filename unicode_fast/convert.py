"""`python -m unicode_fast.convert`; the code is in `unicode_fast.compat.convert`."""

from __future__ import annotations

from unicode_fast.compat.convert import main
from unicode_fast.errors import run_main

if __name__ == "__main__":
    run_main(main)
