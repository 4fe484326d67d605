# The life of a job, sourced by the *.sbatch scripts: check the nodes, start one srun task per rank, watch them, and when
# they have ended say why and decide: done, start again here, go back to the queue, or fail.
#
# The ranks tell this script what happened by files in $A, the attempt's folder (phi4r/parallel/attempt.py). Exit codes
# alone would not do: srun kills the others for the first rank that ends with a code, and then returns theirs.

set -uo pipefail
: "${PHI4R_HOME:=${SLURM_SUBMIT_DIR:?this script runs inside a SLURM job: sbatch launch/sft.sbatch RECIPE --run-dir D}}"
source "$PHI4R_HOME/launch/env.sh"

job_name=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
say() { printf '%(%FT%T)T [%s] %s\n' -1 "$job_name" "$*"; }
state() { squeue -h -j "$SLURM_JOB_ID" -o %T | head -n 1; }
# The running steps of a component of this job, as scancel names them: 17.3
steps_of() { squeue -h -s -j "$1" -o %i | grep -E "^$1\.[0-9]+$"; }
# In a heterogeneous job the second component runs vLLM servers for the trainer; what has no --het-group is about the first.
has_servers() { ((${SLURM_HET_SIZE:-1} > 1)); }

# The value of the last --run-dir among the words.
run_dir_of() {
  local found=
  while (($#)); do
    case $1 in
      --run-dir) found=${2:-} ;;
      --run-dir=*) found=${1#*=} ;;
    esac
    shift
  done
  [[ -n $found ]] || { say "error: --run-dir D is missing: a folder that all nodes share" >&2; return 2; }
  echo "$found"
}

# The step that a restart would go on from.
progress() {
  local newest
  newest=$(ls "$RUN/checkpoints" 2>/dev/null | grep -E '^step_[0-9]+$' | sort -V | tail -n 1)
  newest=${newest#step_}
  echo $((10#${newest:-0}))
}

# RUN/slurm/history.tsv: time, job.restart.attempt, step, how it ended, why. `phi4r status` shows the last line. Where no line
# can be written, SLURM keeps it: in the job's comment, behind the run folder.
note() {
  say "$1: ${2:0:500}" 2>/dev/null
  printf '%(%FT%T%z)T\t%s\t%s\t%s\t%s\n' -1 "$job_name.$attempt" "$(progress)" "$1" "${2:0:500}" \
    2>/dev/null >>"$RUN/slurm/history.tsv" ||
    scontrol update JobId="$SLURM_JOB_ID" Comment="$RUN | $1: ${2:0:500}"
}

# Whether 256 KiB more fit into the attempt's folder.
has_room() {
  head -c 262144 /dev/zero >"$A/room" 2>/dev/null
  local code=$?
  rm -f "$A/room"
  return "$code"
}

# Counts restarts that end at the step where the one before ended, over requeues too. Fails when they are too many.
may_restart() {
  local now last=-1 tries=0
  now=$(progress)
  [[ -f $RUN/slurm/restarts ]] && read -r last tries <"$RUN/slurm/restarts"
  if ((now > last)); then tries=0; else tries=$((tries + 1)); fi
  echo "$now $tries" >"$RUN/slurm/restarts"
  ((tries < PHI4R_MAX_RESTARTS)) && return
  note "gave up" "$tries restarts without a new checkpoint (PHI4R_MAX_RESTARTS=$PHI4R_MAX_RESTARTS); last: $1"
  return 1
}

# Back to the queue, without the nodes given. Only while RUNNING: after scancel it would undo what the user wants.
requeue() {
  local now
  now=$(state)
  [[ $now == RUNNING ]] || { note "ended by SLURM" "not requeued, because the job is ${now:-gone}"; exit 1; }
  note "requeued" "goes on from step $(progress)${1:+, without $1}"
  trap '' TERM
  scontrol requeue "$SLURM_JOB_ID" || { note "failed" "scontrol requeue was refused: does the site forbid it?"; exit 1; }
  if [[ -n ${1:-} ]]; then # possible now that the job waits; nodes that were left out before stay out
    local excluded
    excluded=$(scontrol show job -o "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p' | head -n 1)
    [[ $excluded == "(null)" ]] && excluded=
    local component
    for component in "$SLURM_JOB_ID" ${SLURM_JOB_ID_HET_GROUP_1:-}; do
      scontrol update JobId="$component" ExcNodeList="${excluded:+$excluded,}$1"
    done
  fi
  sleep 300 # SLURM ends this script before
  exit 1
}

# `wait` returns early when a trap runs; the process is over only when it is gone.
wait_for() {
  while :; do
    wait "$1"
    code=$?
    ((code > 128)) && kill -0 "$1" 2>/dev/null || return "$code"
  done
}

# --- before the ranks

check_nodes() {
  check_component "$A" --ntasks="$SLURM_JOB_NUM_NODES"
  ! has_servers || check_component "$A/rollout_nodes" --ntasks="$SLURM_JOB_NUM_NODES_HET_GROUP_1" --het-group=1
}

# check_component FOLDER SRUN_OPTIONS...: comes back where the nodes are fit.
check_component() {
  local folder=$1
  mkdir -p "$folder"
  srun "${@:2}" --ntasks-per-node=1 --wait=0 --output="$folder/check.log" "${PHI4R_SRUN_ARGS[@]}" \
    "$PHI4R_PYTHON" -m phi4r.slurm.check "$folder" 2>"$folder/check_srun.err" &
  local pid=$!
  (sleep $((PHI4R_CHECK_S + 30)); kill "$pid" 2>/dev/null) &
  local alarm=$!
  wait_for "$pid"
  local code=$?
  kill "$alarm" 2>/dev/null
  ((code == 0)) && return 0
  local why bad=
  why=$(grep -m 1 '^problem:' "$folder/check.log" 2>/dev/null || head -n 1 "$folder/check_srun.err")
  [[ -s $folder/bad_nodes ]] && bad=$(<"$folder/bad_nodes")
  if [[ -e $folder/check_failed && -z $bad ]]; then # nothing that other nodes would mend
    note "failed" "check of the nodes: ${why#problem: }"
    exit 1
  fi
  note "bad node" "check of the nodes: ${why#problem: }"
  may_restart "${why#problem: }" || exit 1
  requeue "$bad"
}

# --- while they run

# The innermost frame of the main thread in a rank's stack dump, which faulthandler writes last.
main_frame() { awk '/^(Thread|Current thread)/ {new = 1; next} new {frame = $0; new = 0} END {print frame}' "$1"; }

# Which rank hangs. The others stand in a collective and wait for it.
describe_hang() {
  local heartbeat rank timeout node stack frame waiting= culprit=
  for heartbeat in "$A"/heartbeat_*; do
    [[ -e $heartbeat ]] || continue
    rank=${heartbeat##*_}
    read -r timeout _ _ node <"$heartbeat"
    stack=$A/stack_$rank
    rank=$((10#$rank))
    if [[ ! -s $stack ]]; then
      culprit+="rank $rank on $node left no stack (stopped, or in the kernel); "
    else
      frame=$(main_frame "$stack")
      case $frame in
        *torch/distributed/* | *megatron/core/*) waiting+=" $rank" ;;
        *) culprit+="rank $rank on $node is at ${frame#"${frame%%[![:space:]]*}"}; " ;;
      esac
    fi
  done
  [[ -n $culprit ]] || culprit="all ranks wait for each other; "
  echo "${culprit%; } (no sign of life for ${timeout:-?} s${waiting:+; waiting for it: rank$waiting}; stacks in $A)"
}

# Ends the step when a rank has been silent for longer than its own deadline, or never started.
watch_ranks() {
  local began=$SECONDS heartbeat timeout step age
  while sleep "$PHI4R_WATCH_S"; do
    touch "$A/clock" 2>/dev/null || continue
    for heartbeat in "$A"/heartbeat_*; do
      [[ -e $heartbeat ]] || continue
      read -r timeout _ step _ <"$heartbeat" || continue
      ((timeout > 0)) || continue
      age=$(($(stat -c %Y "$A/clock") - $(stat -c %Y "$heartbeat" 2>/dev/null || echo 9999999999)))
      if ((age > timeout + 2)); then
        describe_hang >"$A/hung"
        scancel --signal=KILL "$SLURM_JOB_ID.$step"
        return
      fi
    done
    if ((SECONDS - began > PHI4R_START_S)); then
      compgen -G "$A/heartbeat_*" >/dev/null || [[ -e $A/finished || -e $A/stopped ]] ||
        compgen -G "$A/error_*" >/dev/null || {
        echo "no rank has started Python within $PHI4R_START_S s (PHI4R_START_S)" >"$A/hung"
        kill "$step_pid"
        return
      }
    fi
  done
}

# What ranks and servers are told about this attempt.
export_attempt() {
  export MASTER_ADDR MASTER_PORT PHI4R_ATTEMPT=$attempt PHI4R_ATTEMPT_DIR=$A
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Another one for every attempt, below the ports that the kernel hands out.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 31 + attempt) % 10000))
}

run_ranks() {
  srun --kill-on-bad-exit=1 --wait=120 --distribution=block \
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}}" \
    --output="$A/rank_%5t.log" "${PHI4R_SRUN_ARGS[@]}" "$PHI4R_PYTHON" -m phi4r "$@" 2>"$A/srun.err" &
  step_pid=$!
  watch_ranks &
  local watcher=$!
  wait_for "$step_pid"
  code=$?
  kill "$watcher" 2>/dev/null
  wait "$watcher" 2>/dev/null
}

# Ask the ranks, and not the servers, to save. A signal to a heterogeneous job goes to all its components, even with "+0".
signal_ranks() {
  local step
  has_servers || { scancel --signal=USR2 "$SLURM_JOB_ID"; return; }
  for step in $(steps_of "$SLURM_JOB_ID"); do scancel --signal=USR2 "$step"; done
}

# --- the vLLM servers of a heterogeneous job, one task each

start_servers() {
  has_servers || return 0
  srun --het-group=1 --ntasks="$SLURM_NTASKS_HET_GROUP_1" --kill-on-bad-exit=0 --wait=0 --distribution=block \
    --cpus-per-task="${SLURM_CPUS_PER_TASK_HET_GROUP_1:-1}" --output="$A/server_%5t.log" "${PHI4R_SRUN_ARGS[@]}" \
    "$PHI4R_PYTHON" -m phi4r serve "${@:2}" 2>"$A/servers.err" &
  servers_pid=$!
}

# They end with the attempt: the next one has another key and other weights. Every process of the step gets the signal.
end_servers() {
  local step alarm code # wait_for sets `code`, and what `judge` looks at is the ranks'
  has_servers || return 0
  for step in $(steps_of "$SLURM_JOB_ID_HET_GROUP_1"); do scancel --signal=TERM "$step"; done
  (sleep 60; kill "$servers_pid" 2>/dev/null) &
  alarm=$!
  wait_for "$servers_pid"
  kill "$alarm" 2>/dev/null
}

# --- after they have ended: sets `how` and `why`

judge() {
  local first died
  # The earliest report of a rank that did not merely lose another one.
  first=$(for report in "$A"/error_*; do [[ -s $report ]] && echo "$(head -n 1 "$report") $report"; done |
    awk '$1 != "peer"' | sort -k 2,2n | head -n 1)
  died=$(grep -m 1 -E 'task' "$A/srun.err" | grep -vE 'Exited with exit code|launch/' | sed 's/^srun: error: //')
  if [[ -e $A/finished ]]; then
    how=finished why="all steps are done"
  elif [[ -e $A/stopped ]]; then
    how=stopped why="saved after a signal (time limit or preemption)"
  elif [[ -n $first ]]; then
    read -r _ _ rank node report <<<"$first"
    how=failed why="rank $rank on $node: $(sed -n 2p "$report")"
  elif ! has_room; then # the ranks could not write down why they ended either
    how=failed why="the disk of $A is full: $(df -h --output=avail,size,target "$A" | tail -n 1 |
      awk '{print $1 " of " $2 " free on " $3}')"
  elif [[ -s $A/hung ]]; then
    how=hung why=$(<"$A/hung")
  elif [[ -n $died ]]; then
    how=lost why="$died"
  elif [[ -n $(find "$A" -name 'stack_*' -size +0 -print -quit 2>/dev/null) ]]; then
    how=hung why=$(describe_hang)
  else
    how=lost why="$(tail -n 1 "$A/srun.err" 2>/dev/null) (exit code $code; logs in $A)"
    for report in "$A"/error_*; do
      [[ -e $report ]] && why="$(sed -n 2p "$report") ($(basename "$report"))" && break
    done
  fi
}

# phi4r_job STAGE WORDS...: run `phi4r STAGE WORDS` with one task per rank until it is done. Never returns.
phi4r_job() {
  local code=0 how= why= stopping= step_pid= servers_pid=
  RUN=$(run_dir_of "$@") || exit 2
  RUN=$(realpath -m "$RUN")
  attempt=0
  mkdir -p "$RUN/logs" "$RUN/slurm" || { say "error: $RUN cannot be made"; exit 1; }
  echo "$SLURM_JOB_ID" >"$RUN/slurm/job"
  scontrol update JobId="$SLURM_JOB_ID" Comment="$RUN" # where `phi4r status` looks
  trap 'stopping=1; say "signal: time limit near"; signal_ranks' USR2
  trap 'stopping=1; say "signal: SLURM wants the nodes back"' TERM
  for ((attempt = 0; ; attempt++)); do
    A=$RUN/logs/$job_name.$attempt
    mkdir -p "$A" && ln -sfn "$job_name.$attempt" "$RUN/logs/latest"
    check_nodes
    say "attempt $attempt: phi4r $* on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks, from step $(progress); logs in $A"
    export_attempt
    start_servers "$@"
    run_ranks "$@"
    end_servers
    # Made anew, it would be an empty run that starts from nothing.
    [[ -d $A && -d $RUN/slurm ]] || { say "failed: the run folder $RUN is lost"; exit 1; }
    judge
    note "$how" "$why"
    case $how in
      finished) exit 0 ;;
      failed) exit 1 ;;
    esac
    [[ $(state) == RUNNING ]] || { note "ended by SLURM" "the job is $(state)"; exit 1; }
    may_restart "$why" || exit 1
    [[ $how != stopped && -z $stopping ]] || requeue
  done
}
