"""Our models and the peers that they are compared with, all with random weights of the released sizes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mochi_core import AsymmDiT, AsymmDiTConfig
from mochi_core.checkpoints import Checkpoint, LazyTensor, load_into, quantize_block_matrices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def use_comfyui() -> None:
    """Make ComfyUI at COMFYUI_PATH importable, on the CPU if there is no GPU."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI folder; `python dev.py test` prepares one in .dev.")
    if path not in sys.path:
        sys.path.insert(0, path)
    from comfy.cli_args import args

    args.cpu = DEVICE == "cpu"


def use_pack() -> None:
    """Make this pack importable as `pack`, as ComfyUI imports it."""
    use_comfyui()
    root = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location("pack", root / "__init__.py", submodule_search_locations=[str(root)])
    assert spec and spec.loader
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Fill in random weights that keep activations in range."""
    for parameter in module.parameters():
        parameter.uniform_(*_range(parameter))
    return module.requires_grad_(False).eval()


def _range(parameter: Tensor) -> tuple[float, float]:
    bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
    return -bound, bound


def our_dit(config: AsymmDiTConfig, dtype: torch.dtype, quantize: str | None = None, home: str = DEVICE) -> AsymmDiT:
    """Our denoiser with its weights on `home`; at most one weight at a time exists unconverted."""
    model = AsymmDiT(config, device="meta", dtype=dtype)

    def stored(like: Tensor) -> LazyTensor:
        return LazyTensor(
            tuple(like.shape), like.dtype, lambda: torch.empty_like(like, device=DEVICE).uniform_(*_range(like))
        )

    tensors = {name: stored(parameter) for name, parameter in model.named_parameters()}
    weights = Checkpoint("random weights", Path(), tensors)
    load_into(model, quantize_block_matrices(weights, quantize), home)
    return model.eval()


def comfy_dit(depth: int, dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    return fill(empty_comfy_dit(depth, dtype, device))


def empty_comfy_dit(depth: int, dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    use_comfyui()
    import comfy.ops
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmDiTJoint

    return AsymmDiTJoint(
        depth=depth, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0,
        mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True,
        patch_embed_bias=True, timestep_mlp_bias=True, timestep_scale=1000.0, use_t5=True, t5_feat_dim=4096,
        t5_token_length=256, attend_to_padding=False, rope_theta=10000.0, device=device, dtype=dtype,
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip


def diffusers_dit(depth: int, dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    return built(lambda: MochiTransformer3DModel(num_layers=depth), dtype, device)


def comfy_vae(dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    use_comfyui()
    from comfy.ldm.genmo.vae.model import VideoVAE

    return built(VideoVAE, dtype, device)


def diffusers_vae(dtype: torch.dtype, device: str = DEVICE) -> nn.Module:
    from diffusers import AutoencoderKLMochi

    return built(AutoencoderKLMochi, dtype, device)


def built(model: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> nn.Module:
    """The model with random weights, created directly in `dtype` on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = model()
    finally:
        torch.set_default_dtype(before)
    return fill(module)
