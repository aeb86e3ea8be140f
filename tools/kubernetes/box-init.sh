#!/bin/bash
# Pid 1 of a box: gives it mounts of its own, says "ready" on stdout, then reaps until it is killed.
#   box-init.sh NAME FOLDER NAMESERVER
# What the machine has is read-only in here, except FOLDER; what a node writes lies in memory.
set -euo pipefail
name=$1 folder=$2 nameserver=$3

mount -t sysfs sysfs /sys
if grep -q '^[1-9]' /proc/self/cgroup; then  # cgroup v1: one hierarchy for each controller
  mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
  while IFS=: read -r _ controller _; do
    [ -n "$controller" ] || continue
    at=/sys/fs/cgroup/${controller#name=}
    mkdir "$at"
    case $controller in name=*) options=none,$controller ;; *) options=$controller ;; esac
    mount -t cgroup -o "$options" cgroup "$at" || rmdir "$at"
  done < /proc/self/cgroup
else  # v2: the group delegates only while no process sits in itself
  mount -t cgroup2 cgroup2 /sys/fs/cgroup
  mkdir -p /sys/fs/cgroup/init
  echo 1 > /sys/fs/cgroup/init/cgroup.procs
  sed 's/\(^\| \)/\1+/g' /sys/fs/cgroup/cgroup.controllers > /sys/fs/cgroup/cgroup.subtree_control
fi

mkdir -p "$folder"/{etc,log,sysctl}
printf '127.0.0.1 localhost\n' > "$folder/etc/hosts"
printf 'nameserver %s\noptions ndots:1\n' "$nameserver" > "$folder/etc/resolv.conf"
echo "$name" > "$folder/etc/hostname"
for file in hosts resolv.conf hostname; do mount --bind "$folder/etc/$file" "/etc/$file"; done
hostname "$name"

mount --bind "$folder" "$folder"
mount --bind "$folder/log" /var/log
mount -t tmpfs -o mode=755 tmpfs /var/lib
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p /run/lock /run/netns
mount -o remount,bind,ro /

# Settings of the whole machine that a kubelet wants: it finds them as it likes them, and so writes
# nothing.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  key=${setting%%=*} file=$folder/sysctl/${setting//[\/=]/_}
  echo "${setting#*=}" > "$file"
  mount --bind "$file" "/proc/sys/$key"
done
mount --make-rshared /

ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward  # of this network namespace only
echo ready
exec > /dev/null
while :; do
  sleep infinity &
  wait $! || true
done
