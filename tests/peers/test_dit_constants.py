"""Published constants of the denoiser against diffusers' and ComfyUI's own copies of them."""

import inspect

import pytest
import torch

from mochi_core import AsymmDiTConfig
from mochi_core.transformer import block, layers, rope
from tests.harness.peers import comfy_class, diffusers_dit
from tests.harness.tiny_models import DIT, random_dit


@pytest.fixture(scope="module")
def diffusers_peer():
    return diffusers_dit(random_dit(DIT))


def test_norms_of_diffusers(diffusers_peer):
    attention = diffusers_peer.transformer_blocks[0].attn1
    for norm in (attention.norm_q, attention.norm_k, attention.norm_added_q, attention.norm_added_k):
        assert norm.eps == block.QK_NORM_EPS == 1e-5
    first = diffusers_peer.transformer_blocks[0]
    for norm in (first.norm1.norm, first.norm2, first.norm3, first.norm4, diffusers_peer.norm_out.norm):
        assert norm.eps == layers.NORM_EPS == 1e-6


def test_positions_of_diffusers(diffusers_peer):
    assert diffusers_peer.rope.target_area == rope.REFERENCE_AREA == 36864


def test_norms_and_positions_of_comfyui(comfyui):  # noqa: ARG001 - makes it importable
    import comfy.ldm.genmo.joint_model.asymm_models_joint as joint
    import comfy.ldm.genmo.joint_model.layers as embedders
    import comfy.ldm.genmo.joint_model.rope_mixed as positions
    import comfy.ops

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    with torch.device("meta"):
        peer = comfy_class(AsymmDiTConfig(depth=1), comfy.ops.disable_weight_init, torch.float32)
    attention = peer.blocks[0].attn
    for name in ("q_norm_x", "k_norm_x", "q_norm_y", "k_norm_y"):
        if getattr(attention, name, None) is not None:
            assert getattr(attention, name).eps == block.QK_NORM_EPS
    assert default(joint.modulated_rmsnorm, "eps") == layers.NORM_EPS
    assert default(joint.residual_tanh_gated_rmsnorm, "eps") == layers.NORM_EPS
    assert peer.final_layer.norm_final.eps == layers.NORM_EPS
    assert default(positions.create_position_matrix, "target_area") == rope.REFERENCE_AREA
    assert default(embedders.TimestepEmbedder.timestep_embedding, "max_period") == layers.TIMESTEP_PERIOD


def test_timesteps_of_comfyui(comfyui):  # noqa: ARG001 - makes it importable
    import comfy.model_detection

    unet = comfy.model_detection.detect_unet_config({"t5_yproj.weight": torch.zeros(1)}, "")
    assert unet["timestep_scale"] == layers.TIMESTEP_SCALE == 1000.0


def test_what_our_layers_are_built_with():
    attention = random_dit(DIT).blocks[0].attn
    assert {m.eps for m in attention.modules() if isinstance(m, torch.nn.RMSNorm)} == {block.QK_NORM_EPS}
