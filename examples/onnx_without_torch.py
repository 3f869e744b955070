"""Finds phrases in a picture with a folder of `sam3-lite export --format onnx`, without PyTorch and without sam3_hf:

pip install onnxruntime numpy pillow tokenizers
python onnx_without_torch.py FOLDER PICTURE found.json overlay.png "red circle" "blue square"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

COLORS = np.array([(230, 60, 60), (60, 140, 230), (60, 190, 90), (240, 170, 40), (160, 80, 200)])
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(bool)": bool}
SETUP, AFTER = ort.SessionOptions(), ort.RunOptions()  # memory that is free is used again, and given back
SETUP.execution_order, SETUP.enable_mem_pattern = ort.ExecutionOrder.PRIORITY_BASED, False
AFTER.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class Finder:
    def __init__(self, folder):
        self.folder, self.graphs = Path(folder), {}
        self.facts = json.loads((self.folder / "sam3_lite_export.json").read_text(encoding="utf-8"))

    def run(self, name, **inputs):
        graph = self.graphs[name] = self.graphs.get(name) or ort.InferenceSession(self.folder / f"{name}.onnx", SETUP)
        given = {one.name: inputs[one.name].astype(TYPES[one.type], copy=False) for one in graph.get_inputs()}
        return graph.run(None, given, AFTER)

    def words(self, phrases):
        """Features (phrases, tokens, hidden) and which tokens count."""
        tokenizer, length = Tokenizer.from_file(str(self.folder / "tokenizer.json")), self.facts["text"]["tokens"]
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("<|endoftext|>"))
        encoded = tokenizer.encode_batch([" ".join(phrase.lower().split()) for phrase in phrases])
        ids, mask = np.array([one.ids for one in encoded]), np.array([one.attention_mask for one in encoded]) > 0
        if self.facts["vocabulary"] is None:
            return self.run("text", input_ids=ids, attention_mask=mask)[0], mask
        with np.load(self.folder / "vocabulary.npz") as known:
            stored = np.where(known["attention_mask"], known["input_ids"], -1)
            same = (np.where(mask, ids, -1)[:, None] == stored).all(2)
            return known["features"][[row.nonzero()[0][0] for row in same]], mask  # fails for other phrases

    def find(self, picture, phrases):
        """Detections, best first, and their masks (n, height, width)."""
        image, side = self.facts["image"], self.facts["sizes"]["image_size"]
        pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR)) * image["rescale"]
        pixels = ((pixels - image["mean"]) / image["std"]).transpose(2, 0, 1)[None]
        maps = dict(zip(("fine", "middle", "coarse"), self.run("vision", pixel_values=pixels), strict=True))
        (words, mask), owner = self.words(phrases), np.zeros(len(phrases))
        if self.facts["summary_token"]:  # what a box that is padding leaves: the image in one token
            box = {"input_boxes": np.zeros((1, 1, 4)), "input_boxes_labels": np.full((1, 1), -10)}
            token = self.run("boxes", **box, coarse=maps["coarse"], image_index=owner[:1])[0][:, 1:]
            words = np.concatenate([words, token.repeat(len(phrases), 0)], 1)
            mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        asked = {"prompt": words, "prompt_mask": mask, "image_index": owner}
        boxes, logits, presence, queries, encoded = self.run("detector", coarse=maps["coarse"], **asked)
        scores = 1 / (1 + np.exp(-logits)) / (1 + np.exp(-presence))
        found, masks, limits = [], [], self.facts["thresholds"]
        for row, query in sorted(np.argwhere(scores > limits["score"]).tolist(), key=lambda at: -scores[tuple(at)]):
            asked = {"prompt": words[[row]], "prompt_mask": mask[[row]], "image_index": owner[:1]}
            chosen = {"encoded": encoded[[row]], "queries": queries[[row]][:, [query]]}
            share = Image.fromarray(1 / (1 + np.exp(-self.run("masks", **maps, **asked, **chosen)[0][0, 0])))
            masks.append(np.asarray(share.resize(picture.size, Image.Resampling.BILINEAR)) > limits["mask"])
            box = boxes[row, query].clip(0, 1) * np.array(picture.size * 2)
            found.append({"label": phrases[row], "score": float(scores[row, query]), "box": box.tolist()})
        return found, masks


if __name__ == "__main__":
    folder, path, json_path, overlay_path, *phrases = sys.argv[1:]
    found, masks = Finder(folder).find(picture := Image.open(path).convert("RGB"), phrases)
    Path(json_path).write_text(json.dumps(found, indent=1))
    drawn = np.asarray(picture).astype(float)
    for one, mask in zip(found, masks, strict=True):
        drawn[mask] = drawn[mask] / 2 + COLORS[phrases.index(one["label"]) % len(COLORS)] / 2
    Image.fromarray(drawn.astype(np.uint8)).save(overlay_path)
