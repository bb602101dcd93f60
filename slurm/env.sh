# shellcheck shell=bash disable=SC2034
# Settings that differ between clusters. Every job of this folder reads them, on every node, from
# the repository's root; the environment of sbatch overrides them:
# `UNIC_DS_OUT=runs/a sbatch slurm/...`.

# Partition and account. sbatch reads them from its own environment, before a job exists: write them
# into the #SBATCH lines, give them to sbatch, or `source slurm/env.sh` in your shell once.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=project

# The GPU that `unic-ds plan` assumes: a100-40, a100-80, h100-80, h200, b200, l40s or a .yaml.
GPU=${UNIC_DS_GPU:-h100-80}

# Images, and the folder in which run folders are made; both must be on a file system that all nodes
# share. OUT is the folder of one run, if it is not RUNS/RECIPE.
DATA=${UNIC_DS_DATA:-}
RUNS=${UNIC_DS_RUNS:-runs}
OUT=${UNIC_DS_OUT:-}

# Software: modules or conda, if your cluster has them; the repository's own .venv is used if it
# exists.
# module load cuda/13.0 gcc/13
# source "$HOME/miniforge3/bin/activate" unic_ds
if [ -d .venv/bin ]; then PATH=$PWD/.venv/bin:$PATH; fi
export PYTHONPATH=$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}

# Container: CONTAINER precedes every command that runs on a node, SRUN_OPTIONS are options of srun.
# Bind the folders of the repository, DATA and RUNS. The image needs the packages of setup.py.
# One of:
# CONTAINER=(apptainer exec --nv --bind "$PWD,/data" --pwd "$PWD" /images/unic_ds.sif)
# CONTAINER=(enroot start --rw --mount "$PWD:$PWD" --mount /data:/data unic_ds)
# SRUN_OPTIONS=(--container-image=/images/unic_ds.sqsh --container-workdir="$PWD"
#   --container-mounts="$PWD:$PWD,/data:/data") # enroot through pyxis
CONTAINER=()
SRUN_OPTIONS=()

# Network: the interface between the nodes, if NCCL and gloo choose a wrong one.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN

# Compute nodes contact no hub: run `unic-ds teachers fetch --recipe R` on a machine with a network.
# The files are in HF_HOME, which must be on the shared file system too.
# export HF_HOME=/data/huggingface
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1

# Ranks per node (the job's GPUs there), and CPU threads per rank.
NPROC=${UNIC_DS_NPROC:-${SLURM_GPUS_ON_NODE:-1}}
if [[ ! $NPROC =~ ^[1-9][0-9]*$ ]]; then # arithmetic would execute its text
  printf '%s\n' "unic_ds: error: UNIC_DS_NPROC must be a number of ranks, got ${NPROC@Q}" >&2
  return 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((${SLURM_CPUS_PER_TASK:-1} + NPROC - 1) / NPROC))}

# Seconds between torchrun's signal to its ranks and SIGKILL: time for a step and a save. Seconds
# between the warning of a time limit and the requeue of a job that has not stopped.
SHUTDOWN=${UNIC_DS_SHUTDOWN:-300}
LATE=${UNIC_DS_LATE:-240}

# How often a job may requeue itself, including preemptions and time limits.
MAX_REQUEUES=${UNIC_DS_MAX_REQUEUES:-100}
