"""One description of each model family: numbers, features, Hugging Face map, chat format, sampling,
arithmetic.

`model` is the section of settings that says how large a model is, `family` what a family says about it,
`phi4`, `phi4_mini` and `qwen3` the families themselves, one file each. Megatron's model, conversion, the
plan, MFU and the renderer read these. No torch, no megatron, no files: plan and settings import it on a
login node.
"""
