# shellcheck shell=bash disable=SC2034
# What differs from one cluster to the next: every job of this folder reads it, on every node, from
# the repository's root. The environment of sbatch wins: `UNIC_DS_OUT=runs/a sbatch slurm/...`.

# Partition and account. sbatch takes them from its own environment, before a job exists: put them
# into the #SBATCH lines, give them to sbatch, or `source slurm/env.sh` in your shell once.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project

# The GPU that `unic-ds plan` reckons with: a100-40, a100-80, h100-80, h200, b200, l40s or a .yaml.
GPU=${UNIC_DS_GPU:-h100-80}

# Images, and the folder that run folders are made in; both must be on a file system that all nodes
# share. OUT is one run's folder where you want another than RUNS/RECIPE.
DATA=${UNIC_DS_DATA:-}
RUNS=${UNIC_DS_RUNS:-runs}
OUT=${UNIC_DS_OUT:-}

# Software: modules or conda where your cluster has them; the repository's own .venv is found.
# module load cuda/13.0 gcc/13
# source "$HOME/miniforge3/bin/activate" unic_ds
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}

# Container: CONTAINER stands before every command that runs on a node, SRUN_OPTIONS among the
# options of srun. Bind whatever holds the repository, DATA and RUNS. The image needs what setup.py
# lists. One of:
# CONTAINER=(apptainer exec --nv --bind "$PWD,/data" --pwd "$PWD" /images/unic_ds.sif)
# CONTAINER=(enroot start --rw --mount "$PWD:$PWD" --mount /data:/data unic_ds)
# SRUN_OPTIONS=(--container-image=/images/unic_ds.sqsh --container-workdir="$PWD"
#   --container-mounts="$PWD:$PWD,/data:/data") # enroot through pyxis
CONTAINER=()
SRUN_OPTIONS=()

# Network: the interface that nodes see each other on, where NCCL and gloo choose a wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# Compute nodes ask no hub: `unic-ds teachers fetch --recipe R` does, where there is a network. The
# files lie in HF_HOME, which must be on the shared file system too.
# export HF_HOME=/data/huggingface
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Ranks on a node (as many as the job has GPUs there), and each one's CPU threads.
NPROC=${UNIC_DS_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
if [[ ! $NPROC =~ ^[1-9][0-9]*$ ]]; then # arithmetic would run what stands in it
  printf '%s\n' "unic_ds: error: UNIC_DS_NPROC must be a number of ranks, got ${NPROC@Q}" >&2
  return 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + NPROC - 1) / NPROC))}

# Seconds that ranks which are told to end have for a step and a save before torchrun kills them, and
# seconds after the warning of a time limit until a job that has not stopped is requeued as it is.
SHUTDOWN=${UNIC_DS_SHUTDOWN:-300}
LATE=${UNIC_DS_LATE:-240}

# How often a job may requeue itself, preemptions and time limits included.
MAX_REQUEUES=${UNIC_DS_MAX_REQUEUES:-100}
