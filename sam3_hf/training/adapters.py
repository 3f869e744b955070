"""Adapters: a low-rank product beside each of some linear layers trains, through peft; all else stands still."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..modeling_sam3_lite import Sam3LiteModel
from ..sources_sam3_lite import ADAPTER_WEIGHTS
from .adapter_arguments import AdapterArguments
from .sharded import part_like

logger = logging.getLogger(__name__)

# Layers that are only ever called. Of others the model reads the weights itself, as of the convolutions of the mask
# head, where an adapter would be passed by.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
DETECTOR = ("geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
VISION = "vision_encoder"
PARTS = {"detector": DETECTOR, "vision": (VISION,), "all": (*DETECTOR, VISION)}


def check_adapters(settings: AdapterArguments) -> None:
    """
    Raises:
        ImportError: peft is needed and not installed.
    """
    if not settings.lora_rank:
        return
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError('peft is not installed; lora_rank needs pip install "sam3-hf[lora]".') from error


def target_pattern(targets: str) -> str:
    """A regular expression for the whole names of the layers that `--lora_targets` means, in any of our models."""
    plain = rf"(?:{'|'.join(PARTS.get(targets, PARTS['all']))})\.(?:.*\.)?(?:{'|'.join(LAYERS)})"
    return plain if targets in PARTS else rf"(?=(?:{targets})$){plain}"


def add_adapters(model: Sam3LiteModel, settings: AdapterArguments) -> None:
    """
    Puts adapters beside the chosen layers, which change nothing before their first step, and freezes the model.

    Args:
        model: in float32.

    Raises:
        ValueError: the model is in half precision, or no layer is chosen.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if model.dtype != torch.float32:
        raise ValueError(
            f"adapters train beside float32 weights, and the model is in {str(model.dtype).removeprefix('torch.')}: "
            'load it with dtype="float32"; --mixed_precision fp16 then computes in half precision'
        )
    targets = settings.lora_targets or "detector"
    pattern = target_pattern(targets)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = [name for name in linear if re.fullmatch(pattern, name)]
    if not chosen:
        there = [name for name in linear if re.fullmatch(target_pattern("all"), name)]
        kinds = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name in there)
        raise ValueError(
            f"lora_targets {targets!r} is the whole name of no layer that takes an adapter: choose detector, vision, "
            f"all, or from {', '.join(kinds)}"
        )
    alpha = settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=alpha,
        lora_dropout=settings.lora_dropout or 0.0,
        target_modules=pattern,  # not a list of names, which peft would shorten until they fit the text encoder too
    )
    # What `model.add_adapter` does, behind a check of versions: some of Transformers want a peft that is not out yet.
    inject_adapter_in_model(config, model)
    for layer in adapted_layers(model).values():
        layer.cast_input_dtype_enabled = False  # autocast does it, without a second copy for the backward pass
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("adapters of rank %d on %d layers: %.2f M of weights train", config.r, len(chosen), trained / 1e6)


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter by their names; none in a model that trains as a whole."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def trains_vision(model: nn.Module) -> bool:
    """Whether any weight of the vision encoder trains."""
    return any(parameter.requires_grad for parameter in model.vision_encoder.parameters())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the adapters by the names that the model in training has for them; empty if it has none."""
    layers = adapted_layers(model)
    return {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if key.startswith("lora_")
    }


def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """
    Args:
        state: whole tensors, also where the model is in parts.

    Raises:
        ValueError: it is that of other adapters.
    """
    present = adapter_state(model)
    odd = sorted(state.keys() ^ present.keys())
    if odd:
        raise ValueError(f"the checkpoint holds other adapters than this run trains: {odd[:5]}")
    model.load_state_dict({name: part_like(value, present[name]) for name, value in state.items()}, strict=False)


@torch.no_grad()
def plain_weights(model: nn.Module, state: dict[str, Tensor], merge: bool) -> dict[str, Tensor]:
    """
    The weights by the names that they have in a model without adapters.

    Args:
        state: that of the model, in whole tensors.
        merge: add to them what the adapters have learnt.
    """
    weights = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, layer in adapted_layers(model).items() if merge else ():
        (adapter,) = layer.lora_A
        down, up = (state[f"{name}.lora_{side}.{adapter}.weight"] for side in "AB")
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.scaling[adapter] * (up @ down)
    return weights


def save_adapter(model: nn.Module, state: dict[str, Tensor], folder: Path, base: str) -> None:
    """
    Writes the adapter as `PeftModel.from_pretrained` and `model.load_adapter` read it.

    Args:
        state: that of the model, in whole tensors.
        base: folder or repository of the model that it belongs to.
    """
    from peft import get_peft_model_state_dict

    ((name, config),) = model.peft_config.items()
    config = copy.copy(config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(folder)
    own = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    weights = {f"base_model.model.{key}": value.cpu().contiguous() for key, value in own.items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
