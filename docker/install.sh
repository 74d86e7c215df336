#!/usr/bin/env bash
# Into an environment that has its own torch, which stays what it is: `bash docker/install.sh` in the repository.
#
# The package and megatron-core go in without their dependencies; then what the two need beside torch, with torch held at
# the version that is there: pip ends with an error where it would have to be another one.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# As pip knows it: torch.__version__ may say more (+cu130), which no candidate of pip's would equal.
torch() { python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; }
torch > "$scratch/constraints.txt"

python -m pip install --no-cache-dir --no-deps packaging "megatron-core>=0.19,<0.20" .
python - > "$scratch/needs.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

ours = [Requirement(text) for text in requires("abkd-megatron")]
core = next(it for it in ours if it.name == "megatron-core")
theirs = [Requirement(text) for text in requires("megatron-core")]
chosen = [{"extra": extra} for extra in ("", *core.extras)]
for need in (*ours, *theirs):
    if need.name in ("torch", "megatron-core"):
        continue
    if need.marker is None or any(need.marker.evaluate(environment) for environment in chosen):
        need.marker = None
        print(need)
PYTHON
python -m pip install --no-cache-dir --constraint "$scratch/constraints.txt" --requirement "$scratch/needs.txt"

held="$(cat "$scratch/constraints.txt")"
found="$(torch)"
[[ "$held" == "$found" ]] || { echo "expected $held as before, found $found" >&2; exit 1; }
abkd-megatron env
