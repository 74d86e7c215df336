#!/usr/bin/env bash
# One job on several nodes without a scheduler. The same line on every node, in a directory that all of them share:
#
#   NNODES=8 ENDPOINT=node0:29500 bash examples/launch/torchrun.sh distill configs/llama31_70b_to_8b_64xH100.yaml
#
# NNODES    number of nodes (1)
# ENDPOINT  rendezvous host:port on one of them (localhost:29500)
# NPROC     processes per node, one per GPU (8)
# LOGS      each rank's output goes to LOGS/.../attempt_0/RANK_ON_ITS_NODE/{stdout,stderr}.log (logs/torchrun)
#
# Checkpoints go to megatron.save; the same line resumes from the last one. Further arguments are passed on:
# distillation.alpha=0.3 megatron.exit-duration-in-mins=230
set -euo pipefail

# Megatron needs it to overlap communication with computation.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Time for a save between SIGTERM and SIGKILL; torchrun's default of 30 s is short.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

endpoint="${ENDPOINT:-localhost:29500}"
exec torchrun \
    --nnodes "${NNODES:-1}" --nproc-per-node "${NPROC:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$endpoint" --max-restarts 0 \
    --log-dir "${LOGS:-logs/torchrun}" --tee 3 \
    -m abkd_megatron "$@"
