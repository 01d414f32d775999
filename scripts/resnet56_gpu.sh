#!/usr/bin/env bash
# ResNet-56 on CIFAR-10 at 2.11 and 2.57 times fewer MACs on one GPU, beside published results (docs/log.md).
#
#   AUTOPRUNE_DATA=DIR scripts/resnet56_gpu.sh [EPOCHS] [SECONDS]
#
# EPOCHS of the training set for each target (200), in pieces of SECONDS (560): call it again until it says that
# both are done. What a piece finished is kept, what it was in the middle of is tried again.
# Not run yet: no GPU was at hand when it was written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

epochs=${1:-200} piece=${2:-560}
: "${AUTOPRUNE_DATA:?set it to the folder that holds cifar10/ and weights/ (see docs/commands.md)}"
ends=$((SECONDS + piece))

for factor in 2.11 2.57; do
  share=$(awk -v f="$factor" 'BEGIN { printf "%.4f", 1 / f }')
  out=runs/resnet56-$factor
  [ -e "$out/report.json" ] && { echo "$out is done"; continue; }
  left=$((ends - SECONDS))
  [ "$left" -gt 30 ] || { echo "time is up: call this again"; exit 0; }
  code=0
  timeout --signal=INT --kill-after=20 "$left" autoprune run studies/resnet56_cifar10.py --target "macs=$share" \
    --max-drop 3 --budget "epochs=$epochs" --device cuda --out "$out" --plain --resume || code=$?
  case $code in
    0 | 3) echo "$out is done" ;;
    124 | 130 | 137) echo "time is up: call this again"; exit 0 ;;
    *) exit "$code" ;;
  esac
done
