#!/usr/bin/env bash
# Trains from a fresh clone: prepares the environment (scripts/setup.sh), then runs `python -m trainer train`.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ./launch.sh [CONFIG] [a.b=c ...]

Train as CONFIG says (default: configs/quickstart.yaml), with overrides such as train.steps=40.
A run continues by itself from the newest checkpoint of its run folder. The first call makes .venv.

environment:
  TURNOUT_PYTHON    the Python to use; an active environment that has torch is used as it is (see scripts/setup.sh)
  OMP_NUM_THREADS   threads of the process (default: the cores it may use)

exit codes: 0 ok, 1 set-up failed, 2 config, 3 data, 4 checkpoint, 5 communication, 6 numerics, 7 resources,
75 preempted and saved
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

for name in NPROC NNODES; do
    if [ "${!name:-1}" != 1 ]; then
        echo "launch.sh: $name=${!name}: this version trains in one process; unset $name or set it to 1" >&2
        exit 2
    fi
done

python="$("$root/scripts/setup.sh" launch)"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    threads="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    # Two threads of one core share its arithmetic units: count cores where the system tells them from threads.
    cores="$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)" || cores=0
    if [ "$cores" -gt 0 ] && [ "$cores" -lt "$threads" ]; then threads="$cores"; fi
    export OMP_NUM_THREADS="$threads"
fi

# -P: the caller's folder may hold another trainer/.
exec "$python" -P -m trainer train "$config" "$@"
