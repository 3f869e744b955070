"""
Trains a lite SAM 3 on a COCO dataset.

    accelerate launch training/train.py training/configs/lite_fp16.yaml --data path/to/dataset

`--help` lists all settings; what a run writes is told in `sam3_hf.training.main`.
"""

import sys

from sam3_hf.training.main import main

if __name__ == "__main__":
    sys.exit(main(command="accelerate launch training/train.py"))
