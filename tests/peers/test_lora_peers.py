"""LoRA files written by diffusers and peft: our results against theirs."""

import pytest
import torch
from diffusers import MochiPipeline as DiffusersPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from mochi_core import load_lora
from tests.harness.lora_files import diffusers_weights, random_adapter, write_adapter
from tests.harness.peers import (
    assert_agree,
    assert_differ,
    diffusers_dit,
    pipeline,
)
from tests.harness.tiny_models import random_dit

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
CONFIGS = {
    "attention": {"target_modules": ATTENTION},
    "all layers, alpha": {"target_modules": "all-linear", "lora_alpha": 7},
    "alphas by layer": {"target_modules": ATTENTION, "lora_alpha": 7, "alpha_pattern": {"to_k": 2, "attn1.to_v": 11}},
    "rank-stabilised": {"target_modules": ATTENTION, "lora_alpha": 7, "use_rslora": True},
    "dora": {"target_modules": "all-linear", "lora_alpha": 7, "use_dora": True},
}


@pytest.fixture
def dit():
    return random_dit()


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))


@pytest.mark.parametrize("name", CONFIGS)
def test_file_saved_by_diffusers(dit, tmp_path, name):
    config = LoraConfig(r=4, init_lora_weights=False, **CONFIGS[name])
    trained = diffusers_dit(dit)
    trained.add_adapter(config)
    randomise(trained)
    DiffusersPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    assert_differ(dit, trained)
    load_lora(dit, tmp_path / "pytorch_lora_weights.safetensors")
    assert_agree(dit, trained)
    loaded = diffusers_dit(dit)
    pipeline(loaded).load_lora_weights(tmp_path)
    assert_agree(dit, loaded)


@pytest.mark.parametrize("name", CONFIGS)
def test_folder_saved_by_peft(dit, tmp_path, name):
    trained = get_peft_model(diffusers_dit(dit), LoraConfig(r=4, init_lora_weights=False, **CONFIGS[name]))
    randomise(trained)
    trained.save_pretrained(tmp_path)
    load_lora(dit, tmp_path)
    assert_agree(dit, trained)


def test_several_with_strengths(dit, tmp_path):
    peer, strengths = diffusers_dit(dit), {"a": 0.7, "b": -0.4}
    theirs = pipeline(peer)
    for seed, (name, strength) in enumerate(strengths.items()):
        adapter = random_adapter(diffusers_weights(dit), seed=seed)
        path = write_adapter(tmp_path / f"{name}.safetensors", adapter, "diffusers")
        theirs.load_lora_weights(path, adapter_name=name)
        load_lora(dit, path, strength)
    theirs.set_adapters(list(strengths), list(strengths.values()))
    assert_agree(dit, peer)
