"""A smaller text encoder of CLIP's kind, fitted to what the larger one says of phrases: no pictures, no labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from ..checkpoints import CLIP, Checkpoint
from ..checkpoints.text_encoder import read_text, text_parts
from ..configuration_sam3_lite import Sam3LiteConfig
from ..phrases import everyday_phrases, hold_out
from ..processing_sam3_lite import tokenize
from .basis import Basis, rotation
from .depth import layer_maps, search_layers
from .least_squares import LeastSquares
from .mapper import map_checkpoint
from .measure import measure_signals
from .refit import CLIP_SITES, Stack, refit_stack
from .report import MappingReport
from .towers import has_clip, text_tower

logger = logging.get_logger(__name__)

TEXT_LAYERS = f"{CLIP}.encoder.layers"
RIDGE = 1e-2  # pull to the mapped weights, in units of the mean variance of a layer's inputs
PHRASES_AT_ONCE = 256
CHOICES = 8  # of layers that are tried at most; each is one fit of the text encoder to a sample of the phrases
SAMPLE = 600  # phrases that are enough to choose layers, heads, neurons and directions by


def fits_text(source: Sam3LiteConfig, target: Sam3LiteConfig) -> bool:
    """Whether a mapping makes a text encoder of CLIP's kind smaller."""
    if not (has_clip(source) and has_clip(target)) or source.vocabulary is not None or target.vocabulary is not None:
        return False
    old, new = text_tower(source), text_tower(target)
    return (old.width, old.mlp, old.depth) != (new.width, new.mlp, new.depth)


@torch.no_grad()
def map_with_phrases(
    checkpoint: Checkpoint,
    config: Sam3LiteConfig,
    shapes: dict[str, tuple[int, ...]],
    tokenizer,
    phrases: Sequence[str] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options,
) -> tuple[dict[str, Tensor], MappingReport]:
    """
    As [`map_checkpoint`] by `isometry`, but the text encoder, which becomes smaller, is fitted to phrases.

    Its stream is rotated into the strongest directions that the phrases show, and other choices of layers than evenly
    spread ones are tried. Then, layer by layer on the smaller encoder's own activations, what writes to the stream is
    fitted by ridge regression to the larger one's stream, and the projection behind it to the larger one's features.

    Args:
        tokenizer: of the checkpoint.
        phrases: by default everyday ones. An eighth of them is held out, to measure.
        device: where to compute the fit.
        options: further ones of [`map_checkpoint`].

    Returns:
        As there; `calibration["text"]` of the report has the cosine between the features of both for the phrases that
        were held out, mean over their tokens.

    Raises:
        ValueError: as there, or there are less than two phrases.
    """
    fitted, held_out = hold_out(everyday_phrases() if phrases is None else list(dict.fromkeys(phrases)))
    start = layer_maps(checkpoint.config, config)[TEXT_LAYERS]  # raises what can be said before the work
    sample = fitted[:: max(len(fitted) // SAMPLE, 1)]
    batches = ([ids.to(device) for ids in batches_of(tokenizer, part)] for part in (sample, held_out))
    fit = _TextFit(checkpoint, config, *batches)
    kept, tried = fit.choose_layers(start, shapes)
    layers = options.pop("layers", None) or {}
    state, report = map_checkpoint(
        checkpoint,
        config,
        shapes,
        "isometry",
        dtype=dtype,
        text_signals=fit.signals,
        layers={TEXT_LAYERS: kept, **layers},
        **options,
    )
    before, after = fit.refit_state(state, kept, [ids.to(device) for ids in batches_of(tokenizer, fitted)])
    report.mark_refit([f"{TEXT_LAYERS}.0.{site.linear}" for site in CLIP_SITES] + ["text_projection"])
    report.calibration["text"] = {
        "phrases": "everyday" if phrases is None else "given",
        "phrases_fitted": len(fitted),
        "phrases_held_out": len(held_out),
        "cosine": after,
        "cosine_before_fit": before,
        "layer_choices_tried": tried,
        "stream_energy_kept": fit.basis.energy,
    }
    return state, report


def batches_of(tokenizer, phrases: Sequence[str]) -> list[Tensor]:
    """Tokens `(phrases, tokens)` of phrases of the same length each, so that there is no padding."""
    tokens = tokenize(tokenizer, list(phrases))
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(1)
    return [
        batch
        for length in lengths.unique().tolist()
        for batch in ids[lengths == length, :length].split(PHRASES_AT_ONCE)
    ]


class _Side:
    """One of the two text encoders: its layers one by one, on tokens without padding."""

    def __init__(self, parts: nn.ModuleDict):
        self.parts, self.text = parts, parts["text_encoder"].text_model

    def stack(self, batches: list[Tensor]) -> Stack:
        """The layers, with the streams `(phrases, tokens, width)` of some tokens in front of the first."""
        return Stack(self.text.encoder.layers, _run, [self.text.embeddings(input_ids=ids) for ids in batches])

    def features(self, stream: Tensor) -> Tensor:
        """`(phrases, tokens, hidden)` of the stream behind the last layer."""
        return self.parts["text_projection"](self.text.final_layer_norm(stream))

    def run(self, ids: Tensor) -> Tensor:
        """The stream behind the last layer."""
        stack = self.stack([ids])
        stack.pass_layers(0, len(stack.layers))
        return stack.streams[0]


class _TextFit:
    """
    The steps of [`map_with_phrases`].

    Args:
        sample, held_out: tokens of phrases, by [`batches_of`]; on their device all is computed.
    """

    def __init__(self, checkpoint: Checkpoint, config: Sam3LiteConfig, sample: list[Tensor], held_out: list[Tensor]):
        self.checkpoint, self.config, self.sample, self.held_out = checkpoint, config, sample, held_out
        self.device = sample[0].device
        self.teacher = _Side(read_text(checkpoint).to(self.device))
        tower = text_tower(checkpoint.config)
        runs: list[Callable[[], Tensor]] = [lambda ids=ids: self.teacher.run(ids) for ids in sample]
        layers = self.teacher.text.encoder.layers
        self.signals = measure_signals(layers, f"{tower.attention}.{tower.out_proj}", tower.heads, runs)
        self.wanted = [self.teacher.features(self.teacher.run(ids)) for ids in held_out]
        width = text_tower(config).width
        self.basis = Basis()
        if width < tower.width:
            basis = rotation(self.signals.moment, width)
            self.basis = replace(basis, matrix=basis.matrix.to(self.device))

    def choose_layers(self, start: list[int], shapes: dict[str, tuple[int, ...]]) -> tuple[list[int], int]:
        """The layers to keep, and how many choices were tried: the even spread, `start`, is improved."""
        types = [False] * len(self.teacher.text.encoder.layers)
        if len(start) == len(types):
            return start, 0
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(("text_encoder", "text_proj"))}

        def score(kept: list[int]) -> float:
            state, _ = map_checkpoint(
                self.checkpoint,
                self.config,
                shapes,
                "isometry",
                text_signals=self.signals,
                layers={TEXT_LAYERS: kept},
            )
            _, cosine = self.refit_state(state, kept, self.sample)
            logger.info(f"text layers {kept}: cosine {cosine:.4f}")
            return cosine

        best, tried = search_layers(start, types, score, limit=CHOICES)
        return best, len(tried)

    def refit_state(self, state: dict[str, Tensor], kept: list[int], batches: list[Tensor]) -> tuple[float, float]:
        """
        Refits the text encoder within the parameters of the model, in place.

        Returns:
            The cosine of [`map_with_phrases`] before and after.

        Raises:
            ValueError: a value is beyond the dtype of the parameters.
        """
        parts = text_parts(self.config.text_config, self.config.detr_encoder_config.hidden_size).eval()
        parts.load_state_dict({name: state[name] for name in parts.state_dict()})
        parts.to(self.device)
        student = _Side(parts)
        before = self.cosine(student)
        stacks = student.stack(batches), self.teacher.stack(batches)
        refit_stack(*stacks, kept, CLIP_SITES, self.basis.write_stream, RIDGE)
        projection = parts["text_projection"]
        fit = LeastSquares(projection.in_features, projection.out_features, projection.weight.device)
        for own, theirs in zip(*(stack.streams for stack in stacks), strict=True):
            fit.add(student.text.final_layer_norm(own), self.teacher.features(theirs))
        fit.refit(projection, RIDGE)
        for name, tensor in parts.state_dict().items():
            if not state[name].copy_(tensor).isfinite().all():
                raise ValueError(f"`{name}` does not fit into {state[name].dtype} after its fit: use another `dtype`.")
        return before, self.cosine(student)

    def cosine(self, student: _Side) -> float:
        cosines = [
            F.cosine_similarity(student.features(student.run(ids)), wanted, dim=-1).flatten()
            for ids, wanted in zip(self.held_out, self.wanted, strict=True)
        ]
        return torch.cat(cosines).mean().item()


def _run(layer: nn.Module, stream: Tensor, _: int) -> Tensor:
    """A layer on `(phrases, tokens, width)`, where no token sees what comes after it."""
    length = stream.shape[1]
    hidden = torch.full((length, length), float("-inf"), dtype=stream.dtype, device=stream.device).triu(1)
    return layer(stream, attention_mask=hidden[None, None])


__all__ = ["fits_text", "map_with_phrases"]
