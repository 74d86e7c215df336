#!/usr/bin/env bash
# Install into an environment without changing its torch: `bash docker/install.sh` in the repository.
#
# The package and megatron-core are installed without dependencies, then their other dependencies with torch pinned to the
# installed version. pip fails if a dependency needs another torch.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# pip's version: torch.__version__ may have a local part (+cu130), which matches no candidate.
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
