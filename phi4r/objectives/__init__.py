"""What RL minimises: one function per surrogate, on per-token vectors."""
