"""What megatron-core is told of offloading, of Adam's moments in bf16, and of transformer-engine's layers.

None of it runs without a GPU: settings and layer specs are built, and what is missing is said.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from phi4r.cli.main import main
from phi4r.configs.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from phi4r.core import optional
from phi4r.core.errors import UserError
from phi4r.families.registry import get_family
from phi4r.models.attention import CoreAttention
from phi4r.models.gpt import RMSNorm, layer_spec, pipeline_layout, transformer_config
from phi4r.plan.states import rank_states
from phi4r.train.optimizer import megatron_settings, memory_options

MODEL = ModelConfig(dtype="bf16", vocab_size=64)
without_te = pytest.mark.skipif(
    optional.available("transformer_engine"), reason="transformer-engine is installed"
)


def linears(kind: str) -> dict[str, Any]:
    layer = layer_spec(get_family("phi4"), kind).submodules
    attention, mlp = layer.self_attention.submodules, layer.mlp.submodules
    assert layer.input_layernorm is layer.pre_mlp_layernorm is RMSNorm
    assert attention.core_attention is CoreAttention
    names = {"qkv": attention.linear_qkv, "proj": attention.linear_proj}
    return names | {"fc1": mlp.linear_fc1, "fc2": mlp.linear_fc2}


def test_layers_of_transformer_engine_differ_in_their_four_products_only() -> None:
    te = importlib.import_module("megatron.core.extensions.transformer_engine")
    column, row = te.TEColumnParallelLinear, te.TERowParallelLinear
    assert column is not row
    local = {"qkv": ColumnParallelLinear, "proj": RowParallelLinear}
    assert linears("local") == local | {"fc1": ColumnParallelLinear, "fc2": RowParallelLinear}
    assert linears("transformer_engine") == {"qkv": column, "proj": row, "fc1": column, "fc2": row}


@pytest.mark.parametrize(
    ("fp8", "number_format"), [("tensorwise", "hybrid"), ("blockwise", "e4m3"), ("mxfp8", "e4m3")]
)
def test_an_fp8_recipe_reaches_megatrons_config(fp8: Any, number_format: str) -> None:
    found = transformer_config(MODEL, ParallelConfig(), TrainConfig(layers="transformer_engine", fp8=fp8))
    assert (found.fp8, found.fp8_recipe, found.fp8_param) == (number_format, fp8, False)
    assert transformer_config(MODEL, ParallelConfig()).fp8 is None


def test_stages_are_spelt_out_in_the_order_of_the_layers() -> None:
    parallel = ParallelConfig(pp=2, vpp=2, stage_layers="2,1,4,3")
    one = ["decoder"]
    assert pipeline_layout(10, parallel) == [["embedding", *one * 2], one, one * 4, [*one * 3, "loss"]]
    layout = transformer_config(
        ModelConfig(vocab_size=64, num_layers=10), parallel
    ).pipeline_model_parallel_layout
    assert [len(stage) for rank in layout.layout for stage in rank] == [3, 4, 1, 4], "by rank"


def test_offloading_is_megatrons_hybrid_optimizer_with_the_share_asked_for() -> None:
    options = memory_options(OptimizerConfig(offload=0.25))
    assert options["optimizer_cpu_offload"]
    assert options["optimizer_offload_fraction"] == 0.25
    assert options["use_precision_aware_optimizer"], "gradients come as decoupled_grad"


def test_all_options_are_those_of_megatrons_optimizer() -> None:
    known = {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}
    for ours in (OptimizerConfig(offload=0.5), OptimizerConfig(moments="bf16")):
        assert memory_options(ours).keys() <= known


@without_te
def test_megatron_itself_cannot_offload_without_transformer_engine() -> None:
    """Why offloading asks for the package too: megatron-core compares its version unasked."""
    with pytest.raises(TypeError):
        MegatronOptimizerConfig(use_distributed_optimizer=True, **memory_options(OptimizerConfig(offload=1)))


def test_moments_in_bf16_keep_whole_master_weights() -> None:
    options = memory_options(OptimizerConfig(moments="bf16"))
    assert options["exp_avg_dtype"] is options["exp_avg_sq_dtype"] is torch.bfloat16
    assert options["use_precision_aware_optimizer"]
    assert "main_params_dtype" not in options, "megatron-core's default is fp32"
    assert not options["store_param_remainders"], "else a checkpoint would hold halves of weights"
    assert MegatronOptimizerConfig(lr=1e-3).main_params_dtype is torch.float32
    assert memory_options(OptimizerConfig()) == {}


def test_the_plan_knows_what_they_save() -> None:
    def optimizer_bytes(**options: Any) -> int:
        return rank_states(MODEL, ParallelConfig(), optimizer=OptimizerConfig(**options)).optimizer

    weights = MODEL.num_parameters
    assert optimizer_bytes() == 12 * weights  # two moments and the master weight in fp32
    assert optimizer_bytes(moments="bf16") == 8 * weights
    assert optimizer_bytes(offload=0.75) == 3 * weights
    assert optimizer_bytes(offload=1.0) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_offload_from() -> None:
    with pytest.raises(UserError, match="there is no GPU here"):
        megatron_settings(MODEL, ParallelConfig(), OptimizerConfig(offload=0.5))


@without_te
@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer.moments", "bf16"],
        ["--train.layers", "transformer_engine"],
        ["--train.layers", "transformer_engine", "--train.fp8", "tensorwise"],
    ],
    ids=["moments", "layers", "fp8"],
)
def test_without_transformer_engine_the_run_ends_with_how_to_install_it(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--data.num_generated", "8", "--data.heldout", "0", "--model.dtype", "bf16"]
    with pytest.raises(SystemExit) as ended:
        main(["sft", "tiny", "--run-dir", str(tmp_path / "run"), *small, *words])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "needs transformer-engine, which is not installed: make install EXTRAS=te (compiles CUDA" in said
