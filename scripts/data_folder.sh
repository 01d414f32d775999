#!/usr/bin/env bash
# Print the folder with the data sets for the tests marked `data`: AUTOPRUNE_DATA where it is set, or else
# runs/data, made once from the packed sets in ../shared/data; nothing where there are none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${AUTOPRUNE_DATA:-}" ]; then
  printf '%s\n' "$AUTOPRUNE_DATA"
  exit
fi
packed=${AUTOPRUNE_PACKED_DATA:-$(dirname "$PWD")/shared/data}
[ -f "$packed/unpack.py" ] || exit 0
made=$PWD/runs/data
if ! [ -f "$made/complete" ]; then
  echo "unpacking CIFAR-10 from $packed into $made (once, about a minute)" >&2
  mkdir -p "$made/cifar10"
  .venv/bin/python "$packed/unpack.py" "$made/cifar10" >&2
  ln -sfn "$packed/weights" "$made/weights"
  ln -sfn "$packed/FashionMNIST" "$made/FashionMNIST"
  touch "$made/complete"
fi
printf '%s\n' "$made"
