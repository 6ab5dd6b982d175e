"""`python -m unicode_fast.report`."""

from __future__ import annotations

from unicode_fast.errors import run_main
from unicode_fast.report.tables import main

if __name__ == "__main__":
    run_main(main)
