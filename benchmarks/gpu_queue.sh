#!/usr/bin/env bash
# What is wanted of a GPU, in three stages of under four minutes each:
#
#     bash benchmarks/gpu_queue.sh [--toy] [--stage N]… OUT [PACKED]
#
#     1  tests of models, training, records, SAEs and steering               OUT/tests.json
#     2  speed and memory of blocks, models and records, with and without
#        torch.compile                                                       OUT/speed.json
#     3  CRATE and GPT-2 at 3L trained on the tokens in the folder PACKED    OUT/gpu_3L.json
#
# Each number is in its file as soon as it is known. A stage that is cut off goes on when the same line is started
# again; what is large and needed for that alone lies in OUT.work. --stage chooses, and may be given several times.
# --toy runs few tests and small sizes, to see that the queue works, on any machine. PYTHON and SECONDS_A_STAGE (225)
# may be set. Needed are torch, einops, safetensors, numpy, scipy, scikit-learn, accelerate, tqdm, filelock, lazy_loader,
# tiktoken, tokenizers, hypothesis and pytest; transformers for some tests.
set -uo pipefail
usage() { sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

toy=() stages=() places=()
while [ $# -gt 0 ]; do
  case $1 in
    --toy) toy=(--toy) ;;
    --stage) [[ ${2:-} = [123] ]] || usage; stages+=("$2"); shift ;;
    -*) usage ;;
    *) places+=("$(realpath -m -- "$1")") ;;
  esac
  shift || usage
done
[ ${#places[@]} -ge 1 ] && [ ${#places[@]} -le 2 ] || usage
out=${places[0]} packed=${places[1]:-} python=${PYTHON:-python3} limit=${SECONDS_A_STAGE:-225}
cd "$(dirname "$0")/.."
mkdir -p "$out" "$out.work"
export PYTHONPATH=$PWD:$PWD/benchmarks PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$out.work/compiled

# Interrupted at the end of the stage's time, and killed if that does not help: what is known is on the disk.
run() { timeout --signal=INT --kill-after=5 $((limit > SECONDS - start ? limit - SECONDS + start : 1)) "$python" "$@"; }

stage_1() {
  local tests=(tests/test_crate.py tests/test_gpt2.py tests/test_language_model.py tests/test_mssa.py
    tests/test_ista.py tests/test_ista_layer.py tests/test_coding_rate.py tests/test_training.py
    tests/interpret/test_records.py tests/test_layerwise.py tests/test_sae.py tests/steering/test_steering.py
    tests/steering/test_steering_cost.py tests/experiments/test_comparison.py tests/test_sae_training.py tests/test_run_directory.py)
  [ ${#toy[@]} = 0 ] || tests=(tests/test_crate.py tests/test_mssa.py tests/test_ista_layer.py)
  local workers=() worst=0
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 4)
  # Warnings of a machine's own versions are shown and fail no test.
  local pytest=(-m pytest -q -o addopts= -o filterwarnings=default -p no:cacheprovider -p gpu_tests
    --outcomes "$out/tests.json" "${workers[@]}" "${tests[@]}")
  # Each training would compile its model on a GPU, for longer than it trains: once is enough, in the tests of that.
  run "${pytest[@]}" -k compile || worst=$?
  TORCH_COMPILE_DISABLE=1 run "${pytest[@]}" -k "not compile" || worst=$?
  return $worst
}

stage_2() { run benchmarks/gpu_speed.py "$out" "${toy[@]}"; }

stage_3() {
  if [ ${#toy[@]} = 0 ] && [ -z "$packed" ]; then
    echo "stage 3 needs PACKED, a folder of tokens: see benchmarks/gpu_reference.py" >&2
    return 2
  fi
  run benchmarks/gpu_reference.py "${toy[@]}" ${packed:+"$packed"} "$out" --presets 3L
}

"$python" -c 'import cratelab, torch; print(torch.__version__, cratelab.best_device())' || exit 1
worst=0
[ ${#stages[@]} -gt 0 ] || stages=(1 2 3)
for stage in "${stages[@]}"; do
  echo "== stage $stage, $limit seconds at most"
  start=$SECONDS
  "stage_$stage" 2>&1 | tee "$out/stage_$stage.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) said="done" ;;
    124 | 130 | 137) said="cut off; the same line goes on" ;;
    *) said="failed ($status)" ;;
  esac
  echo "== stage $stage: $said after $((SECONDS - start)) seconds"
  [ "$status" = 0 ] || worst=1
done
exit $worst
