"""The embedded rollout engine: sampled tokens per second by how many sequences are decoded at once.

    python -m benchmarks.rollout [--slots 8 32 128] [--num-requests 128] [--new-tokens 64]

Needs phi4r installed. A model of the tiny preset with random weights samples `--num-requests` answers of
exactly `--new-tokens` tokens to prompts of 16 to 48 random tokens, at temperature 1; prefill included. Beside
it: transformers' `generate` on a Phi-3 of the same sizes, everything in one padded batch. The samples of the
engine must not depend on the number of slots: that is compared before anything is written.
tokens_per_second counts sampled tokens. Rows go to results/rollout.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import measure, suite
from benchmarks.suite import SkippedError

COLUMNS = [*suite.COLUMNS, "requests", "tokens_per_second"]
VOCAB = 128


def random_prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 16 to 48 random token ids."""
    random = np.random.default_rng(seed)
    return [tuple(random.integers(1, VOCAB, int(random.integers(16, 49))).tolist()) for _ in range(count)]


def embedded(prompts: list[tuple[int, ...]], new_tokens: int) -> Any:
    """A function of (slots, i): the completions of all prompts with the i-th streams."""
    from phi4r.configs.load import load_stage
    from phi4r.configs.sections import ParallelConfig, TrainConfig
    from phi4r.parallel.layout import init_layout
    from phi4r.sampling.embedded import EmbeddedEngine
    from phi4r.sampling.types import SampleRequest, SamplingOptions
    from phi4r.train.engine import Engine
    from phi4r.train.session import fill_weights

    model = dataclasses.replace(load_stage("rl", "tiny", ["model.dtype=fp32"]).config.model, vocab_size=VOCAB)
    engine = Engine(model, ParallelConfig(), init_layout(ParallelConfig()), TrainConfig())
    fill_weights(engine, "", seed=0)

    def sample(slots: int, i: int) -> Any:
        requests = [SampleRequest(prompt, (i, number)) for number, prompt in enumerate(prompts)]
        return EmbeddedEngine(engine, (), slots).generate(requests, SamplingOptions(new_tokens))

    return sample


def transformers_generate(prompts: list[tuple[int, ...]], new_tokens: int, device: str) -> measure.Call:
    """transformers' own sampler on a Phi-3 with the tiny preset's sizes, prompts padded on the left."""
    try:
        from transformers import Phi3Config, Phi3ForCausalLM
    except ImportError:
        raise SkippedError("transformers is not installed") from None
    from phi4r.configs.load import load_stage

    model = load_stage("rl", "tiny", ["model.dtype=fp32"]).config.model
    config = Phi3Config(
        vocab_size=VOCAB,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        max_position_embeddings=model.max_position_embeddings,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    network = Phi3ForCausalLM(config).to(device).eval()
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1

    def call(i: int) -> Any:
        torch.manual_seed(i)
        out = network.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        assert out.size(1) == longest + new_tokens, "generate ended early"
        return out

    return call


def _disagreement(sample: Any, slots: list[int]) -> str:
    """Which numbers of slots sample other tokens than the first, "" if none."""
    first = [completion.tokens for completion in sample(slots[0], 0)]
    wrong = [str(n) for n in slots[1:] if [completion.tokens for completion in sample(n, 0)] != first]
    return ", ".join(wrong)


def settings() -> argparse.Namespace:
    """The command line; only what a rollout has of the common options."""
    parser = suite.parser(__doc__)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--num-requests", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    return parser.parse_args()


def main() -> int:
    """All numbers of slots, interleaved."""
    options = settings()
    run = suite.start("rollout", options, COLUMNS)
    prompts = random_prompts(options.num_requests)
    sample = embedded(prompts, options.new_tokens)
    if wrong := _disagreement(sample, options.slots):
        sys.exit(f"benchmarks.rollout: {wrong} slots sample other tokens; nothing is written")

    def timed(slots: int) -> measure.Call:
        return lambda i: sample(slots, i)

    makers = {f"embedded_{n}_slots": partial(timed, n) for n in options.slots}
    makers["transformers"] = partial(transformers_generate, prompts, options.new_tokens, run.device)
    tokens = options.num_requests * options.new_tokens
    what = suite.Comparison(
        op="rollout",
        mode="sample",
        case=f"{options.num_requests}x{options.new_tokens}",
        dtype="float32",
        shape="tiny preset",
        tokens=tokens,
        flops=0.0,
        bytes=0.0,
        against=(f"embedded_{max(options.slots)}_slots",),
    )
    print(f"rollout of {options.num_requests} answers of {options.new_tokens} tokens")
    rows = suite.compare(run, what, suite.gather(run, makers), write=False)
    for row in rows:
        row["requests"] = options.num_requests
        row["tokens_per_second"] = f"{tokens / float(row['p50_ms']) * 1e3:.1f}"
        print(f"  {row['impl']:28} {row['tokens_per_second']:>10} tokens/s")
    run.write(rows)
    suite.finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
