"""Quantised weights: block formats against the `gguf` package, our quantisers, and the layer."""

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from mochi_core.quantization import blocks, ggml
from mochi_core.quantization.weights import QUANTIZERS, QuantizedLinear, QuantizedWeight, quantize_fp8, quantize_int8
from tests.harness.quantized_files import random_blocks
from tests.harness.random_inputs import gaussian

# Half a step of each format, relative to the largest weight of a row.
LARGEST_ERROR = {"fp8": 1 / 28, "fp8_rowwise": 1 / 28, "int8": 1 / 254, "q4_0": 1 / 7}


@pytest.mark.parametrize("name", ggml.BLOCK_TYPES)
def test_blocks_equal_the_gguf_package_bit_for_bit(name):
    rows = random_blocks(name, rows=64, columns=1280)
    expected = dequantize(rows, GGMLQuantizationType[name])
    ours = blocks.dequantize(torch.from_numpy(rows), name)
    assert ours.dtype == torch.float32
    assert numpy.array_equal(ours.numpy().view(numpy.uint32), expected.view(numpy.uint32))


def test_our_q4_0_equals_the_gguf_packages():
    weight = gaussian()
    weight[3] = 0
    assert numpy.array_equal(ggml.quantize_q4_0(weight).numpy(), quantize(weight.numpy(), GGMLQuantizationType.Q4_0))


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_quantisers_stay_within_their_step(kind):
    weight = gaussian()
    weight[3] = 0
    packed = QUANTIZERS[kind](weight)
    assert packed.shape == weight.shape
    error = (packed.dequantized() - weight).abs() / weight.abs().amax()
    assert 0 < error.max() <= LARGEST_ERROR[kind]
    assert not packed.dequantized()[3].any()


def test_fp8_uses_its_whole_range_and_int8_has_a_scale_per_row():
    weight = gaussian()
    values, scale = quantize_fp8(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, ())
    assert values.float().abs().max() == 448
    values, scale = quantize_int8(weight)
    assert (values.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (48, 1))
    assert (values.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("kind", ["fp8", "int8", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_equals_a_linear_layer_of_the_dequantized_weight(kind, dtype):
    packed, bias = QUANTIZERS[kind](gaussian()), gaussian(1, 48)[0]
    layer = QuantizedLinear(packed, torch.nn.Parameter(bias, requires_grad=False))
    x = gaussian(7, 256, seed=1).to(dtype)
    expected = torch.nn.functional.linear(x, packed.dequantized().to(dtype), bias.to(dtype))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.dequantized(), packed.dequantized())
    assert (layer.in_features, layer.out_features) == (256, 48)
    bytes_held = sum(t.numel() * t.itemsize for t in layer.buffers())
    assert bytes_held < gaussian().numel() * 1.1


def test_rows_that_are_no_whole_number_of_blocks_are_refused():
    with pytest.raises(ValueError, match="not a whole number of Q4_0 blocks"):
        _ = QuantizedWeight(torch.zeros(2, 19, dtype=torch.uint8), block_type="Q4_0").shape
    with pytest.raises(ValueError, match="not a whole number of Q4_0 blocks of 32; use fp8 or int8"):
        QUANTIZERS["q4_0"](gaussian(2, 33))
