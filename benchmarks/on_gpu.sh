#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests on CUDA, every bit compared with the CPU, a training run on each device,
# and timings. Usage: benchmarks/on_gpu.sh FOLDER. Leaves logs and tables in FOLDER for benchmarks/results/.
# Needs gpubn with its test extra, and CuPy; each step runs even if one before it failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/on_gpu.sh FOLDER}
mkdir -p "$out"
failed=0
step() { # name, command...
    local name=$1
    shift
    echo "== $name: $*"
    "$@" >"$out/$name.log" 2>&1 && echo "passed" || { echo "FAILED ($?)"; failed=1; }
    tail -n 4 "$out/$name.log"
}
export PYTHONUNBUFFERED=1
step info python3 -m gpubn info
step tests python3 -m pytest -q -p no:cacheprovider --device cuda tests/layers tests/train
step same-bits python3 -m pytest -q -p no:cacheprovider --device cuda tests/kernels/test_same_bits.py
for device in cuda cpu; do
    rm -rf "$out/run-$device"
    step "train-$device" python3 -m gpubn train --device "$device" --out "$out/run-$device"
done
step bench-cuda python3 -m benchmarks --device cuda --out "$out/cuda.csv"
step bench-cpu python3 -m benchmarks --device cpu --quick --out "$out/cpu.csv"
exit $failed
