"""One GPU's share of a Phi-4 training step: some decoder layers and the head, forward and backward, packed.

    python -m benchmarks.step [--tokens 4096 8192 32768] [--layers 10] [--recompute]

Plain torch with our kernels: hidden states [T, D] of packed documents (like reasoning traces) go through
`--layers` of the 40 layers and the GRPO head; gradients of all weights and of the input come out. Weights and
gradients are bf16; the optimizer's step is not in it. The same step with other parts:

    ours        our attention, our head            varlen      torch's varlen_attn, our head
    sdpa        torch SDPA (cuDNN; one call per document), our head
    plain_head  our attention, all logits at once  torch       torch SDPA, all logits at once

    mfu = FLOPs / (time * 989 TFLOP/s), the dense bf16 peak of H100 and H200 SXM
    FLOPs = 6 T (layers (D (N + 2K) H + N H D + 3 D F) + D V) + layers 3.5 (4 N H sum_S S^2 / 2)

Recomputed and elementwise work counts nothing, nor does the embedding. tokens_per_second is of the layers
measured. attention_percent and head_percent: their own times, measured in the same run, over the step's.
model_tokens_per_second and model_mfu: the same for all 40 layers with one head, derived from this run by
T / (40 (step - head) / layers + head). Rows go to results/step.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import measure, suite
from benchmarks.attention_peers import (
    Attention,
    Documents,
    ours_fastest,
    reference,
    sdpa_cudnn,
    sdpa_flash,
    varlen,
)  # fmt: skip
from benchmarks.elementwise import EAGER, Function, compiled, rotary_tables
from benchmarks.head_peers import Batch, Loss, naive_loss, ours_loss, random_problem
from benchmarks.shapes import SHAPES, Shape, documents, step_flops

COLUMNS = [
    *suite.COLUMNS, "layers", "recompute", "tokens_per_second", "mfu", "attention_percent", "head_percent",
    "model_tokens_per_second", "model_mfu",
]  # fmt: skip
PEAK_TFLOPS = 989.0
ERROR_TOKENS = {"phi4": 512, "tiny": 64}
ROOMY_BYTES = 120 * 2**30


@dataclass(frozen=True)
class Weights:
    """One layer's: norms [D], qkv [(N + 2K) H, D], out [D, N H], gate_up [2F, D], down [D, F]."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.input_norm, self.qkv, self.out, self.post_norm, self.gate_up, self.down


def random_weights(shape: Shape, device: str, dtype: torch.dtype, seed: int) -> Weights:
    """Normal with the deviation 1 / sqrt(columns), norms near 1; all require gradients."""
    random = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, device=device, generator=random).mul_(columns**-0.5)
        return drawn.to(dtype).requires_grad_()

    def norm() -> Tensor:
        drawn = 1 + torch.randn(shape.hidden, device=device, generator=random).mul_(0.1)
        return drawn.to(dtype).requires_grad_()

    D, heads = shape.hidden, shape.num_heads * shape.head_dim
    return Weights(
        norm(), matrix(shape.qkv, D), matrix(D, heads), norm(), matrix(2 * shape.ffn, D), matrix(D, shape.ffn)
    )


@dataclass(frozen=True)
class Parts:
    """What a step is put together from; `functions` are the elementwise ops by name."""

    attend: Attention
    loss: Loss
    functions: Mapping[str, Function]


@dataclass(frozen=True)
class Step:
    """Weights, one packed row and what to do with it."""

    shape: Shape
    layers: tuple[Weights, ...]
    final_norm: Tensor
    head: Tensor
    x: Tensor
    tables: tuple[Tensor, Tensor]
    recompute: bool

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Everything that gets a gradient, the input included."""
        inner = tuple(tensor for layer in self.layers for tensor in layer.tensors)
        return (self.x, *inner, self.final_norm, self.head)


def run_layer(
    x: Tensor, residual: Tensor, weights: Weights, step: Step, parts: Parts
) -> tuple[Tensor, Tensor]:
    """One decoder layer on the previous one's (output, residual stream), each [T, D]."""
    shape, ops = step.shape, parts.functions
    residual, normed = ops["rms_norm"](x, residual, weights.input_norm)
    heads = (normed @ weights.qkv.t()).view(len(x), -1, shape.head_dim)
    q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
    q, k = ops["rope"](q, k, *step.tables)
    attended = parts.attend(q, k, v).reshape(len(x), -1) @ weights.out.t()
    residual, normed = ops["rms_norm"](attended, residual, weights.post_norm)
    (activated,) = ops["swiglu"](normed @ weights.gate_up.t())
    return activated @ weights.down.t(), residual


def loss_of(step: Step, parts: Parts) -> Tensor:
    """The loss of the row, with its graph."""
    x, residual = step.x, torch.zeros_like(step.x)
    for weights in step.layers:
        if step.recompute:
            x, residual = checkpoint(run_layer, x, residual, weights, step, parts, use_reentrant=False)
        else:
            x, residual = run_layer(x, residual, weights, step, parts)
    _, normed = parts.functions["rms_norm"](x, residual, step.final_norm)
    return parts.loss(normed, step.head)


def backward(step: Step, parts: Parts) -> Tensor:
    """A whole step; returns the gradient of the input. Gradients are made anew each time, as after
    zero_grad."""
    loss_of(step, parts).backward()
    grad = step.x.grad
    assert grad is not None
    for parameter in step.parameters:
        parameter.grad = None
    return grad


def make_step(
    shape: Shape, num_layers: int, lengths: list[int], dtype: torch.dtype, device: str, recompute: bool
) -> tuple[Step, Batch]:
    """Random weights and a random row with its targets."""
    _, head, batch = random_problem(sum(lengths), shape.hidden, shape.vocab, dtype, device, seed=0)
    random = torch.Generator(device).manual_seed(1)
    x = torch.randn(sum(lengths), shape.hidden, device=device, generator=random).to(dtype).requires_grad_()
    layers = tuple(random_weights(shape, device, dtype, seed) for seed in range(num_layers))
    norm = torch.ones(shape.hidden, device=device, dtype=dtype, requires_grad=True)
    tables = rotary_tables(lengths, shape.head_dim, device)
    return Step(shape, layers, norm, head, x, tables, recompute), batch


def sdpa(docs: Documents) -> Attention:
    """torch's best packed SDPA on this device."""
    return sdpa_cudnn(docs) if docs.device == "cuda" else sdpa_flash(docs)


VARIANTS: dict[str, tuple[Callable[[Documents], Attention], Callable[[Batch, str], Loss]]] = {
    "ours": (ours_fastest, ours_loss),
    "sdpa": (sdpa, ours_loss),
    "varlen": (varlen, ours_loss),
    "plain_head": (ours_fastest, naive_loss),
    "torch": (sdpa, naive_loss),
}


def parts_of(name: str, docs: Documents, batch: Batch) -> Parts:
    """The parts of a variant; SkippedError where one is missing."""
    attention, loss = VARIANTS[name]
    functions = {op: compiled(op, "cuda") if docs.device == "cuda" else EAGER[op] for op in EAGER}
    return Parts(attention(docs), loss(batch, "grpo"), functions)


def errors(run: suite.Run, shape: Shape, dtype: torch.dtype, said: set[str]) -> dict[str, float]:
    """Relative error of the input's gradient through one layer and the head, against float64."""
    lengths = documents("lognormal", ERROR_TOKENS[shape.name])
    docs = Documents(tuple(lengths), run.device)
    step, batch = make_step(shape, 1, lengths, dtype, run.device, recompute=False)

    def double(x: Tensor) -> Tensor:
        return x.detach().double().requires_grad_()

    exact = Step(
        shape,
        tuple(Weights(*(double(x) for x in layer.tensors)) for layer in step.layers),
        double(step.final_norm),
        double(step.head),
        double(step.x),
        (step.tables[0].double(), step.tables[1].double()),
        recompute=False,
    )
    # The policy that sampled is this one, so that no ratio sits on a clip's edge by chance.
    with torch.no_grad():
        old = Parts(partial(reference, documents=docs), partial(chosen_logprobs, batch=batch), EAGER)
        batch = Batch(batch.targets, loss_of(exact, old).float(), batch.ref_logprobs, batch.advantages)
    truth = backward(exact, Parts(partial(reference, documents=docs), naive_loss(batch, "grpo"), EAGER))

    def measured(name: str) -> float:
        return measure.checked_error([backward(step, parts_of(name, docs, batch))], [truth])

    return suite.gather(run, {name: partial(measured, name) for name in VARIANTS}, said)


def chosen_logprobs(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    """Log-probs [T] of the targets in the inputs' dtype."""
    return (hidden @ weight.t()).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def shares(run: suite.Run, step: Step, parts: Mapping[str, Parts]) -> dict[str, tuple[float, float]]:
    """(ms of one layer's attention, ms of the head), forward and backward, of each variant."""
    shape, num_tokens = step.shape, len(step.x)
    random = torch.Generator(run.device).manual_seed(2)
    q, k, v, dout = (
        torch.randn(num_tokens, n, shape.head_dim, device=run.device, generator=random).to(step.x.dtype)
        for n in (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def attention(chosen: Parts) -> measure.Call:
        return lambda i: torch.autograd.grad(chosen.attend(q, k, v), (q, k, v), dout)

    def head(chosen: Parts) -> measure.Call:
        return lambda i: torch.autograd.grad(chosen.loss(step.x, step.head), (step.x, step.head))

    calls = {f"{name} attention": attention(chosen) for name, chosen in parts.items()}
    calls |= {f"{name} head": head(chosen) for name, chosen in parts.items()}
    times, _ = measure.interleave(calls, 0.0, run.device, min_rounds=run.min_rounds)
    return {
        name: (times[f"{name} attention"].p50, times[f"{name} head"].p50)
        for name in parts
        if f"{name} attention" in times and f"{name} head" in times
    }


def finish_row(step: Step, lengths: list[int], row: dict[str, str], parts: tuple[float, float] | None) -> str:
    """Add the step's own columns to a row; `parts` are its `shares`. Returns them as a line to print."""
    shape, num_layers, num_tokens, ms = step.shape, len(step.layers), sum(lengths), float(row["p50_ms"])
    row["layers"], row["recompute"] = str(num_layers), str(int(step.recompute))
    row["tokens_per_second"] = f"{num_tokens / ms * 1e3:.1f}"
    row["mfu"] = _mfu(float(row["flops"]), ms, step.x.device.type)
    line = f"{row['tokens_per_second']:>10} tokens/s  MFU {row['mfu'] or '-'}"
    if parts is None:
        return line
    attention_ms, head_ms = parts
    model_ms = shape.num_layers * (ms - head_ms) / num_layers + head_ms
    model_flops = step_flops(shape, shape.num_layers, lengths)
    row["attention_percent"] = f"{100 * num_layers * attention_ms / ms:.1f}"
    row["head_percent"] = f"{100 * head_ms / ms:.1f}"
    row["model_tokens_per_second"] = f"{num_tokens / model_ms * 1e3:.1f}"
    row["model_mfu"] = _mfu(model_flops, model_ms, step.x.device.type)
    return (
        f"{line}  attention {row['attention_percent']}%  head {row['head_percent']}%  "
        f"{shape.num_layers} layers: {row['model_tokens_per_second']} tokens/s, MFU {row['model_mfu'] or '-'}"
    )


def _mfu(flops: float, ms: float, device: str) -> str:
    """Share of 989 TFLOP/s, "" where there is no such GPU."""
    return f"{flops / ms / 1e9 / PEAK_TFLOPS:.4f}" if device == "cuda" else ""


def main() -> int:
    """All sizes asked for."""
    parser = suite.parser(__doc__)
    parser.add_argument("--layers", type=int, help="default: 10 with 120 GiB of GPU memory, else 4 (tiny: 2)")
    parser.add_argument("--recompute", action="store_true", help="recompute each layer in the backward")
    options = parser.parse_args()
    run = suite.start("step", options, COLUMNS)
    shape = SHAPES[run.shape]
    dtype = torch.bfloat16 if run.device == "cuda" else torch.float32
    roomy = run.device == "cuda" and torch.cuda.get_device_properties(0).total_memory > ROOMY_BYTES
    num_layers = options.layers or (2 if run.shape == "tiny" else 10 if roomy else 4)
    said: set[str] = set()
    right = errors(run, shape, dtype, said)
    for num_tokens in options.tokens:
        lengths = documents("lognormal", num_tokens)
        docs = Documents(tuple(lengths), run.device)
        step, batch = make_step(shape, num_layers, lengths, dtype, run.device, options.recompute)
        print(f"step of {num_layers} layers and the head, {num_tokens:,} tokens in {len(lengths)} documents")
        makers = {name: partial(parts_of, name, docs, batch) for name in right}
        parts = suite.gather(run, makers, said)
        what = suite.Comparison(
            op="step",
            mode="forward_backward",
            case="lognormal",
            dtype=str(dtype).removeprefix("torch."),
            shape=shape.name,
            tokens=num_tokens,
            flops=step_flops(shape, num_layers, lengths),
            bytes=0.0,
            against=("ours", "sdpa", "torch"),
            errors=right,
        )
        compare(run, what, step, lengths, parts)
    suite.finish(run)
    return 0


def compare(
    run: suite.Run, what: suite.Comparison, step: Step, lengths: list[int], parts: Mapping[str, Parts]
) -> None:
    """Time the variants and their parts, write the rows."""

    def timed(chosen: Parts) -> measure.Call:
        return lambda i: backward(step, chosen)

    rows = suite.compare(run, what, {name: timed(chosen) for name, chosen in parts.items()}, write=False)
    found = shares(run, step, {row["impl"]: parts[row["impl"]] for row in rows})
    for row in rows:
        print(f"  {row['impl']:28} {finish_row(step, lengths, row, found.get(row['impl']))}")
    run.write(rows)


if __name__ == "__main__":
    sys.exit(main())
