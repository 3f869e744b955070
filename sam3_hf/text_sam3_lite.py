"""Text encoders of SAM 3 Lite: CLIP's, as in SAM 3, and those of SAM3-LiteText."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextTextModel

from .configuration_sam3_lite import context_length
from .presets_sam3_lite import LITE_TEXT

# Text is encoded in whole blocks of tokens, which matrix products on GPUs want.
TOKEN_BLOCK = 8


class Sam3LiteTextEncoder(CLIPPreTrainedModel):
    """CLIP text transformer under the parameter names of `Sam3Model`, without the projection SAM 3 never reads."""

    base_model_prefix = "text_model"

    def __init__(self, config):
        super().__init__(config)
        # Without a dtype it would be that of the file the config was read from, whatever the rest of the model is in.
        self.text_model = CLIPTextModel._from_config(config, dtype=torch.get_default_dtype())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.embeddings.token_embedding = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids, attention_mask: `(prompts, tokens)` int, padding at the end. No token sees what comes after it,
                so the mask only tells which states are wanted.

        Returns:
            `last_hidden_state` `(prompts, tokens, hidden)` and `pooler_output` `(prompts, hidden)`. Prompts that are
            alike are encoded once, and what is padding in all of them not at all: there, states are zero.

        Raises:
            ValueError: the two differ in shape.
        """
        num_tokens = input_ids.shape[1]
        input_ids, _, row, lengths = _distinct(input_ids, attention_mask)
        length = min(-(-int(lengths.max()) // TOKEN_BLOCK) * TOKEN_BLOCK, num_tokens)
        outputs = self.encode(input_ids[:, :length])
        return BaseModelOutputWithPooling(
            last_hidden_state=F.pad(outputs.last_hidden_state, (0, 0, 0, num_tokens - length))[row],
            pooler_output=outputs.pooler_output[row],
        )

    def encode(self, input_ids: Tensor) -> BaseModelOutputWithPooling:
        """The transformer on tokens as they are: `(prompts, tokens)` int, without a look at their values."""
        return self.text_model(input_ids=input_ids)


class Sam3LiteMobileTextEncoder(Sam3LiteTextTextModel):
    """
    MobileCLIP text transformer of SAM3-LiteText under the parameter names of `Sam3LiteTextModel`, without the
    projection of the pooled state that SAM 3 never reads.

    Every token sees all others, the convolutions of the smallest see padding as well, and positions are resized to the
    number of tokens. So it always runs on as many as it was trained with ([`context_length`]), all padding the same:
    what it says of a phrase does not depend on how, or with which other phrases, that was padded.
    """

    _no_split_modules = ["Sam3LiteTextTextEncoderLayer", "Sam3LiteTextRepMixerBlock"]

    def __init__(self, config):
        super().__init__(config)
        self.projection = nn.Identity()

    def _init_weights(self, module: nn.Module):
        if module is not self:  # whose projection Transformers would initialise
            super()._init_weights(module)

    def train(self, mode: bool = True) -> Sam3LiteMobileTextEncoder:
        """As [`~torch.nn.Module.train`]; statistics of BatchNorms stay, or phrases would depend on their batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Module):
        self.embeddings.token_embedding = value

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids, attention_mask: `(prompts, tokens)` int, padding at the end, of which any amount will do.

        Returns:
            `last_hidden_state` `(prompts, tokens, hidden)` and `pooler_output` `(prompts, hidden)`. Prompts that are
            alike are encoded once. States of tokens beyond [`context_length`] are zero.

        Raises:
            ValueError: the two differ in shape, or a prompt has more tokens than the encoder reads.
        """
        num_tokens, context = input_ids.shape[1], context_length(self.config)
        input_ids, attention_mask, row, lengths = _distinct(input_ids, attention_mask)
        if int(lengths.max()) > context:
            raise ValueError(
                f"A prompt has {int(lengths.max())} tokens, this text encoder reads {context}: make prompts with the "
                "`Sam3LiteProcessor` of the model, which cuts them, and pass their `attention_mask`."
            )
        more = context - num_tokens  # negative: so many are cut
        positions = torch.arange(context, device=input_ids.device)
        # CLIP's tokenizer pads with the end of text, the last of its tokens; other padding reads the same here.
        input_ids = F.pad(input_ids, (0, more)).where(positions < lengths[:, None], self.config.vocab_size - 1)
        outputs = self.encode(input_ids, F.pad(attention_mask, (0, more)))
        return BaseModelOutputWithPooling(
            last_hidden_state=F.pad(outputs.last_hidden_state, (0, 0, 0, -more))[row],
            pooler_output=outputs.pooler_output[row],
        )

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """The transformer on tokens as they are: `(prompts, tokens)` int, without a look at their values."""
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def build_text_encoder(config) -> Sam3LiteTextEncoder | Sam3LiteMobileTextEncoder:
    """The text encoder of a `text_config`."""
    return (Sam3LiteMobileTextEncoder if config.model_type == LITE_TEXT else Sam3LiteTextEncoder)(config)


def _distinct(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    Prompts without repetitions.

    Returns:
        `input_ids` and `attention_mask` of each different prompt; the row of each prompt among them; and the place
        after the last token of each that is no padding.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            "`input_ids` and `attention_mask` differ in number of prompts or tokens: "
            f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}."
        )
    different, row = torch.stack([input_ids, attention_mask.to(input_ids.dtype)], 1).unique(dim=0, return_inverse=True)
    input_ids, attention_mask = different.unbind(1)
    positions = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
    return input_ids, attention_mask, row, (positions * (attention_mask != 0)).amax(1)
