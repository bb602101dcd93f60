#!/usr/bin/env bash
# Node script of a job: srun starts it once on each node, and it executes torchrun.
# UNIC_DS_PROGRAM is train (the default) or eval.
set -uo pipefail
source slurm/env.sh || exit

# Compiled kernels are cached on the node's own disk, in a folder that no other user can write to,
# since programs are loaded from there.
cache=${SLURM_TMPDIR:-/tmp}/unic_ds_$(id -u)
mkdir -m 700 "$cache" 2>/dev/null
if [ -d "$cache" ] && [ ! -L "$cache" ] && [ -O "$cache" ] && [ "$(stat -c %a "$cache")" = 700 ]; then
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$cache/triton}
  export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$cache/inductor}
else
  printf '%s\n' "unic_ds: node $SLURMD_NODENAME: ${cache@Q} is not a folder of mode 700 of your own;" \
    "kernels are cached in the default folders of Triton and torch" >&2
fi

# Otherwise restarted ranks of the same job would use the addresses of the previous ranks' store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
restarts=2 program=(unic_ds/train.py)
if [ "${UNIC_DS_PROGRAM:-train}" = eval ]; then restarts=0 program=(-m unic_ds.cli eval); fi
exec "${CONTAINER[@]}" torchrun \
  --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$NPROC" \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
  --rdzv-endpoint="$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-conf="is_host=$((SLURM_NODEID == 0))" --local-addr="$SLURMD_NODENAME" \
  --max-restarts="$restarts" \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout="$SHUTDOWN" \
  "${program[@]}" "$@"
