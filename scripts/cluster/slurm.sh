#!/usr/bin/env bash
#SBATCH --job-name=autoprune
#SBATCH --array=0-7
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=autoprune-%A_%a.log
#SBATCH --signal=B:TERM@120
# One coordinator (task 0) and seven workers, each on a node or a part of one:
#   sbatch scripts/cluster/slurm.sh my_study.py postgresql://ann@db.site/prune s3://models/night
# PGPASSWORD or ~/.pgpass, and AWS_* or ~/.aws, have to be there on the nodes. A task that was preempted is
# requeued and joins again.
set -euo pipefail

study=$1 storage=$2 artifacts=$3
name=${NAME:-$(basename "$study" .py)}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

if [ "${SLURM_ARRAY_TASK_ID:-0}" = 0 ]; then
  exec autoprune run "$study" --storage "$storage" --artifacts "$artifacts" --out "runs/$name" --resume
fi
for _ in $(seq 60); do
  if autoprune status "$storage#$name" --artifacts "$artifacts" >/dev/null 2>&1; then
    exec autoprune worker "$storage#$name" --artifacts "$artifacts" --study "$study"
  fi
  sleep 30
done
echo "error: the run $name has not measured its baseline within half an hour" >&2
exit 1
