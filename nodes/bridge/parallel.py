"""One video on several devices, with the host's own means: its clones of a MODEL, and a thread for each device.

The host distributes whole prompts over the clones. Here it calls the denoiser of the first device only, as if there were no
others, so that guiders, LoRAs, hooks, context windows and wrappers of the denoiser work as on one device; the denoiser
distributes its work over the clones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import permutations
from typing import Any

import comfy.model_management as mm
import comfy.multigpu
import comfy.patcher_extension
import comfy.samplers
import torch
from torch import Tensor

from ...mochi_core import AsymmDiT
from ...mochi_core.parallel.group import Group, Stopped, Threads
from ...mochi_core.parallel.plan import HEADS, Plan, choose
from ...mochi_core.parallel.team import Members
from .choices import log_choice
from .patches import mixes_samples
from .prepared import Conditioning

KEY = "mochi_parallel"
SPLITS = ("auto", "guidance", "sequence")
CLONES, POOL = "multigpu_clones", "multigpu_thread_pool"
"""Keys of the host's options in a run for the MODEL of each device and for their threads."""
OTHERS = "multigpu"
"""Key of a MODEL's clones for other devices among its additional models."""


def add_devices(model, gpus: int, split: str):
    """A copy of a MODEL that runs on `gpus` devices, 0 for all of them; `split` is one of `SPLITS`.

    Raises:
        ValueError: the MODEL is not from our loader.
    """
    if not isinstance(model.model.diffusion_model, AsymmDiT):
        raise ValueError(
            f"The MODEL is {type(model.model).__name__} from another loader, which Mochi Parallel cannot share out; connect "
            "Load Mochi Transformer, or use MultiGPU CFG Split."
        )
    available = len(mm.get_all_torch_devices())
    mm.cleanup_models_gc()  # the host looks for clones among loaded models, and fails on those already freed
    mm.cleanup_models()
    all_there = all(loaded is not None for loaded in mm.loaded_models())  # a network used elsewhere stays loaded
    shared = comfy.multigpu.create_multigpu_deepclones(model, gpus or available, reuse_loaded=all_there)
    wrappers = {
        comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING: partial(_with_shared_memory, split),
        comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE: _with_threads,
        comfy.patcher_extension.WrappersMP.CALC_COND_BATCH: partial(_with_devices, split),
    }
    for place, wrapper in wrappers.items():
        shared.remove_wrappers_with_key(place, KEY)
        if len(_patchers(shared)) > 1:
            shared.add_wrapper_with_key(place, KEY, wrapper)
    if len(_patchers(shared)) == 1:
        log_choice("parallel", f"one GPU of {available}, so the MODEL works as without the node")
    return shared


def _patchers(model) -> list:
    """The MODEL for each device, its own first."""
    return [model, *model.get_additional_models_with_key(OTHERS)]


def _with_shared_memory(split: str, executor, model, *arguments, **named):
    """Wraps the host's loading of a MODEL, which leaves memory free for computing: each device needs it for its share only."""
    devices = tuple(patcher.load_device for patcher in _patchers(model))
    with_guidance, without = (str(plan_for(split, devices, prompts)) for prompts in (2, 1))
    log_choice("parallel", ", ".join(map(str, devices)), f"{with_guidance} where there is guidance", f"else {without}")
    with _shared_memory(model.model, split, devices):
        return executor(model, *arguments, **named)


def _with_threads(executor, guider, sigmas, extra_args, *arguments, **named):
    """Wraps a run of the host's sampler, for which the host has started its threads."""
    if (pool := extra_args["model_options"].get(POOL)) is not None:
        _check_threads(pool)
    return executor(guider, sigmas, extra_args, *arguments, **named)


def _check_threads(pool) -> None:
    """Raise the error of a thread that could not set its device: it runs nothing and returns that error for all work."""
    for device in pool.devices:
        pool.submit(device, int)
        with _named_errors(device):
            if (error := pool.get_result(device)[1]) is not None:
                raise error


def _with_devices(split: str, executor, model, conds, x, timestep, model_options):
    """Wraps the host's call of the denoiser for some prompts; the host sees only one device."""
    clones, pool = model_options.get(CLONES), model_options.get(POOL)
    if not clones or pool is None or torch.is_grad_enabled():
        return executor(model, conds, x, timestep, model_options)
    own = model.current_patcher
    others = [patcher for patcher in clones.values() if patcher.load_device != own.load_device]
    devices = Devices(split, (own, *others), pool)
    for hooks in {cond["hooks"] for prompt in conds for cond in prompt or () if cond.get("hooks") is not None}:
        own.prepare_hook_patches_current_keyframe(timestep, hooks, model_options)  # on all devices
    with _one_device(model_options, devices), _shared_memory(model, split, devices.names):
        for patcher in others:
            patcher.prepare_state(timestep, model_options)
        return executor(model, conds, x, timestep, model_options)


@contextmanager
def _one_device(model_options: dict, devices: Devices) -> Iterator[None]:
    """Move the other devices from the host's options to where the denoiser finds them."""
    options = model_options["transformer_options"]
    taken = {key: model_options.pop(key) for key in (CLONES, POOL)}
    options[KEY] = devices
    try:
        yield
    finally:
        del options[KEY]
        model_options.update(taken)


@contextmanager
def _shared_memory(model, split: str, devices: tuple[torch.device, ...]) -> Iterator[None]:
    """Make the host count the memory that a positive and a negative prompt need on one device."""
    model.shared_by = plan_for(split, devices, 2).size
    try:
        yield
    finally:
        model.shared_by = 1


@contextmanager
def uncompiled(model, options: dict) -> Iterator[None]:
    """Make the host bypass a network that another node compiled as a whole: the compiled code is for one device."""
    compiled = model.diffusion_model
    network = getattr(compiled, "_orig_mod", None)  # set by `torch.compile` on a compiled module
    if KEY not in options or network is None:
        yield
        return
    _warn_of_compiled()
    model.diffusion_model = network
    try:
        yield
    finally:
        model.diffusion_model = compiled


@lru_cache
def _warn_of_compiled() -> None:
    logging.warning("Mochi parallel: the compiled transformer is not used, because the compiled code is for one GPU.")


def plan_for(split: str, devices: tuple[torch.device, ...], prompts: int, heads: int = HEADS) -> Plan:
    """The part of a forward for `prompts` prompts that each device computes.

    `auto` splits pairs of prompts first, then tokens; `guidance` leaves devices idle instead of splitting tokens.
    """
    pairs = prompts % 2 == 0 and split != "sequence"
    if split == "guidance":
        return Plan(guidance=2 if pairs else 1)
    return choose(len(devices), heads, guided=pairs, peers=reach_each_other(devices))


@lru_cache
def reach_each_other(devices: tuple[torch.device, ...]) -> bool:
    """Whether all can access each other's memory, as far as PyTorch reports it."""
    pairs = permutations([device for device in devices if device.type == "cuda"], 2)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in pairs)


@dataclass(frozen=True)
class Devices:
    """The devices of one call by the host, for the denoiser on the first of them."""

    split: str
    patchers: tuple
    """The host's loaded MODEL for each device."""
    pool: Any
    """The host's threads for the other devices."""

    @property
    def names(self) -> tuple[torch.device, ...]:
        return tuple(patcher.load_device for patcher in self.patchers)

    def velocity(self, network: Any, x: Tensor, conditioning: Conditioning, options: dict) -> Tensor:
        """The result of `network.velocity`, where `network` is the `HostAsymmDiT` of the first device, computed by all devices.

        Raises:
            The first error on any device, once all devices have stopped.
        """
        prompts = 1 if mixes_samples(options) or len(x) % len(options["uuids"]) else len(options["uuids"])
        plan = plan_for(self.split, self.names, prompts, network.config.num_heads)
        hooks, inference = self.patchers[0].current_hooks, torch.is_inference_mode_enabled()

        def work(world: Group) -> Tensor:
            patcher, members = self.patchers[world.rank], Members.of(world, plan)
            with torch.inference_mode(inference), torch.no_grad(), _named_errors(patcher.load_device):
                if world.rank > 0:
                    patcher.apply_hooks(hooks)
                own = network if world.rank == 0 else patcher.model.diffusion_model
                velocity = own.velocity(*_share(x, conditioning, options, members, patcher.load_device))
            return velocity if members.tokens.rank == 0 else velocity[:0]

        velocities = Threads(plan.size).run(work, self._start)
        return torch.cat([velocity.to(x.device) for velocity in velocities])

    def _start(self, rank: int, work: Callable[[], None]) -> Callable[[], object]:
        """Start a member's work in its device's thread; returns a function that waits for it to finish."""
        device = self.patchers[rank].load_device
        self.pool.submit(device, work)
        return partial(self.pool.get_result, device)


def _share(x: Tensor, conditioning: Conditioning, options: dict, members: Members, device: torch.device):
    """`HostAsymmDiT.velocity`'s arguments for one member: its samples of the batch, on its device."""
    count, index = members.guidance.size, members.guidance.rank
    samples = slice(index * len(x) // count, (index + 1) * len(x) // count)
    own = comfy.patcher_extension.copy_nested_dicts(options)
    del own[KEY]
    for name in ("cond_or_uncond", "uuids"):
        entries = own[name]
        own[name] = entries[index * len(entries) // count : (index + 1) * len(entries) // count]
    for name in ("sigmas", "sample_sigmas"):
        own[name] = own[name].to(device)
    comfy.samplers.cast_transformer_options(own, device=device)
    group = members.tokens if members.tokens.size > 1 else None
    return x[samples].to(device), conditioning.part(samples, device), own, group


@contextmanager
def _named_errors(device: torch.device) -> Iterator[None]:
    """Log which device failed first."""
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        logging.error("Mochi parallel: %s failed, and all devices stop: %s", device, error)
        raise
