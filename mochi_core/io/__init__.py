"""Videos and latents as files."""
