"""Make the tiny Mochi that comes with the project: an autoencoder, then a denoiser and a text encoder together.

    python -m mochi_core.train.tiny FOLDER --tokenizer ComfyUI/comfy/text_encoders/t5_tokenizer

takes one and a half hours on two CPU cores; run it again to go on where it stopped. FOLDER gets the weights, laid out as
ComfyUI's model folders, and a CSV file of the losses for each of the three courses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from ...autoencoder.model import AsymmVAE
from ...checkpoints import from_state_dict
from ...checkpoints.formats.writer import write_safetensors
from . import dit as tiny_dit
from . import vae as tiny_vae
from .course import Course, follow

VAE_COURSE = Course("vae", steps=4000, learning_rate=8e-4, average=0.995)
DECODER_COURSE = Course("decoder", steps=2500, learning_rate=4e-4, average=0.995)
DIT_COURSE = Course("dit", steps=5000, learning_rate=1e-3, average=0.999)
CLIPS = (6000, 2000, 2000)
"""Of each of the sizes that the denoiser learns from."""
SKIPPED = ("encoder.embed_tokens.weight",)
"""T5's table of tokens is there under two names."""
METADATA = {
    "format": "pt",
    "title": "Tiny Mochi",
    "description": "A small Mochi 1 trained on drawn clips of coloured shapes; for tests and demonstrations.",
    "license": "Apache-2.0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with T5's tokenizer.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads to use")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    make(arguments.folder, arguments.tokenizer, arguments.device)


def make(folder: Path, tokenizer_folder: Path, device: torch.device) -> None:
    """All of it, from the first step that is not done."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    vae = train_decoder(folder, train_vae(folder, device), device)
    write_model(folder / "vae" / "mochi_tiny_vae.safetensors", vae)
    sets = [clips_of(folder, size, count, vae, tokenizer) for size, count in zip(tiny_dit.SIZES, CLIPS, strict=True)]
    tiny = train_dit(folder, sets, tokenizer, device)
    write_model(folder / "diffusion_models" / "mochi_tiny.safetensors", tiny.dit)
    write_model(folder / "text_encoders" / "t5_tiny.safetensors", tiny.t5)


def train_vae(folder: Path, device: torch.device) -> AsymmVAE:
    torch.manual_seed(VAE_COURSE.seed)
    vae = tiny_vae.new_vae().to(device)

    def learn(step: int) -> Tensor:
        video = tiny_vae.batch(VAE_COURSE.rng(step)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return tiny_vae.loss(vae, video, torch.Generator().manual_seed(step))

    return follow(VAE_COURSE, vae, learn, folder)


def train_decoder(folder: Path, vae: AsymmVAE, device: torch.device) -> AsymmVAE:
    """Latents with Mochi's statistics, and sharper pictures from them."""
    assert vae.decoder is not None
    tiny_vae.standardize(vae, tiny_vae.captioned_batch(DECODER_COURSE.rng(DECODER_COURSE.steps), count=200).to(device))
    vae.decoder.requires_grad_(True)

    def learn(step: int) -> Tensor:
        rng = DECODER_COURSE.rng(step)
        video = tiny_vae.captioned_batch(rng, count=2, width=int(rng.choice([64, 64, 96]))).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            return tiny_vae.decoder_loss(vae, video)

    return follow(DECODER_COURSE, vae, learn, folder)


def clips_of(
    folder: Path, size: tuple[int, int, int], count: int, vae: AsymmVAE, tokenizer: tiny_dit.Tokenizer
) -> tiny_dit.Clips:
    """Encoded clips of one size, made once."""
    path = folder / f"clips_{'x'.join(map(str, size))}.safetensors"
    if not path.is_file():
        rng = DIT_COURSE.rng(DIT_COURSE.steps + tiny_dit.SIZES.index(size))
        tiny_dit.write_clips(path, tiny_dit.random_clips(rng, count, size, vae, tokenizer))
    return tiny_dit.read_clips(path)


def train_dit(
    folder: Path, sets: list[tiny_dit.Clips], tokenizer: tiny_dit.Tokenizer, device: torch.device
) -> tiny_dit.TinyMochi:
    torch.manual_seed(DIT_COURSE.seed)
    tiny = tiny_dit.TinyMochi().to(device)

    def learn(step: int) -> Tensor:
        rng = DIT_COURSE.rng(step)
        with torch.autocast(device.type, torch.bfloat16):
            return tiny_dit.loss(tiny, tokenizer, tiny_dit.choose(rng, sets), rng)

    return follow(DIT_COURSE, tiny, learn, folder)


def write_model(path: Path, model: nn.Module) -> None:
    """In bf16 but for `pos_frequencies`, as published files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtypes = {"pos_frequencies": torch.float32}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in SKIPPED}
    stored = {name: tensor.to("cpu", dtypes.get(name, torch.bfloat16)) for name, tensor in weights.items()}
    write_safetensors(path, from_state_dict(stored), METADATA)


if __name__ == "__main__":
    main()
