"""Hugging Face Phi3ForCausalLM folders <-> phi4r checkpoints, one tensor at a time, without a process group.

`hf.py` is the command (what a folder holds, checks, files carried along), `stream.py` reads and writes
megatron-core's `torch_dist` storage tensor by tensor. The name table is in `phi4r.models.names`;
no arithmetic on weights lives here.
"""
