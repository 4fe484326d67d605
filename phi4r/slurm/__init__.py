"""SLURM, from outside and inside a job: submitting recipes (`submit`), what became of them (`status`,
`logs`), the policy of a job (`supervise`, run by launch/job.sh on the first node), and the check of the nodes
before ranks start (`check`). The job scripts are launch/*.sbatch.

No torch here: `phi4r launch`, `status` and `logs` run on a login node. What happens in the ranks belongs to
`phi4r.parallel.attempt`.
"""
