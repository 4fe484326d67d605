"""A decoder on megatron-core: numbers to transformer config, layer spec, core attention, weight
names.

Megatron-core supplies the layers and their parallelism; what lives here is what it lacks on CPU or for packed
rows (RMSNorm with sequence parallelism, core attention with GQA, cu_seqlens, context parallelism and a KV
cache, the log-prob head). No training, data or file formats belong here; kernels live in `phi4r_kernels`.
"""
