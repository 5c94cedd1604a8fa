"""The recipe for the tiny Mochi in `models/`: procedural clips, an autoencoder, a denoiser and a text encoder."""
