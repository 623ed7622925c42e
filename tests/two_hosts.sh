#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with addresses of their own, joined by a cable (veth). Needs root, or
# unprivileged user namespaces. Everything is gone when this script ends, whichever way it ends.
#
#   tests/two_hosts.sh COMMAND...      on host 1 and on host 2, with NODE_RANK (0, 1) and MASTER_ADDR set;
#                                      prints the bytes that crossed the cable; exits 77 where this is not permitted
set -euo pipefail

if [ -z "${IN_A_NAMESPACE:-}" ]; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(--user --map-root-user)
    for tool in unshare nsenter ip; do
        if ! command -v "$tool" >/dev/null; then echo "no $tool (util-linux, iproute2)" >&2 && exit 77; fi
    done
    if ! reason="$(unshare "${as_root[@]}" --net --mount true 2>&1)"; then echo "$reason" >&2 && exit 77; fi
    IN_A_NAMESPACE=1 exec unshare "${as_root[@]}" --net --mount --pid --fork --kill-child "$0" "$@"
fi

# ip keeps the names of namespaces in /run: a private one, so that nothing is left behind.
if ! reason="$({ mount -t tmpfs none /run && ip netns add host1 && ip netns add host2; } 2>&1)"; then
    echo "$reason" >&2
    exit 77
fi
ip link add cable1 netns host1 type veth peer name cable2 netns host2
for i in 1 2; do
    ip -n "host$i" addr add "10.77.0.$i/24" dev "cable$i"
    ip -n "host$i" link set "cable$i" up
    ip -n "host$i" link set lo up
done

export MASTER_ADDR=10.77.0.1
NODE_RANK=0 nsenter --net=/run/netns/host1 "$@" &
first=$!
NODE_RANK=1 nsenter --net=/run/netns/host2 "$@" &
second=$!
code=0
wait "$first" || code=$?
wait "$second" || code=$?
echo "crossed $(nsenter --net=/run/netns/host1 awk '$1 == "cable1:" { print $2 + $10 }' /proc/net/dev) bytes"
exit "$code"
