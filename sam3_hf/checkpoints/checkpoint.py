"""SAM 3 checkpoints of every origin under one set of names: Transformers, Meta's native files, and back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Sam3Config, Sam3VideoConfig
from transformers.utils import (
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)

from ..configuration_sam3_lite import VIT_LAYER_NORM_EPS, Sam3LiteConfig, spread_global_layers
from ..sources_sam3_lite import config_fields, is_training_checkpoint, safe_weights
from ..vocabulary_sam3_lite import BUFFERS

logger = logging.get_logger(__name__)

# A source that holds a smaller share of the tensors it should is refused.
MIN_IDENTIFIED = 0.9
# Bytes to read from a file before it is mapped anew: pages that were read stay in memory as long as their mapping.
MAX_MAPPED = 64 * 2**20
# Name of Meta's own file in the Hub repository of SAM 3.
NATIVE_FILE = "sam3.pt"
# What `training/train.py` writes into a checkpoint folder beside its weights. The folder has no text tensors among the
# weights where that part was frozen, and their average only if the run kept one.
FROZEN_TEXT = "frozen_text.safetensors"
AVERAGE = "ema.safetensors"
# Where the models of a run are in its output folder.
_RUN_FOLDERS = ("final", "checkpoints/best", "checkpoints/last", "best", "last")


@dataclass(frozen=True)
class Names:
    """
    One row of the name table. `{i}` stands for a layer index, `{leaf}` for `weight` or `bias`, `{qkv}` in a
    Transformers name for the letters q, k, v of the three tensors that Meta stores as one, stacked on dimension 0.
    """

    native: str
    transformers: str
    form: str = "same"  # or "fused", "transposed", "class_token" (Meta keeps the row of a class token in front)


_TRUNK = "backbone.vision_backbone.trunk"
_CONVS = "backbone.vision_backbone.convs"
_TEXT = "backbone.language_backbone"
_DECODER = "transformer.decoder"
_VIT = "vision_encoder.backbone"
_NECK = "vision_encoder.neck.fpn_layers"
_CLIP = "text_encoder.text_model"


def _modules(native: str, transformers: str, pairs: dict[str, str]) -> list[Names]:
    return [Names(f"{native}.{a}.{{leaf}}", f"{transformers}.{b}.{{leaf}}") for a, b in pairs.items()]


def _attention(native: str, transformers: str, out_proj: str = "o_proj") -> list[Names]:
    return [
        Names(f"{native}.in_proj_{{leaf}}", f"{transformers}.{{qkv}}_proj.{{leaf}}", "fused"),
        Names(f"{native}.out_proj.{{leaf}}", f"{transformers}.{out_proj}.{{leaf}}"),
    ]


def _mlp(native: str, transformers: str, count: int) -> list[Names]:
    return _modules(f"{native}.layers", transformers, {str(i): f"layer{i + 1}" for i in range(count)})


_FFN = {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
_THREE_NORMS = {"norm1": "layer_norm1", "norm2": "layer_norm2", "norm3": "layer_norm3"}

NAME_TABLE: tuple[Names, ...] = (
    # vision encoder
    Names(f"{_TRUNK}.pos_embed", f"{_VIT}.embeddings.position_embeddings", "class_token"),
    Names(f"{_TRUNK}.blocks.{{i}}.attn.qkv.{{leaf}}", f"{_VIT}.layers.{{i}}.attention.{{qkv}}_proj.{{leaf}}", "fused"),
    *_modules(_TRUNK, _VIT, {"patch_embed.proj": "embeddings.patch_embeddings.projection", "ln_pre": "layer_norm"}),
    *_modules(
        f"{_TRUNK}.blocks.{{i}}",
        f"{_VIT}.layers.{{i}}",
        {
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn.proj": "attention.o_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        },
    ),
    *_modules(
        _CONVS,
        _NECK,
        {
            "0.dconv_2x2_0": "0.scale_layers.0",
            "0.dconv_2x2_1": "0.scale_layers.2",
            "1.dconv_2x2": "1.scale_layers.0",
            "{i}.conv_1x1": "{i}.proj1",
            "{i}.conv_3x3": "{i}.proj2",
        },
    ),
    # text encoder
    Names(f"{_TEXT}.encoder.positional_embedding", f"{_CLIP}.embeddings.position_embedding.weight"),
    Names(f"{_TEXT}.encoder.text_projection", "text_encoder.text_projection.weight", "transposed"),
    *_modules(
        f"{_TEXT}.encoder", _CLIP, {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm"}
    ),
    *_attention(
        f"{_TEXT}.encoder.transformer.resblocks.{{i}}.attn", f"{_CLIP}.encoder.layers.{{i}}.self_attn", "out_proj"
    ),
    *_modules(
        f"{_TEXT}.encoder.transformer.resblocks.{{i}}",
        f"{_CLIP}.encoder.layers.{{i}}",
        {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"},
    ),
    Names(f"{_TEXT}.resizer.{{leaf}}", "text_projection.{leaf}"),
    # geometry encoder
    *_modules(
        "geometry_encoder",
        "geometry_encoder",
        {
            "label_embed": "label_embed",
            "cls_embed": "cls_embed",
            "boxes_direct_project": "boxes_direct_project",
            "boxes_pool_project": "boxes_pool_project",
            "boxes_pos_enc_project": "boxes_pos_enc_project",
            "final_proj": "final_proj",
            "img_pre_norm": "vision_layer_norm",
            "norm": "prompt_layer_norm",
            "encode_norm": "output_layer_norm",
        },
    ),
    *_attention("geometry_encoder.encode.{i}.self_attn", "geometry_encoder.layers.{i}.self_attn"),
    *_attention("geometry_encoder.encode.{i}.cross_attn_image", "geometry_encoder.layers.{i}.cross_attn"),
    *_modules("geometry_encoder.encode.{i}", "geometry_encoder.layers.{i}", {**_FFN, **_THREE_NORMS}),
    # DETR encoder
    *_attention("transformer.encoder.layers.{i}.self_attn", "detr_encoder.layers.{i}.self_attn"),
    *_attention("transformer.encoder.layers.{i}.cross_attn_image", "detr_encoder.layers.{i}.cross_attn"),
    *_modules("transformer.encoder.layers.{i}", "detr_encoder.layers.{i}", {**_FFN, **_THREE_NORMS}),
    # DETR decoder
    *_attention(f"{_DECODER}.layers.{{i}}.self_attn", "detr_decoder.layers.{i}.self_attn"),
    *_attention(f"{_DECODER}.layers.{{i}}.ca_text", "detr_decoder.layers.{i}.text_cross_attn"),
    *_attention(f"{_DECODER}.layers.{{i}}.cross_attn", "detr_decoder.layers.{i}.vision_cross_attn"),
    *_modules(
        f"{_DECODER}.layers.{{i}}",
        "detr_decoder.layers.{i}",
        {
            **_FFN,
            "norm1": "vision_cross_attn_layer_norm",
            "catext_norm": "text_cross_attn_layer_norm",
            "norm2": "self_attn_layer_norm",
            "norm3": "mlp_layer_norm",
        },
    ),
    *_modules(
        _DECODER,
        "detr_decoder",
        {
            "norm": "output_layer_norm",
            "presence_token_out_norm": "presence_layer_norm",
            "query_embed": "query_embed",
            "reference_points": "reference_points",
            "presence_token": "presence_token",
        },
    ),
    *_mlp(f"{_DECODER}.bbox_embed", "detr_decoder.box_head", 3),
    *_mlp(f"{_DECODER}.presence_token_head", "detr_decoder.presence_head", 3),
    *_mlp(f"{_DECODER}.ref_point_head", "detr_decoder.ref_point_head", 2),
    *_mlp(f"{_DECODER}.boxRPB_embed_x", "detr_decoder.box_rpb_embed_x", 2),
    *_mlp(f"{_DECODER}.boxRPB_embed_y", "detr_decoder.box_rpb_embed_y", 2),
    # scores and masks
    *_mlp("dot_prod_scoring.prompt_mlp", "dot_product_scoring.text_mlp", 2),
    *_modules(
        "dot_prod_scoring",
        "dot_product_scoring",
        {"prompt_mlp.out_norm": "text_mlp_out_norm", "prompt_proj": "text_proj", "hs_proj": "query_proj"},
    ),
    *_attention("segmentation_head.cross_attend_prompt", "mask_decoder.prompt_cross_attn"),
    *_modules(
        "segmentation_head",
        "mask_decoder",
        {
            "cross_attn_norm": "prompt_cross_attn_norm",
            "pixel_decoder.conv_layers.{i}": "pixel_decoder.conv_layers.{i}",
            "pixel_decoder.norms.{i}": "pixel_decoder.norms.{i}",
            "mask_predictor.mask_embed.layers.{i}": "mask_embedder.layers.{i}",
            "instance_seg_head": "instance_projection",
            "semantic_seg_head": "semantic_projection",
        },
    ),
)

# What a SAM 3 file may hold beside the detector's parameters, and why it is left behind.
DROPPED = (
    (r"(module\.)?(tracker|tracker_model|tracker_neck|inst_interactive_predictor)\.", "video tracker"),
    (r".*\bsam2_convs\.", "neck of the tracker"),
    (r".*\.(freqs_cis|freqs_cis_real|freqs_cis_imag|attn_mask)$", "table that the model computes"),
    (r".*\bgeometry_encoder\.points_", "point prompts, which the detector does not take"),
)
# Parameters of the standard model that no output depends on; a lite model does not have them.
UNREAD = (
    r"vision_encoder\.neck\.fpn_layers\.3\.",
    r"text_encoder\.text_projection\.",
    r"mask_decoder\.pixel_decoder\.(conv_layers|norms)\.2\.",
)
# Prefixes under which the detector's tensors are found.
_PREFIXES = ("", "detector_model.", "detector.", "module.", "module.detector.", "model.", "model.detector.")


def _pattern(template: str) -> re.Pattern:
    escaped = re.escape(template)
    for field, group in (("i", r"(?P<i>\d+)"), ("leaf", "(?P<leaf>weight|bias)"), ("qkv", "(?P<qkv>[qkv])")):
        escaped = escaped.replace(rf"\{{{field}\}}", group)
    return re.compile(escaped)


_NATIVE_PATTERNS = [(_pattern(row.native), row) for row in NAME_TABLE]
_TRANSFORMERS_PATTERNS = [(_pattern(row.transformers), row) for row in NAME_TABLE]


@dataclass(frozen=True)
class Stored:
    """Where a parameter is found in a file: the stored name, and how the stored tensor differs from the parameter."""

    name: str
    form: str = "same"
    part: int = 0  # of a fused tensor: 0, 1, 2 for q, k, v

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the parameter, from the shape of the stored tensor."""
        if self.form == "fused":
            return (stored[0] // 3, *stored[1:])
        if self.form == "transposed":
            return tuple(reversed(stored))
        if self.form == "class_token":
            return (stored[0], stored[1] - 1, *stored[2:])
        return tuple(stored)

    def take(self, stored: Tensor) -> Tensor:
        """The parameter, from the stored tensor."""
        if self.form == "fused":
            return stored.chunk(3)[self.part]
        if self.form == "transposed":
            return stored.T
        if self.form == "class_token":
            return stored[:, 1:]
        return stored


def from_native(name: str) -> dict[str, Stored]:
    """
    Transformers names of what Meta stores as `name` (three for fused attention projections), each with the way to
    take it out. Empty where the table has no such name.
    """
    for pattern, row in _NATIVE_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            letters = "qkv" if row.form == "fused" else " "
            fields = match.groupdict()
            return {
                row.transformers.format(**fields, qkv=letter): Stored(name, row.form, part)
                for part, letter in enumerate(letters)
            }
    return {}


def to_native(name: str) -> Stored | None:
    """Where Meta stores the parameter that Transformers calls `name`: the inverse of [`from_native`]."""
    for pattern, row in _TRANSFORMERS_PATTERNS:
        match = pattern.fullmatch(name)
        if match:
            fields = match.groupdict()
            part = "qkv".index(fields["qkv"]) if row.form == "fused" else 0
            return Stored(row.native.format(**fields), row.form, part)
    return None


def native_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    Renames parameters from Transformers' names to Meta's.

    Args:
        state_dict: parameters of a [`Sam3LiteModel`] or `Sam3Model`.

    Returns:
        The same under Meta's names, attention projections fused. Meta's model never reads the row of the class token
        of its position embedding; it is zero.

    Raises:
        ValueError: a name that the table does not have, or one of three attention projections is missing.
    """
    parts: dict[str, dict[int, Tensor]] = {}
    forms: dict[str, str] = {}
    for name, tensor in state_dict.items():
        stored = to_native(name)
        if stored is None:
            raise ValueError(f"`{name}` is no parameter of SAM 3: it has no native name.")
        parts.setdefault(stored.name, {})[stored.part] = tensor
        forms[stored.name] = stored.form
    native = {}
    for name, pieces in parts.items():
        tensor = pieces[0] if 0 in pieces else next(iter(pieces.values()))
        if forms[name] == "fused":
            if len(pieces) != 3:
                raise ValueError(f"`{name}` needs the q, k and v projections; only {len(pieces)} of 3 are there.")
            tensor = torch.cat([pieces[i] for i in range(3)])
        elif forms[name] == "transposed":
            tensor = tensor.T.contiguous()
        elif forms[name] == "class_token":
            tensor = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        native[name] = tensor
    return native


class SafetensorsFiles:
    """Tensors of one or several safetensors files, read one at a time."""

    def __init__(self, paths: Iterable[str]):
        """
        Raises:
            OSError: a file is missing, truncated or no safetensors file.
        """
        self._handles = {}
        self._paths = {name: path for path in paths for name in self._open(path).keys()}
        self._mapped = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    @property
    def paths(self) -> set[str]:
        return set(self._paths.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open(self._paths[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        if self._mapped > MAX_MAPPED:
            self._handles, self._mapped = {}, 0
        tensor = self._open(self._paths[name]).get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor

    def _open(self, path: str):
        if path not in self._handles:
            try:
                self._handles[path] = safe_open(path, framework="pt")
            except (SafetensorError, FileNotFoundError) as error:
                raise OSError(
                    f"{path} cannot be read ({error}): it is missing, truncated or no safetensors file. "
                    "Download it again."
                ) from error
        return self._handles[path]


class PickledTensors:
    """Tensors of a file written by `torch.save`: a state dict, or one under `model` in a training checkpoint."""

    def __init__(self, path: str):
        """
        Raises:
            OSError: the file is truncated or not written by `torch.save`.
            ValueError: the file holds something else than tensors in dicts, or objects that only code could restore.
        """
        self._path = path
        self._tensors = self._load()
        self._mapped = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def paths(self) -> set[str]:
        return {self._path}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        if self._mapped > MAX_MAPPED:
            self._tensors, self._mapped = self._load(), 0
        self._mapped += self._tensors[name].nbytes
        return self._tensors[name]

    def _load(self) -> dict[str, Tensor]:
        content = _load_pickled(self._path)
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict):
            raise ValueError(f"{self._path} holds a {type(content).__name__}, not a dict of tensors.")
        return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


class LoadedTensors:
    """Tensors of a model in memory, read onto the CPU as those of files are."""

    def __init__(self, model: nn.Module):
        self._tensors = model.state_dict()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @property
    def paths(self) -> set[str]:
        return set()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].cpu()


def _load_pickled(path: str):
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise OSError(f"{path} is truncated: the end of the archive is missing. Download it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        unsupported = re.search(r"Unsupported (?:global: GLOBAL|class|type) (\S+)", str(error))
        if unsupported is None:
            raise OSError(f"{path} cannot be read: it is truncated or no PyTorch file.") from error
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values, and restoring `{unsupported[1]}` would "
            "run code. Save its weights alone: `torch.save({'model': state_dict}, path)`."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise OSError(f"{path} cannot be read ({error}): it is truncated or no PyTorch file.") from error


class Checkpoint:
    """
    A SAM 3 checkpoint of any origin: its sizes as a [`Sam3LiteConfig`], and its tensors under Transformers' names.

    Args:
        label: what to call it in messages.
        files: the tensors as stored.
        config: sizes, if the checkpoint says them; otherwise they are inferred from the shapes.
        is_lite: whether it was saved by [`Sam3LiteModel`].

    Raises:
        ValueError: no tensor of SAM 3 was recognised; the message shows what the file holds.
    """

    def __init__(
        self,
        label: str,
        files: SafetensorsFiles | PickledTensors | LoadedTensors,
        config: Sam3LiteConfig | None = None,
        is_lite: bool = False,
    ):
        self.label, self.is_lite, self._files = label, is_lite, files
        self._stored, self.dropped, self.unknown = _identify(files)
        if not self._stored:
            raise ValueError(
                f"{label} holds no tensor of SAM 3. It has {len(list(files))} tensors, such as "
                f"{_examples([*self.unknown, *self.dropped])}{_guess(self.unknown)}."
            )
        self.config = config or self._infer_config()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._stored[name]
        return stored.shape(self._files.shape(stored.name))

    def stored_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a tensor of the file, under the name that it has there."""
        return self._files.shape(stored_name)

    def read(self, name: str) -> Tensor:
        """The tensor as stored, possibly mapped from the file: copy it before keeping it."""
        stored = self._stored[name]
        try:
            return stored.take(self._files.read(stored.name))
        except SafetensorError as error:
            raise OSError(f"{self.label}: `{stored.name}` cannot be read ({error}).") from error

    @property
    def size(self) -> int:
        """Bytes of the files that its tensors are in."""
        return sum(os.path.getsize(path) for path in self._files.paths)

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the first tensor."""
        return self.read(next(iter(self._stored))).dtype

    def check(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """
        Compares the checkpoint with the parameters that a model of its sizes has.

        Returns:
            Names of the parameters that it lacks.

        Raises:
            ValueError: it lacks more than a tenth, or a tensor has another shape than its config says.
        """
        missing = [name for name in expected if name not in self]
        if len(missing) > (1 - MIN_IDENTIFIED) * len(expected):
            raise ValueError(
                f"{self.label} is no complete SAM 3 checkpoint: {len(expected) - len(missing)} of {len(expected)} "
                f"tensors were recognised; missing are {len(missing)}, such as {_examples(missing)}. "
                f"{self._unknown_names()}."
            )
        for name, shape in expected.items():
            if name in self and self.shape(name) != tuple(shape):
                raise ValueError(
                    f"{self.label}: `{self._stored[name].name}` has shape {self.shape(name)}, its configuration says "
                    f"{tuple(shape)}."
                )
        return missing

    def _unknown_names(self) -> str:
        examples = f", such as {_examples(self.unknown)}" if self.unknown else ""
        return f"{len(self.unknown)} tensors have unknown names{examples}{_guess(self.unknown)}"

    def _infer_config(self) -> Sam3LiteConfig:
        table = re.compile(r".*blocks\.\d+\.attn\.freqs_cis")
        tables = {name: self._files.shape(name) for name in self.dropped if table.fullmatch(name)}
        try:
            return _config_from_shapes({name: self.shape(name) for name in self}, tables)
        except KeyError as error:
            raise ValueError(
                f"{self.label} is no complete SAM 3 checkpoint: {len(self._stored)} tensors were recognised, but "
                f"{error} is missing. {self._unknown_names()}."
            ) from error


def _identify(files: Iterable[str]) -> tuple[dict[str, Stored], dict[str, str], list[str]]:
    """
    Sorts stored names, for the likeliest prefix.

    Returns:
        The recognised ones under Transformers' names; those left behind, with the reason; the unknown ones.
    """
    names = list(files)
    best: dict[str, Stored] = {}
    for prefix in _PREFIXES:
        found: dict[str, Stored] = {}
        for name in names:
            if name.startswith(prefix):
                found.update(_recognise(name, name[len(prefix) :]))
        if len(found) > len(best):
            best = found
    dropped = {
        stored.name: "read by nothing" for name, stored in best.items() if any(re.match(p, name) for p in UNREAD)
    }
    best = {name: stored for name, stored in best.items() if stored.name not in dropped}
    used = {stored.name for stored in best.values()}
    unknown = []
    for name in names:
        reason = next((reason for pattern, reason in DROPPED if re.match(pattern, name)), None)
        if reason is not None:
            dropped[name] = reason
        elif name not in used and name not in dropped:
            unknown.append(name)
    return best, dropped, unknown


def _recognise(name: str, bare: str) -> dict[str, Stored]:
    # Some versions of Transformers save the text encoder without the name of its inner module.
    bare = re.sub(r"^text_encoder\.(?=embeddings|encoder|final_layer_norm)", f"{_CLIP}.", bare)
    if to_native(bare) is not None or bare in BUFFERS:
        return {bare: Stored(name)}
    return {target: Stored(name, stored.form, stored.part) for target, stored in from_native(bare).items()}


def _examples(names: list[str], count: int = 4) -> str:
    return ", ".join(f"`{name}`" for name in names[:count])


def _guess(names: list[str]) -> str:
    """What a foreign checkpoint probably is, from names that only it has."""
    foreign = {
        r"(model\.)?(sam_mask_decoder|memory_attention|image_encoder\.trunk)\.": "a SAM 2 checkpoint",
        r"(image_encoder\.blocks|mask_decoder\.transformer|vision_encoder\.layers)\.": "a SAM checkpoint",
        r"(model\.)?(layers\.\d+\.self_attn|embed_tokens|h\.\d+\.attn)\b|lm_head\.": "a language model",
    }
    for pattern, kind in foreign.items():
        if any(re.match(pattern, name) for name in names):
            return f"; it looks like {kind}"
    return ""


def _config_from_shapes(shapes: dict[str, tuple[int, ...]], tables: dict[str, tuple[int, ...]]) -> Sam3LiteConfig:
    """
    Sizes of a checkpoint without a config. Sizes that leave no trace in the shapes are those of `facebook/sam3`
    (head size 64, window 24, image 1008 px, evenly spread global layers), unless the rotary `tables` of the native
    format, `(positions, head size / 2)` per layer, tell them.
    """
    width, _, patch, _ = shapes[f"{_VIT}.embeddings.patch_embeddings.projection.weight"]
    depth = _count(shapes, f"{_VIT}.layers")
    positions = shapes[f"{_VIT}.embeddings.position_embeddings"][1]
    vit = {
        "hidden_size": width,
        "intermediate_size": shapes[f"{_VIT}.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(width // 64, 1),
        "patch_size": patch,
        "pretrain_image_size": round(positions**0.5) * patch,
        "global_attn_indexes": spread_global_layers(depth, 4),
    }
    if tables:
        by_layer = {int(re.search(r"blocks\.(\d+)", name)[1]): shape for name, shape in tables.items()}
        sides = {layer: round(shape[0] ** 0.5) for layer, shape in by_layer.items()}
        vit["num_attention_heads"] = width // (2 * by_layer[0][1])
        vit["window_size"] = min(sides.values())
        vit["image_size"] = max(sides.values()) * patch
        vit["global_attn_indexes"] = sorted(i for i, side in sides.items() if side == max(sides.values()))
    vocab_size, text_width = shapes[f"{_CLIP}.embeddings.token_embedding.weight"]
    hidden_size = shapes["text_projection.weight"][0]
    transformer = {
        "hidden_size": hidden_size,
        "num_attention_heads": shapes["detr_decoder.box_rpb_embed_x.layer2.weight"][0],
        "intermediate_size": shapes["detr_decoder.layers.0.mlp.fc1.weight"][0],
    }
    return Sam3LiteConfig(
        vision_config={"backbone_config": vit, "fpn_hidden_size": hidden_size},
        text_config={
            "vocab_size": vocab_size,
            "hidden_size": text_width,
            "intermediate_size": shapes[f"{_CLIP}.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": _count(shapes, f"{_CLIP}.encoder.layers"),
            "num_attention_heads": max(text_width // 64, 1),
            "max_position_embeddings": shapes[f"{_CLIP}.embeddings.position_embedding.weight"][0],
        },
        geometry_encoder_config={
            **transformer,
            "num_layers": _count(shapes, "geometry_encoder.layers"),
            "roi_size": shapes["geometry_encoder.boxes_pool_project.weight"][-1],
        },
        detr_encoder_config={**transformer, "num_layers": _count(shapes, "detr_encoder.layers")},
        detr_decoder_config={
            **transformer,
            "num_layers": _count(shapes, "detr_decoder.layers"),
            "num_queries": shapes["detr_decoder.query_embed.weight"][0],
        },
        mask_decoder_config={"hidden_size": hidden_size, "num_attention_heads": transformer["num_attention_heads"]},
    )


def _count(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    """Number of layers called `prefix`.0 and so on."""
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in shapes]
    indices = {int(match[1]) for match in found if match}
    if not indices:
        raise KeyError(f"{prefix}.0")
    return max(indices) + 1


def lite_config(config: Sam3Config) -> Sam3LiteConfig:
    """
    The configuration of a standard model as one of ours: the same sizes without the parts that nothing reads.

    What does not say whether phrases get the summary token is SAM 3 itself, where they do, and whose ViT was trained
    with another epsilon than Transformers' converter wrote.
    """
    names = ("vision", "text", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
    parts = {f"{name}_config": copy.deepcopy(getattr(config, f"{name}_config")) for name in names}
    summary_token = getattr(config, "summary_token", None)
    if summary_token is None:
        parts["vision_config"].backbone_config.layer_norm_eps = VIT_LAYER_NORM_EPS
        summary_token = True
    return Sam3LiteConfig(**parts, initializer_range=config.initializer_range, summary_token=summary_token)


def stock_config(config: Sam3LiteConfig) -> Sam3Config:
    """
    The configuration of the standard model class at the sizes of `config`: the inverse of [`lite_config`]. It keeps
    `summary_token`, which the standard class does not read.
    """
    names = ("vision", "text", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder")
    parts = {f"{name}_config": copy.deepcopy(getattr(config, f"{name}_config")) for name in names}
    parts["vision_config"].scale_factors = [4.0, 2.0, 1.0, 0.5]
    parts["mask_decoder_config"].num_upsampling_stages = 3
    return Sam3Config(**parts, initializer_range=config.initializer_range, summary_token=config.summary_token)


def open_checkpoint(
    source: str | os.PathLike,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    fields: dict | None = None,
    **hub_arguments,
) -> Checkpoint | None:
    """
    Opens a checkpoint without reading its tensors.

    Args:
        source: Hub id or folder of model type `sam3`, `sam3_video` or `sam3_lite`, a folder with a single `.pt` file,
            or a `.pt`, `.pth`, `.bin` or `.safetensors` file. Also a checkpoint folder of `training/train.py`, of
            which `variant="ema"` gives the averaged weights.
        variant, hub_arguments: `revision`, `token`, `cache_dir`, `local_files_only`, ... as in `from_pretrained`.
        fields: content of the source's `config.json`, if it was read before.
        use_safetensors: `False` reads `pytorch_model.bin` of a folder or repository, which is refused otherwise;
            nothing in it is executed.

    Returns:
        The checkpoint, or `None` if there is neither a `config.json` nor a native file.

    Raises:
        ValueError: the source is of another model type, or its file holds something else than SAM 3, or it is the
            output folder of a training run, or a checkpoint of one in parts.
        OSError: a file is missing, truncated or of an unknown format.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        return Checkpoint(source, _open_file(source))
    config = source_config(source, fields, **hub_arguments)
    if config is None:
        _refuse_run_folder(source)
        native = _native_file(source, hub_arguments)
        return native and Checkpoint(native, _open_file(native))
    if is_training_checkpoint(source):
        files = SafetensorsFiles(_training_files(source, variant))
    elif use_safetensors is False:
        files = PickledTensors(cached_file(source, WEIGHTS_NAME, **hub_arguments))
    else:
        files = SafetensorsFiles(_weight_files(source, variant, hub_arguments))
    is_lite = isinstance(config, Sam3LiteConfig)
    return Checkpoint(source, files, config if is_lite else lite_config(config), is_lite)


def _training_files(source: str, variant: str | None) -> list[str]:
    """Files of a training checkpoint; a tensor of a later one replaces that of an earlier one."""
    parts = sorted(name for name in os.listdir(source) if name.startswith("pytorch_model_fsdp"))
    if parts and not os.path.isfile(os.path.join(source, SAFE_WEIGHTS_NAME)):
        raise ValueError(
            f"{source} was written under FSDP, in parts: take the folder final/ of the run, or put the parts together "
            f"with `accelerate merge-weights {os.path.join(source, parts[0])} {source}`."
        )
    if variant not in (None, "ema"):
        raise ValueError(f"{source} is a training checkpoint: its variants are None and 'ema', not {variant!r}.")
    files = [os.path.join(source, name) for name in (SAFE_WEIGHTS_NAME, FROZEN_TEXT, AVERAGE)]
    weights, frozen, average = files
    if variant == "ema" and not os.path.isfile(average):
        raise OSError(f"{source} has no {AVERAGE}: its run kept no average of the weights (`ema_decay` was 0).")
    if os.path.isfile(frozen):
        return [weights, frozen, *([average] if variant == "ema" else [])]
    if not any(name.startswith("text_encoder.") for name in SafetensorsFiles([weights])):
        raise OSError(f"{frozen} is missing, which holds the frozen text encoder of the checkpoint.")
    return [weights, *([average] if variant == "ema" else [])]


def _refuse_run_folder(source: str):
    """Raises a ValueError naming the models in the output folder of a training run."""
    models = [name for name in _RUN_FOLDERS if os.path.isfile(os.path.join(source, name, "config.json"))]
    if models:
        paths = " or ".join(os.path.join(source, name) for name in models)
        raise ValueError(f"{source} is the folder of a training run, not of a model: take {paths}.")


def _open_file(path: str) -> SafetensorsFiles | PickledTensors:
    return SafetensorsFiles([path]) if path.endswith(".safetensors") else PickledTensors(path)


def source_config(
    source: str | os.PathLike, fields: dict | None = None, **hub_arguments
) -> Sam3LiteConfig | Sam3Config | None:
    """
    The detector's configuration from the `config.json` of a folder or Hub repository, `None` if it has none.

    Args:
        fields: its content, if it was read before.

    Raises:
        ValueError: the model type is none of SAM 3's.
    """
    fields = fields or config_fields(source, **hub_arguments)
    if fields is None:
        return None
    model_type = fields.get("model_type")
    if model_type == "sam3_lite":
        return Sam3LiteConfig.from_dict(fields)
    if model_type == "sam3":
        return Sam3Config.from_dict(fields)
    if model_type == "sam3_video":
        return Sam3VideoConfig.from_dict(fields).detector_config
    raise ValueError(
        f"{source} is a model of type {model_type!r}; a lite model starts from `sam3`, `sam3_video` or `sam3_lite`, "
        f"or from Meta's `{NATIVE_FILE}`."
    )


def _native_file(source: str, hub_arguments: dict) -> str | None:
    if not os.path.isdir(source):
        return cached_file(source, NATIVE_FILE, _raise_exceptions_for_missing_entries=False, **hub_arguments)
    found = sorted(name for name in os.listdir(source) if name.endswith((".pt", ".pth")))
    if len(found) > 1:
        raise ValueError(f"{source} has no config.json and several files ({', '.join(found)}): name the one to load.")
    return os.path.join(source, found[0]) if found else None


def _weight_files(source: str, variant: str | None, hub_arguments: dict) -> list[str]:
    path = safe_weights(source, variant, **hub_arguments)
    if path.endswith(".safetensors"):
        return [path]
    with open(path, encoding="utf-8") as file:
        shards = sorted(set(json.load(file)["weight_map"].values()))
    return [cached_file(source, shard, **hub_arguments) for shard in shards]


__all__ = [
    "AVERAGE",
    "DROPPED",
    "FROZEN_TEXT",
    "NAME_TABLE",
    "Checkpoint",
    "lite_config",
    "native_state_dict",
    "open_checkpoint",
    "source_config",
    "stock_config",
]
