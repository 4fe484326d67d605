"""Sampling as a service: requests, completions, engines (embedded, vLLM servers), weight updates."""
