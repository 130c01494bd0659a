#!/bin/sh
# Install the locked environment, each file by its digest: sh envs/install.sh .venv/bin/python
# torch goes by its version alone, because its CPU and CUDA builds differ: pip takes the one that
# its indexes offer, and what that build needs besides the lock (NVIDIA's libraries, Triton). For
# the CPU build: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
set -eu
python=$1
envs=$(dirname "$0")

install() {
	"$python" -m pip install --quiet --disable-pip-version-check "$@"
}

# Source archives are built with the locked setuptools, not with what an index has today.
sed -n '/^setuptools==/,/[^\\]$/p' "$envs/hashes.txt" |
	install --no-deps --require-hashes -r /dev/stdin
install --no-deps --no-build-isolation --require-hashes -r "$envs/hashes.txt" -r "$envs/models.txt"
install --constraint "$envs/lock.txt" torch
