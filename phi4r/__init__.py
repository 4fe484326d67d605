"""phi4r: Phi-4-reasoning (curation, SFT, GRPO, evaluation) on megatron-core.

Only the version lives here. Importing `phi4r` must stay instant: no torch, no megatron, no typer.
"""

__version__ = "0.1.0"
