"""The recipe of the tiny Mochi in `models/`: drawn clips, an autoencoder, a denoiser and a text encoder."""
