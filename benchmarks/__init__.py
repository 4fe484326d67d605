"""Benchmarks and repeated runs: `python -m benchmarks.<name>`, each appends rows to results/<name>.csv.

Nothing imports this package, and no number in README or docs comes from anywhere else than its rows.
"""
