"""A denoiser whose blocks visit the device one after the other computes the same, and is left as it was."""

import pytest
import torch
from safetensors.torch import save_file

from mochi_core import load_transformer, sample
from mochi_core.offload import streamed
from tests.core.test_convert import in_a_process, needs_proc
from tests.core.test_sample import NOISE, SIGMAS, prompt
from tests.harness.lora_files import random_adapter, write_adapter
from tests.harness.tiny_models import random_dit

CONDITIONS = prompt(6), prompt(2, seed=1)


@pytest.fixture
def dit():
    return random_dit()


def addresses(dit):
    tensors = [*dit.named_parameters(), *dit.named_buffers()]
    return {name: tensor.data_ptr() for name, tensor in tensors}


def hooks(dit):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in dit.modules())


@pytest.mark.parametrize("quantize", [None, "fp8", "fp8_rowwise", "int8", "q4_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_result_with_loras_and_quantised_weights(dit, tmp_path, dtype, quantize):
    save_file(dit.state_dict(), tmp_path / "dit.safetensors")
    dit = load_transformer(tmp_path / "dit.safetensors", dtype, quantize=quantize)
    for i, dora in enumerate((False, True)):
        adapter = random_adapter(random_dit().state_dict(), seed=i, dora=dora)
        dit.load_lora(write_adapter(tmp_path / f"{i}.safetensors", adapter, "comfyui"), 0.5)
    before, hooked = addresses(dit), hooks(dit)
    expected = sample(dit, NOISE, SIGMAS, *CONDITIONS)
    with streamed(dit, "cpu"):
        assert torch.equal(sample(dit, NOISE, SIGMAS, *CONDITIONS), expected)
    assert addresses(dit) == before
    assert hooks(dit) == hooked
    assert torch.equal(sample(dit, NOISE, SIGMAS, *CONDITIONS), expected)


def test_only_the_block_at_work_is_away_from_home(dit):
    home, seen = addresses(dit), []

    def away(block, *_):
        names = {name for name, address in addresses(dit).items() if address != home[name]}
        seen.append((block, {".".join(name.split(".")[:3]) for name in names if name.startswith("blocks.")}))
        assert {name for name in home if not name.startswith("blocks.")} < names

    watched = [dit.blocks[i].attn.qkv_x.register_forward_hook(away) for i in range(3)]
    with streamed(dit, "cpu"):
        sample(dit, NOISE, SIGMAS, *CONDITIONS)
    parts = [{f"blocks.{i}.{part}" for part in ("attn", "mlp_x", "mlp_y")} for i in range(3)]
    parts[2].remove("blocks.2.mlp_y")
    assert [names for _, names in seen] == [parts[i] for i in (0, 0, 1, 1, 2, 2)] * 5
    for hook in watched:
        hook.remove()


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("place", ["blocks.1.attn", "blocks.0.mod_x", "blocks.2.mlp_x.w1", "final_layer"])
def test_a_failure_leaves_the_denoiser_as_it_was(dit, place, step):
    home, expected, calls = addresses(dit), sample(dit, NOISE, SIGMAS, *CONDITIONS), []

    def fail(*_):
        calls.append(place)
        if len(calls) > step or place.endswith("mod_x"):
            raise KeyboardInterrupt

    hook = dit.get_submodule(place).register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), streamed(dit, "cpu"):
        sample(dit, NOISE, SIGMAS, *CONDITIONS)
    hook.remove()
    assert addresses(dit) == home
    assert hooks(dit) == 0
    assert torch.equal(sample(dit, NOISE, SIGMAS, *CONDITIONS), expected)


def test_cancelling_leaves_the_denoiser_as_it_was(dit):
    home, stop = addresses(dit), lambda step, _: step == 1
    expected = sample(dit, NOISE, SIGMAS, *CONDITIONS, on_step=stop)
    with streamed(dit, "cpu"):
        assert torch.equal(sample(dit, NOISE, SIGMAS, *CONDITIONS, on_step=stop), expected)
    assert addresses(dit) == home


def test_blocks_may_be_called_in_any_order(dit):
    latents, sigma = NOISE, torch.tensor([0.4])
    text = dit.prepare_text(*CONDITIONS[0])
    modulation, rope = dit.modulation(sigma, text.pooled), dit.rope(latents.shape, latents.device)

    def reversed_blocks(_, index, x, y, __, context):
        block, (mod_x, mod_y) = dit.blocks[1 - index if index < 2 else 2], modulation.blocks[index]
        return block(x, y, (mod_x, mod_y), context)

    expected = dit.denoise(latents, text, modulation, rope, run_block=reversed_blocks)
    assert not torch.equal(expected, dit.denoise(latents, text, modulation, rope))
    with streamed(dit, "cpu"):
        assert torch.equal(dit.denoise(latents, text, modulation, rope, run_block=reversed_blocks), expected)


@needs_proc
def test_two_blocks_take_memory_and_no_more():
    code = """
import torch
from mochi_core import AsymmDiT, AsymmDiTConfig, linear_quadratic_schedule, sample
from mochi_core.offload import streamed
config = AsymmDiTConfig(
    depth=6, hidden_size_x=768, hidden_size_y=384, num_heads=6, text_width=64, mlp_size_x=4096, mlp_size_y=1024)
dit = AsymmDiT(config).requires_grad_(False)
dit.pos_frequencies.zero_()
condition = torch.zeros(1, 4, 64), torch.ones(1, 4, dtype=torch.bool)
def run():
    sample(dit, torch.zeros(1, 12, 1, 4, 4), linear_quadratic_schedule(3), condition, condition)
def run_streamed():
    with streamed(dit, "cpu"):
        run()
run()
_, plain, _ = peak_of(run)
_, peak, _ = peak_of(run_streamed)
block = sum(p.nbytes for n, p in dit.blocks[0].named_parameters() if not n.startswith("mod"))
print(f'{{"peak": {peak - plain}, "block": {block}}}')
"""
    found = in_a_process(code)
    assert found["block"] > 50e6
    assert 1.9 * found["block"] < found["peak"] < 2 * found["block"] + 10e6
