"""Text encoder of SAM 3 Lite."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPPreTrainedModel

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
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                "`input_ids` and `attention_mask` differ in number of prompts or tokens: "
                f"{tuple(input_ids.shape)} and {tuple(attention_mask.shape)}."
            )
        num_tokens = input_ids.shape[1]
        different, row = torch.stack([input_ids, attention_mask.to(input_ids.dtype)], 1).unique(
            dim=0, return_inverse=True
        )
        positions = torch.arange(1, num_tokens + 1, device=input_ids.device)
        longest = int((positions * (different[:, 1] != 0)).max())
        length = min(-(-longest // TOKEN_BLOCK) * TOKEN_BLOCK, num_tokens)
        outputs = self.text_model(input_ids=different[:, 0, :length])
        return BaseModelOutputWithPooling(
            last_hidden_state=F.pad(outputs.last_hidden_state, (0, 0, 0, num_tokens - length))[row],
            pooler_output=outputs.pooler_output[row],
        )
