"""SLURM, from outside and inside a job: submitting recipes (`submit`), what became of them (`status`,
`logs`), and the check of the nodes before ranks start (`check`, run by launch/job.sh). The job scripts are
launch/*.sbatch.

No torch here: `phi4r launch`, `status` and `logs` run on a login node. What happens in the ranks belongs to
`phi4r.parallel.attempt`.
"""
