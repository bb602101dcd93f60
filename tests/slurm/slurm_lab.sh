#!/usr/bin/env bash
# A Slurm cluster on one machine: slurmctld and a slurmd per node, every node with its own network,
# host name, processes and fake GPUs. It lives while its command runs; with the command, or when it
# is killed, everything in it ends: no process, network device or mount outlives it.
#
#   slurm_lab.sh up DIR [NODES=8] [GPUS=8] [COMMAND ...]  run COMMAND (an interactive shell) on its
#                                                         controller; DIR: state and logs, emptied
#   slurm_lab.sh on DIR ctl|NODE COMMAND ...              run COMMAND on the controller or a node
#   slurm_lab.sh crash DIR NODE                           kill everything on a node, like a power cut
#   slurm_lab.sh boot DIR NODE                            start it again
#
# As root, with Debian's slurmctld slurmd slurm-client munge iproute2.
set -euo pipefail

NET=10.77.0 # seen by nobody but the lab
OWN=$(realpath "${BASH_SOURCE[0]}")

up() {
  local dir
  dir=$(mkdir -p "$1" && realpath "$1") && shift
  rm -rf "${dir:?}"/{state,log,spool,dev,munge,pids}
  mkdir -p "$dir"/{state,log,spool,dev,munge,pids}
  chmod 755 "$dir" "$dir/munge"
  unshare --net --uts --mount --pid --mount-proc --fork --kill-child \
    bash "$OWN" controller "$dir" "$@" <&0 &
  lab=$!
  trap 'kill -KILL "$lab" 2>/dev/null || :' EXIT
  trap 'exit 143' TERM INT HUP
  echo "$lab" >"$dir/pids/lab"
  wait "$lab"
}

# What `up` runs as the first process of the lab's own namespaces.
controller() {
  local dir=$1 nodes=${2:-8} gpus=${3:-8} node
  shift "$(($# < 3 ? $# : 3))"
  hostname ctl
  ip link set lo up
  ip link add lab type bridge
  ip addr add $NET.254/24 dev lab
  ip link set lab up
  write_settings "$dir" "$nodes" "$gpus"
  mount --bind "$dir/hosts" /etc/hosts
  head -c 1024 /dev/urandom >"$dir/munge/key"
  chmod 600 "$dir/munge/key"
  # --force: a folder above may be closed to others, and here is nobody else.
  munged --force --socket="$dir/munge/sock" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -D -i >"$dir/log/ctl.out" 2>&1 &
  for node in $(seq "$nodes"); do boot "$dir" "n$node"; done
  until [ "$(sinfo -h -N -p gpu -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ]; do sleep 0.1; done
  touch "$dir/pids/ready"
  if [ $# -eq 0 ]; then set -- bash -i; fi
  "$@"
}

write_settings() {
  local dir=$1 nodes=$2 gpus=$3 number
  for number in $(seq 0 $((gpus - 1))); do ln -sfn /dev/null "$dir/dev/nvidia$number"; done
  {
    echo "127.0.0.1 localhost"
    echo "$NET.254 ctl"
    for number in $(seq "$nodes"); do echo "$NET.$number n$number"; done
  } >"$dir/hosts"
  echo "Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
  # The fake GPUs are no devices that CUDA could use: a node is to train on its CPU, as one says by
  # an empty CUDA_VISIBLE_DEVICES, unless DIR/dead has a file of its name: its GPUs do not come up.
  mkdir -p "$dir/dead"
  cat >"$dir/prolog" <<PROLOG
#!/bin/sh
[ -e "$dir/dead/\$SLURMD_NODENAME" ] || echo "export CUDA_VISIBLE_DEVICES="
PROLOG
  chmod 755 "$dir/prolog"
  # slurmd ends where it is left to find out and no cgroup is mounted.
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
  cat >"$dir/slurm.conf" <<CONF
ClusterName=lab
SlurmctldHost=ctl($NET.254)
SlurmUser=root
AuthInfo=socket=$dir/munge/sock
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pids/slurmctld
SlurmdPidFile=$dir/pids/slurmd.%n
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$dir/prolog
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=${SLURMD_TIMEOUT:-60}
KillWait=60
GresTypes=gpu
NodeName=n[1-$nodes] NodeAddr=$NET.[1-$nodes] Sockets=1 CoresPerSocket=64 RealMemory=512000 Gres=gpu:$gpus
PartitionName=gpu Nodes=ALL Default=YES MaxTime=7-0 PriorityTier=1 GraceTime=90
PartitionName=high Nodes=ALL MaxTime=7-0 PriorityTier=10 PreemptMode=OFF
CONF
}

boot() {
  local dir=$1 node=$2 number=${2#n} pid
  unshare --net --uts --mount --pid --mount-proc --fork --kill-child \
    bash "$OWN" node "$dir" "$node" >"$dir/log/$node.out" 2>&1 &
  pid=$!
  echo "$pid" >"$dir/pids/$node"
  # The network namespace is there as soon as the process has left ours.
  until [ "$(readlink "/proc/$pid/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
  ip link add "veth$number" type veth peer name eth0 netns "$pid"
  ip link set "veth$number" master lab up
}

# A node's first process: it waits for its network, and reaps what jobs leave behind.
node() {
  local dir=$1 node=$2
  hostname "$node"
  until ip addr add "$NET.${node#n}/24" dev eth0; do sleep 0.02; done 2>/dev/null
  ip link set eth0 up
  ip link set lo up
  mkdir -p "$dir/spool/$node"
  slurmd -D -N "$node" -f "$dir/slurm.conf"
}

# In the lab's namespaces as the node's process sees them: first the controller's, then its own.
on() {
  local dir node=$2
  dir=$(realpath "$1") && shift 2
  local inside=(nsenter -t "$(first_child "$(cat "$dir/pids/lab")")" --net --uts --mount --pid "--wdns=$PWD")
  export SLURM_CONF=$dir/slurm.conf
  if [ "$node" = ctl ]; then exec "${inside[@]}" "$@"; fi
  exec "${inside[@]}" bash "$OWN" enter "$dir" "$node" "$@"
}

enter() {
  local dir=$1 node=$2
  shift 2
  exec nsenter -t "$(first_child "$(cat "$dir/pids/$node")")" --net --uts --mount --pid "--wdns=$PWD" "$@"
}

first_child() { cut -d" " -f1 "/proc/$1/task/$1/children"; }

crash() {
  kill -KILL "$(cat "$1/pids/$2")"
}

case ${1:-} in
  up | controller | node | on | enter) "$@" ;;
  crash | boot)
    if [ "$(hostname)" = ctl ]; then "$@"; else on "$2" ctl bash "$OWN" "$1" "$(realpath "$2")" "$3"; fi ;;
  *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$OWN" ;;
esac
