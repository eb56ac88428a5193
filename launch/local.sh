#!/usr/bin/env bash
# One machine: a process for each of its GPUs, or several on its CPU.
#
#   bash launch/local.sh RECIPE [KEY.PATH=VALUE ...]
#   ACCELERATE_USE_CPU=true PROCESSES=2 bash launch/local.sh RECIPE
#
# To be started in the checkout. Ctrl-C, SIGTERM or `touch RUN_DIR/STOP` stop the run, which saves itself first; the same
# line goes on. (SIGTERM leaves it 30 s to save itself, Ctrl-C too; STOP all the time that it wants.)
#
# Variables, all optional:
#   RUN_DIR             run folder [runs/<file name of the recipe>]
#   PROCESSES           [gpu: one for each GPU] a number on a machine without one, and then also ACCELERATE_USE_CPU=true
#   ACCELERATE_USE_CPU  true: processes without a GPU (gloo)
#   PYTHON              the Python that tlscale is installed for [python3]
#
# Tested on: two processes on a CPU, by `make test`. Not run: on GPUs.
set -euo pipefail

recipe=${1:?the recipe is missing: bash launch/local.sh RECIPE [KEY.PATH=VALUE ...]}
run_dir=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}

# torchrun's --max-restarts stays at 0: it would start the processes again that just stopped, only to end at once.
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-gpu}" \
  tlscale/run.py "$recipe" --out "$run_dir" --resume "${@:2}"
