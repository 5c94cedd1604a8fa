"""AsymmVAE, the autoencoder of Mochi 1: both halves, streaming and the scales of its latents."""
