#!/usr/bin/env bash
# Everything that needs a GPU, in one call: `bash benchmarks/on_gpu.sh [RESULTS] [--only STAGE,...]`; see on_gpu.py.
# PYTHON is the interpreter, with torch for CUDA and pytest.
exec "${PYTHON:-python3}" "$(dirname "$0")/on_gpu.py" "$@"
