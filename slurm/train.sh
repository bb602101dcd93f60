#!/usr/bin/env bash
# The body of every training job: refuse what cannot run, start a torchrun on each node, and requeue
# the job where it was stopped. RECIPE and DS_CONFIG come from the template; any option of the
# trainer may follow. Functions alone, so that bash has read the file before the job begins: who
# updates the repository does not change a running job.
set -uo pipefail

main() {
  source slurm/env.sh || exit
  local code ranks=$((SLURM_JOB_NUM_NODES * NPROC))
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
  OPTIONS=("$@")
  GIVEN=
  default recipe "$RECIPE"
  default ds_config "$DS_CONFIG"
  default data.train "$DATA"
  given recipe
  local wanted=$GIVEN
  if ! given out && [ -z "$OUT" ]; then
    case $wanted in
      *.yaml | *.yml) say "refused: a recipe from a file needs --out, or UNIC_DS_OUT" && exit 2 ;;
    esac
    if [[ ! $wanted =~ ^[A-Za-z0-9_][A-Za-z0-9_.+-]*$ ]]; then
      say "refused: no recipe is called ${wanted@Q}; unic-ds train --help names them" && exit 2
    fi
  fi
  default out "${OUT:-$RUNS/$wanted}"
  given out
  OUT=$GIVEN
  case $OUT in
    '') say "refused: --out is empty" && exit 2 ;;
    -*) OUT=./$OUT ;; # no option of mkdir, rm or grep
  esac
  asked= # to stop: by the time limit or by a preemption
  timer= # of the time limit: the process that waits for LATE seconds
  rm -f "$OUT/STOP"
  trap 'stop; late' USR1
  trap stop TERM
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    rm -f "$OUT/slurm.failed"
    refuse "$ranks"
  fi
  mkdir -p "$OUT" || exit 2 # what is refused leaves none
  if [ -n "$asked" ]; then stop; fi
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $ranks ranks, in ${OUT@Q}"
  train
  code=$?
  if [ "$code" -eq 0 ] && { [ -z "$asked" ] || finished; }; then return 0; fi
  again "$code"
}

# Asked to stop: have the ranks save and stop.
stop() {
  asked=yes
  if [ -d "$OUT" ]; then touch "$OUT/STOP"; fi
}

say() { printf '%s\n' "unic_ds: job $SLURM_JOB_ID: $*" >&2; }

# Put the value of an option that the command line gives into GIVEN; else fail. `-` in a name reads
# as `_`.
given() {
  local -i i
  local name
  for ((i = 0; i < ${#OPTIONS[@]}; i++)); do
    name=${OPTIONS[i]%%=*}
    if [ "${name//-/_}" != "__$1" ]; then continue; fi
    if [ "$name" = "${OPTIONS[i]}" ]; then GIVEN=${OPTIONS[i + 1]-}; else GIVEN=${OPTIONS[i]#*=}; fi
    return
  done
  GIVEN=
  return 1
}

# Add an option where there is a value and the command line gives none.
default() { if [ -n "$2" ] && ! given "$1"; then OPTIONS+=("--$1=$2"); fi; }

# Refuse what the trainer would refuse, or what the GPUs could not hold.
refuse() {
  local ranks=$1 why
  if ! once check --ranks "$ranks" "${OPTIONS[@]}"; then
    why="unic-ds check says why above"
  elif finished && ! given run.extend; then
    return
  elif once plan --gpus "$ranks" --gpu "$GPU" "${OPTIONS[@]}"; then
    return
  else
    why="unic-ds plan found no room on $ranks x $GPU, or failed, see above"
  fi
  if asked_to_stop; then
    again 1
    exit
  fi
  say "refused: $why; nothing was trained"
  exit 2
}

# On one node of the job, in the container if there is one.
once() { srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" unic-ds "$@"; }

finished() { [ -f "$OUT/student/model.safetensors" ] && [ -f "$OUT/results.json" ]; }

train() {
  local step code first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR=$first MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
  srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" bash slurm/node.sh "${OPTIONS[@]}" &
  step=$!
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
    wait "$step"
    code=$?
  done
  rm -f "$OUT/STOP"
  if [ -n "$timer" ]; then kill "$timer" 2>/dev/null; fi
  return "$code"
}

# Told of the time limit: a run that builds, resumes or evaluates does not look for STOP, and what
# Slurm then ends it would not requeue.
# shellcheck disable=SC2317 # the trap calls it
late() {
  if [ -n "$timer" ]; then return; fi
  { sleep "$LATE" && say "did not stop within $LATE s" && hopeful && again 1; } &
  timer=$!
}

# A command of Slurm's, asked again for a minute: its controller is slow when much happens.
ask() {
  local -i i
  for ((i = 0; i < 12; i++)); do
    if "$@"; then return; fi
    sleep 5
  done
  return 1
}

# By the time limit, or by a preemption, of which Slurm tells the ranks and not this shell.
asked_to_stop() {
  [ -n "$asked" ] || [[ $(ask scontrol show job "$SLURM_JOB_ID") =~ \ PreemptTime=[0-9] ]]
}

# Requeue a job that did not finish; else what it ends with.
again() {
  local state
  if ! state=$(ask squeue -h -j "$SLURM_JOB_ID" -o %T); then
    say "Slurm does not answer; submit it again to go on"
    return "$1"
  fi
  case $state in # cancelled, or already requeued by Slurm: nothing of ours to add
    RUNNING | SIGNALING) ;;
    *) return "$1" ;;
  esac
  local without
  without=$(unfit)
  if ! asked_to_stop && { { [ -z "$without" ] && decided; } || ! hopeful; }; then return "$1"; fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
    say "requeued $MAX_REQUEUES times (MAX_REQUEUES); submit it again to go on"
    return 1
  fi
  (
    trap '' TERM # which Slurm sends to all of a job that is requeued
    ask scontrol requeue "$SLURM_JOB_ID" || exit
    if [ -n "$without" ]; then exclude "$without"; fi
  )
}

# The nodes that the ranks of this start named as unfit, by commas.
unfit() {
  grep -hsF "$(job_in_event)" "$OUT"/stage*/events.jsonl "$OUT"/events.jsonl |
    sed -n 's/.*"exclude": "\([A-Za-z0-9._,-]*\)".*/\1/p' | tail -n 1
}

# Keep the job's next start off nodes, beside those that it is kept off already.
exclude() {
  local now
  now=$(ask scontrol --oneliner show job "$SLURM_JOB_ID")
  now=$([[ $now =~ \ ExcNodeList=([^\ ]+) ]] && printf '%s' "${BASH_REMATCH[1]}")
  if [ "$now" = '(null)' ]; then now=; fi
  if ask scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${now:+$now,}$1"; then
    say "requeued without $1"
  fi
}

# How an event that ends this start for good names it, as node.sh tells torchrun.
job_in_event() { printf '"job": "%s"' "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"; }

# Whether this start ended for a reason that the next would meet again.
decided() {
  grep -qsF "$(job_in_event)" "$OUT"/stage*/events.jsonl "$OUT"/events.jsonl || return 1
  say "it would end so again; not requeued"
}

# Whether a failed job should try again: not after two failures with the same newest checkpoint.
hopeful() {
  local here
  here=$(grep -hs '' "$OUT"/stage*/checkpoints/latest "$OUT"/checkpoints/latest | paste -sd ' ')
  if [ -f "$OUT/slurm.failed" ] && [ "$(cat "$OUT/slurm.failed")" = "$here" ]; then
    say "failed twice without a newer checkpoint (${here:-none yet}); not requeued"
    return 1
  fi
  printf '%s\n' "$here" >"$OUT/slurm.failed"
}

main "$@"
exit
