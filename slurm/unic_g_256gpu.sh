#!/usr/bin/env bash
#SBATCH --job-name=unic_g --output=slurm/%x-%j.log --open-mode=append
#SBATCH --nodes=32 --ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=64 --mem=0
#SBATCH --time=24:00:00 --signal=B:USR1@300 --requeue
# ViT-g/14 on 256 GPUs, from the repository's root: sbatch slurm/unic_g_256gpu.sh [--option value ...]

if [ ! -f slurm/train.sh ]; then
  echo "unic_ds: error: no slurm/train.sh in $PWD; submit there, or with --chdir=REPOSITORY" >&2
  exit 2
fi
RECIPE=unic_g DS_CONFIG=ds_configs/zero3.json exec bash slurm/train.sh "$@"
