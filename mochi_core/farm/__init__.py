"""Many prompts on many GPUs and machines: Ray hands them out, each is made by one worker."""
