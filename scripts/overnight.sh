#!/usr/bin/env bash
# Start a sweep in the evening, have models in the morning. The same command goes on where it stopped.
#
#   scripts/overnight.sh nohup   STUDY...    survives logging out; log in OUT/log
#   scripts/overnight.sh systemd STUDY...    a user unit; starts again after a crash
#   scripts/overnight.sh slurm   STUDY...    one node of a cluster; requeued when it is preempted
#
# UNTIL (07:00), OUT (runs/overnight), WORKERS (1) and AUTOPRUNE (autoprune) come from the environment.
set -euo pipefail

until=${UNTIL:-07:00} out=${OUT:-runs/overnight} workers=${WORKERS:-1} program=${AUTOPRUNE:-autoprune}

if [ $# -lt 2 ]; then
  sed -n 's/^# \{0,1\}//; 2,8p' "$0" >&2
  exit 2
fi
how=$1
shift
mkdir -p "$out"
sweep=("$program" sweep "$@" --until "$until" --out "$out" --workers "$workers")

case $how in
  nohup)
    nohup "${sweep[@]}" >>"$out/log" 2>&1 </dev/null &
    echo "process $! works until $until; tail -f $out/log" ;;
  systemd)
    systemd-run --user --unit autoprune-overnight --working-directory "$PWD" \
      --property Restart=on-failure --property RestartSec=30 --property RestartPreventExitStatus="1 2" \
      --property KillSignal=SIGTERM --property TimeoutStopSec=180 "${sweep[@]}"
    echo "journalctl --user -fu autoprune-overnight" ;;
  slurm)
    sbatch --job-name autoprune --requeue --open-mode append --output "$out/log" --signal TERM@300 \
      --cpus-per-task "${CPUS:-8}" --time "${TIME:-12:00:00}" --wrap "exec $(printf '%q ' "${sweep[@]}")"
    echo "tail -f $out/log" ;;
  *)
    echo "error: $how is none of nohup, systemd, slurm" >&2
    exit 2 ;;
esac
