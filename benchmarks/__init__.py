"""Side-by-side measurements: `python -m benchmarks.dit`, `python -m benchmarks.vae`."""
