"""The text encoder of a checkpoint, for a model that has stored phrases in its place."""

import copy
import os

import torch
from torch import nn
from transformers import initialization as init

from ..errors import missing_source, named_source
from ..text_sam3_lite import build_text_encoder
from ..vocabulary_sam3_lite import Sam3LiteVocabulary
from .checkpoint import Checkpoint
from .opening import open_checkpoint

# Largest relative difference of text features that rounding explains, half precision at both ends included. Those of
# other weights differ by about as much as they are large.
SAME_FEATURES = 0.05


def read_text_encoder(source: str | os.PathLike, model, **hub_arguments) -> tuple[nn.Module, nn.Linear]:
    """
    See [`~Sam3LiteModel.restore_text_encoder`].

    Args:
        model: with a fixed vocabulary, whose features the encoder must give.

    Returns:
        Encoder and projection, on the device and in the precision of the model.
    """
    token = hub_arguments.get("token")
    with named_source(source, token):
        checkpoint = open_checkpoint(source, **hub_arguments)
    if checkpoint is None:
        raise missing_source(source, token)
    if checkpoint.config.vocabulary is not None:
        raise ValueError(f"{source} has a fixed vocabulary and no text encoder either: name a complete model.")
    width, hidden_size = (c.detr_encoder_config.hidden_size for c in (checkpoint.config, model.config))
    if width != hidden_size:
        raise ValueError(f"{source} projects its text to {width} channels, this model needs {hidden_size}.")
    text_config = copy.deepcopy(checkpoint.config.text_config)
    text_config._attn_implementation = model.config.text_config._attn_implementation
    if text_config.vocab_size != model.config.text_config.vocab_size:
        raise ValueError(
            f"{source} has a tokenizer of {text_config.vocab_size} tokens, this model one of "
            f"{model.config.text_config.vocab_size}."
        )
    parts = read_text(checkpoint, text_config)
    encoder, projection = parts["text_encoder"], parts["text_projection"]
    parts.to(model.device).train(model.training)
    _check_features(source, model.vocabulary, encoder, projection)
    parts.to(model.dtype)
    return encoder, projection


def text_parts(text_config, hidden_size: int) -> nn.ModuleDict:
    """
    A text encoder and its projection under their names in the model, in float32, without values.

    Args:
        hidden_size: width of the detector.
    """
    with init.no_init_weights():
        encoder = build_text_encoder(copy.deepcopy(text_config))
        projection = nn.Linear(text_config.hidden_size, hidden_size)
    return nn.ModuleDict({"text_encoder": encoder, "text_projection": projection})


def read_text(checkpoint: Checkpoint, text_config=None) -> nn.ModuleDict:
    """
    The text encoder and projection of a checkpoint, in float32.

    Args:
        text_config: that of the checkpoint by default.

    Raises:
        ValueError: the checkpoint lacks a tensor of them, or has it in another size than its configuration says.
    """
    parts = text_parts(text_config or checkpoint.config.text_config, checkpoint.config.detr_encoder_config.hidden_size)
    missing = checkpoint.check({name: tensor.shape for name, tensor in parts.state_dict().items()})
    if missing:
        raise ValueError(f"{checkpoint.label} has no whole text encoder: it lacks {', '.join(missing[:4])}.")
    parts.load_state_dict({name: checkpoint.read(name) for name in parts.state_dict()})
    return parts.eval()


@torch.no_grad()
def _check_features(source, stored: Sam3LiteVocabulary, encoder: nn.Module, projection: nn.Linear):
    valid = stored.attention_mask.bool()
    features = projection(encoder(stored.input_ids, stored.attention_mask).last_hidden_state)[valid]
    difference = (features - stored.features[valid].float()).norm() / features.norm()
    if not difference <= SAME_FEATURES:
        raise ValueError(
            f"The text encoder of {source} is not the one that the vocabulary was made with: its features of the "
            f"same phrases differ by {difference:.0%} (at most {SAME_FEATURES:.0%} may be rounding)."
        )
