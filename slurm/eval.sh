#!/usr/bin/env bash
#SBATCH --job-name=eval --output=slurm/%x-%j.log
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=8 --time=01:00:00
# Print the table of a finished run, or export the encoder of an unfinished run's newest checkpoint:
#   sbatch slurm/eval.sh runs/unic_l

if [ ! -f slurm/env.sh ]; then
  echo "unic_ds: error: no slurm/env.sh in $PWD; submit there, or with --chdir=REPOSITORY" >&2
  exit 2
fi
source slurm/env.sh || exit
run=${1:-}
if [ ! -f "$run/config.yaml" ]; then
  printf '%s\n' "unic_ds: error: ${run@Q} is no run folder; use sbatch slurm/eval.sh runs/RECIPE" >&2
  exit 2
fi
if [ -f "$run/student/model.safetensors" ] && [ -f "$run/results.json" ]; then
  exec "${CONTAINER[@]}" unic-ds train "--recipe=$run/config.yaml" "--out=$run" \
    --ds_config ds_configs/zero2.json
fi
exec "${CONTAINER[@]}" unic-ds export "--run=$run"
