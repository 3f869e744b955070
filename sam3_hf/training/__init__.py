"""The trainer. `training/train.py`, `sam3-lite train` and `python -m sam3_hf.training` start it."""

DEFAULT_COMMAND = "accelerate launch -m sam3_hf.training"
