"""The card of an exported folder."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..plain_text import markdown, plain
from ..sharing.model_card import PLACEHOLDER, SAM_LICENSE, SAM_LICENSE_LINK, Origin

PRECISIONS = {
    "fp32": "float32",
    "fp16": "float16; boxes and scores leave the graphs in float32",
    "int8-weights": "weights in int8, one scale per output channel; arithmetic in float32",
    "int8": "products of the encoders and of the detector in int8, fitted to pictures; all else in float32",
}
RUNTIMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
GRAPHS = {
    "vision": "pixels to the feature pyramid, once per image",
    "text": "token ids to features, once per phrase",
    "boxes": "boxes to prompt tokens; with a box of label -10 alone, the summary token of an image",
    "detector": "pyramid and prompt tokens to boxes, score logits, presence logits and queries, once per prompt",
    "masks": "chosen queries to mask logits",
}


def export_card(facts: dict, origin: Origin) -> ModelCard:
    """The card that goes beside the graphs, from the content of their JSON."""
    licence = {"license": "other", "license_name": SAM_LICENSE, "license_link": SAM_LICENSE_LINK}
    data = ModelCardData(
        library_name={"onnx": "onnx", "openvino": "openvino"}[facts["format"]],
        pipeline_tag="mask-generation",
        tags=["sam3", "sam3_lite", "instance-segmentation", facts["format"]],
        base_model=origin.base if origin.on_hub else None,
        **(licence if origin.derived else {}),
    )
    rows = [f"| `{name}` | {GRAPHS[name]} |" for name in facts["graphs"]]
    words = "any phrase" if facts["vocabulary"] is None else ", ".join(map(markdown, map(plain, facts["vocabulary"])))
    side = facts["sizes"]["image_size"]
    text = f"""---
{data}
---

# Lite SAM 3 for {RUNTIMES[facts["format"]]}

Finds and segments every instance of a concept that is named by a phrase or shown by a box. Made with sam3-hf by
`sam3-lite export`, for pictures of {side} × {side} px, in {PRECISIONS[facts["precision"]]}.
What can be asked for: {words}.

| graph | what it does |
|---|---|
{chr(10).join(rows)}

Numbers of images, prompts, boxes and queries are free. Sizes, normalisation, thresholds and versions are in
`sam3_lite_export.json`; boxes are xyxy relative to the image, a score is `sigmoid(logit) * sigmoid(presence)`.

```python
from sam3_hf import Sam3LitePipeline

found = Sam3LitePipeline.from_pretrained("{PLACEHOLDER}")("picture.jpg", ["{_phrase(facts)}"])
```

Licence: {facts["license"]}. Versions: {", ".join(f"{name} {value}" for name, value in facts["versions"].items())}.
"""
    return ModelCard(text)


def _phrase(facts: dict) -> str:
    return plain((facts["vocabulary"] or ["red blood cell"])[0]).replace('"', "'")


def write_export_card(folder: Path, facts: dict, origin: Origin) -> None:
    export_card(facts, origin).save(folder / "README.md")
