"""The trainer: ``torchrun -m prelora.train --recipe NAME``."""
