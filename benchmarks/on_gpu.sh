#!/usr/bin/env bash
# All that needs a GPU, in one go: the tests on CUDA, every bit compared with the CPU, training to the same hash on each
# device, and timings. Usage: benchmarks/on_gpu.sh FOLDER. Leaves logs, tables and charts in FOLDER for
# benchmarks/results/. benchmarks/on_gpu.sh FOLDER bench does the timings alone. Needs gpubn with its test extra, and CuPy;
# with PyTorch it is timed too. Each step runs even if one before it failed.
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
hashes() { # of three kinds of runs: the same on both devices
    local device kind flags
    for kind in batchnorm layernorm float64; do
        case $kind in
        batchnorm) flags="" ;;
        layernorm) flags="--normalization layernorm --update-rule sgd_momentum --learning-rate 0.02" ;;
        float64) flags="--dtype float64" ;;
        esac
        for device in cuda cpu; do
            rm -rf "$out/run-$kind-$device"
            # shellcheck disable=SC2086
            python3 -m gpubn train --reproducible --epochs 5 --device $device --out "$out/run-$kind-$device" $flags ||
                return 1
        done | tee /dev/stderr | grep SHA-256 | sort -u | wc -l | grep -qx 1 || return 1
    done
}
tests() { # the tests, and training
    step tests python3 -m pytest -q -p no:cacheprovider --device cuda tests/layers tests/nn tests/train \
        tests/test_table.py
    step same-bits python3 -m pytest -q -p no:cacheprovider --device cuda tests/kernels/test_same_bits.py \
        tests/kernels/test_elementary.py tests/kernels/test_half_conversion.py
    step parity python3 -m gpubn parity --json "$out/parity.json"
    step large-arrays python3 tests/kernels/large_arrays.py --device cuda
    step exp-log python3 tests/kernels/exhaustive_exp_log.py --device cuda
    step hashes hashes
    step train-cuda python3 -m gpubn train --device cuda --out "$out/run-cuda"
}
timings() { # float32 in full; half precision where there are fewer bytes to move for as many values
    local dtype
    step bench-cuda python3 -m benchmarks --device cuda --out "$out/cuda.csv" --plot "$out/cuda.png"
    step bench-cuda-reuse python3 -m benchmarks --device cuda --reuse --peer torch --out "$out/cuda-reuse.csv"
    for dtype in float16 bfloat16; do
        step "bench-cuda-$dtype" python3 -m benchmarks --device cuda --dtype $dtype --quick \
            --out "$out/cuda-$dtype.csv" --plot "$out/cuda-$dtype.png"
    done
    step sizes-cuda python3 -m benchmarks.sizes --device cuda --out "$out/cuda-sizes.csv" --plot "$out/cuda-sizes.png"
    step bench-reproducible python3 -m benchmarks.reproducible --device cuda --out "$out/cuda-reproducible.csv"
    step bench-cpu python3 -m benchmarks --device cpu --quick --out "$out/cpu.csv" --plot "$out/cpu.png"
}
[ "${2:-}" = bench ] || tests
timings
exit $failed
