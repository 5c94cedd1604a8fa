"""AsymmDiT, Mochi 1's denoiser: network, attention backends and offloading."""
