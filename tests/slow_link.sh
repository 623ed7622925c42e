#!/usr/bin/env bash
# Hosts on one machine, joined by a switch (network namespaces, a bridge), with a slow link between two of them: what
# one sends to the other passes a limit of RATE, everything else does not. Needs root, or unprivileged user namespaces.
#
#   tests/slow_link.sh HOSTS A B RATE COMMAND...    on all hosts, with RANK 0 .. HOSTS-1; such as: 4 1 3 100mbit
#
# Exits with 77 where this is not permitted, and says why. Everything is gone when this script ends.
set -euo pipefail

if [ -z "${IN_A_NAMESPACE:-}" ]; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(--user --map-root-user)
    if ! reason="$(unshare "${as_root[@]}" --net --mount true 2>&1)"; then echo "$reason" >&2 && exit 77; fi
    IN_A_NAMESPACE=1 exec unshare "${as_root[@]}" --net --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
hosts="$1" a="$2" b="$3" rate="$4"
shift 4
if ! reason="$({ mount -t tmpfs none /run && ip link add switch type bridge && ip link set switch up; } 2>&1)"; then
    echo "$reason" >&2
    exit 77
fi

# From host $1 to host $2: a class of its own, with the limit; all else is in class 10.
limit() {
    local device="cable$1"
    ip netns exec "host$1" tc qdisc add dev "$device" root handle 1: htb default 10
    ip netns exec "host$1" tc class add dev "$device" parent 1: classid 1:10 htb rate 100gbit quantum 60000
    ip netns exec "host$1" tc class add dev "$device" parent 1: classid 1:20 htb rate "$rate" quantum 60000
    ip netns exec "host$1" tc filter add dev "$device" protocol ip parent 1: prio 1 \
        u32 match ip dst "10.77.0.$((10 + $2))/32" flowid 1:20
}

for ((i = 0; i < hosts; i++)); do
    ip netns add "host$i"
    ip link add "plug$i" type veth peer name "cable$i" netns "host$i"
    ip link set "plug$i" master switch up
    ip -n "host$i" addr add "10.77.0.$((10 + i))/24" dev "cable$i"
    ip -n "host$i" link set "cable$i" up
    ip -n "host$i" link set lo up
done
limit "$a" "$b"
limit "$b" "$a"
export WORLD_SIZE="$hosts" LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=10.77.0.10 MASTER_PORT="${MASTER_PORT:-29571}"
for ((i = 1; i < hosts; i++)); do
    RANK=$i ip netns exec "host$i" "$@" >/dev/null &
done
RANK=0 ip netns exec host0 "$@"
