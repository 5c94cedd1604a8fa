"""AsymmVAE, Mochi 1's autoencoder: encoder, decoder, streaming and latent scaling."""
