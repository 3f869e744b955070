"""training/package_checkpoint.py: a standard checkpoint of a trained model, and what its card says of scores."""

import json
import runpy
from pathlib import Path

import torch
from conftest import micro_config, shake

from sam3_hf import Sam3LiteModel

SCRIPT = Path(__file__).parents[1] / "training" / "package_checkpoint.py"


def test_a_packaged_model_is_the_trained_one_in_half_precision(tmp_path):
    torch.manual_seed(0)
    model = shake(Sam3LiteModel(micro_config()))
    model.save_pretrained(tmp_path / "final")
    figures = dict.fromkeys(("segm_AP", "segm_AP50", "bbox_AP", "segm_cgF1", "IL_MCC"), 0.125)
    splits = {"seen": figures | {"segm_AP": 0.75}, "unseen": figures, "dense": figures | {"segm_AP": 0.5}}
    scores = {"images": 30, "absent_images": 7, **splits, "absent": {"IL_negative_accuracy": 0.9375}}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    main = runpy.run_path(str(SCRIPT))["main"]
    for folder in ("packaged", "again"):
        main([str(tmp_path / "final"), str(tmp_path / folder), "--scores", str(tmp_path / "scores.json")])

    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("packaged", "again")]
    assert files[0] == files[1]
    card = (tmp_path / "packaged" / "README.md").read_text()
    assert "| segm_AP | 0.750 | 0.125 | 0.500 |" in card and "30 pictures of each split" in card
    assert "asked on 7 pictures, 93.8% find nothing" in " ".join(card.split())
    packaged = Sam3LiteModel.from_pretrained(tmp_path / "packaged", preset="same")
    weights = packaged.state_dict()
    assert packaged.dtype == torch.float16 and set(weights) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight.to(weights[name].dtype), rtol=0, atol=0, msg=name)
