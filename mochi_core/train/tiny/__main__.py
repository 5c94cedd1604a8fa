"""Make the tiny Mochi that comes with the project: an autoencoder, then a denoiser and a text encoder together.

The denoiser first learns to make videos from text, then also from given frames, with per-frame noise levels, and finally
details, on more clips.

    python -m mochi_core.train.tiny FOLDER --tokenizer ComfyUI/comfy/text_encoders/t5_tokenizer

takes three and a half hours on two CPU cores; run it again to resume where it stopped. FOLDER receives the weights, laid out
like ComfyUI's model folders, and a CSV file of losses for each of the five training stages.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, autocast, nn

from ... import interrupts
from ...autoencoder.model import AsymmVAE
from ...checkpoints import from_state_dict
from ...checkpoints.formats.writer import write_safetensors
from ...checkpoints.names.detect import FRAME_LEVELS_KEY
from ...transformer.model import AsymmDiT
from . import dit as tiny_dit
from . import vae as tiny_vae
from .loop import TrainLoop

VAE_LOOP = TrainLoop("vae", steps=4000, learning_rate=8e-4, average=0.995)
DECODER_LOOP = TrainLoop("decoder", steps=2500, learning_rate=4e-4, average=0.995)
DIT_LOOP = TrainLoop("dit", steps=5000, learning_rate=1e-3, average=0.999)
FRAMES_LOOP = TrainLoop("frames", steps=2200, learning_rate=5e-4, average=0.998)
WITH_FRAME_LEVELS = 0.5
"""Fraction of the batches of `frames` and `details` with per-frame noise levels; the others are as before."""
DETAILS_LOOP = TrainLoop("details", steps=4400, learning_rate=8e-4, average=0.998)
CLIPS = {"dit": (6000, 2000, 2000), "details": (20000, 5000, 7000)}
"""Number of clips of each size in `tiny_dit.SIZES`; `details` uses different clips."""
SKIPPED = ("encoder.embed_tokens.weight",)
"""Tensors that are not written: transformers holds T5's token embedding under two names."""
METADATA = {
    "format": "pt",
    "title": "Tiny Mochi",
    "description": "A small Mochi 1 trained on drawn clips of coloured shapes; for tests and demonstrations.",
    "license": "Apache-2.0",
}


def main() -> int:
    """Train what is not trained yet; returns 0 when all is done, 130 after Ctrl-C."""
    interrupts.raise_again()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with T5's tokenizer.json")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads to use")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    try:
        make(arguments.folder, arguments.tokenizer, arguments.device)
    except KeyboardInterrupt:
        return 130
    return 0


def make(folder: Path, tokenizer_folder: Path, device: torch.device) -> None:
    """Train and write all three models, starting at the first unfinished step."""
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    vae = train_decoder(folder, train_vae(folder, device), device)
    write_model(folder / "vae" / "mochi_tiny_vae.safetensors", vae)
    sets, more = (clips_of(folder, loop, vae, tokenizer) for loop in (DIT_LOOP, DETAILS_LOOP))
    tiny = train_dit(folder, sets, tokenizer, device)
    for loop, clips in ((FRAMES_LOOP, sets), (DETAILS_LOOP, more)):
        tiny = train_on(loop, folder, tiny, clips, tokenizer, device)
    write_model(folder / "diffusion_models" / "mochi_tiny.safetensors", tiny.dit)
    write_model(folder / "text_encoders" / "t5_tiny.safetensors", tiny.t5)


def train_vae(folder: Path, device: torch.device) -> AsymmVAE:
    """Train the whole autoencoder; its latents get close to Mochi's statistics."""
    torch.manual_seed(VAE_LOOP.seed)
    vae = tiny_vae.new_vae().to(device)

    def loss_at(step: int) -> Tensor:
        video = tiny_vae.batch(VAE_LOOP.rng(step)).to(device)
        with autocast(device.type, torch.bfloat16):
            return tiny_vae.loss(vae, video, torch.Generator().manual_seed(step))

    return VAE_LOOP.run(vae, loss_at, folder)


def train_decoder(folder: Path, vae: AsymmVAE, device: torch.device) -> AsymmVAE:
    """Scale the latents to Mochi's statistics, then train only the decoder on them for sharper images."""
    assert vae.decoder is not None
    tiny_vae.standardize(vae, tiny_vae.captioned_batch(DECODER_LOOP.rng(DECODER_LOOP.steps), count=200).to(device))
    vae.decoder.requires_grad_(True)

    def loss_at(step: int) -> Tensor:
        rng = DECODER_LOOP.rng(step)
        video = tiny_vae.captioned_batch(rng, count=2, width=int(rng.choice([64, 64, 96]))).to(device)
        with autocast(device.type, torch.bfloat16):
            return tiny_vae.decoder_loss(vae, video)

    return DECODER_LOOP.run(vae, loss_at, folder)


def clips_of(folder: Path, loop: TrainLoop, vae: AsymmVAE, tokenizer: tiny_dit.Tokenizer) -> list[tiny_dit.Clips]:
    """Encoded clips of each size for a training stage, read from `folder`; drawn and written there the first time."""
    sets = []
    for number, (size, count) in enumerate(zip(tiny_dit.SIZES, CLIPS[loop.name], strict=True)):
        path = folder / f"clips_{loop.name}_{'x'.join(map(str, size))}.safetensors"
        if not path.is_file():
            clips = tiny_dit.random_clips(loop.rng(loop.steps + number), count, size, vae, tokenizer)
            tiny_dit.write_clips(path, clips)
        sets.append(tiny_dit.read_clips(path))
    return sets


def train_dit(
    folder: Path, sets: list[tiny_dit.Clips], tokenizer: tiny_dit.Tokenizer, device: torch.device
) -> tiny_dit.TinyMochi:
    """Train the denoiser and the text encoder together on encoded clips."""
    torch.manual_seed(DIT_LOOP.seed)
    tiny = tiny_dit.TinyMochi().to(device)

    def loss_at(step: int) -> Tensor:
        rng = DIT_LOOP.rng(step)
        with autocast(device.type, torch.bfloat16):
            return tiny_dit.loss(tiny, tokenizer, tiny_dit.choose_set(rng, sets), rng)

    return DIT_LOOP.run(tiny, loss_at, folder)


def train_on(
    loop: TrainLoop,
    folder: Path,
    tiny: tiny_dit.TinyMochi,
    sets: list[tiny_dit.Clips],
    tokenizer: tiny_dit.Tokenizer,
    device: torch.device,
) -> tiny_dit.TinyMochi:
    """Train the denoiser and text encoder further, with per-frame noise levels in some of the batches."""
    details = loop is DETAILS_LOOP

    def loss_at(step: int) -> Tensor:
        rng = loop.rng(step)
        with autocast(device.type, torch.bfloat16):
            clips = tiny_dit.choose_set(rng, sets)
            return tiny_dit.loss(tiny, tokenizer, clips, rng, WITH_FRAME_LEVELS, details=details)

    return loop.run(tiny.requires_grad_(True).train(), loss_at, folder)


def write_model(path: Path, model: nn.Module) -> None:
    """Write the weights in bf16 and `pos_frequencies` in float32, as in published files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtypes = {"pos_frequencies": torch.float32}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in SKIPPED}
    stored = {name: tensor.to("cpu", dtypes.get(name, torch.bfloat16)) for name, tensor in weights.items()}
    note = {FRAME_LEVELS_KEY: "true"} if isinstance(model, AsymmDiT) else {}
    write_safetensors(path, from_state_dict(stored), METADATA | note)


if __name__ == "__main__":
    sys.exit(main())
