"""Opening a model for training or inference: tokenizer, architecture, weights.

SFT, GRPO, scoring, generation and evaluation all come through here, so that a checkpoint means the same to
each of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from phi4r.configs.sections import InitConfig, ModelConfig, ParallelConfig, TokenizerConfig, TrainConfig
from phi4r.configs.stages import check_layout
from phi4r.core.console import say
from phi4r.core.errors import ConfigError, UserError
from phi4r.data.tokenizer import Tokenizer
from phi4r.families.model import SHAPE_FIELDS
from phi4r.models.names import load_weights, random_weights
from phi4r.parallel.layout import Layout, init_layout
from phi4r.train.checkpoint import load_model
from phi4r.train.engine import Engine
from phi4r.train.folders import read_model_config, tokenizer_folder

VOCAB_MULTIPLE = 64


def open_tokenizer(config: TokenizerConfig, checkpoint: str = "") -> Tokenizer:
    """The tokenizer of `config.path`, else that of the checkpoint the run starts from, else the built-in
    one."""
    if config.path or not checkpoint:
        return _noted(Tokenizer.load(config.path, config.think_tokens))
    folder = tokenizer_folder(checkpoint)
    if folder is None:
        raise UserError(f"{checkpoint}: holds no tokenizer; set tokenizer.path")
    return _noted(Tokenizer.load(folder))


def _noted(tokenizer: Tokenizer) -> Tokenizer:
    if tokenizer.note:
        say(tokenizer.note)
    return tokenizer


def resolve_model(model: ModelConfig, tokenizer: Tokenizer, checkpoint: str = "") -> ModelConfig:
    """`model` with its vocabulary size known and checked against the tokenizer and the checkpoint it starts
    from."""
    if checkpoint:
        found = read_model_config(checkpoint)
        for name in SHAPE_FIELDS:
            ours, theirs = getattr(model, name), getattr(found, name)
            if ours != theirs:
                raise ConfigError(
                    f"model.{name}", f"is {ours}, but init.checkpoint {checkpoint} has {theirs}"
                )
        if model.vocab_size not in (0, found.vocab_size):
            raise ConfigError(
                "model.vocab_size",
                f"is {model.vocab_size}, but init.checkpoint {checkpoint} has {found.vocab_size}",
            )
        model = dataclasses.replace(model, vocab_size=found.vocab_size)
    elif model.vocab_size == 0:
        rounded = -(-tokenizer.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        model = dataclasses.replace(model, vocab_size=rounded)
    if tokenizer.chat != model.description.chat:
        say(
            f"note: {tokenizer.source} has the special tokens of another chat format than model.family ="
            f" {model.family}: turns are written as {tokenizer.chat.header!r} ... {tokenizer.chat.end!r}"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ConfigError(
            "model.vocab_size", f"is {model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens"
        )
    return model


def fill_weights(engine: Engine, checkpoint: str, seed: int) -> None:
    """Fill an engine's parameters from a checkpoint or Hugging Face folder, or at random where `checkpoint`
    is ""."""
    if checkpoint:
        load_model(checkpoint, engine.chunks)
    else:
        model, layout = engine.model_config, engine.layout
        load_weights(engine.models, model, random_weights(model, seed), layout.tp_rank, layout.tp)
    engine.sync_optimizer()


@dataclass
class Inference:
    """A model opened for sampling or scoring, without an optimizer."""

    engine: Engine
    layout: Layout
    checkpoint: str
    tokenizer_config: TokenizerConfig

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Opened when first needed: scoring token ids works without one."""
        return open_tokenizer(self.tokenizer_config, self.checkpoint)


def open_inference(
    checkpoint: str, parallel: ParallelConfig, tokenizer: TokenizerConfig | None = None
) -> Inference:
    """Open a phi4r checkpoint, a run folder or a Hugging Face folder under any layout, for inference."""
    layout = init_layout(parallel)
    model = read_model_config(checkpoint)
    check_layout(model, parallel)
    engine = Engine(model, parallel, layout, TrainConfig())
    fill_weights(engine, checkpoint, seed=0)
    return Inference(engine, layout, checkpoint, tokenizer or TokenizerConfig())


def open_frozen(engine: Engine, parallel: ParallelConfig, init: InitConfig, seed: int) -> Engine:
    """A second, frozen copy of the model with the weights that a run started from: the KL reference."""
    frozen = Engine(engine.model_config, parallel, engine.layout, engine.train)
    fill_weights(frozen, init.checkpoint, seed)
    return frozen
