#!/usr/bin/env bash
#SBATCH --job-name=o2o
#SBATCH --cpus-per-task=1
#SBATCH --mem=6G
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.log
# One run of the benchmark per task of the array; ./benchmark.sh --engine slurm submits it with the list's flags.
# What your cluster needs beyond that (partition, account, --gres=gpu:1) goes into SBATCH_PARTITION and the like, which
# sbatch reads from the environment, or into the lines above.
set -euo pipefail
exec ./benchmark.sh "$@" --index "$SLURM_ARRAY_TASK_ID"
