#!/usr/bin/env bash
#SBATCH --job-name=plan --output=slurm/%x-%j.log
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=4 --time=00:30:00
# Predict memory and time of a run, without a GPU; it may also run on a login node:
#   sbatch slurm/plan.sh --recipe unic_l --gpus 64 --ds_config ds_configs/zero2.json [--search]

if [ ! -f slurm/env.sh ]; then
  echo "unic_ds: error: no slurm/env.sh in $PWD; submit there, or with --chdir=REPOSITORY" >&2
  exit 2
fi
source slurm/env.sh || exit
for word; do
  case $word in --gpu | --gpu=*) exec "${CONTAINER[@]}" unic-ds plan "$@" ;; esac
done
exec "${CONTAINER[@]}" unic-ds plan "--gpu=$GPU" "$@"
