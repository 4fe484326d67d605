"""RL objectives on per-token vectors."""
