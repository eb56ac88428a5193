#!/usr/bin/env bash
# Makes the environment of `make test-xla`, with torch_xla and the torch that belongs to it, and prints where it is.
#
# It lies outside of the checkout, in ${TLSCALE_XLA_CACHE:-~/.cache/tlscale-xla}/<hash of what it is made from>, is made
# anew where it is missing or half-made, and its tlscale is this checkout. Its torch is older than tlscale's floor:
# docs/xla.md says why, and what not to do in it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

python=${PYTHON:-python3}
constraints=tests/xla/constraints.txt
cache=${TLSCALE_XLA_CACHE:-$HOME/.cache/tlscale-xla}

# tlscale's own dependencies but for torch, whose floor there is above what torch_xla has.
mapfile -t needed < <("$python" - <<'PY'
import re, tomllib
wanted = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
print(*(line for line in wanted if re.split(r"[^\w-]", line)[0] != "torch"), sep="\n")
PY
)
((${#needed[@]})) || { echo "make_xla_env: pyproject.toml names no dependencies" >&2; exit 1; }
needed+=(torch torch_xla pytest pytest-timeout hatchling editables)

key=$({
  cat "$constraints"
  printf '%s\n' "${needed[@]}"
  "$python" -c 'import platform, sys; print(sys.version, sys.base_prefix, platform.machine())'
} | sha256sum | cut -c1-16)
venv=$cache/$key

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9
if [[ ! -f $venv/.complete ]]; then
  echo "make_xla_env: building $venv; that is several GB, and takes minutes" >&2
  rm -rf -- "$venv"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet -c "$constraints" "${needed[@]}" >&2
  touch "$venv/.complete" # last, so that a half-made environment is never taken for a whole one
fi
# Without its dependencies: pip would refuse torch.
"$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e . >&2
echo "$venv"
