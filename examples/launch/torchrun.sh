#!/usr/bin/env bash
# One job on several nodes without a scheduler. The same line on every node, from a folder that all of them share:
#
#   NNODES=8 ENDPOINT=node0:29500 bash examples/launch/torchrun.sh distill configs/llama31_70b_to_8b_64xH100.yaml
#
# NNODES    how many nodes take part (1)
# ENDPOINT  host:port of one of them, where they find each other (localhost:29500)
# NPROC     processes a node, one a GPU (8)
# LOGS      each rank's output goes to LOGS/.../attempt_0/RANK_ON_ITS_NODE/{stdout,stderr}.log (logs/torchrun)
#
# Checkpoints go where the file's megatron.save says; the same line goes on from the last of them. What comes after the
# file is given on: distillation.alpha=0.3 megatron.exit-duration-in-mins=230
set -euo pipefail

# Megatron's way to have communication start before the computation that it hides behind.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# What torchrun gives the ranks between SIGTERM, at which they save, and SIGKILL; its own 30 s are short for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

endpoint="${ENDPOINT:-localhost:29500}"
exec torchrun \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$endpoint" --max-restarts 0 \
    --log-dir "${LOGS:-logs/torchrun}" --tee 3 \
    -m abkd_megatron "$@"
