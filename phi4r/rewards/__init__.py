"""Rewards of a graded response. No torch."""
