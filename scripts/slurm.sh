#!/usr/bin/env bash
# Trains on the nodes of a Slurm allocation: one task a node runs launch.sh there, which starts the node's ranks.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh CONFIG [a.b=c ...]      from the repository, on a shared disk
#   NPROC=16 sbatch --nodes 2 scripts/slurm.sh CONFIG ...                       16 ranks a node, whatever it has
#
# Two minutes before its time limit, or when it is preempted, the run finishes its step, saves and exits with 75. Sent
# again, the same line goes on. After a failure each node starts its own ranks again, and they meet anew.
#SBATCH --job-name=turnout
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=USR1@120
#SBATCH --output=slurm-%j.log
set -euo pipefail

for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES; do
    case "${!name:-}" in
    "" | *[!0-9]* | 0*)
        echo "slurm.sh: $name=${!name:-}: is not a number of at least 1; submit this with sbatch" >&2
        exit 2
        ;;
    esac
done
for name in SLURM_SUBMIT_DIR SLURM_JOB_NODELIST; do
    if [ -z "${!name:-}" ]; then echo "slurm.sh: $name is not set; submit this with sbatch" >&2 && exit 2; fi
done
if ! cd -- "$SLURM_SUBMIT_DIR" 2>/dev/null; then
    echo "slurm.sh: SLURM_SUBMIT_DIR=$SLURM_SUBMIT_DIR: is no folder of this machine; submit from a shared disk" >&2
    exit 2
fi
if [ ! -x launch.sh ]; then
    echo "slurm.sh: $PWD has no launch.sh: submit from the repository, sbatch scripts/slurm.sh CONFIG" >&2
    exit 2
fi

export NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
export NNODES="$SLURM_JOB_NUM_NODES"
# Not head, which may leave while scontrol still writes: SIGPIPE would end this script.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

scripts/setup.sh launch >/dev/null # once, not on all nodes at the same time
# The first node to end must not have the others killed: they may still save. A minute later nobody is left.
# shellcheck disable=SC2016 # each task reads its own number
exec srun --kill-on-bad-exit=0 --wait=60 bash -c 'NODE_RANK="$SLURM_NODEID" exec ./launch.sh "$@"' launch.sh "$@"
