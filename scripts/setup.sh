#!/usr/bin/env bash
# Prepare the Python that launch.sh and scripts/test.sh use, and print its path on stdout.
#
#   scripts/setup.sh launch    the base dependencies and the extra `recipes` (the default)
#   scripts/setup.sh dev       those and the extra `dev`
#
# An environment of your choice (TURNOUT_PYTHON=path, else an active virtualenv, else an active conda environment) is
# used if it has Python >= 3.11 and a torch that pyproject.toml allows. The project is installed into it; its torch and
# all other packages that fit stay. Otherwise the project gets its own .venv, made by TURNOUT_PYTHON or the first
# suitable python on PATH, with exactly the versions of the lock (requirements/*.txt), pip included, checked by hash.
# A call with nothing to do takes a fraction of a second and needs no network. State and pip's log: .cache/setup/.
# To renew the lock: python -m scripts.lock
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
mark="made-by-turnout-setup" # a file in .venv that names the folder; a .venv without it is never deleted
level="${1:-launch}"

say() { printf 'setup: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit 1
}

# Describes an interpreter in one line. Must also parse on the old Pythons that it is there to reject.
read -r -d '' probe <<'PYTHON' || true
import sys
version = "%d.%d.%d" % tuple(sys.version_info[:3])
if sys.version_info[:2] < (3, 11):
    print(version + " old - - - - -")
    sys.exit()
import hashlib, importlib.util, os, re
root = sys.argv[1]
sys.path = [entry for entry in sys.path if entry]  # "" is the caller's folder, which may hold another trainer/
torch = "-"
if importlib.util.find_spec("torch"):
    from importlib import metadata  # slow
    try:
        torch = metadata.version("torch") or "-"  # as pip sees it
    except (metadata.PackageNotFoundError, KeyError):
        pass  # left over from an uninstalled torch
number = re.match(r"(\d+)\.(\d+)", torch)
torch_fits = "fits" if number and (2, 11) <= (int(number[1]), int(number[2])) < (3, 0) else "-"
spec = importlib.util.find_spec("trainer")
package = os.path.join(os.path.realpath(root), "trainer", "__init__.py")
here = spec and spec.origin and os.path.realpath(spec.origin) == package
makes_venv = importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv")
key = hashlib.sha256(version.encode())
lock = os.path.join(root, "requirements")
for name in [os.path.join(root, "pyproject.toml")] + [os.path.join(lock, name) for name in sorted(os.listdir(lock))]:
    with open(name, "rb") as file:
        key.update(hashlib.sha256(file.read()).digest())
print(version, "new" if sys.version_info[:2] > (3, 14) else "ok", torch, torch_fits, "here" if here else "-",
      "venv" if makes_venv else "-", key.hexdigest(), hashlib.sha256(sys.prefix.encode()).hexdigest()[:16])
PYTHON

# describe PYTHON: set the variables below; fail if it does not run or is older than 3.11.
describe() {
    local facts
    facts="$("$1" -c "$probe" "$root" 2>/dev/null)" || facts=""
    version="" age="" torch="" torch_fits="" here="" makes_venv="" key="" prefix=""
    read -r version age torch torch_fits here makes_venv key prefix <<<"$facts" || true
    [ "$age" = ok ] || [ "$age" = new ] # new: newer than the lock supports
}

# ready: true if the interpreter described last has everything for this level (dev includes launch).
ready() {
    local stamp
    if [ "$here" != here ] || [ "$torch" = - ] || [ -e "$state/unfinished" ]; then return 1; fi
    for stamp in "$state/$level" "$state/dev"; do
        if [ -f "$stamp" ] && [ "$(<"$stamp")" = "$key" ]; then return 0; fi
    done
    return 1
}

# locate COMMAND: print its absolute path; fail if there is none.
locate() {
    local path
    path="$(type -P "$1")" || return 1
    case "$path" in
    /*) printf '%s\n' "$path" ;;
    *) printf '%s\n' "$PWD/$path" ;;
    esac
}

# choose: describe an interpreter, set `python`, `state` and `owner` (of the environment and its torch); fail if .venv
# must be made.
choose() {
    local candidate
    chosen="" wanted=""
    if [ -n "${TURNOUT_PYTHON:-}" ]; then
        chosen="$(locate "$TURNOUT_PYTHON")" || die "TURNOUT_PYTHON=$TURNOUT_PYTHON: no such command"
    fi
    case "$chosen" in
    "" | "$venv"/*) chosen="" ;; # .venv does not count as a choice
    *)
        describe "$chosen" || die "TURNOUT_PYTHON=$TURNOUT_PYTHON: Python ${version:-does not run}; needs 3.11 or newer"
        wanted="$version"
        ;;
    esac
    owner=user
    for candidate in "$chosen" "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}" "${CONDA_PREFIX:+$CONDA_PREFIX/bin/python}" \
        "$venv/bin/python"; do
        python="$candidate"
        # A marked one is this folder's .venv, handled below, or another checkout's, which is left alone.
        if [ -z "$python" ] || [ -e "${python%/bin/*}/$mark" ] || ! describe "$python"; then continue; fi
        if [ "$torch_fits" != fits ]; then continue; fi
        state="$root/.cache/setup/$prefix"
        if [ "$python" = "$venv/bin/python" ]; then state="$root/.cache/setup/venv"; fi
        if ready || "$python" -c 'import torch' 2>/dev/null; then return 0; fi
        say "$python: torch $torch does not import; this environment is left alone"
    done
    owner=setup
    python="$venv/bin/python"
    state="$root/.cache/setup/venv"
    if [ ! -e "$venv/$mark" ]; then
        if [ ! -e "$venv" ]; then return 1; fi
        describe "$python" || die "$venv was not made by this script and has no working Python >= 3.11; move it away"
        return 0
    fi
    # The scripts of a moved .venv name its old path; after a killed install pip may mistake half a package for a whole.
    if [ "$(<"$venv/$mark")" != "$root" ] || [ -e "$state/unfinished" ] || ! describe "$python"; then return 1; fi
    [ -z "$wanted" ] || [ "$version" = "$wanted" ]
}

# find_base: set `base` to the first python that can make .venv.
find_base() {
    local name candidate found="" crippled=""
    for name in ${chosen:+"$chosen"} python3 python python3.14 python3.13 python3.12 python3.11; do
        while read -r candidate; do
            case "$candidate" in "" | "$venv"/*) continue ;; esac
            if ! describe "$candidate" || [ "$age" = new ]; then
                found="$found, $candidate (${version:-does not run})"
            elif [ "$makes_venv" != venv ]; then
                crippled="${crippled:-python${version%.*}}"
            else
                base="$candidate"
                return
            fi
        done <<<"$(type -aP "$name")"
        if [ -n "$chosen" ]; then break; fi
    done
    if [ -n "$crippled" ]; then
        die "$crippled cannot make a virtual environment: its ensurepip or venv module is missing;" \
            "install the package $crippled-venv (Debian, Ubuntu: sudo apt install $crippled-venv)"
    fi
    found="${found#, }"
    die "needs Python 3.11 to 3.14, for which the lock has files; found ${found:-none}; install one, or set" \
        "TURNOUT_PYTHON to its path"
}

make_venv() {
    find_base
    if [ -e "$venv" ]; then
        mv "$venv" "$root/.cache/setup/old-venv.$$" # atomic: a partial .venv never has this name
    fi
    rm -rf "$state" "$root"/.cache/setup/old-venv.* "$root"/.cache/setup/new-venv.*
    mkdir -p "$state" "$root/.cache/setup/new-venv.$$"
    printf '%s\n' "$root" >"$root/.cache/setup/new-venv.$$/$mark"
    mv "$root/.cache/setup/new-venv.$$" "$venv"
    : >"$state/unfinished"
    "$base" -m venv "$venv" >"$state/log" 2>&1 || failed "$base -m venv $venv failed"
    describe "$python" || die "$base made a .venv whose python does not run"
}

failed() {
    tail -n 15 "$state/log" >&2
    die "$1 (above: the end of ${state#"$root"/}/log)"
}

install() {
    local torch_before="$torch"
    mkdir -p "$state"
    # PYTHONSAFEPATH would hide the package scripts/.
    (cd "$root" && PYTHONSAFEPATH="" "$python" -m scripts.install "$level" "$owner" "$state") || failed "pip install failed"
    describe "$python" || die "$python no longer runs"
    if [ "$owner" = user ] && [ "$torch" != "$torch_before" ]; then
        die "torch changed from $torch_before to $torch in $python; that is a bug in scripts/setup.sh"
    fi
    [ "$here" = here ] || die "$python finds another trainer than $root/trainer; is PYTHONPATH set?"
    rm -f "$state/launch" "$state/dev"
    printf '%s\n' "$key" >"$state/$level"
    say "ready after $SECONDS s"
}

case "$level" in
launch | dev) ;;
*) die "unknown level '$level'; use launch or dev" ;;
esac

if choose && ready; then
    printf '%s\n' "$python"
    exit 0
fi

mkdir -p "$root/.cache/setup"
if type -P flock >/dev/null; then
    exec 9>"$root/.cache/setup/lock" # inherited by pip, which holds the lock even if this script is killed
    flock -n 9 || {
        say "waiting for another setup of this folder"
        flock 9
    }
fi

if ! choose; then
    if [ -e "$state/unfinished" ]; then say "the last setup was interrupted"; fi
    make_venv
    say "setting up .venv with Python $version (about a minute, or as long as downloading torch takes)"
elif ready; then
    printf '%s\n' "$python"
    exit 0
elif [ "$owner" = user ]; then
    say "installing into $(dirname -- "$(dirname -- "$python")"), whose torch $torch stays"
else
    say "updating .venv"
fi
install
printf '%s\n' "$python"
