"""The tiny model that comes with the pack still makes the same latents: prompt, T5, denoiser, schedule, guidance, seed.

The file holds float32 latents in VAE space. Computed with one thread or two, without oneDNN, without AVX2, or by PyTorch's
plain attention, they differ by a relative 1.6e-6. After a change that is meant to change videos:
`python -m tests.core.test_golden` rewrites the file.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_core import MochiPipeline, load_text_encoder, load_vae
from tests.harness import trained
from tests.harness.numbers import relative_error

GOLDEN = Path(__file__).parents[1] / "data" / "golden_tiny_latents.safetensors"
TOLERANCE = 1e-4
# T5's tokens for "a red square moving left on a black background".
TOKENS = [3, 9, 1131, 2812, 1735, 646, 30, 3, 9, 1001, 2458, 1]


def tiny_pipeline():
    """A pipeline whose text encoder reads every prompt as `TOKENS`, so that no tokenizer is needed."""
    with TemporaryDirectory() as folder, mock.patch("transformers.AutoTokenizer.from_pretrained") as load:
        load.return_value = lambda _, **_options: SimpleNamespace(input_ids=TOKENS)
        (Path(folder) / "tokenizer.json").touch()
        text_encoder = load_text_encoder(trained.T5, folder, torch.float32)
    return MochiPipeline(trained.denoiser(), load_vae(trained.VAE, torch.float32), text_encoder)


def latents():
    """Latents (1, 12, 3, 8, 12): 13 frames of 96 x 64."""
    return tiny_pipeline()(
        "a red square moving left on a black background",
        height=64, width=96, num_frames=13, num_inference_steps=8, guidance_scale=4.5, seed=7, output_type="latent",
    )  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)["latents"]


def test_the_tiny_model_makes_the_latents_that_it_made(golden):
    result = latents()
    assert (result.dtype, result.shape) == (torch.float32, golden.shape)
    assert relative_error(result, golden) <= TOLERANCE


@pytest.mark.parametrize("threads", [1, 2])
def test_the_tolerance_covers_other_ways_to_compute(golden, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            assert relative_error(latents(), golden) <= TOLERANCE / 10
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    save_file({"latents": latents()}, GOLDEN)
