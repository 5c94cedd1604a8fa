"""What the benchmarks compute rather than measure."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.dit import forward_flops
from benchmarks.measure import Measurement, attempt, table
from mochi_core import AsymmDiT, AsymmDiTConfig
from mochi_core.transformer.attention import BACKENDS

TINY = {"hidden_size_x": 96, "hidden_size_y": 48, "num_heads": 4, "text_width": 64, "pool_heads": 4}
MLP = {"mlp_size_x": 160, "mlp_size_y": 112}


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("text_tokens", [0, 7])
def test_the_work_of_a_step_is_what_torch_counts(depth, text_tokens):
    dit = AsymmDiT(AsymmDiTConfig(depth=depth, **TINY, **MLP)).eval()
    latents = torch.randn(1, 12, 3, 8, 10)
    with torch.no_grad():
        mask = (torch.arange(16) < text_tokens)[None]
        text = dit.prepare_text(torch.randn(1, 16, TINY["text_width"]), mask)
        modulation, rope = dit.modulation(torch.tensor([0.5]), text.pooled), dit.rope(latents.shape, latents.device)
        with FlopCounterMode(display=False) as counter:
            # Only this kernel is made of products that the counter knows on a CPU.
            dit.denoise(latents, text, modulation, rope, attention=BACKENDS["math"].run)
    assert forward_flops(dit.config, 3 * 4 * 5, text_tokens) == counter.get_total_flops()


def test_a_contender_that_fails_is_a_row_that_says_so():
    def refused(_):
        raise ValueError("it takes | nothing here")

    column = ("s", lambda _case, m, _ours: f"{m.median:.1f}")
    failed = Measurement([attempt(refused, {}, calls=1)])
    worked = Measurement([attempt(lambda _: lambda: None, {}, calls=1)])
    assert failed.median == failed.largest("peak_mib") == math.inf
    lines = table(lambda case: case["name"], [{"name": "x"}], [{"ours": worked, "peer": failed}], [column, column])
    assert lines[2:] == ["| x | ours | 0.0 | 0.0 |", "| x | peer | ValueError: it takes / nothing here |  |"]
