"""`accelerate launch -m sam3_hf.training` or `python -m sam3_hf.training`: as `training/train.py`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
