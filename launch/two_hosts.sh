#!/usr/bin/env bash
# Two hosts (or more) by hand, without a scheduler: to be started on each of them, with its rank.
#
#   first host:   MACHINE_RANK=0 MASTER_ADDR=first PROCESSES_PER_HOST=8 bash launch/two_hosts.sh RECIPE [KEY.PATH=VALUE ...]
#   second host:  MACHINE_RANK=1 MASTER_ADDR=first PROCESSES_PER_HOST=8 bash launch/two_hosts.sh RECIPE [KEY.PATH=VALUE ...]
#
# To be started in the checkout, with the same recipe and keys on all. All hosts must see one run folder, one
# $TLSCALE_CACHE and the data under the same paths. `touch RUN_DIR/STOP` stops the run on all of them at the same step,
# saved; so does SIGTERM to one launcher, within 30 s. To go on, the same lines again. A host that is lost ends the run on
# the others, too; its last checkpoint is what the same lines go on from.
#
# Variables:
#   MACHINE_RANK        number of this host: 0 for the first, which MASTER_ADDR names
#   MASTER_ADDR         name or address of the first host, as every host can reach it
#   PROCESSES_PER_HOST  one for each GPU of a host; all hosts have as many
# and optional:
#   MACHINES            hosts [2]
#   MASTER_PORT         a free port of the first host [29500]
#   RUN_DIR             run folder [runs/<file name of the recipe>]
#   ACCELERATE_USE_CPU  true: processes without a GPU (gloo)
#   GLOO_SOCKET_IFNAME  network interface between the hosts, where there are several; on GPUs NCCL_SOCKET_IFNAME as well
#   PYTHON              the Python that tlscale is installed for [python3]
#
# Tested on: both lines on one machine, a process each, on the CPU, by `make test`. Not run: on GPUs.
set -euo pipefail

recipe=${1:?the recipe is missing: bash launch/two_hosts.sh RECIPE [KEY.PATH=VALUE ...]}
run_dir=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}
machines=${MACHINES:-2}
processes=$((machines * ${PROCESSES_PER_HOST:?how many processes a host runs: one for each of its GPUs}))

# accelerate fails without --machine_rank, and without --multi_gpu it would start one process on a host without GPUs.
exec "${PYTHON:-python3}" -m accelerate.commands.launch --multi_gpu --num_machines "$machines" --num_processes "$processes" \
  --machine_rank "${MACHINE_RANK:?the number of this host: 0 is the first}" \
  --main_process_ip "${MASTER_ADDR:?name or address of the first host}" --main_process_port "${MASTER_PORT:-29500}" \
  --same_network --mixed_precision no --dynamo_backend no \
  tlscale/run.py "$recipe" --out "$run_dir" --resume "${@:2}"
