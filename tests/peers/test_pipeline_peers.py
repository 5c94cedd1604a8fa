"""The whole path from prompt to latents, against diffusers' MochiPipeline."""

import inspect

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import MochiPipeline as DiffusersPipeline
from safetensors.torch import save_file
from transformers import T5TokenizerFast

from mochi_core import MochiPipeline, load_text_encoder, normalize_latents
from mochi_core.config import MAX_TEXT_TOKENS
from tests.harness import trained
from tests.harness.numbers import relative_error
from tests.harness.peers import diffusers_dit, diffusers_vae
from tests.harness.tiny_models import random_dit, random_t5, random_vae

PROMPT = "a red kite over the sea"


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    weights = tmp_path_factory.mktemp("t5") / "t5.safetensors"
    save_file(random_t5(), weights)
    dit, vae, t5 = random_dit(), random_vae(), load_text_encoder(weights, trained.TOKENIZER)
    theirs = DiffusersPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=diffusers_vae(vae),
        text_encoder=t5.model,
        tokenizer=T5TokenizerFast.from_pretrained(trained.TOKENIZER),
        transformer=diffusers_dit(dit),
        force_zeros_for_empty_prompt=True,
    )
    theirs.set_progress_bar_config(disable=True)
    return MochiPipeline(dit, vae, t5), theirs


@pytest.mark.parametrize("negative_prompt", ["", "blurry"])
def test_latents_agree_with_diffusers(pipelines, negative_prompt):
    ours, theirs = pipelines
    size = {"height": 64, "width": 96, "num_frames": 13, "num_inference_steps": 8, "guidance_scale": 4.5}
    latents = ours(PROMPT, negative_prompt, seed=3, output_type="latent", **size)
    expected = theirs(
        PROMPT,
        negative_prompt,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        return_dict=False,
        **size,
    )[0]
    assert relative_error(normalize_latents(latents), expected) <= 1e-4


def test_prompts_are_as_long_as_diffusers():
    assert inspect.signature(DiffusersPipeline.__call__).parameters["max_sequence_length"].default == MAX_TEXT_TOKENS
