"""The parts of the benchmarks that are computed, not measured."""

import math
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import parallel, traffic
from benchmarks.dit import forward_flops
from benchmarks.measure import Measurement, Timed, attempt, measure, table
from benchmarks.simulated_gpu import GpuCounter, no_attention, simulated_gpu, text_of_lengths
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
            # On a CPU, the counter only knows the products of this kernel.
            dit.denoise(latents, text, modulation, rope, attend=BACKENDS["math"].run)
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


@pytest.mark.parametrize(("calls", "made"), [(2, ["short", "whole", "whole", "whole"]), (0, ["short", "whole"])])
def test_what_is_built_once_is_built_before_anything_is_timed(calls, made):
    done = []
    timed = Timed(torch.nn.Linear(1, 1), lambda: done.append("whole"), lambda: done.append("short"))
    assert len(measure(lambda _: timed, {}, calls)["seconds"]) == max(calls, 1)
    assert done == made


WAITS = {
    "a number": lambda t: t.gpu.sum().item(),
    "a list": lambda t: t.gpu.tolist(),
    "a decision": lambda t: bool(t.mask.any()),
    "a mask as index": lambda t: t.gpu[t.mask],
    "places": lambda t: t.mask.nonzero(),
    "selected values": lambda t: t.gpu.masked_select(t.mask),
    "to the host": lambda t: t.gpu.cpu(),
    "to the device": lambda t: t.cpu.to(t.gpu.device),
    "into the device": lambda t: t.gpu.copy_(t.cpu),
    "some columns, for which PyTorch makes a copy": lambda t: t.cpu[:, 2:5].copy_(t.gpu[:, 2:5], non_blocking=True),
    "the same to the device": lambda t: t.gpu[:, 2:5].copy_(t.cpu[:, 2:5], non_blocking=True),
    "a list as index": lambda t: t.gpu[[0, 2]],
    "a new tensor": lambda t: t.gpu.new_tensor([1.0, 2.0]),
}
NO_WAITS = {
    "a queued copy": lambda t: t.gpu.copy_(t.cpu, non_blocking=True) + t.cpu.to(t.gpu.device, non_blocking=True),
    "some rows": lambda t: t.cpu[1:3].copy_(t.gpu[1:3], non_blocking=True),
    "rows of a turned matrix": lambda t: t.cpu.t()[:, 1:3].to(t.gpu.device, non_blocking=True),
    "a number for the device": lambda t: t.gpu[0].fill_(1.0) * 2.0,
    "no values": lambda t: t.gpu[:0].cpu(),
    "indices on the device": lambda t: t.gpu[torch.arange(2, device=t.gpu.device)],
    "a mask as operand": lambda t: torch.where(t.mask, t.gpu, 0.0),
    "on the host": lambda t: t.cpu.sum() + t.cpu.clone(),
}


def counted(call):
    """Counts of `call` with tensors and a mask of 4 x 8, up to where it reads values, which fake tensors lack."""
    with simulated_gpu():
        gpu, mask = torch.empty(4, 8, device="cuda"), torch.empty(4, 8, device="cuda", dtype=torch.bool)
        tensors = SimpleNamespace(gpu=gpu, mask=mask, cpu=torch.empty(4, 8))
        with (
            GpuCounter() as counter,
            suppress(DataDependentOutputException, DynamicOutputShapeException, StopIteration),
        ):
            call(tensors)
    return counter


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS)
def test_waiting_for_a_simulated_gpu_is_seen(call):
    assert counted(call).waits


@pytest.mark.parametrize("call", NO_WAITS.values(), ids=NO_WAITS)
def test_what_does_not_wait_for_a_simulated_gpu(call):
    assert not counted(call).waits


def test_tensors_of_two_devices_cannot_be_added():
    with pytest.raises(RuntimeError, match="same device"):
        counted(lambda t: t.gpu + t.cpu)


def test_what_is_counted_on_a_simulated_gpu():
    def call(t):
        x = t.gpu * 2  # 2 x 128 bytes
        x.add_(t.gpu[:1])  # 2 x 128 and 32
        x[0] = t.gpu[1]  # 2 x 32
        x.t()
        del x
        return (t.gpu @ torch.empty(8, 2, device="cuda")).sum()  # 128 + 64 + 32, and 32 + 4

    counter = counted(call)
    assert counter.moved == {
        "aten.mul.Tensor": 256,
        "aten.add_.Tensor": 288,
        "aten.copy_.default": 64,
        "aten.sum.default": 36,
    }
    assert counter.products == [(2 * 4 * 8 * 2, 224)]
    assert counter.starts == 5
    assert counter.peak == 128  # x, the rest is smaller


def test_products_on_a_simulated_gpu_are_those_that_torch_counts():
    config = AsymmDiTConfig(depth=2, **TINY, **MLP)
    with simulated_gpu():
        dit, latents = AsymmDiT(config, device="cuda"), torch.empty(1, 12, 3, 8, 10, device="cuda")
        text = text_of_lengths(dit, 7)
        modulation, rope = (
            dit.modulation(torch.ones(1, device="cuda"), text.pooled),
            dit.rope(latents.shape, latents.device),
        )
        with GpuCounter() as counter:
            dit.denoise(latents, text, modulation, rope, attend=no_attention)
    attention = 2 * 2 * 2 * (60 + 7) ** 2 * TINY["hidden_size_x"]
    assert sum(flops for flops, _ in counter.products) + attention == forward_flops(config, 60, 7)


def test_a_members_share_sends_what_the_formula_says(monkeypatch):
    monkeypatch.setattr(parallel, "CONFIG", AsymmDiTConfig(depth=1))
    _, sent, _ = parallel.counts(frames=25, members=4)
    tokens, text, values = 5 * 1590, 256, 48 * 3 * -(-5 * 1590 // 4)  # the last layer's output goes to three
    expected = 2 * (3072 * 3 * (4 * tokens / 4 + text) / 4 + values)
    assert float(sent) == pytest.approx(expected / 1e9, abs=0.01)


def test_a_decode_is_counted_with_the_look_at_its_numbers():
    counter = traffic.count(traffic.DECODES["ours, plain, 5 GiB"], 1)
    assert counter.starts > 300
    assert len(counter.waits) == 1
    assert "autoencoder/latents.py" in counter.waits[0]
