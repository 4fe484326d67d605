"""How work is cut over ranks: starting them, process groups and layouts, the CPU platform, context
parallelism's split of a row.

`launch` is the parent's side and never imports torch; everything else runs inside a rank. megatron-core may
be imported here, in `model`, `train` and `convert`, and nowhere else. Nothing here knows about losses, data
or rewards.
"""
