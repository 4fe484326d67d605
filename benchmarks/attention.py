"""Attention on packed documents: ours beside what torch offers, forward and backward.

    python -m benchmarks.attention [--tokens 32768] [--mixes dense lognormal] [--modes forward]

Causal inside each document. Work is counted as 4 N H sum_S S^2 / 2 for the forward and 2.5 times that for the
backward, where S are the documents' lengths, whatever an implementation computes. The mixes:

    dense      one document                       uniform   eight of equal length
    lognormal  like reasoning traces, none above T/4        giant     one of 3T/4 and 32 short ones

Rows go to results/attention.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure, suite
from benchmarks.attention_peers import OURS, PEERS, Attention, Documents, reference
from benchmarks.shapes import MIXES, SHAPES, Shape, attention_bytes, attention_flops, documents

ALL = {**OURS, **PEERS}
MODES = ("forward", "backward")
ERROR_TOKENS = 2048
AGAINST = ("ours_hopper", "ours", "sdpa_flash")


def random_inputs(
    shape: Shape, num_tokens: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output, standard normal; q, k and v require gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    q, k, v, dout = (
        torch.randn(num_tokens, n, shape.head_dim, device=device, generator=generator).to(dtype)
        for n in heads
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def error(attend: Attention, docs: Documents, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative error against float64 by mode: of the output, and the worst one of the three gradients."""
    q, k, v, dout = inputs
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, out64 = attend(q, k, v), reference(*exact, docs)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    grads64 = torch.autograd.grad(out64, exact, dout.double())
    return {
        "forward": measure.checked_error([out.detach()], [out64.detach()]),
        "backward": measure.checked_error(grads, grads64),
    }


def errors(
    run: suite.Run, shape: Shape, dtype: torch.dtype, mix: str, num_tokens: int, said: set[str]
) -> dict[str, dict[str, float]]:
    """Errors of all implementations by mode, on a row of at most 2,048 tokens with one KV head; the ones that
    are missing or wrong are not in it."""
    docs = Documents(tuple(documents(mix, min(num_tokens, ERROR_TOKENS))), run.device)
    group = shape.num_heads // shape.num_kv_heads
    slice_shape = Shape("slice", 0, group, 1, shape.head_dim, 0, 0, 0)
    inputs = random_inputs(slice_shape, docs.num_tokens, dtype, run.device, seed=1)

    def measured(make: Callable[[Documents], Attention]) -> dict[str, float]:
        return error(make(docs), docs, inputs)

    return suite.gather(run, {name: partial(measured, make) for name, make in ALL.items()}, said)


def calls(
    makers: Mapping[str, Attention], mode: str, sets: list[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> dict[str, Callable[[], measure.Call]]:
    """For each implementation a function that makes its timed call."""

    def make(attend: Attention) -> measure.Call:
        if mode == "forward":

            def forward(i: int) -> Tensor:
                with torch.no_grad():
                    return attend(*sets[i % len(sets)][:3])

            return forward
        outs = [attend(q, k, v) for q, k, v, _ in sets]

        def backward(i: int) -> tuple[Tensor, ...]:
            q, k, v, dout = sets[i % len(sets)]
            return torch.autograd.grad(outs[i % len(sets)], (q, k, v), dout, retain_graph=True)

        return backward

    return {name: partial(make, attend) for name, attend in makers.items()}


def compare(
    run: suite.Run,
    shape: Shape,
    dtype: torch.dtype,
    mode: str,
    mix: str,
    docs: Documents,
    made: Mapping[str, Attention],
    right: Mapping[str, Mapping[str, float]],
) -> None:
    """One mode of one row of documents. The deterministic variant differs in the backward alone."""
    num_tokens, lengths = docs.num_tokens, list(docs.lengths)
    moved = attention_bytes(shape, num_tokens, mode, dtype.itemsize)
    what = suite.Comparison(
        op="attention",
        mode=mode,
        case=mix,
        dtype=str(dtype).removeprefix("torch."),
        shape=f"{shape.num_heads}/{shape.num_kv_heads}x{shape.head_dim}",
        tokens=num_tokens,
        flops=attention_flops(shape, lengths, mode),
        bytes=moved,
        against=AGAINST,
        errors={name: found[mode] for name, found in right.items()},
    )
    print(
        f"attention {mode}, {mix}, {num_tokens:,} tokens in {len(lengths)} documents "
        f"(longest {max(lengths):,})"
    )
    sets = [
        random_inputs(shape, num_tokens, dtype, run.device, seed)
        for seed in range(measure.rotations(moved, run.device))
    ]
    chosen = {name: made[name] for name in made if mode == "backward" or name != "ours_deterministic"}
    suite.compare(run, what, suite.gather(run, calls(chosen, mode, sets)))


def main() -> int:
    """All modes, mixes and sizes asked for."""
    parser = suite.parser(__doc__)
    parser.add_argument("--mixes", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    run = suite.start("attention", options)
    shape = SHAPES[run.shape]
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    said: set[str] = set()
    for mix in options.mixes:
        right = errors(run, shape, dtype, mix, max(options.tokens), said)
        for num_tokens in options.tokens:
            docs = Documents(tuple(documents(mix, num_tokens)), run.device)
            made = suite.gather(run, {name: partial(ALL[name], docs) for name in right}, said)
            for mode in options.modes:
                compare(run, shape, dtype, mode, mix, docs, made, right)
    suite.finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
