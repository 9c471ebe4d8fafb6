#!/usr/bin/env bash
# Brings up a real SLURM cluster of several nodes on one Debian 12 machine, as root, without
# systemd, docker or cgroups. Idempotent: a healthy cluster is left as it is, a broken or
# half-started one is torn down and started afresh.
#
#   up.sh              # then:  . "$SLURM_TEST_ROOT/env.sh"   (sets SLURM_CONF)
#
# Every "node" is a slurmd in its own PID + UTS + mount (+ network) namespace, with its own
# hostname (n1..nN), /etc/hosts and, in netns mode, its own IP address on a private bridge.
#   up.sh crash 2         # node n2 dies at once, slurmd, tasks and all (power cut)
#   up.sh kill-slurmd 2   # only its slurmd dies; the tasks run on
#   up.sh unplug 2 / plug 2   # netns mode: its network goes away / comes back
#   up.sh kill-controller / start-controller   # slurmctld goes away / comes back with what it had saved
#   up.sh start 2         # brings n2 back after crash or kill-slurmd, waits until SLURM uses it
# Everything else (file system, users, python) is shared with the host.
set -euo pipefail

ROOT=${SLURM_TEST_ROOT:-/tmp/akorn-slurm}
NODES=${SLURM_TEST_NODES:-3}
CPUS=${SLURM_TEST_CPUS:-64}           # per node; more than the host has is fine
MEM=${SLURM_TEST_MEM:-1000000}        # MB per node; neither checked against the host nor enforced
GPUS=${SLURM_TEST_GPUS:-8}            # fake GPUs per node (character devices; CUDA_VISIBLE_DEVICES is set)
NET=${SLURM_TEST_NET:-auto}           # netns | loopback | auto
DBD=${SLURM_TEST_DBD:-1}              # 1: MariaDB + slurmdbd, so that sacct (and so submitit) sees job states
PREFIX=${SLURM_TEST_PREFIX:-198.18.77}  # /24 for netns mode (RFC 2544 range, never routed)
BR=${SLURM_TEST_BRIDGE:-slurmt0}
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { echo "[slurm] $*" >&2; }
alive() { local st; [ -s "$1" ] && read -r _ _ st _ 2>/dev/null <"/proc/$(cat "$1")/stat" && [ "$st" != Z ]; }

# ---------------------------------------------------------------- 1. packages
install_packages() {
  local want=(slurmd slurmctld slurm-client munge iproute2 util-linux procps) missing=() p
  [ "$DBD" = 1 ] && want+=(slurmdbd mariadb-server)
  for p in "${want[@]}"; do
    dpkg-query -W -f='${db:Status-Abbrev}' "$p" 2>/dev/null | grep -q '^ii' || missing+=("$p")
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  say "installing ${missing[*]}"
  # Keep the packages' own daemons from starting (we run our own, under $ROOT).
  local policy=0 failed=0
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; policy=1
  fi
  mkdir -p "$ROOT"
  { DEBIAN_FRONTEND=noninteractive timeout 60 apt-get -o Acquire::Retries=0 -o Acquire::http::Timeout=15 update -q &&
    DEBIAN_FRONTEND=noninteractive timeout 240 apt-get install -y -q --no-install-recommends "${missing[@]}"
  } >"$ROOT/apt.log" 2>&1 || failed=1
  [ $policy = 0 ] || rm -f /usr/sbin/policy-rc.d
  [ $failed = 0 ] || { tail -n 20 "$ROOT/apt.log" >&2; exit 1; }
}

# ---------------------------------------------------------------- 2. already up?
healthy() {
  [ -s "$ROOT/etc/slurm.conf" ] && alive "$ROOT/run/munged.pid" && alive "$ROOT/run/slurmctld.host.pid" || return 1
  [ "$(cat "$ROOT/etc/params" 2>/dev/null)" = "$PARAMS" ] || return 1
  local i
  for i in $(seq "$NODES"); do
    alive "$ROOT/run/n$i.node.pid" && alive "$ROOT/run/n$i.slurmd.pid" || return 1
  done
  wait_idle 5
}
wait_idle() {  # all nodes usable (idle, mixed or allocated), within $1 seconds
  local end=$((SECONDS + $1)) n
  while :; do
    n=$(SLURM_CONF=$ROOT/etc/slurm.conf timeout 5 sinfo -h -N -o '%N %T' 2>/dev/null |
        awk '$2 ~ /^(idle|mixed|allocated)$/ {print $1}' | sort -u | wc -l) || n=0
    [ "$n" -eq "$NODES" ] && return 0
    [ $SECONDS -ge $end ] && return 1
    alive "$ROOT/run/slurmctld.host.pid" || return 1
    sleep 0.2
  done
}

# ---------------------------------------------------------------- 3. network
pick_net() {
  [ "$NET" != auto ] && return 0
  if ip netns add slurmt-probe 2>/dev/null; then
    ip netns del slurmt-probe
    if ip link add slurmtp0 type veth peer name slurmtp1 2>/dev/null; then
      ip link del slurmtp0; NET=netns; return 0
    fi
  fi
  NET=loopback
}
addr() { if [ "$NET" = netns ]; then echo "$PREFIX.$((10 + $1))"; else echo 127.0.0.1; fi; }
port() { if [ "$NET" = netns ]; then echo 16818; else echo $((16820 + $1)); fi; }

# ---------------------------------------------------------------- 4. config
write_config() {
  mkdir -p "$ROOT"/{etc,run,log,state,spool,dev}
  chmod 755 "$ROOT" "$ROOT"/{etc,run,log}
  chmod 700 "$ROOT/state"
  local i ctl_addr=127.0.0.1 g
  [ "$NET" = netns ] && ctl_addr=$PREFIX.1
  for ((g = 0; g < GPUS; g++)); do    # character devices, or CUDA_VISIBLE_DEVICES is not set
    [ -c "$ROOT/dev/nvidia$g" ] || mknod "$ROOT/dev/nvidia$g" c 1 3
  done
  { echo "127.0.0.1 localhost"; echo "$ctl_addr ctl"
    for i in $(seq "$NODES"); do echo "$(addr "$i") n$i"; done; } >"$ROOT/etc/hosts"
  cat >"$ROOT/etc/slurm.conf" <<E
ClusterName=slurmtest
SlurmctldHost=ctl($ctl_addr)
SlurmctldPort=16817
SlurmdPort=16818
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again (default 120 s, minimum 5)
AuthInfo=socket=$ROOT/run/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$ROOT/state
SlurmdSpoolDir=$ROOT/spool/%n
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SwitchType=switch/none
MpiDefault=none
# scheduling: CPUs only, so that memory never blocks; config_overrides accepts more CPUs than the host has
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=200000,batch_sched_delay=0,requeue_delay=1
PriorityType=priority/basic
# preemption: a job in 'high' requeues jobs in 'debug'; --signal's signal is sent first, GraceTime before the kill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
# quick reactions
TreeWidth=65533
ReturnToService=2
SlurmdTimeout=${SLURM_TEST_SLURMD_TIMEOUT:-10}
SlurmctldTimeout=30
MessageTimeout=5
BatchStartTimeout=60
KillWait=3
CompleteWait=0
# on a busy machine processes die slowly, and a node on which one has not died in time is drained: jobs wait for ever
UnkillableStepTimeout=600
MinJobAge=600
# a fresh cluster must not reuse job ids: submitit would take an old job's result in the same folder for the new one's
FirstJobId=$(( $(date +%s) / 4 % 60000000 + 1000 ))
JobRequeue=1
OverTimeLimit=0
GresTypes=gpu
E
  if [ "$DBD" = 1 ]; then
    cat >>"$ROOT/etc/slurm.conf" <<E
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$ROOT/run/munge.socket
AccountingStorageTRES=gres/gpu
E
    (umask 077; cat >"$ROOT/etc/slurmdbd.conf" <<E
AuthType=auth/munge
AuthInfo=socket=$ROOT/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile=$ROOT/log/slurmdbd.log
PidFile=$ROOT/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=16806
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=1
E
    )
    chmod 600 "$ROOT/etc/slurmdbd.conf"
  else
    cat >>"$ROOT/etc/slurm.conf" <<E
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobcomp.txt
E
  fi
  local gres=""; [ "$GPUS" -gt 0 ] && gres="Gres=gpu:$GPUS"
  for i in $(seq "$NODES"); do
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=$(addr "$i") Port=$(port "$i") CPUs=$CPUS RealMemory=$MEM $gres State=UNKNOWN"
  done >>"$ROOT/etc/slurm.conf"
  cat >>"$ROOT/etc/slurm.conf" <<E
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
E
  if [ "$GPUS" -gt 0 ]; then
    printf 'AutoDetect=off\nNodeName=n[1-%s] Name=gpu File=%s/dev/nvidia[0-%s]\n' "$NODES" "$ROOT" $((GPUS - 1)) >"$ROOT/etc/gres.conf"
  else
    printf 'AutoDetect=off\n' >"$ROOT/etc/gres.conf"
  fi
  echo "$PARAMS" >"$ROOT/etc/params"
  cat >"$ROOT/env.sh" <<E
export SLURM_TEST_ROOT=$ROOT
export SLURM_CONF=$ROOT/etc/slurm.conf
E
  [ -s "$ROOT/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
  chmod 400 "$ROOT/etc/munge.key"
}

# ---------------------------------------------------------------- 5. daemons
start_munged() {
  munged --key-file="$ROOT/etc/munge.key" --socket="$ROOT/run/munge.socket" \
    --pid-file="$ROOT/run/munged.pid" --log-file="$ROOT/log/munged.log" \
    --seed-file="$ROOT/run/munged.seed" --num-threads=2
  munge -n -S "$ROOT/run/munge.socket" | unmunge -S "$ROOT/run/munge.socket" >/dev/null
}

start_dbd() {
  local new=0
  if [ ! -d "$ROOT/mysql/mysql" ]; then
    new=1; mkdir -p "$ROOT/mysql"; chown mysql: "$ROOT/mysql"
    mariadb-install-db --no-defaults --user=mysql --datadir="$ROOT/mysql" --skip-test-db \
      --auth-root-authentication-method=socket >"$ROOT/log/mariadb-install.log" 2>&1
  fi
  mkdir -p "$ROOT/run/mysql"; chown mysql: "$ROOT/run/mysql"
  setsid mariadbd --no-defaults --user=mysql --datadir="$ROOT/mysql" --bind-address=127.0.0.1 --port=16806 \
    --socket="$ROOT/run/mysql/s.sock" --pid-file="$ROOT/run/mysql/mariadbd.pid" \
    --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
    --skip-log-bin --performance-schema=off --skip-name-resolve --max-connections=50 \
    >"$ROOT/log/mariadbd.log" 2>&1 </dev/null &
  echo $! >"$ROOT/run/mariadbd.host.pid"
  local end=$((SECONDS + 60))
  until mariadb --no-defaults -S "$ROOT/run/mysql/s.sock" -e 'select 1' >/dev/null 2>&1; do
    [ $SECONDS -ge $end ] && { say "mariadbd did not come up"; exit 1; }
    sleep 0.2
  done
  [ $new = 1 ] && mariadb --no-defaults -S "$ROOT/run/mysql/s.sock" -e "
    create database slurm_acct_db; create user slurm@'127.0.0.1' identified by 'slurm';
    grant all on slurm_acct_db.* to slurm@'127.0.0.1';"
  SLURM_CONF=$ROOT/etc/slurm.conf setsid slurmdbd -D >"$ROOT/log/slurmdbd.out" 2>&1 </dev/null &
  echo $! >"$ROOT/run/slurmdbd.host.pid"
  end=$((SECONDS + 60))
  until (exec 3<>/dev/tcp/127.0.0.1/16819) 2>/dev/null; do
    alive "$ROOT/run/slurmdbd.host.pid" || { say "slurmdbd died"; tail -n 5 "$ROOT/log/slurmdbd.log" >&2; exit 1; }
    [ $SECONDS -ge $end ] && { say "slurmdbd did not come up"; exit 1; }
    sleep 0.2
  done
}

start_ctld() {
  # its own UTS namespace, so that its hostname is "ctl" whatever the machine is called
  setsid unshare --uts -- sh -c 'hostname ctl; exec slurmctld -D -i -f "$0"' "$ROOT/etc/slurm.conf" \
    >"$ROOT/log/slurmctld.out" 2>&1 </dev/null &
  echo $! >"$ROOT/run/slurmctld.host.pid"
}

start_bridge() {
  [ "$NET" = netns ] || return 0
  ip link show "$BR" >/dev/null 2>&1 || ip link add "$BR" type bridge
  ip addr replace "$PREFIX.1/24" dev "$BR"
  ip link set "$BR" up
}

start_node() {  # $1 = index
  local i=$1 n=n$1 ns=slurmt-n$1 wrap=()
  mkdir -p "$ROOT/spool/$n"
  if [ "$NET" = netns ]; then
    ip netns del "$ns" 2>/dev/null || true
    ip link del "slt$i" 2>/dev/null || true
    ip netns add "$ns"
    ip link add "slt$i" type veth peer name eth0 netns "$ns"
    ip link set "slt$i" master "$BR" up
    ip -n "$ns" addr add "$(addr "$i")/24" dev eth0
    ip -n "$ns" link set lo up
    ip -n "$ns" link set eth0 up
    wrap=(nsenter "--net=/run/netns/$ns")
  fi
  # bash as the namespace's init: reaps orphans, and outlives slurmd (so that slurmd alone can be killed)
  setsid ${wrap[@]+"${wrap[@]}"} unshare --uts --mount --pid --fork --kill-child=SIGKILL --mount-proc -- \
    bash -c '
      trap : TERM INT HUP
      hostname "$1"
      mount --bind "$2/etc/hosts" /etc/hosts
      slurmd -D -N "$1" -f "$2/etc/slurm.conf" &
      while :; do wait -n 2>/dev/null || sleep 0.5; done' _ "$n" "$ROOT" \
    >"$ROOT/log/$n.out" 2>&1 </dev/null &
  echo $! >"$ROOT/run/$n.node.pid"
}
find_slurmd() {  # records the host's view of the pids
  local i=$1 n=n$1 u init kids k end=$((SECONDS + 10))
  u=$(cat "$ROOT/run/$n.node.pid")
  while [ $SECONDS -lt $end ]; do
    init=$(awk '{print $1}' "/proc/$u/task/$u/children" 2>/dev/null || true)
    if [ -n "$init" ]; then
      echo "$init" >"$ROOT/run/$n.init.pid"
      kids=$(cat "/proc/$init/task/$init/children" 2>/dev/null || true)
      for k in $kids; do
        if [ "$(cat "/proc/$k/comm" 2>/dev/null)" = slurmd ]; then echo "$k" >"$ROOT/run/$n.slurmd.pid"; return 0; fi
      done
    fi
    sleep 0.1
  done
  say "slurmd of $n did not start"; tail -n 5 "$ROOT/log/$n.out" >&2; return 1
}

# ---------------------------------------------------------------- 6. faults, for tests
node_cmd() {  # crash|kill-slurmd|unplug|plug|start INDEX
  local cmd=$1 i=$2 n=n$2 end st
  [ "$NET" != auto ] || NET=$(sed -n 's/.* net=\([a-z]*\) .*/\1/p' "$ROOT/etc/params")
  case $cmd in
    crash) kill -KILL "$(cat "$ROOT/run/$n.node.pid")" ;;
    kill-slurmd) kill -KILL "$(cat "$ROOT/run/$n.slurmd.pid")" ;;
    unplug) ip link set "slt$i" down ;;
    plug) ip link set "slt$i" up ;;
    start)
      [ "$NET" != netns ] || ip link set "slt$i" up 2>/dev/null || true
      if ! alive "$ROOT/run/$n.node.pid"; then start_node "$i"
      elif ! alive "$ROOT/run/$n.slurmd.pid"; then
        nsenter -t "$(cat "$ROOT/run/$n.init.pid")" -m -u -n -p -- slurmd -N "$n" -f "$ROOT/etc/slurm.conf" >>"$ROOT/log/$n.out" 2>&1
      fi
      find_slurmd "$i"
      end=$((SECONDS + 60))
      while :; do
        st=$(SLURM_CONF=$ROOT/etc/slurm.conf timeout 5 sinfo -h -n "$n" -o %T | head -1)
        case $st in
          idle|mixed|allocated) return 0 ;;
          drain*) SLURM_CONF=$ROOT/etc/slurm.conf scontrol update "NodeName=$n" State=RESUME ;;  # a task died slowly
        esac
        [ $SECONDS -lt $end ] || { say "$n is $st"; return 1; }
        sleep 0.2
      done ;;
    *) say "unknown command $cmd"; return 2 ;;
  esac
}

main() {
  [ "$(id -u)" = 0 ] || { say "needs root"; exit 1; }
  install_packages
  pick_net
  PARAMS="nodes=$NODES cpus=$CPUS mem=$MEM gpus=$GPUS net=$NET dbd=$DBD prefix=$PREFIX timeout=${SLURM_TEST_SLURMD_TIMEOUT:-10}"
  if healthy; then say "already up ($PARAMS)"; return 0; fi
  bash "$HERE/down.sh"
  write_config
  start_munged
  [ "$DBD" = 1 ] && start_dbd
  start_bridge
  start_ctld
  local i
  for i in $(seq "$NODES"); do start_node "$i"; done
  for i in $(seq "$NODES"); do find_slurmd "$i"; done
  wait_idle 40 || { say "nodes not idle:"; SLURM_CONF=$ROOT/etc/slurm.conf sinfo -N -l >&2 || true; tail -n 5 "$ROOT"/log/*.log >&2; exit 1; }
  say "up ($PARAMS): . $ROOT/env.sh"
}
case ${1:-} in
  '') main ;;
  kill-controller) kill -KILL "$(cat "$ROOT/run/slurmctld.host.pid")" ;;
  start-controller) start_ctld ;;
  *) node_cmd "$@" ;;
esac
