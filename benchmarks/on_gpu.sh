#!/usr/bin/env bash
# Everything that needs a GPU, in one call: `bash benchmarks/on_gpu.sh [RESULTS]`. Builds without network, runs the tests
# with skips for lack of CUDA forbidden, the sanitizers over the operators where they are installed, then the
# benchmarks, and prints their table last. PYTHON is the interpreter, with torch for CUDA and pytest.
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

echo "== build"
$python -m pip install -q --no-build-isolation --no-deps -e . || $python setup.py -q build_ext --inplace || exit 1

echo "== tests"
$python -m pytest -q -p no:cacheprovider tests -k "cuda or gpu" 2>&1 | tee "$results/gpu-tests.log" | tail -n 30
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1

if command -v compute-sanitizer > /dev/null; then
  operators="tests/test_nearest_codeword.py tests/test_codebook_update.py tests/test_commitment.py"
  for tool in memcheck racecheck initcheck; do
    echo "== compute-sanitizer $tool"
    timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name kns=unicode_fast \
      $python -m pytest -q -x -p no:cacheprovider $operators -k "cuda-cuda and (primes or blocks or joint or loops)" \
      > "$results/sanitizer-$tool.log" 2>&1
    status=$?
    tail -n 3 "$results/sanitizer-$tool.log"
    [ $status -eq 0 ] || failed=1
  done
else
  echo "compute-sanitizer is not installed: not run"
fi

echo "== benchmarks"
for bench in bench_search bench_contrast bench_feed bench_train_step; do
  # Compiling a step takes most of the time of the last one, which keeps what it has measured when it is ended.
  timeout $([ $bench = bench_train_step ] && echo 240 || echo 120) $python -m pytest -q -p no:cacheprovider "benchmarks/$bench.py" --device cuda --results "$results" \
    > "$results/$bench.log" 2>&1
  [ $? -eq 0 ] || failed=1
done
[ "$results" = benchmarks/results ] && $python benchmarks/update_readme.py
tail -n 40 "$results"/bench_{search,contrast,feed,train_step}.log
exit $failed
