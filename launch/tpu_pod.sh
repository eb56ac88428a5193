#!/usr/bin/env bash
# A slice of Cloud TPUs with several hosts: the same command on each of them, from your own machine, by gcloud.
#
#   TPU_NAME=pod ZONE=us-central2-b bash launch/tpu_pod.sh RECIPE [KEY.PATH=VALUE ...]
#
# Each host needs the checkout, a Python with torch_xla 2.9, torch 2.9 and tlscale, and the run folder and the data under
# the same paths (a file store that all mount). A word may hold no single quote. To stop: `touch RUN_DIR/STOP` there.
#
# Variables:
#   TPU_NAME          the slice
#   ZONE              where it is
# and optional:
#   CHECKOUT          folder of the checkout on the hosts [tlscale, in the home folder]
#   RUN_DIR           run folder on the hosts [runs/<file name of the recipe>]
#   HOSTS             hosts of the slice [4]
#   CHIPS_PER_HOST    processes on a host, one for each chip [4]
#   PYTHON            the Python on the hosts [python3]
#
# Tested on: nothing. NOT RUN: there was no TPU. Only its logic is tested, with another `gcloud`, by `make test`. What was
# run of the XLA path is one process of torch_xla on a CPU (`make test-xla`), no second one.
set -euo pipefail

recipe=${1:?the recipe is missing: bash launch/tpu_pod.sh RECIPE [KEY.PATH=VALUE ...]}
run_dir=${RUN_DIR:-runs/$(basename "$recipe" .yaml)}
about=http://metadata.google.internal/computeMetadata/v1/instance/attributes
words=''
for word in "${@:2}"; do
  words+=" '$word'"
done

# A host learns its number, and who is first, from its own metadata.
gcloud compute tpus tpu-vm ssh "${TPU_NAME:?name of the slice}" --zone "${ZONE:?zone of the slice}" --worker=all --command "
set -eu
recipe='$recipe'
run_dir='$run_dir'
about() { curl -sf -H 'Metadata-Flavor: Google' '$about/'\"\$1\"; }
rank=\$(about agent-worker-number)
first=\$(about worker-network-endpoints | cut -d, -f1 | cut -d: -f3)
cd '${CHECKOUT:-tlscale}'
export PJRT_DEVICE=TPU
exec '${PYTHON:-python3}' -m torch.distributed.run --nnodes '${HOSTS:-4}' --nproc-per-node '${CHIPS_PER_HOST:-4}' \
  --node-rank \"\$rank\" --master-addr \"\$first\" --master-port 29500 \
  tlscale/run.py \"\$recipe\" --out \"\$run_dir\" --resume$words"
