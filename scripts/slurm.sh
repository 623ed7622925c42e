#!/usr/bin/env bash
# Train on the nodes of a Slurm allocation: one task per node runs launch.sh, which starts the ranks of the node.
#
#   sbatch --nodes 2 --gpus-per-node 8 scripts/slurm.sh CONFIG [a.b=c ...]      from the repository, on a shared disk
#   NPROC=16 sbatch --nodes 2 scripts/slurm.sh CONFIG ...                       16 ranks per node, whatever its GPUs
#   SPARES=1 sbatch --nodes 3 --no-kill --gpus-per-node 8 scripts/slurm.sh CONFIG ...   two nodes, and a spare one
#
# Two minutes before its time limit, or when preempted, the run finishes its step, saves and exits with 75. Submit the
# same line again to resume. After a failure each node restarts its own ranks, and they rendezvous again.
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
    echo "slurm.sh: SLURM_SUBMIT_DIR=$SLURM_SUBMIT_DIR: is not a folder on this machine; submit from a shared disk" >&2
    exit 2
fi
if [ ! -x launch.sh ]; then
    echo "slurm.sh: $PWD has no launch.sh: submit from the repository, sbatch scripts/slurm.sh CONFIG" >&2
    exit 2
fi

export NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-1}}"
export SPARES="${SPARES:-0}"
case "$SPARES" in *[!0-9]*) echo "slurm.sh: SPARES=$SPARES: is not a number" >&2 && exit 2 ;; esac
if [ "$SPARES" -ge "$SLURM_JOB_NUM_NODES" ]; then
    echo "slurm.sh: SPARES=$SPARES: leaves none of $SLURM_JOB_NUM_NODES nodes for the ranks" >&2 && exit 2
fi
export NNODES="$((SLURM_JOB_NUM_NODES - SPARES))"
# Not `head -1`: it exits while scontrol still writes, and SIGPIPE would end this script.
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

scripts/setup.sh launch >/dev/null # once, instead of on all nodes at the same time
# The first node to end must not kill the others, which may still be saving; after a minute Slurm ends them, unless
# there are spares, which go on where a node was lost.
options=(--kill-on-bad-exit=0 --wait=60)
if [ "$SPARES" -gt 0 ]; then options=(--kill-on-bad-exit=0 --wait=0 --no-kill); fi
# shellcheck disable=SC2016 # expanded by each task
exec srun "${options[@]}" bash -c 'NODE_RANK="$SLURM_NODEID" exec ./launch.sh "$@"' launch.sh "$@"
