"""Training: the step, the optimizer and its schedule, checkpoints and resuming, metrics, and the SFT loop.

What is here works on packed rows and a loss, and does not know where they come from: nothing here imports
`rl`. megatron-core may be imported here.
"""
