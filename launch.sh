#!/usr/bin/env bash
# Train from a fresh clone: prepare the environment (scripts/setup.sh), then run `python -m trainer launch`.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./launch.sh [CONFIG] [a.b=c ...]

Train CONFIG (default: configs/quickstart.yaml) with overrides such as train.steps=40.
The run resumes from the newest checkpoint of its run folder. It restarts after a failure that may be transient (exit
codes 1, 5 and 7, a killed process) until three restarts in a row have made no progress. On SIGTERM, SIGUSR1, SIGHUP
or Ctrl-C it finishes the step, saves and exits with 75. The first call creates .venv.

environment:
  TURNOUT_PYTHON    the Python to use; an active environment with torch is used and its torch kept (scripts/setup.sh)
  NPROC             ranks on this machine (default 1), such as NPROC=2 ./launch.sh CONFIG parallel.ep_size=2
  NNODES            machines (default 1); then also NODE_RANK, MASTER_ADDR and, if 29500 is taken, MASTER_PORT
  SPARES            machines beyond these (default 0), NODE_RANK from NNODES on, that take the places of lost ones
  OMP_NUM_THREADS   threads of each rank (default: the cores divided by the ranks)

exit codes, for any number of ranks: 0 ok, 1 set-up failed or a bug, 2 config, 3 data, 4 checkpoint, 5 communication,
6 numerics, 7 resources, 75 stopped and saved, 128 + n killed by signal n
TEXT
}

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
config=configs/quickstart.yaml
[ "$PWD" -ef "$root" ] || config="$root/$config"
case "${1:-}" in
-h | --help)
    usage
    exit
    ;;
"" | -* | *=*) ;;
*)
    config="$1"
    shift
    ;;
esac

nproc="${NPROC:-1}" nnodes="${NNODES:-1}"
for name in nproc nnodes; do
    case "${!name}" in
    "" | *[!0-9]* | 0*)
        echo "launch.sh: ${name^^}=${!name}: is not a number of at least 1" >&2
        exit 2
        ;;
    esac
done
if [ "$nnodes" != 1 ]; then
    for name in NODE_RANK MASTER_ADDR; do
        if [ -z "${!name:-}" ]; then
            echo "launch.sh: NNODES=$nnodes needs $name as well (NODE_RANK: 0 on the first node, 1 on the next;" \
                "MASTER_ADDR: the address of the first)" >&2
            exit 2
        fi
    done
fi

python="$("$root/scripts/setup.sh" launch)"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    # Two threads of one core share its arithmetic units, so count cores if lscpu can.
    cores="$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)" || cores=0
    if [ "$cores" -gt 0 ] && [ "$cores" -lt "$threads" ]; then threads="$cores"; fi
    threads=$((threads / nproc))
    if [ "$threads" -lt 1 ]; then threads=1; fi
    export OMP_NUM_THREADS="$threads"
fi

# -P: the caller's folder may hold another trainer/. `launch` reads NPROC and the other variables itself.
exec "$python" -P -m trainer launch "$config" "$@"
