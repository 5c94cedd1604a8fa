"""The LoRAs that we train and write, against peft and diffusers."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from mochi_core.train.config import LoraKeys
from mochi_core.train.lora import add_lora, write_lora
from mochi_core.train.objective import velocity_loss
from tests.harness.peers import assert_agree, assert_differ, diffusers_dit, pipeline
from tests.harness.random_inputs import batch
from tests.harness.tiny_models import random_dit

KEYS = LoraKeys(qkv_proj_lora_rank=8, qkv_proj_lora_alpha=4.0, out_proj_lora_rank=4, out_proj_lora_alpha=6.0)


@pytest.fixture
def trained():
    """A denoiser and its LoRA, which has some effect."""
    dit = random_dit()
    factors = add_lora(dit, KEYS, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, factor in factors.items():
            if name.endswith("lora_B"):
                factor.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return dit, factors


@pytest.mark.parametrize("way", ["load_lora_weights", "load_lora_adapter"])
def test_diffusers_makes_of_our_file_what_was_trained(trained, tmp_path, way):
    dit, factors = trained
    _, path = write_lora(tmp_path / "step", factors, KEYS, dit.config.depth)
    peer = diffusers_dit(random_dit())
    assert_differ(dit, peer)
    if way == "load_lora_weights":
        pipeline(peer).load_lora_weights(path)
    else:
        peer.load_lora_adapter(path)
    assert_agree(dit, peer)


@torch.enable_grad()
def test_gradients_are_pefts(trained):
    dit, factors = trained
    velocity_loss(dit, *batch()).backward()
    layers = ["attn.qkv_x", "attn.qkv_y", "attn.proj_x", "attn.proj_y"]
    config = LoraConfig(
        r=8, lora_alpha=4, target_modules=layers, rank_pattern={r"proj_[xy]": 4}, alpha_pattern={r"proj_[xy]": 6}
    )
    peer = inject_adapter_in_model(config, random_dit())
    parameters = {name.replace(".default.weight", ""): p for name, p in peer.named_parameters() if "lora_" in name}
    assert parameters.keys() == factors.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(factors[name])
    velocity_loss(peer, *batch()).backward()
    for name, factor in factors.items():
        torch.testing.assert_close(factor.grad, parameters[name].grad, rtol=1e-4, atol=1e-6)
    assert all(factor.grad.any() for factor in factors.values())
