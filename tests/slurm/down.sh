#!/usr/bin/env bash
# Stops what up.sh started for this root, whether or not its pid files are left, and removes its interfaces and state.
set -uo pipefail
ROOT=${SLURM_TEST_ROOT:-/tmp/akorn-slurm}
BR=${SLURM_TEST_BRIDGE:-slurmt0}
KEEP=${SLURM_TEST_KEEP:-0}          # 1: keep state and logs

# ours NAME: processes of that name that have this root among their arguments or in their environment
ours() {
  local d name
  for d in /proc/[0-9]*; do
    read -r name 2>/dev/null <"$d/comm" && [ "$name" = "$1" ] || continue
    grep -zqE "(^|=)${ROOT//./\\.}(/|$)" "$d/cmdline" "$d/environ" 2>/dev/null && echo "${d#/proc/}"
  done
}
# a zombie that the machine's pid 1 has not reaped yet counts as gone
gone() { local st; read -r _ _ st _ 2>/dev/null <"/proc/$1/stat" || return 0; [ "$st" = Z ]; }
stop() {  # stop NAME SIGNAL: all of that name, within 10 s
  local pids pid i
  pids=$(ours "$1")
  [ -n "$pids" ] && kill "-$2" $pids 2>/dev/null
  for pid in $pids; do
    for ((i = 0; i < 200; i++)); do gone "$pid" && continue 2; sleep 0.05; done
    kill -KILL "$pid" 2>/dev/null
  done
}

# slurmctld takes 2 s to save its state on TERM; the state is thrown away, so KILL is fine unless KEEP
sig=KILL; [ "$KEEP" = 1 ] && sig=TERM
inits=$(cat "$ROOT"/run/n*.init.pid 2>/dev/null)
stop slurmctld $sig
stop unshare KILL   # the nodes; --kill-child takes each one's pid namespace with it
stop slurmd KILL    # of a node whose namespace outlived it
stop slurmdbd TERM
stop mariadbd TERM
stop munged TERM
for pid in $inits; do for ((i = 0; i < 200; i++)); do gone "$pid" && break; sleep 0.05; done; done
rm -f "$ROOT"/run/*.pid
if command -v ip >/dev/null; then
  for d in /sys/class/net/"$BR"/brif/slt*; do [ -e "$d" ] && ip link del "$(basename "$d")" 2>/dev/null; done
  for ns in $(ip netns list 2>/dev/null | awk '/^slurmt-n[0-9]/ {print $1}'); do ip netns del "$ns"; done
  ip link show "$BR" >/dev/null 2>&1 && ip link del "$BR"
fi
[ "$KEEP" = 1 ] || rm -rf "$ROOT"/{etc/slurm.conf,etc/params,state,spool,log,run,mysql}
exit 0
