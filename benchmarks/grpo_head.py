"""The LM head with its loss, forward and backward: ours beside what one would use instead.

    python -m benchmarks.grpo_head [--tokens 32768] [--modes grpo cross_entropy]

Phi-4's head: D 5,120, V 100,352. Modes: grpo (clipped surrogate, token mean), grpo_full (that with a KL to a
reference policy and an entropy bonus), cross_entropy, logprobs (no backward). Work is counted as 6 T D V (2 T
D V for logprobs): recomputed logits count nothing. bare_gemms is these products alone, and the bound that
percent_of_bound is of. Rows go to results/grpo_head.csv.
"""

from __future__ import annotations

import sys
from functools import partial

import torch

from benchmarks import measure, suite
from benchmarks.head_peers import MODES, PEERS, Head, bare_gemms, random_problem, reference
from benchmarks.shapes import SHAPES, Shape, head_bytes, head_flops

TOKENS = {"phi4": [2048, 8192, 32_768, 65_536], "tiny": [64, 128]}
ERROR_TOKENS = {"phi4": 8192, "tiny": 64}
AGAINST = ("ours", "compiled_chunks", "naive")


def errors(run: suite.Run, shape: Shape, dtype: torch.dtype, mode: str, said: set[str]) -> dict[str, float]:
    """Worst relative error of dX and dW (of the log-probs) against float64; what is missing or wrong is not
    in it."""
    num_tokens = ERROR_TOKENS[shape.name]
    x, weight, batch = random_problem(num_tokens, shape.hidden, shape.vocab, dtype, run.device, seed=1)
    exact = reference(x, weight, batch, mode)

    def measured(name: str) -> float:
        outputs = PEERS[name](batch, mode)(x, weight)
        return measure.checked_error(outputs if mode == "logprobs" else outputs[1:], exact)

    return suite.gather(run, {name: partial(measured, name) for name in PEERS}, said)


def calls(
    run: suite.Run, what: suite.Comparison, shape: Shape, dtype: torch.dtype, said: set[str]
) -> dict[str, measure.Call]:
    """The right implementations and the bare products on one random problem; W alone is larger than a
    cache."""
    x, weight, batch = random_problem(what.tokens, shape.hidden, shape.vocab, dtype, run.device, seed=0)
    makers = {name: partial(PEERS[name], batch, what.mode) for name in what.errors}
    heads = suite.gather(run, makers, said)
    if heads:
        heads["bare_gemms"] = bare_gemms(batch, what.mode)

    def timed(head: Head) -> measure.Call:
        return lambda i: head(x, weight)

    return {name: timed(head) for name, head in heads.items()}


def main() -> int:
    """All modes and sizes asked for."""
    parser = suite.parser(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    sizes = options.tokens
    run = suite.start("grpo_head", options)
    shape = SHAPES[run.shape]
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    said: set[str] = set()
    for mode in options.modes:
        right = errors(run, shape, dtype, mode, said)
        for num_tokens in sizes or TOKENS[run.shape]:
            backward = mode != "logprobs"
            what = suite.Comparison(
                op="grpo_head",
                mode=mode,
                case="all_tokens",
                dtype=str(dtype).removeprefix("torch."),
                shape=f"{shape.hidden}x{shape.vocab}",
                tokens=num_tokens,
                flops=head_flops(num_tokens, shape.hidden, shape.vocab, backward),
                bytes=head_bytes(num_tokens, shape.hidden, shape.vocab, backward, dtype.itemsize),
                against=AGAINST,
                bound="bare_gemms",
                errors=right,
            )
            print(f"grpo_head {mode}, {num_tokens:,} tokens, D {shape.hidden:,}, V {shape.vocab:,}")
            suite.compare(run, what, calls(run, what, shape, dtype, said))
    suite.finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
