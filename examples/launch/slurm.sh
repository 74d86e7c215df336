#!/usr/bin/env bash
#SBATCH --job-name=distill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@300
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.log
# One job under Slurm, one task per GPU; start it in a directory that all nodes share:
#
#   sbatch --nodes 8 examples/launch/slurm.sh distill configs/llama31_70b_to_8b_64xH100.yaml
#
# IMAGE=... in front of sbatch runs it in a container (pyxis: `srun --container-image`) with this directory mounted;
# MOUNTS=/data:/data adds mounts. Without IMAGE the nodes' `python` is used.
#
# Every rank gets SIGTERM five minutes before the time limit. With `exit-signal-handler`, as in configs/, Megatron saves and
# exits. Jobs of one name run one after another (singleton) and resume from the last checkpoint, because the
# configuration saves to and loads from one directory. Further arguments are passed on.
set -euo pipefail

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR="${hosts[0]}"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT

# Megatron needs it to overlap communication with computation.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

container=()
if [[ -n "${IMAGE:-}" ]]; then
    container=(--container-image "$IMAGE" --container-mounts "$PWD:$PWD${MOUNTS:+,$MOUNTS}" --container-workdir "$PWD")
fi

# Set torchrun's variables from Slurm's. Without torchrun's agent in between, Slurm's signals reach the ranks.
# shellcheck disable=SC2016  # each task expands these
exec srun --kill-on-bad-exit=1 --label "${container[@]}" bash -c '
    export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
    export LOCAL_WORLD_SIZE="$((SLURM_NTASKS / SLURM_NNODES))"
    exec python -m abkd_megatron "$@"' rank "$@"
