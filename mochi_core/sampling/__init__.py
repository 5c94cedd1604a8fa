"""Noise schedules, guidance, Euler steps and the block cache."""
