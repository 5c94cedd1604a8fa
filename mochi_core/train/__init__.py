"""Training: LoRAs for Mochi, and all weights of small denoisers. Nothing else in the core imports this package."""

from .. import packages

packages.check(packages.TRAINING, "train")
