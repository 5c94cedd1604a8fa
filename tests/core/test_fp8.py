"""fp8 products with row-wise scales, against the same numbers multiplied in float32."""

import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from mochi_core import AsymmDiT, AsymmDiTConfig, load_lora
from mochi_core.checkpoints import Checkpoint, from_state_dict, load_into, quantize_block_matrices
from mochi_core.quantization import fp8
from mochi_core.quantization import weights as quantized
from mochi_core.quantization.fp8 import linear_rowwise, multiply_rowwise, quantize_rows
from mochi_core.quantization.weights import QUANTIZERS, QuantizedLinear
from mochi_core.transformer.layers import FeedForward
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.numbers import relative_error
from tests.harness.random_inputs import gaussian, inputs
from tests.harness.tiny_models import random_dit

# The last bit of bfloat16.
ROUNDING = {"rtol": 2**-8, "atol": 1e-5}


def load(dit, dtype=torch.float32):
    """Load the same denoiser, quantised."""
    weights = Checkpoint("random weights", Path(), from_state_dict(dit.state_dict()))
    loaded = AsymmDiT(dit.config, device="meta", dtype=dtype)
    load_into(loaded, quantize_block_matrices(weights, "fp8_rowwise"), "cpu")
    return loaded.eval()


def layer(rows=48, columns=256, bias=True):
    bias = torch.nn.Parameter(gaussian(1, rows, seed=3)[0], requires_grad=False) if bias else None
    return QuantizedLinear(QUANTIZERS["fp8_rowwise"](gaussian(rows, columns)), bias)


def float32_product(x, linear):
    """The product of the quantised operands, in float32."""
    values, scale = quantize_rows(x.flatten(0, -2))
    out = F.linear(values.float() * scale, linear.dequantized(), linear.bias)
    return out.unflatten(0, x.shape[:-1])


def test_every_row_uses_the_whole_range():
    x = gaussian(5000) * torch.logspace(-6, 6, 5000)[:, None]
    x[7] = 0
    values, scale = quantize_rows(x)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (5000, 1))
    largest = values.float().abs().amax(dim=1)
    assert (largest[7], scale[7]) == (0, 1)
    assert (torch.cat((largest[:7], largest[8:])) == 448).all()
    error = (values.float() * scale - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_equals_the_float32_product_of_what_was_quantised(dtype, bias):
    linear, x = layer(bias=bias), gaussian(14, seed=1).unflatten(0, (2, 7)).to(dtype)
    out = linear(x)
    assert out.dtype == dtype
    # A bias is rounded to bfloat16 before it is added.
    torch.testing.assert_close(out.float(), float32_product(x, linear), **{**ROUNDING, "atol": 0.03 if bias else 1e-5})
    exact = F.linear(x.float(), gaussian(), linear.bias)
    assert 0.01 < relative_error(out.float(), exact) < 0.05


def test_both_of_pytorchs_spellings_give_the_same(monkeypatch):
    operands = *quantize_rows(gaussian(7, seed=1)), *quantize_rows(gaussian()), gaussian(1, 48)[0]
    newer = multiply_rowwise(*operands)
    monkeypatch.delattr(F, "scaled_mm")
    assert torch.equal(multiply_rowwise(*operands), newer)


def test_parts_of_a_longer_tensor_and_no_rows_at_all():
    linear, x = layer(), gaussian(60, seed=1).unflatten(0, (2, 30))
    whole = linear(x)
    torch.testing.assert_close(linear(x[:, :11]), whole[:, :11], **ROUNDING)
    assert linear(x[:, :0]).shape == (2, 0, 48)


def test_sizes_that_gpus_cannot_multiply_are_refused():
    for rows, columns in ((24, 32), (32, 24)):
        with pytest.raises(ValueError, match=f"{rows} x {columns} weight cannot be multiplied in fp8.*use fp8 or int8"):
            QUANTIZERS["fp8_rowwise"](gaussian(rows, columns))


def test_a_device_that_cannot_says_so_once_and_others_are_silent():
    fp8._probe.cache_clear()
    with pytest.warns(
        UserWarning, match="mps cannot multiply in fp8 .* weights are dequantised instead: Could not run"
    ):
        assert fp8.unsupported_reason(torch.device("mps")) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fp8.unsupported_reason(torch.device("mps")) is not None
        assert fp8.unsupported_reason(torch.device("cpu")) is None


def test_where_it_cannot_be_had_weights_are_dequantized(monkeypatch):
    linear, x = layer(), gaussian(7, seed=1)
    monkeypatch.setattr(quantized, "unsupported_reason", lambda device: f"{device} is too old")
    assert torch.equal(linear(x), F.linear(x, linear.dequantized(), linear.bias))


def test_feed_forward_in_chunks_equals_one_piece(monkeypatch):
    feed_forward = FeedForward(64, 96, ops=torch.nn)
    for name in ("w1", "w2"):
        weight = gaussian(*getattr(feed_forward, name).weight.shape)
        setattr(feed_forward, name, QuantizedLinear(QUANTIZERS["fp8_rowwise"](weight / 8)))
    x = gaussian(50, 64, seed=1)[None]
    whole = feed_forward(x)
    monkeypatch.setattr("mochi_core.transformer.layers.FEED_FORWARD_TOKEN_CHUNK", 16)
    torch.testing.assert_close(feed_forward(x), whole, **ROUNDING)


@pytest.mark.parametrize("lengths", [(6,), (0,), (16, 5, 0)])
def test_denoiser_stays_near_the_plain_one(lengths):
    dit = random_dit()
    plain = dit(*inputs(lengths))
    for dtype in (torch.float32, torch.bfloat16):
        assert 0.005 < relative_error(load(dit, dtype)(*inputs(lengths)), plain) < 0.08


@pytest.mark.slow
@pytest.mark.usefixtures("float32_products")
def test_full_width_stays_near_bf16():
    dit = random_dit(AsymmDiTConfig(depth=1), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    latents, embeds = torch.randn(1, 12, 1, 16, 16, generator=generator), torch.randn(1, 8, 4096, generator=generator)
    arguments = latents, torch.tensor([0.7]), embeds, torch.ones(1, 8, dtype=torch.bool)
    plain, loaded = dit(*arguments), load(dit, torch.bfloat16)
    assert 0.005 < relative_error(loaded(*arguments), plain) < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
def test_compiled_whole_equals_plain():
    plain, compiled = load(random_dit()), load(random_dit())
    fp8._probe.cache_clear()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    arguments = inputs((16, 5, 0))
    assert relative_error(compiled(*arguments), plain(*arguments)) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("new_compiler")
def test_lengths_of_prompts_do_not_compile_anew():
    graphs, dit = [], load(random_dit())

    def count(graph, _):
        graphs.append(graph)
        return graph

    dit.compile_blocks(backend=count)
    for length in (3, 4, 5):
        dit(*inputs((length,)))
    before = len(graphs)
    for length in (6, 7, 9, 11):
        dit(*inputs((length,)))
    assert len(graphs) == before


def test_lora_changes_it_as_it_changes_the_plain_one(tmp_path):
    dit, arguments = random_dit(), inputs([6])
    adapter = write_adapter(tmp_path / "a.safetensors", random_adapter(dit.state_dict()), "kohya")
    loaded = load(dit)
    before, plain = loaded(*arguments), dit(*arguments)
    lora = load_lora(loaded, adapter)
    changed = loaded(*arguments)
    load_lora(dit, adapter)
    effect = relative_error(dit(*arguments), plain)
    assert relative_error(changed, dit(*arguments)) < 0.08 < effect
    lora.remove()
    assert torch.equal(loaded(*arguments), before)


def test_no_gradient_no_training():
    from mochi_core.train.config import ExactQuantizer

    assert {*QUANTIZERS} - {*get_args(ExactQuantizer)} == {"fp8_rowwise"}
    x = gaussian(7, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="derivative"):
        linear_rowwise(x, *quantize_rows(gaussian())).sum().backward()
