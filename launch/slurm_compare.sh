#!/usr/bin/env bash
# Slurm: the runs of `tlscale compare` as the tasks of one array, and a job after it that gathers their table.
#
#   bash launch/slurm_compare.sh [OPTIONS OF SBATCH ...] -- RECIPE [WORDS OF tlscale compare ...]
#   bash launch/slurm_compare.sh --gpus-per-node=1 --cpus-per-task=8 --time=02:00:00 -- photos.yaml --seeds 0,1,2
#
# Prints the numbers of the two jobs. The options are those of every task, a run of one process, and of the last job,
# which begins when all tasks have ended: what is not finished by then is named below the table. All nodes have to see
# the current folder. A task that is preempted, or whose time is up, saves itself and is queued again. To go on with a
# comparison some of whose runs failed: the same line again, with --resume at its end.
#
# Variables, all optional:
#   PYTHON        the Python that tlscale is installed for [python3]
#   MOST_AT_ONCE  tasks that may run at the same time [all]
#   MAX_REQUEUES  how often a task may be queued again [50]
#
# Tested on: Slurm 22.05 of Debian 12, two nodes on one machine, on CPUs, by `make test-slurm`; its logic in `make test`.
# Not run: on GPUs, on nodes that are machines of their own, with other versions of Slurm.
set -euo pipefail

say() { echo "slurm_compare.sh: $*"; }

# `line`: words of a shell, as tlscale prints them, the first of which is `tlscale`
read_words() {
  eval "words=($1)"
  words=("${words[@]:1}")
}

submit() {
  local options=() line root count array
  while [[ $# -gt 0 && $1 != -- ]]; do
    options+=("$1")
    shift
  done
  [[ $# -ge 2 ]] || { say "the recipe is missing: bash launch/slurm_compare.sh [OPTIONS OF SBATCH ...] -- RECIPE [...]"; exit 2; }
  shift
  jobs=$(mktemp)
  trap 'rm -f "$jobs" "$jobs.then"' EXIT
  "${PYTHON:-python3}" -m tlscale compare "$@" --print-jobs >"$jobs" 2>"$jobs.then" || {
    local code=$?
    cat "$jobs.then" >&2
    exit "$code"
  }
  line=$(sed -n 's/^then: //p' "$jobs.then")
  read_words "$line"
  root=$(dirname "${words[-1]}") # of --out ROOT/table
  mkdir -p "$root/jobs"
  cp "$jobs" "$root/jobs/lines"
  echo "$line" >"$root/jobs/gather"
  count=$(wc -l <"$jobs")
  array=$(sbatch --parsable --job-name=compare --array="1-$count${MOST_AT_ONCE:+%$MOST_AT_ONCE}" --requeue \
    --open-mode=append --signal=B:USR1@120 --output="$root/jobs/%a.out" "${options[@]}" "$0" --task "$root/jobs/lines")
  say "$count runs: job ${array%%;*}, output in $root/jobs/*.out"
  array=$(sbatch --parsable --job-name=table --dependency="afterany:${array%%;*}" --output="$root/jobs/table.out" \
    "${options[@]}" "$0" --table "$root/jobs/gather")
  say "their table: job ${array%%;*}, in $root/table"
}

# A line of tlscale's: `tlscale run RECIPE --out RUN_DIR --resume`
task() {
  local run run_dir code asked=no starts=$((${SLURM_RESTART_COUNT:-0} + 1))
  read_words "$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")"
  run_dir=${words[3]}
  # The run saves itself on SIGTERM. Slurm's own SIGTERM ends the job: cancelled, or queued again by somebody else.
  trap 'asked=stop; kill -TERM "$run" 2>/dev/null || true' USR1
  trap 'asked=end; kill -TERM "$run" 2>/dev/null || true' TERM
  rm -f "$run_dir/STOPPED" # of an earlier start
  "${PYTHON:-python3}" -m tlscale "${words[@]}" &
  run=$!
  # A signal ends a wait; the next one gets the exit code.
  code=0
  wait "$run" || code=$?
  while kill -0 "$run" 2>/dev/null; do
    code=0
    wait "$run" || code=$?
  done
  if ((code != 75)); then
    exit "$code"
  elif [[ $asked == end ]]; then
    say "ended by Slurm"
  elif [[ $asked == no ]] && grep -q '"by": "the file' "$run_dir/STOPPED"; then
    say "stopped by hand"
  elif ((starts > ${MAX_REQUEUES:-50})); then
    say "not queued again: this was start $starts, and MAX_REQUEUES is ${MAX_REQUEUES:-50}"
  else
    say "the run saved itself, and is queued again"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit 75
}

case ${1:-} in
  --task) task "$2" ;;
  --table)
    read_words "$(<"$2")"
    exec "${PYTHON:-python3}" -m tlscale "${words[@]}"
    ;;
  *) submit "$@" ;;
esac
