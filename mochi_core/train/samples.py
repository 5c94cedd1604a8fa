"""Sample videos made during training, to see what is being learned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..autoencoder.latents import denormalize_latents
from ..autoencoder.model import AsymmVAE
from ..checkpoints import load_vae
from ..io.video import save_video, to_unit_range
from ..pipeline import initial_noise
from ..sampling.sample import EncodedPrompts, sample
from ..sampling.schedule import linear_quadratic_schedule
from ..text_encoder import load_text_encoder
from ..transformer.model import AsymmDiT
from .config import SampleKeys


@dataclass(frozen=True)
class Samples:
    """Everything that sample videos need besides the denoiser; the autoencoder is kept in main memory between them."""

    keys: SampleKeys
    vae: AsymmVAE
    prompts: list[EncodedPrompts]
    uncond: EncodedPrompts


def prepare_samples(keys: SampleKeys) -> Samples:
    """Load the autoencoder and encode the prompts, on the CPU, as they are few; the text encoder is freed right away."""
    vae = load_vae(keys.vae)
    vae.check_decoder(keys.video_size.latent_shape())
    text_encoder = load_text_encoder(keys.t5, keys.tokenizer)
    return Samples(keys, vae, [text_encoder.encode(prompt) for prompt in keys.prompts], text_encoder.encode(""))


def write_samples(samples: Samples, dit: AsymmDiT, stem: Path, chosen: Iterable[int]) -> list[Path]:
    """Make the videos of the prompts with the chosen indices; STEM-1.mp4 is the one for index 0."""
    keys, device, paths = samples.keys, dit.pos_frequencies.device, []
    noise = initial_noise(keys.video_size.latent_shape(), keys.seed)
    sigmas = linear_quadratic_schedule(keys.steps)
    for i in chosen:
        latents = sample(dit, noise, sigmas, samples.prompts[i], samples.uncond, keys.guidance)
        samples.vae.to(device)
        video = to_unit_range(samples.vae.decode(denormalize_latents(latents.to(device)))[0])  # (3, F, H, W)
        samples.vae.to("cpu")
        paths.append(stem.with_name(f"{stem.name}-{i + 1}.mp4"))
        save_video(video.permute(1, 2, 3, 0), paths[-1])
    return paths
