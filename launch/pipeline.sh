#!/bin/bash
# SFT -> GRPO -> evaluation as three jobs, each starting when the one before has succeeded (it waits through requeues; after
# a failure the rest is cancelled). Run it on a login node:
#
#   launch/pipeline.sh SFT_RECIPE RL_RECIPE TASK RUN_FOLDER NODES [options of `phi4r launch` for all three]
#   launch/pipeline.sh phi4_sft phi4_grpo problems.jsonl /shared/runs/phi4 4 --time 24:00:00
#
# All three are checked before the first is submitted. The evaluation runs on one node.
set -euo pipefail
(($# >= 5)) || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
: "${PHI4R_HOME:=$(cd "$(dirname "$0")/.." && pwd)}"
source "$PHI4R_HOME/launch/env.sh"
sft_recipe=$1 rl_recipe=$2 task=$3 folder=$4 nodes=$5
shift 5

stage() { # NAME WORDS...
  case $1 in
    sft) "$PHI4R_PYTHON" -m phi4r launch sft "$sft_recipe" --nodes "$nodes" --run-dir "$folder/sft" "${@:2}" ;;
    rl) "$PHI4R_PYTHON" -m phi4r launch rl "$rl_recipe" --nodes "$nodes" --run-dir "$folder/rl" \
      --init.checkpoint "$folder/sft" "${@:2}" ;;
    eval) "$PHI4R_PYTHON" -m phi4r launch eval "$folder/rl" "$task" --recipe "$rl_recipe" --run-dir "$folder/eval" \
      --eval.compare "$folder/sft" "${@:2}" ;;
  esac
}

for name in sft rl eval; do stage "$name" "$@" --dry-run >/dev/null; done
sft=$(stage sft "$@" --parsable)
rl=$(stage rl "$@" --parsable --after "$sft")
eval=$(stage eval "$@" --parsable --after "$rl")
echo "submitted: sft $sft -> rl $rl -> eval $eval"
echo "  phi4r status            all of them"
echo "  phi4r logs $folder/sft -f"
