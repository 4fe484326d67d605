#!/bin/bash
# job.sh STAGE WORDS...: run `phi4r STAGE WORDS` in this SLURM job, one task per rank, until it is done. Run by the *.sbatch
# scripts. What is decided, and when, is in phi4r/slurm/supervise.py, which takes this process's place and its signals.
set -euo pipefail
: "${PHI4R_HOME:=${SLURM_SUBMIT_DIR:?this script runs inside a SLURM job: sbatch launch/sft.sbatch RECIPE --run-dir D}}"
source "$PHI4R_HOME/launch/env.sh"
exec "$PHI4R_HOST_PYTHON" "$PHI4R_HOME/phi4r/slurm/supervise.py" "${PHI4R_SRUN_ARGS[@]}" -- "$@"
