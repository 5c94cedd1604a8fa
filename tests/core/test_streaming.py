"""Streaming in time and strips of rows: every plan equals the plain forward."""

import subprocess
import sys
from itertools import count, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import Conv3d, GroupNorm
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.random_weights import randomize
from mochi_core import AsymmVAE, AsymmVAEConfig
from mochi_core.autoencoder import steps
from mochi_core.autoencoder.decoder import Decoder
from mochi_core.autoencoder.layers import frame_norm
from mochi_core.autoencoder.memory import decoder_memory_estimate
from mochi_core.autoencoder.plan import CPU, MIB, Plan
from mochi_core.autoencoder.steps import decoder_steps, encoder_steps, frame_statistics, pad_causal, strip_norm
from mochi_core.autoencoder.streaming import (
    ClipStep,
    OomRetry,
    OutOfMemory,
    StreamStep,
    empty_cache,
    is_out_of_memory,
    store,
    stream,
)
from tests.harness.tiny_models import VAE, random_vae

EVERYTHING = Plan(CPU, CPU, 2**60)
REAL_WIDTHS = AsymmVAEConfig(decoder_blocks=(1, 1, 1, 1, 1), encoder_blocks=(1, 1, 1, 1, 1))
# No size is a multiple of another or of a strip's height.
LATENT = (3, 3, 5)
PIXELS = (13, 24, 40)


@pytest.fixture(scope="module")
def vae():
    return random_vae(dtype=torch.float64)


def latents(num_latents, height, width):
    generator = torch.Generator().manual_seed(num_latents)
    return torch.randn(1, 12, num_latents, height, width, generator=generator, dtype=torch.float64)


def pixels(frames, height, width):
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(1, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def steps_of(half):
    if isinstance(half, Decoder):
        return decoder_steps(half)
    return encoder_steps(half, half.output_proj.weight.dtype)


def run(half, x, plan):
    """The result of `half` of an autoencoder for x, and the heights and frame counts of its convolutions' inputs."""
    seen = set()
    hooks = [
        layer.register_forward_hook(lambda _, args, __: seen.add((args[0].shape[2], args[0].shape[3])))
        for layer in half.modules()
        if isinstance(layer, nn.Conv3d) and layer.kernel_size == (3, 3, 3)
    ]
    result = torch.cat(list(stream(steps_of(half), [x], OomRetry(plan))), dim=2)
    for hook in hooks:
        hook.remove()
    return result, seen


def relative(result, expected):
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_caches_as_they_wait_in_main_memory_beside_a_gpu(vae, half, monkeypatch):
    """Cache rows are stored one after another, as a separate copy."""
    made = []

    def outermost(x, frames, device):
        cache = empty_cache(x.to("meta"), frames, device)
        made.append(cache)
        assert all(cache[..., top : top + 2, :].permute(3, 0, 1, 2, 4).is_contiguous() for top in range(x.shape[3] - 1))
        return cache

    x = latents(2, 3, 5) if half == "decoder" else pixels(7, 24, 24)
    expected = getattr(vae, half)(x)
    monkeypatch.setattr(steps, "empty_cache", outermost)
    result, _ = run(getattr(vae, half), x, Plan(CPU, CPU, 80_000))
    assert made
    assert relative(result, expected) <= 1e-12


# Bytes: from some rows of a single frame to the whole clip at once.
WORKING_SETS = [30_000, 80_000, 300_000, 2_000_000]


@pytest.mark.parametrize("working_set", [*WORKING_SETS, EVERYTHING.working_set])
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_every_plan_equals_the_plain_forward(vae, half, working_set):
    x = latents(*LATENT) if half == "decoder" else pixels(*PIXELS)
    expected = getattr(vae, half)(x)
    result, _ = run(getattr(vae, half), x, Plan(CPU, CPU, working_set))
    assert result.shape == expected.shape
    assert relative(result, expected) <= 1e-12


@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_single_rows_equal_the_plain_forward(vae, half):
    x = latents(2, 2, 3) if half == "decoder" else pixels(7, 16, 8)
    expected = getattr(vae, half)(x)
    result, seen = run(getattr(vae, half), x, Plan(CPU, CPU, 1))
    assert relative(result, expected) <= 1e-12
    assert seen == {(1 + 2, 1 + 2)}  # frames and rows, with the two previous frames and the surrounding rows


def test_plans_really_differ(vae):
    """The test above would prove nothing if the plans led to the same strips."""
    ways = [run(vae.decoder, latents(*LATENT), Plan(CPU, CPU, size))[1] for size in WORKING_SETS]
    assert all(a != b for a, b in pairwise(ways))
    assert run(vae.decoder, latents(*LATENT), EVERYTHING)[1] == {
        (3 + 2, 3 + 2),
        (7 + 2, 6 + 2),
        (13 + 2, 12 + 2),
        (13 + 2, 24 + 2),
    }


@pytest.mark.slow
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_real_channel_counts(half):
    vae = random_vae(REAL_WIDTHS, dtype=torch.float64)
    x = latents(2, 3, 2) if half == "decoder" else pixels(7, 24, 16)
    expected = getattr(vae, half)(x)
    for working_set in (150_000, 600_000, EVERYTHING.working_set):
        assert relative(run(getattr(vae, half), x, Plan(CPU, CPU, working_set))[0], expected) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_float32_and_bfloat16(half):
    x = (latents(*LATENT) if half == "decoder" else pixels(*PIXELS)).float()
    exact, single, small = (random_vae(dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    expected, _ = run(getattr(exact, half), x.double(), EVERYTHING)
    whole = [
        run(getattr(vae, half), x.to(vae.dtype) if half == "decoder" else x, EVERYTHING)[0] for vae in (single, small)
    ]
    for working_set in (20_000, 200_000):
        plan = Plan(CPU, CPU, working_set)
        parts = [
            run(getattr(vae, half), x.to(vae.dtype) if half == "decoder" else x, plan)[0] for vae in (single, small)
        ]
        assert relative(parts[0], whole[0]) <= 1e-5
        # Strips take their statistics in float32, so bf16 may only come closer to the exact result.
        errors = [(result.double() - expected).norm() / expected.norm() for result in (parts[1], whole[1])]
        assert errors[0] <= 1.02 * errors[1]


@pytest.mark.parametrize("frames", [(1, 2), (2, 1), (1, 1, 1)])
def test_a_clip_may_arrive_in_pieces(vae, frames):
    z = latents(*LATENT)
    expected = vae.decoder(z)
    result = torch.cat(list(stream(decoder_steps(vae.decoder), z.split(frames, dim=2), OomRetry(EVERYTHING))), dim=2)
    assert relative(result, expected) <= 1e-12


def test_latent_does_not_change_when_later_frames_do(vae):
    video = pixels(13, 16, 16)
    changed = video.clone()
    changed[:, :, 7:] = -changed[:, :, 7:]
    for working_set in (20_000, 2**40):
        a, b = (run(vae.encoder, x, Plan(CPU, CPU, working_set))[0] for x in (video, changed))
        assert torch.equal(a[:, :, :2], b[:, :, :2])
        assert not torch.equal(a[:, :, 2:], b[:, :, 2:])


def test_statistics_of_strips_are_those_of_the_frame():
    """Brightness rises from strip to strip: averaging the strips' variances would miss most of it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 3, 9, 5, generator=generator, dtype=torch.float64)
    x = x + torch.linspace(-20, 20, 9, dtype=torch.float64)[:, None]
    norm = GroupNorm(32, 64, dtype=torch.float64)
    randomize(norm, seed=1)
    strips = [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 9)]
    parts = strip_norm(norm, x, strips)
    expected = frame_norm(norm, x)
    torch.testing.assert_close(torch.cat([parts(rows) for rows in strips], dim=3), expected, rtol=1e-12, atol=1e-12)
    _, variance = frame_statistics(x, 32, strips)
    averaged = torch.stack([frame_statistics(x[..., rows, :], 32, [slice(None)])[1] for rows in strips]).mean(0)
    assert (averaged < 0.2 * variance).all()


@pytest.mark.parametrize(("above", "below"), [(True, True), (True, False), (False, False)])
def test_padding_repeats_the_border(above, below):
    generator = torch.Generator().manual_seed(0)
    frames, before = (torch.randn(2, 3, n, 4, 5, generator=generator) for n in (3, 2))
    padded = pad_causal(before, frames, above=above, below=below)
    joined = torch.cat((before, frames), dim=2)
    assert torch.equal(padded, nn.functional.pad(joined, (1, 1, above, below, 0, 0), mode="replicate"))


class Failing:
    """Layers that run out of memory in the given calls of their convolutions."""

    def __init__(self, *failing, error=torch.OutOfMemoryError):
        calls = self.calls = count()

        class Conv3d(nn.Conv3d):
            def forward(self, x):
                if next(calls) in failing:
                    raise error("CUDA out of memory. Tried to allocate everything.")
                return super().forward(x)

        self.ops = SimpleNamespace(Conv3d=Conv3d, Linear=nn.Linear, GroupNorm=nn.GroupNorm)


@pytest.mark.parametrize("failing", [(0,), (5,), (3, 4, 5), (2, 8, 13)])
@pytest.mark.parametrize("half", ["decoder", "encoder"])
def test_goes_on_with_a_smaller_plan_when_memory_runs_out(vae, half, failing):
    x = latents(2, 3, 2) if half == "decoder" else pixels(7, 24, 16)
    expected, _ = run(getattr(vae, half), x, EVERYTHING)
    scarce = AsymmVAE(VAE, ops=Failing(*failing).ops, dtype=torch.float64)
    scarce.load_state_dict(vae.state_dict())
    retry = OomRetry(Plan(CPU, CPU, MIB))
    result = torch.cat(list(stream(steps_of(getattr(scarce, half)), [x], retry)), dim=2)
    assert relative(result, expected) <= 1e-12
    assert retry.plan.working_set == MIB // 2 ** len(failing)


def test_attention_goes_on_where_memory_ran_out(vae):
    x = pixels(*PIXELS)
    expected, _ = run(vae.encoder, x, EVERYTHING)
    attention, calls = next(m for m in vae.encoder.modules() if type(m).__name__ == "TemporalAttention"), count()

    def fail(*_):
        if next(calls) in (2, 5, 6):
            raise MemoryError

    hook = attention.register_forward_pre_hook(fail)
    result, _ = run(vae.encoder, x, Plan(CPU, CPU, 100_000))
    hook.remove()
    assert next(calls) > 7
    assert relative(result, expected) <= 1e-12


def test_smallest_plan_that_fails_says_how_much_is_missing(vae):
    hopeless = AsymmVAE(VAE, ops=Failing(*range(1000)).ops, dtype=torch.float64)
    hopeless.load_state_dict(vae.state_dict())
    with pytest.raises(OutOfMemory, match=r"frames of 3 x 5 latents need .* even one row at a time; make the video"):
        hopeless.decode(latents(*LATENT))
    with pytest.raises(OutOfMemory, match=r"need 0.00 GiB besides .* one row at a time, 0.00 GiB more than is free"):
        hopeless.decode(latents(*LATENT), memory_limit=1)
    with pytest.raises(OutOfMemory, match=r"frames of 24 x 40 pixels need"):
        hopeless.encode(pixels(*PIXELS))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
    shapes = Failing(0, error=lambda _: RuntimeError("shapes do not match")).ops
    wrong = AsymmVAE(VAE, ops=shapes, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        wrong.decode(latents(*LATENT))


REAL_SHORTAGE = """
import resource, sys, torch
from mochi_core import AsymmVAE
from tests.harness.tiny_models import random_vae
vae = random_vae()
z = torch.randn(1, 12, 2, 30, 53, generator=torch.Generator().manual_seed(0))
out = torch.empty(vae.decoded_shape(z.shape))
vae.decode(z[..., :4, :4])  # libraries take what they want once
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20, most))
vae.decode(z, memory_limit=2**34, out=out)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
expected = vae.decode(z)
assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_real_lack_of_memory():
    """A plan for 16 GiB succeeds with 400 MiB, and ends in one sentence with 2."""
    enough, too_little = (
        subprocess.run([sys.executable, "-c", REAL_SHORTAGE, mib], capture_output=True, text=True, check=False)
        for mib in ("400", "2")
    )
    assert enough.returncode == 0, enough.stderr
    assert "OutOfMemory: Out of memory: frames of 30 x 53 latents need" in too_little.stderr


def test_plan_follows_the_memory_there_is():
    gpu = torch.device("cuda")
    estimate = decoder_memory_estimate(AsymmVAEConfig(), 60, 106, 2)
    plenty, some, little = (estimate.choose_plan(int(gib * 2**30), gpu) for gib in (80, 4, 2))
    assert plenty.working_set == 256 * MIB
    assert (plenty.cache_device, some.cache_device, little.cache_device) == (gpu, gpu, CPU)
    assert some.working_set < plenty.working_set
    for limit, plan in ((80, plenty), (4, some), (2, little)):
        assert estimate.peak_bytes(plan) <= limit * 2**30
    assert estimate.choose_plan(1, gpu) == Plan(gpu, CPU, MIB)
    assert estimate.choose_plan(1, CPU) == Plan(CPU, CPU, MIB)


def test_smaller_plans_end_at_one_row_with_caches_in_main_memory():
    plan, seen = Plan(torch.device("cuda"), torch.device("cuda"), 128 * MIB), []
    while plan is not None:
        seen.append(plan)
        plan = plan.smaller()
    assert seen[-1] == Plan(torch.device("cuda"), CPU, 1)
    assert [p.cache_device.type for p in seen].index("cpu") == 5
    assert seen[5].working_set == 8 * MIB


def test_progress_rises_to_the_whole_and_its_error_ends_the_work(vae):
    reports, z = [], latents(3, 8, 8)
    vae.decode(torch.cat([z] * 2), memory_limit=1, on_progress=lambda *report: reports.append(report))
    done = [done for done, _ in reports]
    assert {total for _, total in reports} == {2 * 13}
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == 26
    assert len(set(done)) > 10
    reports.clear()
    vae.encode(pixels(*PIXELS), on_progress=lambda *report: reports.append(report))
    assert reports[-1][0] == reports[-1][1]
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)

    def cancel(done, _):
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vae.decode(z, memory_limit=1, on_progress=cancel)


def test_frames_leave_one_by_one_into_the_given_tensor(vae):
    z = latents(3, 8, 8)
    out = torch.zeros(1, 3, 13, 64, 64, dtype=torch.float64)
    assert vae.decode(z, memory_limit=1, out=out) is out
    torch.testing.assert_close(out, vae.decode(z), rtol=1e-12, atol=1e-12)
    pieces = list(vae.decode_stream(z, memory_limit=1))
    assert [piece.shape[2] for piece in pieces] == [1] * 13


def test_a_gathered_clip_leaves_the_device_when_memory_runs_out():
    class Piece:
        def to(self, device):
            moved.append(device)
            return self

    def fail(_):
        raise torch.OutOfMemoryError

    moved, gpu = [], torch.device("cuda")
    retry = OomRetry(Plan(gpu, gpu, 8 * MIB))
    retry.clips.append([Piece(), Piece()])
    assert retry.run(fail) is None
    assert retry.plan == Plan(gpu, CPU, 8 * MIB)
    assert moved == [CPU, CPU]


def test_clip_steps_get_the_whole_clip():
    got = []
    steps = [
        StreamStep(lambda x, cache, plan: (x + 1, cache)),  # noqa: ARG005
        ClipStep(lambda pieces, _: got.extend(piece.clone() for piece in pieces)),
        StreamStep(lambda x, cache, plan: (2 * x, cache)),  # noqa: ARG005
    ]
    x = torch.arange(6.0).view(1, 1, 6, 1, 1)
    result = torch.cat(list(stream(steps, [x], OomRetry(Plan(CPU, CPU, 8)))), dim=2)
    assert [piece.shape[2] for piece in got] == [2, 2, 2]
    assert torch.equal(torch.cat(got, dim=2), x + 1)
    assert torch.equal(result, 2 * (x + 1))


class Copies(TorchDispatchMode):
    """Records for each copy between devices whether the host may continue before it completes; nothing leaves meta."""

    def __init__(self):
        super().__init__()
        self.early = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            self.early.append(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return args[0]
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            self.early.append(kwargs.get("non_blocking", False))
        return function(*args, **kwargs)


def test_caches_are_complete_before_the_host_goes_on_where_no_memory_is_pinned():
    device = torch.device("meta")
    conv, blocks = Conv3d(4, 4, 3, device=device), Conv3d(4, 4, (3, 2, 2), stride=(3, 2, 2), device=device)
    x, past, plan = torch.empty(1, 4, 4, 8, 8, device=device), torch.empty(1, 4, 2, 8, 8), Plan(device, CPU, 2**60)
    with Copies() as copies:
        steps.norm_silu_conv(GroupNorm(2, 4, device=device), conv, x, past, plan)
        steps.downsample(blocks, x, (past,), plan)
        store(x, empty_cache(x, 4, CPU))
    assert len(copies.early) >= 5
    assert not any(copies.early)
