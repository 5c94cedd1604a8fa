import math

import pytest
import torch

from mochi_core import AsymmDiT, AsymmDiTConfig
from mochi_core.transformer.rope import axis_positions, rotate


def reference_angles(frequencies, num_latents, rows, columns):
    """The formula, token by token, in float64."""
    scale = math.sqrt(192 * 192 / (rows * columns))
    positions = [
        (t, (row + 0.5) * scale - rows * scale / 2, (column + 0.5) * scale - columns * scale / 2)
        for t in range(num_latents)
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.einsum("na,ahf->nhf", torch.tensor(positions, dtype=torch.float64), frequencies.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_angles_are_exact_on_the_real_grid_in_any_module_dtype(dtype):
    dit = AsymmDiT(AsymmDiTConfig(depth=1, hidden_size_x=96, hidden_size_y=96, num_heads=3, text_width=64), dtype=dtype)
    frequencies = torch.randn(dit.pos_frequencies.shape, generator=torch.Generator().manual_seed(0))
    dit.pos_frequencies.data.copy_(frequencies)
    rope = dit.rope((1, 12, 28, 60, 106), torch.device("cpu"))
    angles, seen = reference_angles(frequencies, 28, 30, 53), []
    for tokens, part in rope.chunks(5000):
        freqs = part.table()
        assert freqs.dtype == torch.float32
        assert (freqs[..., 0] - angles[tokens].cos()).abs().max() < 1e-6
        assert (freqs[..., 1] - angles[tokens].sin()).abs().max() < 1e-6
        seen.append((tokens.start, tokens.stop))
    frame = 30 * 53
    assert seen == [(i * frame, min(i + 3, 28) * frame) for i in range(0, 28, 3)]


def test_a_part_of_the_table_is_that_of_its_tokens():
    dit = AsymmDiT(AsymmDiTConfig(depth=1, hidden_size_x=96, hidden_size_y=96, num_heads=3, text_width=64))
    dit.pos_frequencies.data.normal_(generator=torch.Generator().manual_seed(0))
    rope = dit.rope((1, 12, 4, 6, 10), torch.device("cpu"))  # 4 frames of 15 tokens
    whole = rope.table()
    for start, stop in ((0, 60), (0, 15), (7, 12), (14, 46), (15, 30), (59, 60)):
        part = rope.part(slice(start, stop))
        assert torch.equal(part.table(), whole[start:stop])
        inner = slice((stop - start) // 3, stop - start)
        assert torch.equal(part.part(inner).table(), whole[start:stop][inner])
        for chunk in (1, 30, 100):
            seen = [(tokens, table.table()) for tokens, table in part.chunks(chunk)]
            assert torch.equal(torch.cat([table for _, table in seen]), whole[start:stop])
            assert all(torch.equal(table, whole[start:stop][tokens]) for tokens, table in seen)


def test_positions_cover_the_same_area_at_every_size():
    for rows, columns in ((30, 53), (8, 8), (7, 31)):
        _, h, w = axis_positions(1, rows, columns)
        assert h.diff()[0] * rows * w.diff()[0] * columns == pytest.approx(192 * 192)
        assert h.sum() == pytest.approx(0, abs=1e-9)
        assert w.sum() == pytest.approx(0, abs=1e-9)


def test_rotation_turns_neighbouring_pairs():
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    angles = torch.tensor([math.pi / 2, math.pi / 6]).view(1, 1, 2)
    expected = torch.tensor([0.0, 1.0, -0.5, math.sqrt(3) / 2]).view(1, 1, 1, 4)
    torch.testing.assert_close(rotate(x, torch.stack((angles.cos(), angles.sin()), dim=-1)), expected)
