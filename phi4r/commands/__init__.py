"""What the smaller commands do: quick start, generate, score, replay, profile, doctor, verify."""
