#!/usr/bin/env bash
#SBATCH --job-name=eval --output=slurm/%x-%j.log
#SBATCH --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --time=04:00:00
# Compare models on tasks, on the GPUs of any number of nodes; the same command again goes on from
# the feature cache:
#   sbatch --nodes=2 --gpus-per-node=8 slurm/eval.sh knn,linear --models runs/unic_l,dinov2_g \
#     --eval.data /data/imagenet
# Print the table of a finished run, or export the encoder of an unfinished run's newest checkpoint:
#   sbatch slurm/eval.sh runs/unic_l

if [ ! -f slurm/env.sh ]; then
  echo "unic_ds: error: no slurm/env.sh in $PWD; submit there, or with --chdir=REPOSITORY" >&2
  exit 2
fi
source slurm/env.sh || exit
run=${1:-}
if [ $# -gt 1 ]; then
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR=$first MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) UNIC_DS_PROGRAM=eval
  exec srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" bash slurm/node.sh "$@"
fi
if [ ! -f "$run/config.yaml" ]; then
  printf '%s\n' "unic_ds: error: ${run@Q} is no run folder; use sbatch slurm/eval.sh runs/RECIPE, or" \
    "slurm/eval.sh TASKS --models MODELS" >&2
  exit 2
fi
if [ -f "$run/student/model.safetensors" ] && [ -f "$run/results.json" ]; then
  exec "${CONTAINER[@]}" unic-ds train "--recipe=$run/config.yaml" "--out=$run" \
    --ds_config ds_configs/zero2.json
fi
exec "${CONTAINER[@]}" unic-ds export "--run=$run"
