#!/usr/bin/env bash
# Stops what up.sh started (by its pid files only) and removes its interfaces and state.
set -uo pipefail
ROOT=${SLURM_TEST_ROOT:-/tmp/akorn-slurm}
BR=${SLURM_TEST_BRIDGE:-slurmt0}
KEEP=${SLURM_TEST_KEEP:-0}          # 1: keep state and logs

pid_of() { [ -s "$1" ] && cat "$1" 2>/dev/null || true; }
# a zombie that the machine's pid 1 has not reaped yet counts as gone
gone() { local st; read -r _ _ st _ 2>/dev/null <"/proc/$1/stat" || return 0; [ "$st" = Z ]; }
# kill_if PID NAME SIGNAL: only if the pid is still a process of that name
kill_if() { [ -n "$1" ] && [ "$(cat "/proc/$1/comm" 2>/dev/null)" = "$2" ] && kill "-$3" "$1" 2>/dev/null; }
await() {  # PID...: up to 10 s each, then kill
  local pid i
  for pid in "$@"; do
    for i in $(seq 200); do gone "$pid" && continue 2; sleep 0.05; done
    kill -KILL "$pid" 2>/dev/null
  done
}
stop() { local p; p=$(pid_of "$1"); kill_if "$p" "$2" "$3" && await "$p"; rm -f "$1"; }

# slurmctld takes 2 s to save its state on TERM; the state is thrown away, so KILL is fine unless KEEP
sig=KILL; [ "$KEEP" = 1 ] && sig=TERM
stop "$ROOT/run/slurmctld.host.pid" slurmctld $sig
pids=()
for f in "$ROOT"/run/n*.node.pid; do
  [ -e "$f" ] || continue
  p=$(pid_of "$f"); i=$(pid_of "${f%.node.pid}.init.pid")
  kill_if "$p" unshare KILL && pids+=("$p")   # --kill-child: takes the node's pid namespace with it
  [ -n "$i" ] && [ "$(cat "/proc/$i/comm" 2>/dev/null)" = bash ] && [ "$(readlink "/proc/$i/ns/pid")" != "$(readlink /proc/self/ns/pid)" ] && pids+=("$i")
done
await ${pids[@]+"${pids[@]}"}
stop "$ROOT/run/slurmdbd.host.pid" slurmdbd TERM
stop "$ROOT/run/mariadbd.host.pid" mariadbd TERM
stop "$ROOT/run/munged.pid" munged TERM
rm -f "$ROOT"/run/*.pid
if command -v ip >/dev/null; then
  for d in /sys/class/net/"$BR"/brif/slt*; do [ -e "$d" ] && ip link del "$(basename "$d")" 2>/dev/null; done
  for ns in $(ip netns list 2>/dev/null | awk '/^slurmt-n[0-9]/ {print $1}'); do ip netns del "$ns"; done
  ip link show "$BR" >/dev/null 2>&1 && ip link del "$BR"
fi
[ "$KEEP" = 1 ] || rm -rf "$ROOT"/{etc/slurm.conf,etc/params,state,spool,log,run,mysql}
exit 0
