# The environment of every phi4r job: sourced by launch/job.sh on the first node, and by `phi4r launch` around sbatch.
# What differs between clusters belongs into site.sh (copy site.sh.example), which is read first and wins.

PHI4R_SRUN_ARGS=()      # more words for every srun, such as those of a container
if [[ -f ${PHI4R_SITE:-$PHI4R_HOME/launch/site.sh} ]]; then
  source "${PHI4R_SITE:-$PHI4R_HOME/launch/site.sh}"
fi

# The Python that has phi4r installed, on every node (or inside the container).
if [[ -z ${PHI4R_PYTHON:-} ]]; then
  PHI4R_PYTHON=$PHI4R_HOME/.venv/bin/python
  [[ -x $PHI4R_PYTHON ]] || PHI4R_PYTHON=python3
fi

# A Python 3.9 or newer of the first node itself, with SLURM's commands, no packages: it runs phi4r/slurm/supervise.py.
if [[ -z ${PHI4R_HOST_PYTHON:-} ]]; then
  PHI4R_HOST_PYTHON=$(command -v "$PHI4R_PYTHON" || echo python3)
fi

export PHI4R_HOME PHI4R_PYTHON
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# After a collective has timed out (parallel.timeout_s), say which one on which rank, and end the process.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000}

# Restarts in a row that may end without a new checkpoint before a job gives up.
export PHI4R_MAX_RESTARTS=${PHI4R_MAX_RESTARTS:-3}
# Seconds that the check of the nodes may take, and that the ranks may take to start and to begin their work.
export PHI4R_CHECK_S=${PHI4R_CHECK_S:-180}
export PHI4R_START_S=${PHI4R_START_S:-600}
# Seconds between looks at the ranks' heartbeats.
export PHI4R_WATCH_S=${PHI4R_WATCH_S:-10}
# Free space, in GiB, that the run folder must have.
export PHI4R_FREE_GIB=${PHI4R_FREE_GIB:-1}
