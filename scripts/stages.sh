#!/usr/bin/env bash
# Pretrain, anneal and tune on conversations, each stage with the weights of the one before (docs/stages.md).
#
#   ./scripts/stages.sh [a.b=c ...]      overrides of every stage; NPROC=2 and parallel.ep_size=2 share the experts
#
# Started again, it goes on in the stage in which it was stopped. Then: python -m trainer chat runs/chat
set -euo pipefail

cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$(scripts/setup.sh launch)"

"$python" -m scripts.recipes chat
for stage in pretrain anneal chat; do
    ./launch.sh "configs/stages/$stage.yaml" "$@"
done
