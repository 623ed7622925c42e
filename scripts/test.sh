#!/usr/bin/env bash
# Check format, lint, types and import contracts, then run the tests. Fails if any of them fails.
#
#   ./scripts/test.sh                    the tests of every push
#   ./scripts/test.sh full               also those marked `nightly`: larger samples, and what lasts long
#   ./scripts/test.sh fast               the tests of every push except those marked `slow`, which start runs or compile
#   ./scripts/test.sh tests/unit -k x    only pytest, with these arguments (paths relative to the repository)
set -euo pipefail

cd -- "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="$(scripts/setup.sh dev)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests are small, and many start several processes
unset PYTHONDONTWRITEBYTECODE                    # or each of those would compile trainer/ again

what="${1-push}" # push, full and fast check the code as well
case "$what" in
    push) set -- -m "not nightly" ;;
    full) shift && set -- "$@" ;;
    fast) shift && set -- -m "not slow and not nightly" "$@" ;;
    *) what=pytest ;;
esac
failed=""

# stage NAME COMMAND...: run a check; print its name, result and seconds, and its output if it fails.
stage() {
    local name="$1" started="$SECONDS" output
    shift
    if output="$("$@" 2>&1)"; then
        printf '%-12s ok      %3d s\n' "$name" "$((SECONDS - started))"
    else
        printf '%s\n' "$output"
        printf '%-12s FAILED  %3d s\n' "$name" "$((SECONDS - started))"
        failed="$failed, $name"
    fi
}

if [ "$what" != pytest ]; then
    stage "ruff format" "$python" -m ruff format --check .
    stage "ruff check" "$python" -m ruff check .
    stage "pyrefly" "$python" -m pyrefly check --python-interpreter-path "$python"
    stage "lint-imports" "$python" -c 'from importlinter.cli import lint_imports_command as run; run()'
    if [ -n "$failed" ]; then echo "FAILED: ${failed#, } (so this run fails, whatever pytest says below)"; fi
fi

# Last, so that the output ends with pytest's summary. Exit code 5, "no tests ran", is a failure too.
# Four files at a time on two cores: half of the time, tests wait for processes that they have started. In the order of
# folders, so that the long files of chaos, end_to_end and laws come first and none of them is left alone at the end.
if [ "$what" != pytest ]; then set -- -n 4 --dist loadfile --no-loadscope-reorder "$@"; fi
code=0
"$python" -m pytest "$@" || code=$?
if [ "$code" -eq 0 ] && [ -n "$failed" ]; then code=1; fi
exit "$code"
