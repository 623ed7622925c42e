#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with addresses of their own, joined by a cable (veth). Needs root, or
# unprivileged user namespaces. Everything is gone when this script ends, whichever way it ends.
#
#   tests/two_hosts.sh COMMAND...           on host1 and on host2, with NODE_RANK (0, 1) and MASTER_ADDR set;
#                                           prints the bytes that crossed the cable
#   tests/two_hosts.sh --beside COMMAND...  once, on neither of them; on_host 1 COMMAND... runs something on host1,
#                                           and ip -n host1 link set cable1 down cuts the cable
#
# Exits with 77 where this is not permitted, and says why. Each host knows its own name and the other's.
set -euo pipefail

if [ -z "${IN_A_NAMESPACE:-}" ]; then
    as_root=()
    [ "$(id -u)" = 0 ] || as_root=(--user --map-root-user)
    for tool in unshare nsenter ip; do
        if ! command -v "$tool" >/dev/null; then echo "no $tool (util-linux, iproute2)" >&2 && exit 77; fi
    done
    if ! reason="$(unshare "${as_root[@]}" --net --mount --uts true 2>&1)"; then echo "$reason" >&2 && exit 77; fi
    IN_A_NAMESPACE=1 exec unshare "${as_root[@]}" --net --mount --uts --pid --fork --kill-child --mount-proc "$0" "$@"
fi

# ip keeps the names of namespaces in /run: a private one, so that nothing is left behind.
if ! reason="$({ mount -t tmpfs none /run && ip netns add host1 && ip netns add host2; } 2>&1)"; then
    echo "$reason" >&2
    exit 77
fi
ip link set lo up
ip link add cable1 netns host1 type veth peer name cable2 netns host2
printf '127.0.0.1 localhost\n' >/run/hosts
for i in 1 2; do
    ip -n "host$i" addr add "10.77.0.$i/24" dev "cable$i"
    ip -n "host$i" link set "cable$i" up
    ip -n "host$i" link set lo up
    printf '10.77.0.%s host%s\n' "$i" "$i" >>/run/hosts
done
mount --bind /run/hosts /etc/hosts
mkdir /run/bin
cat >/run/bin/on_host <<'TEXT'
#!/bin/sh
i="$1" && shift
exec nsenter --net="/run/netns/host$i" unshare --uts sh -c 'hostname "$0" && exec "$@"' "host$i" "$@"
TEXT
chmod +x /run/bin/on_host
export PATH="$PATH:/run/bin"

export MASTER_ADDR=10.77.0.1
if [ "$1" = --beside ]; then
    shift
    "$@"
    exit
fi
NODE_RANK=0 on_host 1 "$@" &
first=$!
NODE_RANK=1 on_host 2 "$@" &
second=$!
code=0
wait "$first" || code=$?
wait "$second" || code=$?
echo "crossed $(on_host 1 awk '$1 == "cable1:" { print $2 + $10 }' /proc/net/dev) bytes"
exit "$code"
