#!/usr/bin/env bash
# Everything that needs a GPU, in one call: `bash benchmarks/on_gpu.sh [RESULTS]`. Builds without network, runs the tests
# with skips for lack of CUDA forbidden, the sanitizers over the operators where they are installed, then the
# benchmarks, and prints their table last. Ends within ten minutes: what takes longer than its share is stopped, which
# counts as a failure, and benchmarks keep what they have measured. PYTHON is the interpreter, with torch for CUDA and
# pytest.
set -uo pipefail

cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
# The architecture of this GPU; Hopper's own instructions need the "a".
here=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null) || {
  echo "torch finds no GPU here"
  exit 1
}
[ "$here" = 9.0 ] && here=9.0a
export UNICODE_FAST_CUDA=1 UNICODE_FAST_REQUIRE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$here}
failed=0
mkdir -p "$results"

# within SECONDS COMMAND...: stops it, as Ctrl-C would, after so many seconds or where the ten minutes are over.
within() {
  local most=$1 left=$((585 - SECONDS))
  shift
  [ "$left" -gt "$most" ] && left=$most
  if [ "$left" -le 0 ]; then
    echo "no time is left for: $*"
    return 1
  fi
  timeout --signal=INT --kill-after=5 "$left" "$@"
}

echo "== build"
within 240 $python -m pip install -q --no-build-isolation --no-deps -e . ||
  within 240 $python setup.py -q build_ext --inplace || exit 1

echo "== tests"
# test_cuda_logic.py is about what the kernels share with the host.
within 150 $python -m pytest -q -p no:cacheprovider tests --ignore=tests/test_cuda_logic.py -k "cuda or gpu" \
  > "$results/gpu-tests.log" 2>&1 || failed=1
tail -n 30 "$results/gpu-tests.log"

if command -v compute-sanitizer > /dev/null; then
  operators="tests/test_nearest_codeword.py tests/test_codebook_update.py tests/test_commitment.py"
  for tool in memcheck racecheck initcheck; do
    echo "== compute-sanitizer $tool"
    within 40 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=unicode_fast \
      $python -m pytest -q -x -p no:cacheprovider $operators \
      -k "cuda-cuda and (primes or blocks or joint or loops or many_rows)" \
      > "$results/sanitizer-$tool.log" 2>&1 || failed=1
    tail -n 3 "$results/sanitizer-$tool.log"
  done
else
  echo "compute-sanitizer is not installed: not run"
fi

echo "== benchmarks"
# Compiling a training step takes most of the time of the last one.
for bench in bench_search bench_contrast bench_feed bench_train_step; do
  within 150 $python -m pytest -q -p no:cacheprovider "benchmarks/$bench.py" --device cuda --results "$results" \
    > "$results/$bench.log" 2>&1 || failed=1
done
if [ "$results" = benchmarks/results ]; then
  $python benchmarks/update_readme.py
  $python benchmarks/write_step_page.py
  $python benchmarks/scaling.py --write > /dev/null
fi
# A line for each contender and size of Cross-CPC, and what follows.
tail -n 120 "$results/bench_contrast.log"
tail -n 40 "$results"/bench_{search,feed,train_step}.log
exit $failed
