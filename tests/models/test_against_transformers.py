"""Our packed model against transformers' Phi3ForCausalLM, one document at a time: losses and every
gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.data.packing import Document, pack
from phi4r.models.names import from_mcore, load_weights, local_weights, random_weights
from phi4r.parallel.layout import init_layout
from phi4r.train.engine import Engine, sft_loss

MODEL = ModelConfig(
    num_layers=2, hidden_size=32, ffn_hidden_size=80, num_attention_heads=4, num_query_groups=2, head_dim=8,
    vocab_size=96, max_position_embeddings=64, rope_theta=250_000.0,
)  # fmt: skip


def transformers_model() -> Phi3ForCausalLM:
    """The same architecture and weights in transformers, in float64."""
    config = Phi3Config(
        vocab_size=MODEL.vocab_size, hidden_size=MODEL.hidden_size, intermediate_size=MODEL.ffn_hidden_size,
        num_hidden_layers=MODEL.num_layers, num_attention_heads=MODEL.num_attention_heads,
        num_key_value_heads=MODEL.num_query_groups, max_position_embeddings=MODEL.max_position_embeddings,
        original_max_position_embeddings=MODEL.max_position_embeddings, rms_norm_eps=MODEL.rms_norm_eps,
        rope_parameters={
            "rope_type": "default", "rope_theta": MODEL.rope_theta, "partial_rotary_factor": 1.0,
        },
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    model = Phi3ForCausalLM(config).double()
    weights = random_weights(MODEL, 3)
    model.load_state_dict({name: weights(name).double() for name in model.state_dict()})
    return model


def documents() -> list[Document]:
    random = np.random.default_rng(0)
    made = []
    for length in (1, 2, 7, 19, 30, 33):
        tokens = random.integers(0, MODEL.vocab_size, length).astype(np.int32)
        made.append(Document(tokens, np.arange(length) >= length // 3))
    return made


def reference_loss(reference: Phi3ForCausalLM) -> torch.Tensor:
    """Mean cross-entropy of all targets, each document run by itself."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for document in documents():
        ids = torch.from_numpy(document.tokens).long()[None]
        logprobs = reference(ids).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[:, 0]
        mask = torch.from_numpy(document.loss_mask[1:])
        total = total - picked[mask].sum()
        count += int(mask.sum())
    return total / count


@pytest.fixture
def engine() -> Engine:
    layout = init_layout(ParallelConfig())
    made = Engine(
        MODEL,
        ParallelConfig(),
        layout,
        TrainConfig(logit_chunk_size=10),
        OptimizerConfig(weight_decay=0.1, clip_grad=0.0),
    )
    load_weights(made.models, MODEL, random_weights(MODEL, 3), 0, 1)
    made.sync_optimizer()
    return made


@pytest.mark.proves(
    "A document never sees another",
    how="loss and every gradient of packed rows against transformers' Phi3, document by document",
)
def test_packed_loss_and_gradients_equal_transformers_per_document(engine: Engine) -> None:
    reference = transformers_model()
    loss = reference_loss(reference)
    loss.backward()

    result = engine.train_step(pack(documents(), 64), sft_loss, lr=0.0)

    assert result.count == sum(document.num_targets for document in documents())
    assert result.loss == pytest.approx(float(loss), rel=1e-6)
    expected = dict(reference.named_parameters())
    checked = 0
    for weight, parameter in local_weights(engine.models, MODEL):
        ours = from_mcore(weight, parameter.main_grad).double()
        theirs = expected[weight.hf].grad
        # fp32 rounding of sums over a few dozen tokens, relative to the largest entry of the gradient
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max(), weight.hf
        checked += 1
    assert checked == len(expected)


@pytest.mark.proves("Optimizer steps are those of AdamW", how="transformers' Phi3 with torch's AdamW")
def test_optimizer_steps_equal_transformers_with_torch_adamw(engine: Engine) -> None:
    reference = transformers_model()
    matrices = [p for p in reference.parameters() if p.dim() == 2]
    norms = [p for p in reference.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.98), eps=1e-8)
    rows = pack(documents(), 64)
    load_weights(engine.models, MODEL, random_weights(MODEL, 3), 0, 1)
    engine.sync_optimizer()
    engine.clip_grad = 0.5
    for _ in range(6):
        result = engine.train_step(rows, sft_loss, lr=3e-3)
        optimizer.zero_grad()
        loss = reference_loss(reference)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        # fp32 against float64, growing over the steps
        assert result.loss == pytest.approx(float(loss), rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
