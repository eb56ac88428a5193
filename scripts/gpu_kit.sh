#!/usr/bin/env bash
# Shows in minutes what tlscale is worth on a GPU: tests, then benchmarks, on a machine that has torch and no network.
#
#   scripts/gpu_kit.sh prepare                   here: the wheels that the bare machine lacks, into .gpu_kit (ignored by git)
#   scripts/gpu_kit.sh run OUT [--minutes 5]     there: installs them beside its torch, makes photos, tests, measures
#
# `run` stops by itself before its time is up, and writes each result as soon as it has it; a second call with the same
# OUT measures what is missing. Without a GPU (CUDA_VISIBLE_DEVICES=) it does the same at toy size. docs/gpu.md says
# how a session with a lent GPU calls it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kit=.gpu_kit
# What the bare machine lacks, for its Python and platform. It has torch, timm, accelerate, pyarrow, scikit-learn,
# scikit-image, matplotlib, pytest and hypothesis; datasets and wandb stay out, and nothing here imports them.
lacking=(pydantic pydantic-core annotated-types typing-inspection)
their_python=3.12
most_mib=40

prepare() {
  local python=${PYTHON:-python3} name wanted=()
  for name in "${lacking[@]}"; do
    wanted+=("$(grep -iE "^${name//-/[-_]}==" constraints.txt)")
  done
  rm -rf "$kit"
  mkdir -p "$kit"
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$their_python" --implementation cp \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --dest "$kit" "${wanted[@]}"
  local mib
  mib=$(du -sm "$kit" | cut -f1)
  ((mib <= most_mib)) || { echo "gpu_kit: $kit has $mib MiB, and at most $most_mib can be carried" >&2; exit 1; }
  echo "gpu_kit: $(find "$kit" -name '*.whl' | wc -l) wheels, $mib MiB in $kit"
}

run() {
  local out=$1 minutes=5
  shift
  while (($#)); do
    case $1 in
      --minutes) minutes=$2; shift 2 ;;
      *) echo "gpu_kit: unknown option '$1'" >&2; exit 2 ;;
    esac
  done
  # Some seconds are kept for the end: what is not written when the machine is taken is lost.
  local until=$((SECONDS + minutes * 60 - 8)) python=${PYTHON:-python3}
  mkdir -p "$out"
  out=$(cd "$out" && pwd)
  site=$(mktemp -d) # not local: the trap is run when this function is over
  trap 'rm -rf -- "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$kit"/*.whl
  export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
  local toy=()
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu_kit: no GPU here; the same at toy size"
    toy=(--toy)
    export TLSCALE_GPU_TESTS=cpu
  fi
  {
    date -u +%FT%TZ
    git rev-parse HEAD 2>/dev/null || true
    nvidia-smi 2>/dev/null || echo "no nvidia-smi"
    "$python" -m pip list 2>/dev/null | grep -iE '^(torch|torchvision|timm|accelerate|numpy|pillow|pydantic|safetensors) ' || true
    nproc
  } >"$out/machine.txt"

  local work=${TMPDIR:-/tmp}/tlscale_gpu_kit photos='' abreast=()
  if ((!${#toy[@]})); then
    # While the tests run: it takes no GPU. Those start many processes, of which each waits for its libraries.
    nice "$python" benchmarks/photos.py "$work/photos" >"$out/photos.txt" 2>&1 &
    photos=$!
    abreast=(-n 4 --dist worksteal)
  fi

  local left=$((until - SECONDS))
  # Tests have two fifths of the time at most: the benchmarks are what nothing else can show. Killed, and not told to
  # stop: a run within a test would take that for its own stop, and the test would count as failed.
  local for_tests=$((minutes * 60 * 2 / 5))
  ((for_tests < left)) || for_tests=$left
  TLSCALE_GPU_RESULTS=$out/tests.jsonl timeout --signal=KILL "$for_tests" \
    "$python" -m pytest -q -p no:cacheprovider -m gpu "${abreast[@]}" tests/gpu >"$out/tests.txt" 2>&1 || echo "gpu_kit: some tests failed, or had no time"
  tail -n 1 "$out/tests.txt"
  [[ -z $photos ]] || wait "$photos" || echo "gpu_kit: photos: $(tail -n 1 "$out/photos.txt")"

  # A case that ends its process (an error of the driver cannot be caught) is tried once more, and then passed over.
  local try
  for try in 1 2 3; do
    left=$((until - SECONDS))
    ((left > 15)) || break
    if TLSCALE_CACHE=$site/cache timeout --kill-after=5 "$((left + 5))" \
      "$python" benchmarks/gpu.py "$out" --seconds "$left" --work "$work" "${toy[@]}" \
      2>"$out/benchmarks.txt"; then
      break
    fi
    echo "gpu_kit: benchmarks ended in try $try: $(tail -n 1 "$out/benchmarks.txt")"
  done
  echo "gpu_kit: $SECONDS s; results in $out"
}

case ${1-} in
  prepare) prepare ;;
  run)
    [[ $# -ge 2 ]] || { echo "gpu_kit: run needs OUT" >&2; exit 2; }
    shift
    run "$@"
    ;;
  *)
    sed -n '2,5p' "$0" >&2
    exit 2
    ;;
esac
