#!/usr/bin/env bash
# Installs what `make test-slurm` needs: Slurm and munge, from Debian's packages, as root. Starts nothing.
#
# Where they are already, nothing is done. Where they cannot be had, it says so and exits 0: the tests are then skipped,
# and say why.
set -euo pipefail

packages=(slurm-wlm munge)
apt=(apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=120)

has_all() {
  PATH=$PATH:/usr/sbin command -v munged slurmctld slurmd sbatch srun scontrol >/dev/null
}

install_them() {
  # A run level of 1 is what has Debian's scripts leave the services alone.
  RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "${packages[@]}"
}

if has_all; then
  echo "Slurm: already here"
elif ! command -v apt-get >/dev/null || [[ $(id -u) -ne 0 ]]; then
  echo "Slurm: not here, and only root on a Debian system can install ${packages[*]}" >&2
elif install_them || { "${apt[@]}" update && install_them; }; then
  echo "Slurm: installed"
else
  echo "Slurm: ${packages[*]} cannot be had here" >&2
fi
