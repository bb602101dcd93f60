#!/usr/bin/env bash
# Job script of all training jobs: refuse a run that cannot train, start a torchrun on each node,
# and requeue the job if it was stopped. RECIPE and DS_CONFIG come from the template; any option of
# the trainer may follow. All code is in functions, so that bash has read the file completely before
# the job begins: an update of the repository does not change a running job.
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
  asked= # non-empty once the time limit or a preemption asks the job to stop
  timer= # pid of the process that waits for LATE seconds after the time limit's warning
  rm -f "$OUT/STOP"
  trap 'stop; late' USR1
  trap stop TERM
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then
    rm -f "$OUT/slurm.failed"
    refuse "$ranks"
  fi
  mkdir -p "$OUT" || exit 2 # a refused run leaves no folder
  if [ -n "$asked" ]; then stop; fi
  say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $ranks ranks, in ${OUT@Q}"
  train
  code=$?
  if [ "$code" -eq 0 ] && { [ -z "$asked" ] || finished; }; then return 0; fi
  again "$code"
}

# Make the ranks save and stop.
stop() {
  asked=yes
  if [ -d "$OUT" ]; then touch "$OUT/STOP"; fi
}

say() { printf '%s\n' "unic_ds: job $SLURM_JOB_ID: $*" >&2; }

# Set GIVEN to the value of an option on the command line; fail if it is not there. `-` in a name
# counts as `_`.
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

# Add an option with a default, if the default is not empty and the command line lacks the option.
default() { if [ -n "$2" ] && ! given "$1"; then OPTIONS+=("--$1=$2"); fi; }

# Refuse a run that the trainer would refuse, or that does not fit on the GPUs.
refuse() {
  local ranks=$1 why
  if ! once check --ranks "$ranks" "${OPTIONS[@]}"; then
    why="see the message of unic-ds check above"
  elif finished && ! given run.extend; then
    return
  elif once plan --gpus "$ranks" --gpu "$GPU" "${OPTIONS[@]}"; then
    return
  else
    why="the run does not fit on $ranks x $GPU, or unic-ds plan failed; see above"
  fi
  if asked_to_stop; then
    again 1
    exit
  fi
  say "refused: $why; nothing was trained"
  exit 2
}

# Run a verb of unic-ds on one node of the job, in the container if there is one.
once() { srun --nodes=1 --ntasks=1 "${SRUN_OPTIONS[@]}" "${CONTAINER[@]}" unic-ds "$@"; }

finished() { [ -f "$OUT/student/model.safetensors" ] && [ -f "$OUT/results.json" ]; }

train() {
  local step code first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR=$first MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) UNIC_DS_PROGRAM=train
  srun --kill-on-bad-exit=1 "${SRUN_OPTIONS[@]}" bash slurm/node.sh "${OPTIONS[@]}" &
  step=$!
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do # a signal interrupts `wait`, not the step
    wait "$step"
    code=$?
  done
  rm -f "$OUT/STOP"
  if [ -n "$timer" ]; then kill "$timer" 2>/dev/null; fi
  return "$code"
}

# Requeue the job LATE seconds after the time limit's warning if it has not stopped. During setup,
# resume and evaluation a run does not check for STOP, and Slurm does not requeue a job that it ends
# at the time limit.
# shellcheck disable=SC2317 # the trap calls it
late() {
  if [ -n "$timer" ]; then return; fi
  { sleep "$LATE" && say "did not stop within $LATE s" && hopeful && again 1; } &
  timer=$!
}

# Retry a command of Slurm for a minute, since a busy controller may not answer.
ask() {
  local -i i
  for ((i = 0; i < 12; i++)); do
    if "$@"; then return; fi
    sleep 5
  done
  return 1
}

# Succeed if the time limit or a preemption asked the job to stop. A preemption is read from
# scontrol, since Slurm signals only the ranks.
asked_to_stop() {
  [ -n "$asked" ] || [[ $(ask scontrol show job "$SLURM_JOB_ID") =~ \ PreemptTime=[0-9] ]]
}

# Requeue a job that did not finish, if a retry may succeed; else return its exit code.
again() {
  local state
  if ! state=$(ask squeue -h -j "$SLURM_JOB_ID" -o %T); then
    say "Slurm does not answer; submit the job again to resume"
    return "$1"
  fi
  case $state in # a job that was cancelled, or that Slurm has requeued, is left as it is
    RUNNING | SIGNALING) ;;
    *) return "$1" ;;
  esac
  local without
  without=$(unfit)
  if ! asked_to_stop && { { [ -z "$without" ] && decided; } || ! hopeful; }; then return "$1"; fi
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_REQUEUES" ]; then
    say "requeued $MAX_REQUEUES times (MAX_REQUEUES); submit the job again to resume"
    return 1
  fi
  (
    trap '' TERM # Slurm sends it to all processes of a job that is requeued
    ask scontrol requeue "$SLURM_JOB_ID" || exit
    if [ -n "$without" ]; then exclude "$without"; fi
  )
}

# Print the nodes that the ranks of this start recorded as unfit, separated by commas.
unfit() {
  grep -hsF "$(job_in_event)" "$OUT"/stage*/events.jsonl "$OUT"/events.jsonl |
    sed -n 's/.*"exclude": "\([A-Za-z0-9._,-]*\)".*/\1/p' | tail -n 1
}

# Add nodes to those that the job's next start excludes.
exclude() {
  local now
  now=$(ask scontrol --oneliner show job "$SLURM_JOB_ID")
  now=$([[ $now =~ \ ExcNodeList=([^\ ]+) ]] && printf '%s' "${BASH_REMATCH[1]}")
  if [ "$now" = '(null)' ]; then now=; fi
  if ask scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${now:+$now,}$1"; then
    say "requeued without $1"
  fi
}

# Print the id of this start as it is in events of permanent failures; node.sh gives it to torchrun.
job_in_event() { printf '"job": "%s"' "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"; }

# Succeed if this start ended for a reason that a retry would repeat.
decided() {
  grep -qsF "$(job_in_event)" "$OUT"/stage*/events.jsonl "$OUT"/events.jsonl || return 1
  say "it would end so again; not requeued"
}

# Succeed if a failed job should be retried: not after two failures with the same newest checkpoint.
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
