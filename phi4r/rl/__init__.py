"""GRPO: roll out, verify and reward, advantages, objective, step.

    types.py        samples and trajectories (numpy, no torch)
    rewards.py      the paper's reward, part by part (no torch)
    advantages.py   rewards of a group -> advantages (numpy)
    objective.py    log-probs and advantages -> loss sum (torch, pure functions)
    rollout.py      sampling from the trainer's own weights, and what an engine has to offer
    vllm/           sampling on vLLM servers; sampler.py opens the engine that a run asks for
    collect.py      the samples of a step: draw, roll out, verify, reward; ahead.py keeps what is ahead
    train.py        the loop, on one screen

Rewards, advantages and the objective are pure functions of arrays and know nothing of models, ranks or files.
`phi4r.train` never imports this package.
"""
