#!/usr/bin/env bash
# Makes sure that the files of Fashion-MNIST are where tlscale looks for them.
#
# Promise: nothing is written but the Debian package (as root) or $TLSCALE_CACHE/data/fashion-mnist (otherwise), there
# file by file and whole, and no file that is there is touched. Where the files cannot be had, it says so and exits 0:
# tlscale then tries the hub, and what happens without that too is the recipe's to decide (`fallback: sample`).
set -euo pipefail

package=dataset-fashion-mnist
system_dir=/usr/share/datasets/fashion-mnist
cache_dir=${TLSCALE_CACHE:-$HOME/.cache/tlscale}/data/fashion-mnist
files=(train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte)
apt=(apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 -o DPkg::Lock::Timeout=120)

# Whether folder $1 holds all four files, gzipped or plain.
has_all() {
  local file
  for file in "${files[@]}"; do
    [[ -s $1/$file.gz || -s $1/$file ]] || return 1
  done
}

say_and_stop() {
  echo "Fashion-MNIST: $1"
  exit 0
}

install_as_root() {
  local install=("${apt[@]}" install -y --reinstall --no-install-recommends "$package")
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" && return
  echo "Fashion-MNIST: not in the package lists at hand; fetching those anew"
  "${apt[@]}" update && "${install[@]}"
}

# Without root: the package file into folder $1, with package lists of our own where the system's are missing or old.
download_as_user() {
  local own_lists=(-o "Dir::State=$1/apt" -o "Dir::Cache=$1/apt/cache" -o "Dir::State::status=/var/lib/dpkg/status")
  (cd "$1" && "${apt[@]}" download "$package") && return
  echo "Fashion-MNIST: not in the package lists at hand; fetching those anew"
  mkdir -p "$1/apt/lists/partial" "$1/apt/cache/archives/partial"
  (cd "$1" && "${apt[@]}" "${own_lists[@]}" update && "${apt[@]}" "${own_lists[@]}" download "$package")
}

# Unpacks it in folder $1 and puts each of the four files into the cache by one rename.
unpack_as_user() {
  local file
  dpkg -x "$1/$package"_*.deb "$1/root" && has_all "$1/root$system_dir" && mkdir -p "$cache_dir" || return 1
  for file in "${files[@]}"; do
    cp -- "$1/root$system_dir/$file.gz" "$cache_dir/.$file.gz.$$" || return 1
    mv -n -- "$cache_dir/.$file.gz.$$" "$cache_dir/$file.gz" || return 1
  done
}

for dir in ${TLSCALE_DATA:+"$TLSCALE_DATA/fashion-mnist" "$TLSCALE_DATA"} "$cache_dir" "$system_dir"; do
  if has_all "$dir"; then
    say_and_stop "already in $dir"
  fi
done

if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
  if [[ $(id -u) -eq 0 ]]; then
    echo "Fashion-MNIST: installing Debian's package $package"
    if install_as_root && has_all "$system_dir"; then
      say_and_stop "in $system_dir"
    fi
  else
    echo "Fashion-MNIST: not root, so Debian's package $package is not installed but unpacked into $cache_dir"
    work=$(mktemp -d)
    trap 'rm -rf -- "$work" "$cache_dir"/.*-ubyte.gz."$$"' EXIT
    if download_as_user "$work" && unpack_as_user "$work"; then
      say_and_stop "in $cache_dir"
    fi
  fi
fi

{
  echo "Fashion-MNIST: NOT FOUND, and no Debian package can be had here. tlscale itself will try the hub; where that cannot"
  echo "be reached either, a recipe with 'fallback: sample' runs on the 7,000 images that ship with tlscale, and says so."
  echo "To bring the files yourself, put the four *-ubyte.gz into $cache_dir."
} >&2
