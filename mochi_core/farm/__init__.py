"""Many prompts on many GPUs and machines: Ray distributes them, one worker makes each video."""
