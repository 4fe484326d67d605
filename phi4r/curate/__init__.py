"""Curation: raw problems in, a clean and teachable pool out, with a reason for everything that was removed.

Here live the stages (`validate`, `dedup`, `decontaminate`, `difficulty`), their report, the generated raw
pool of the quick start and the command that runs them in order. Stages are pure functions over lists of
`core.problem.Problem`. Nothing here may import torch: pass rates come in through a callback.
"""
