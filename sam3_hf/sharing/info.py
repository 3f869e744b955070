"""What a checkpoint is and costs, from its headers alone: parts, parameters, bytes, FLOPs, vocabulary, licence."""

from __future__ import annotations

import copy
import os
from collections import Counter

import torch
from huggingface_hub import ModelCard
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import cached_file
from yaml import YAMLError

from ..checkpoints import Checkpoint, open_checkpoint
from ..configuration_sam3_lite import Sam3LiteConfig, context_length
from ..errors import missing_source, named_source
from ..mapping import REPORT_FILE
from ..modeling_sam3_lite import Sam3LiteGeometryEncoder, Sam3LiteModel
from ..sources_sam3_lite import read_json
from .sizes import preset_of, sizes_of, text_encoder_of

# The parts of a model, by the modules they consist of.
PARTS = {
    "vision encoder": ("vision_encoder",),
    "text encoder": ("text_encoder", "text_projection"),
    "vocabulary": ("vocabulary",),
    "geometry encoder": ("geometry_encoder",),
    "DETR encoder": ("detr_encoder",),
    "DETR decoder": ("detr_decoder",),
    "mask decoder": ("mask_decoder",),
    "scoring": ("dot_product_scoring",),
}
# How often each part with FLOPs runs; "phrase": once for each different text, whose features can be kept.
_PER = {"vision encoder": "image", "text encoder": "phrase", "geometry encoder": "prompt with a box"}


def model_info(source: str | os.PathLike, **hub_arguments) -> dict:
    """
    Args:
        source: whatever [`~Sam3LiteModel.from_pretrained`] takes: Hub id, folder, `.pt` or `.safetensors` file.
        hub_arguments: `revision`, `token`, `cache_dir`, ... as in `from_pretrained`.

    Returns:
        A dict that `json` can write:

        - `source`, `license` ("unknown" where no model card says it), `preset` (None where the sizes are no preset's),
          `text_encoder` (what [`~Sam3LiteConfig.from_preset`] calls its `text`, None where there is no preset),
          `dtype`, `vocabulary` (None for a model with a text encoder), `sizes`;
        - `parts`: for each part `parameters`, `bytes` as stored, and, where it computes, `flops` and what they are
          `per`: "image", "prompt", "phrase" or "prompt with a box" (one box);
        - `parameters`, `bytes`: totals of the parts;
        - `flops_per_image`, `flops_per_prompt`: of the first prompt for an image, and of each further one. The
          summary token is of the image, texts are taken as encoded before; a multiplication and an addition are two
          FLOPs;
        - `mapping`: `source`, `strategy` and `totals` of its mapping report, or None. Of the model as it was mapped:
          the totals count a text encoder that a vocabulary has replaced since.

    Raises:
        ValueError: the source is no SAM 3 checkpoint, or incomplete, or its model card cannot be read.
        OSError: there is no such source, or a file is truncated.
    """
    source = os.fspath(source)
    token = hub_arguments.get("token")
    with named_source(source, token):
        checkpoint = open_checkpoint(source, **hub_arguments)
    if checkpoint is None:
        raise missing_source(source, token)
    with torch.device("meta"):
        expected = Sam3LiteModel(copy.deepcopy(checkpoint.config)).state_dict()
    missing = checkpoint.check({name: tuple(tensor.shape) for name, tensor in expected.items()})
    if missing:
        raise ValueError(f"{source} is incomplete: it lacks {len(missing)} tensors, such as `{missing[0]}`.")
    flops = count_flops(checkpoint.config)
    summary = flops.pop("summary token")
    parts = _measure(checkpoint, expected, flops)
    report = _find(source, REPORT_FILE, hub_arguments)
    per_prompt = sum(part["flops"] for part in parts.values() if part.get("per") == "prompt")
    return {
        "source": source,
        "license": _license(source, hub_arguments),
        "preset": preset_of(checkpoint.config),
        "text_encoder": text_encoder_of(checkpoint.config),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "vocabulary": checkpoint.config.vocabulary,
        "sizes": sizes_of(checkpoint.config),
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "flops_per_image": parts["vision encoder"]["flops"] + summary + per_prompt,
        "flops_per_prompt": per_prompt,
        "mapping": report and _mapping(report),
    }


def count_flops(config: Sam3LiteConfig) -> dict[str, int]:
    """
    FLOPs of each part that computes, for one image, one phrase (of as many tokens as the text encoder reads), one
    prompt with text and, for the geometry encoder, one box; and of the summary token of an image, 0 if phrases do not
    get it. Counted on the meta device, without memory for weights.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # whose matrix products every version of PyTorch counts
    hidden, size = config.detr_encoder_config.hidden_size, config.image_size
    tokens = context_length(config.text_config)
    flops = {}
    with torch.device("meta"), torch.no_grad():
        # The counter follows gradients, and stumbles over a module that returns its parameter.
        model = Sam3LiteModel(config).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            vision = model.vision_encoder(torch.zeros(1, 3, size, size))
        flops["vision encoder"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            summary = model.image_summary(vision)
        flops["summary token"] = counter.get_total_flops()
        levels = vision.fpn_hidden_states
        if model.vocabulary is None:
            with FlopCounterMode(display=False) as counter:
                # Not through the text encoder's own forward, which looks at the tokens.
                states = model.text_encoder.encode(torch.zeros(1, tokens, dtype=torch.long))
                model.text_projection(states.last_hidden_state)
            flops["text encoder"] = counter.get_total_flops()
        text, owner = torch.zeros(1, tokens, hidden), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            found = model.detect(levels, owner, text, None, None, None, one_to_many=False, summary=summary)
        for part in ("DETR encoder", "DETR decoder", "scoring"):
            (module,) = PARTS[part]
            flops[part] = sum(counter.get_flop_counts()[type(getattr(model, module)).__name__].values())
        with FlopCounterMode(display=False) as counter:
            pixels = model.mask_decoder(levels, found.encoded, owner, found.prompt_features, None)
            model.mask_decoder.masks(found.queries, pixels)
            model.mask_decoder.semantic_projection(pixels)
        flops["mask decoder"] = counter.get_total_flops()
    return flops | {"geometry encoder": _geometry_flops(config)}


@torch.no_grad()
def _geometry_flops(config: Sam3LiteConfig) -> int:
    """Of one box. Run in earnest, as `autocast`, which it enters, knows no meta device; it is small."""
    part, side = config.geometry_encoder_config, config.vision_config.backbone_feature_sizes[-1][0]
    part._attn_implementation = "eager"
    encoder = Sam3LiteGeometryEncoder(part).eval()
    boxes, labels = torch.full((1, 1, 4), 0.5), torch.ones(1, 1, dtype=torch.long)
    vision = torch.zeros(1, part.hidden_size, side, side)
    with FlopCounterMode(display=False) as counter:
        encoder(boxes, labels, vision, vision.flatten(2).transpose(1, 2), torch.zeros(1, dtype=torch.long))
    return counter.get_total_flops()


def _measure(checkpoint: Checkpoint, expected: dict[str, torch.Tensor], flops: dict[str, int]) -> dict[str, dict]:
    parameters, sizes = Counter(), Counter()
    for name in expected:
        part = next(part for part, modules in PARTS.items() if name.split(".")[0] in modules)
        tensor = checkpoint.read(name)  # mapped, so that no weight leaves the disk
        parameters[part] += tensor.numel()
        sizes[part] += tensor.nbytes
    parts = {part: {"parameters": parameters[part], "bytes": sizes[part]} for part in PARTS if part in parameters}
    for part, count in flops.items():
        parts[part] |= {"flops": count, "per": _PER.get(part, "prompt")}
    return parts


def _find(source: str, name: str, hub_arguments: dict) -> str | None:
    """Path of a file of a folder or Hub repository, None if it has none."""
    if os.path.isfile(source):
        return None
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub_arguments)


def _mapping(path: str) -> dict:
    report = read_json(path)
    try:
        kept = {key: report[key] for key in ("source", "strategy", "totals")}
        return kept | {"totals": {action: dict(total) for action, total in kept["totals"].items()}}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no mapping report ({error!r}): remove it.") from error


def _license(source: str, hub_arguments: dict) -> str:
    path = _find(source, "README.md", hub_arguments)
    if path is None:
        return "unknown"
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    try:
        fields = ModelCard(text, ignore_metadata_errors=True).data
    except YAMLError as error:
        raise ValueError(f"README.md of {source} has no valid YAML at its head: {error}") from error
    return fields.get("license_name") or fields.license or "unknown"


__all__ = ["count_flops", "model_info"]
