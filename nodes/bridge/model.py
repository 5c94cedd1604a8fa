"""AsymmDiT as the host's MODEL."""

from __future__ import annotations

import operator
from typing import Any

import comfy.conds
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.supported_models
import torch
from torch import nn

from ...mochi_core import AsymmDiT, AsymmDiTConfig
from ...mochi_core.checkpoints import (
    Checkpoint,
    LazyStateDict,
    check_fit,
    empty_transformer,
    has_frame_levels,
    is_block_matrix,
    quantize_block_matrices,
)
from ...mochi_core.checkpoints.names.detect import FRAME_LEVELS_KEY
from ...mochi_core.config import MAX_TEXT_TOKENS
from ...mochi_core.dtypes import dtype_name
from ...mochi_core.ops import Ops
from ...mochi_core.parallel.sequence import TokenSplit
from ...mochi_core.text_encoder import empty_prompts
from . import parallel
from .attention import host_attention, set_attention
from .cache import cached_run_block
from .choices import arithmetic_choice, kernels_choice, log_choice, stored_name, weights_choice
from .edit import with_unscaled_noise
from .frame_levels import FrameLevels, shares_of, with_frame_levels
from .image_to_video import with_kept_parts
from .patches import host_run_block
from .prepared import Conditioning, conditioning_of, full_mask, prepared, with_run
from .preview import MochiLatents, with_previews
from .quantized import (
    attributes_only,
    by_layer,
    describe_matmul,
    host_weights,
    is_quantized,
    quantized_operations,
    read_part,
)

COMPUTE_DTYPES = [torch.bfloat16, torch.float32]


class HostAsymmDiT(AsymmDiT):
    """The denoiser under the host's calling convention."""

    def __init__(self, config: AsymmDiTConfig, dtype=None, device=None, operations: Ops = nn, **_: Any) -> None:
        super().__init__(config, ops=operations, device=device, dtype=dtype)
        self._host_dtype = dtype or torch.get_default_dtype()
        self._add_stock_attributes()
        if self._host_dtype.itemsize == 1:
            self._keep_small_parts_exact()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the host keeps weights in; some may have another, and are cast when used."""
        return self._host_dtype

    def _add_stock_attributes(self) -> None:
        """Attributes of the host's own Mochi class that nodes read, under the same names."""
        config = self.config
        self.in_channels = self.out_channels = config.in_channels
        self.patch_size, self.num_heads, self.head_dim = config.patch_size, config.num_heads, config.head_dim
        self.hidden_size_x, self.hidden_size_y = config.hidden_size_x, config.hidden_size_y
        self.use_t5, self.t5_feat_dim, self.t5_token_length = True, config.text_width, MAX_TEXT_TOKENS
        self.learn_sigma = self.attend_to_padding = self.use_extended_posenc = False
        self.posenc_preserve_area, self.rope_theta = True, 10000.0

    def _keep_small_parts_exact(self) -> None:
        """Keep everything but the large matrices of the blocks out of 8 bits."""
        for name, parameter in self.named_parameters():
            if parameter.dtype.itemsize == 1 and not is_block_matrix(name, parameter):
                parameter.data = parameter.data.to(torch.bfloat16)

    def forward(
        self, x, timestep, context, attention_mask=None, transformer_options=None,
        conditioning=None, frame_levels: FrameLevels | None = None, **_: Any,
    ):  # fmt: skip
        """`x` (B, 12, T, H, W), `timestep` = sigma (B,) or (B, T), `context` (B, L, width); returns noise - data.

        `conditioning` is prepared by the run for these inputs, or None; `frame_levels` scale the result. The host also
        passes arguments for other models (ControlNets and the like).
        """
        options = transformer_options if transformer_options is not None else {}
        given = (x, timestep, context, attention_mask)

        def run(x, timestep, context, attention_mask=None, transformer_options=None):
            """The forward itself, inside the wrappers of other nodes, which may have replaced the prepared inputs."""
            inputs = x, timestep, context, attention_mask
            unchanged = all(map(operator.is_, inputs, given))
            ready = conditioning if conditioning is not None and unchanged else conditioning_of(self, *inputs)
            out = self._forward(x, ready, options if transformer_options is None else transformer_options)
            return out if frame_levels is None else frame_levels.scale(out)

        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(run, self, wrappers)
        return executor.execute(x, timestep, context, attention_mask, options)

    def _forward(self, x, conditioning: Conditioning, transformer_options):
        devices = transformer_options.get(parallel.KEY)
        if devices is None:
            velocity = self.velocity(x, conditioning, transformer_options)
        else:
            velocity = devices.velocity(self, x, conditioning, transformer_options)
        return -velocity  # the host's flow models return noise - data

    def velocity(self, x, conditioning: Conditioning, transformer_options, group: TokenSplit | None = None):
        """data - noise; with a `group`, its members compute it together; see `AsymmDiT.denoise_each`."""
        run = host_run_block(transformer_options, self.config.depth, x)
        return self.denoise(
            x,
            conditioning.text,
            conditioning.modulation,
            conditioning.rope,
            attend=host_attention(transformer_options),
            run_block=cached_run_block(run, x, transformer_options, self.config.depth, group),
            group=group,
        )


class HostMochi(comfy.model_base.GenmoMochi):
    """The host's Mochi with our denoiser; LoRA loaders and merges recognise it by its base class."""

    has_frame_levels = False
    """Whether the weights were trained with a noise level for each latent frame."""
    shared_by = 1
    """Number of devices that a forward's memory is currently spread over."""

    def __init__(self, model_config, device=None) -> None:
        network: Any = HostAsymmDiT  # the host's type hint only allows the first of its many networks
        comfy.model_base.BaseModel.__init__(
            self, model_config, comfy.model_base.ModelType.FLOW, device=device, unet_model=network
        )

    def memory_required(self, *args, **named):
        """Bytes that the host leaves free on a device for a forward; also how it decides the number of prompts per forward."""
        return super().memory_required(*args, **named) / self.shared_by

    def state_dict(self, *args, **named):
        """Only attributes of the model: the host merges by these entries, and saves what is inside the model."""
        prefix = named.get("prefix") or "".join(args[1:2])
        return attributes_only(self, super().state_dict(*args, **named), prefix)

    def state_dict_for_saving(self, unet_state_dict, *args, **named):
        """The state that the host's save nodes write, plus a mark for our loaders: these nodes cannot store our metadata."""
        state = super().state_dict_for_saving(unet_state_dict, *args, **named)
        return state | (
            {f"model.diffusion_model.{FRAME_LEVELS_KEY}": torch.tensor([])} if self.has_frame_levels else {}
        )

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        """Add the prepared conditioning as late as possible, because wrappers of other nodes may change the prompts."""
        options = transformer_options if transformer_options is not None else {}
        levels = FrameLevels(conds["frame_levels"].flatten(1)) if "frame_levels" in conds else None
        conds["frame_levels"] = levels
        conds["conditioning"] = prepared(self, x, t, c_crossattn, conds.get("attention_mask"), options, levels)
        with parallel.uncompiled(self, options):
            return super()._apply_model(x, t, c_concat, c_crossattn, control, options, **conds)

    def process_timestep(self, timestep, frame_levels: FrameLevels | None = None, **_):
        """Noise levels as the denoiser takes them: other nodes' settings may scale them by 1000 (ModelSamplingSD3)."""
        sigma = timestep / getattr(self.model_sampling, "multiplier", 1.0)
        return sigma if frame_levels is None else frame_levels.sigma(sigma)

    def extra_conds(self, **kwargs):
        """Text and mask at full length, so that prompts of different lengths can share a batch: the denoiser crops each.

        A conditioning without text, which some guiders use as the negative prompt, is an empty prompt.
        """
        out = comfy.model_base.BaseModel.extra_conds(self, **kwargs)
        context, mask = kwargs.get("cross_attn"), kwargs.get("attention_mask")
        if context is None:
            network: Any = self.diffusion_model
            context, mask = empty_prompts(1, network.config.text_width)
        out["c_crossattn"] = comfy.conds.CONDRegular(context)
        out["attention_mask"] = comfy.conds.CONDRegular(full_mask(context, mask))
        shares = shares_of(kwargs.get("denoise_mask")) if self.has_frame_levels else None
        if shares is not None:
            out["frame_levels"] = comfy.conds.CONDRegular(shares)
        return out


class MochiConfig(comfy.supported_models.GenmoMochi):
    """The host's description of a model, from before it is built."""

    latent_format = MochiLatents

    def get_model(self, state_dict, prefix="", device=None):  # noqa: ARG002 - the host's signature
        return HostMochi(self, device=device)


def load_model(
    path: str,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    attention: str = "auto",
    frame_levels: bool | None = None,
    disable_dynamic: bool = False,
):
    """A MODEL from a Mochi transformer file in any known layout.

    `quantize` is as in `mochi_core.load_transformer`, `attention` one of `attention.CHOICES`. `frame_levels` says whether the
    weights were trained with a noise level for each latent frame; None decides by the file's metadata or name.

    Raises:
        ValueError: the file is not a complete Mochi transformer, or the attention cannot be used here.
    """
    stored = read_part(path, "transformer")
    checkpoint = quantize_block_matrices(stored, quantize)
    module = empty_transformer(checkpoint)
    check_fit(dict(module.named_parameters()), checkpoint)
    patcher = _build(module.config, checkpoint, dtype, disable_dynamic)
    attending = set_attention(patcher, attention, patcher.model.get_dtype_inference(), module.config.head_dim)
    network: Any = patcher.model.diffusion_model
    _load_weights(network, checkpoint.tensors, module, assign=patcher.is_dynamic())
    patcher.cached_patcher_init = (load_model, (path, dtype, quantize, attention, frame_levels))
    patcher.model.has_frame_levels = has_frame_levels(stored) if frame_levels is None else frame_levels
    _add_wrappers(patcher)
    _log_choices(patcher, stored_name(stored), quantize, dtype, attending)
    return patcher


def _add_wrappers(patcher) -> None:
    """Add our wrappers to the host's sampling; the first of several is the outermost."""
    wrappers: dict[str, Any] = {"mochi_inversion": with_unscaled_noise}
    if patcher.model.has_frame_levels:
        wrappers["mochi_frame_levels"] = with_frame_levels
    wrappers |= {"mochi_kept": with_kept_parts, "mochi_run": with_run}
    for key, wrapper in wrappers.items():
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE, key, wrapper)
    patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, "mochi_preview", with_previews)


def _log_choices(patcher, stored: str, quantize: str | None, dtype: torch.dtype | None, attending: str) -> None:
    held = patcher.model.get_dtype()
    kept = quantize or (stored if patcher.model.model_config.quant_config else dtype_name(held))
    weights = weights_choice(stored, kept, bool(quantize or dtype), patcher.load_device)
    arithmetic = patcher.model.manual_cast_dtype or held
    compute = arithmetic_choice(arithmetic, patcher.load_device) + describe_matmul(patcher.model.diffusion_model)
    kernels = kernels_choice(patcher.load_device, arithmetic)
    log_choice("transformer", weights, compute, kernels, f"attention {attending}")


def _build(config: AsymmDiTConfig, checkpoint: Checkpoint, dtype: torch.dtype | None, disable_dynamic: bool):
    load_device, offload_device = mm.get_torch_device(), mm.unet_offload_device()
    model_config: Any = MochiConfig({"image_model": "mochi_preview", "config": config})
    held, cast = choose_dtypes(checkpoint, dtype)
    if is_quantized(checkpoint):
        model_config.quant_config = {"mixed_ops": True}
        operations = comfy.ops.pick_operations(held, cast, load_device, model_config=model_config)
        model_config.custom_operations = quantized_operations(operations)
    model_config.set_inference_dtype(held, cast, device=load_device)
    model = model_config.get_model({}, device=offload_device)
    # Looked up late: the host replaces CoreModelPatcher at start-up if it manages memory dynamically.
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    return patcher_class(model, load_device=load_device, offload_device=offload_device)


def choose_dtypes(checkpoint: Checkpoint, asked: torch.dtype | None) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of weights that are not quantised, and the one that they are cast to for computing, or None."""
    device = mm.get_torch_device()
    supported = [torch.float16, *COMPUTE_DTYPES] if asked == torch.float16 else COMPUTE_DTYPES
    if is_quantized(checkpoint):
        both: Any = asked or mm.unet_manual_cast(None, device, supported)
        return both, both
    held = asked or _suitable_dtype(checkpoint, supported)
    return held, mm.unet_manual_cast(held, device, supported)


def _load_weights(network: HostAsymmDiT, tensors: LazyStateDict, plain: AsymmDiT, *, assign: bool) -> None:
    """Load layer by layer; `plain` tells which layers are linear.

    With `assign`, tensors that need no conversion stay memory-mapped.
    """
    # The only parameter outside the layers.
    network.pos_frequencies.data.copy_(tensors["pos_frequencies"].read())
    for layer, part in by_layer({name: tensor for name, tensor in tensors.items() if "." in name}):
        state = {name.removeprefix(layer + "."): value for name, value in host_weights(part, plain).items()}
        network.get_submodule(layer).load_state_dict(state, assign=assign)


def _suitable_dtype(checkpoint: Checkpoint, supported: list[torch.dtype]) -> torch.dtype:
    """The file's own precision if the device supports it."""
    stored, _ = checkpoint.main_dtype()
    count = sum(tensor.numel for tensor in checkpoint.tensors.values())
    dtype = mm.unet_dtype(model_params=count, supported_dtypes=supported, weight_dtype=stored)
    upcast = dtype.itemsize > stored.itemsize and stored in supported
    # If upcast layer by layer during the computation, a model that would not fit still runs.
    return stored if upcast and count * dtype.itemsize > mm.get_free_memory(mm.unet_offload_device()) else dtype
