"""The harness computes bf16 products of slow CPUs in float32: the results equal the native products."""

import pytest
import torch
import torch.nn.functional as F

from tests.harness.products import Float32Products


def operands(dtype, *shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


PRODUCTS = {
    "linear": (F.linear, ((3, 70, 96), (64, 96), (64,))),
    "matmul": (lambda a, b: a @ b, ((2, 9, 96), (96, 33))),
    "baddbmm": (torch.baddbmm, ((2, 9, 33), (2, 9, 96), (2, 96, 33))),
    "bmm": (torch.bmm, ((2, 9, 96), (2, 96, 33))),
    "conv3d": (F.conv3d, ((1, 8, 4, 6, 6), (16, 8, 3, 3, 3), (16,))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_equal_the_native_ones_up_to_the_order_of_sums(name, dtype):
    product, shapes = PRODUCTS[name]
    given = operands(dtype, *shapes)
    native, exact = product(*given), product(*(operand.double() for operand in given))
    with Float32Products():
        ours = product(*given)
    assert ours.dtype == dtype
    assert (ours == native).float().mean() > 0.99
    # Rounded once: half a step of the dtype, plus what a float32 sum may lose.
    step = torch.finfo(dtype).eps / 2
    assert ((ours.double() - exact).abs() <= step * exact.abs() + 1e-4).all()


def test_float32_and_integers_are_left_alone():
    a, b = operands(torch.float32, (5, 7), (7, 3))
    whole = torch.arange(12).reshape(3, 4)
    with Float32Products():
        assert torch.equal(a @ b, torch.matmul(a, b))
        assert (whole @ whole.T).dtype == torch.int64
