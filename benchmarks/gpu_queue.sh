#!/usr/bin/env bash
# The tests and the benchmarks on this machine's GPU: bash benchmarks/gpu_queue.sh OUT [--toy]
# --toy runs few tests and small sizes, to see that the queue works, on any machine.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?"usage: gpu_queue.sh OUT [--toy]: OUT is the folder for the logs"}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c 'import cratelab, torch; print(torch.__version__, cratelab.best_device())' | tee "$out/device.log" || exit 1
# The library's own tests; those of the book and of packaging need packages a bare GPU machine does not have.
tests=(tests/test_coding_rate.py tests/test_mssa.py tests/test_ista.py tests/test_ista_layer.py)
[ "${2:-}" = --toy ] || tests+=(tests/test_language_model.py tests/test_crate.py tests/test_gpt2.py tests/test_layerwise.py tests/corpora)
[ "${2:-}" = --toy ] || tests+=(tests/test_sae.py tests/test_steering.py tests/test_steering_cost.py)
"$python" -m pytest -q -o addopts= "${tests[@]}" 2>&1 | tee "$out/tests.log"
status=$?
: >"$out/bench.log"
for bench in core training interpret sae; do
  "$python" "benchmarks/bench_$bench.py" ${2:+"$2"} 2>&1 | tee -a "$out/bench.log" || status=1
done
exit $status
