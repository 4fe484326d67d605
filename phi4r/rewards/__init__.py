"""Rewards of a graded response. No torch.

length_aware.py   the paper's
function.py       what a reward function is given and returns; by registered name or import path
"""
