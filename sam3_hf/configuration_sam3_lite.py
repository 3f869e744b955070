"""Configuration of the lite SAM 3 family: architecture, loss weights and presets."""

from __future__ import annotations

import copy
import dataclasses

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, Sam3Config
from transformers import __version__ as transformers_version
from transformers.utils import logging

from .limits_sam3_lite import check_multiple, check_values, did_you_mean, read_config
from .presets_sam3_lite import (
    CLIP_TEXT,
    LITE_TEXT,
    MLP_RATIO,
    PRESETS,
    TEXT_ENCODERS,
    preset_fields,
    spread_global_layers,
)

logger = logging.get_logger(__name__)

# Tokens that a phrase is padded or cut to, by SAM 3 and by the text encoders of SAM3-LiteText; see `context_length`.
MAX_TOKENS = 32
LITE_TEXT_TOKENS = 16
# Label of a padded box, as `Sam3Processor` writes it.
BOX_PADDING_LABEL = -10
# Stands in for the text of a prompt that has only boxes.
VISUAL_PHRASE = "visual"

# Names that `from_preset` takes beside the fields of the config itself, and where each one lives.
_SHORT_NAMES = {
    "image_size": ("vision_config", "backbone_config", "image_size"),
    "patch_size": ("vision_config", "backbone_config", "patch_size"),
    "vision_hidden_size": ("vision_config", "backbone_config", "hidden_size"),
    "vision_intermediate_size": ("vision_config", "backbone_config", "intermediate_size"),
    "vision_num_hidden_layers": ("vision_config", "backbone_config", "num_hidden_layers"),
    "vision_num_attention_heads": ("vision_config", "backbone_config", "num_attention_heads"),
    "vision_global_attn_indexes": ("vision_config", "backbone_config", "global_attn_indexes"),
    "vision_window_size": ("vision_config", "backbone_config", "window_size"),
    "text_hidden_size": ("text_config", "hidden_size"),
    "text_intermediate_size": ("text_config", "intermediate_size"),
    "text_num_hidden_layers": ("text_config", "num_hidden_layers"),
    "text_num_attention_heads": ("text_config", "num_attention_heads"),
    "detr_encoder_layers": ("detr_encoder_config", "num_layers"),
    "detr_decoder_layers": ("detr_decoder_config", "num_layers"),
    "num_queries": ("detr_decoder_config", "num_queries"),
}

# Those of them that change which parameters a model has, or their shapes.
SIZE_KEYWORDS = frozenset(_SHORT_NAMES) - {"image_size"} | {"text"}

# The smallest value of each size that the model cannot do without. Widths and resolutions must be multiples besides.
_TRANSFORMER_MINIMUMS = {"intermediate_size": 1, "num_attention_heads": 1}
_MINIMUMS = {
    ("vision_config", "backbone_config"): {
        **_TRANSFORMER_MINIMUMS,
        "num_hidden_layers": 1,
        "patch_size": 1,
        "num_channels": 1,
        "window_size": 1,
    },
    ("text_config",): {
        **_TRANSFORMER_MINIMUMS,
        "num_hidden_layers": 1,
        "vocab_size": 1,
        "projection_dim": 1,
        "max_position_embeddings": 1,
        "repmixer_kernel_size": 1,
    },
    ("geometry_encoder_config",): {**_TRANSFORMER_MINIMUMS, "num_layers": 1, "roi_size": 1},
    ("detr_encoder_config",): {**_TRANSFORMER_MINIMUMS, "num_layers": 1},
    ("detr_decoder_config",): {**_TRANSFORMER_MINIMUMS, "num_layers": 1, "num_queries": 1},
    ("mask_decoder_config",): {"num_attention_heads": 1},
    ("loss_config",): {"mask_num_points": 1, "one_to_many_topk": 1},
}

# Keyword arguments that every Transformers config accepts although they are no dataclass fields.
_COMMON_KEYWORDS = {
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "layer_types",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "torch_dtype",
}


@strict
class Sam3LiteLossConfig(PreTrainedConfig):
    r"""
    Weights and constants of the training loss.

    The defaults are those of the fine-tuning recipe published with SAM 3
    (`sam3/train/configs/roboflow_v100/roboflow_v100_full_ft_100_images.yaml`).

    Args:
        cost_class, cost_bbox, cost_giou (`float`): weights of the focal, L1 and -gIoU terms of the matching cost.
        cost_focal_alpha, cost_focal_gamma (`float`): constants of the focal matching cost.
        bbox_loss_weight, giou_loss_weight (`float`): weights of the L1 (cxcywh) and gIoU losses.
        class_loss_weight (`float`): weight of the IoU-aware classification loss.
        presence_loss_weight (`float`): weight of the presence loss.
        class_alpha, class_gamma (`float`): exponents of the IoU-aware classification target and focal factor.
        class_pos_weight (`float`): weight of matched against unmatched queries in the classification loss.
        mask_focal_loss_weight, mask_dice_loss_weight (`float`): weights of the mask losses.
        mask_focal_alpha, mask_focal_gamma (`float`): constants of the mask focal loss.
        mask_num_points (`int`): points sampled per mask.
        mask_oversample_ratio (`float`): candidates drawn per kept point.
        mask_importance_sample_ratio (`float`): share of the points taken where the mask is most uncertain.
        semantic_focal_loss_weight, semantic_dice_loss_weight (`float`): weights of the semantic losses.
        semantic_focal_alpha, semantic_focal_gamma (`float`): constants of the semantic focal loss.
        one_to_many_weight (`float`): weight of the one-to-many auxiliary branch; 0 switches the branch off.
        one_to_many_alpha (`float`): weight of the score in the quality of a one-to-many match; the IoU gets
            `1 - one_to_many_alpha`.
        one_to_many_threshold (`float`): lowest quality of a one-to-many match.
        one_to_many_topk (`int`): most queries matched to one object.
        one_to_many_masks (`bool`): also supervise the masks of the one-to-many branch; up to `one_to_many_topk` times
            the mask memory.
    """

    model_type = "sam3_lite_loss"

    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    cost_focal_alpha: float = 0.25
    cost_focal_gamma: float = 2.0
    bbox_loss_weight: float = 5.0
    giou_loss_weight: float = 2.0
    class_loss_weight: float = 20.0
    presence_loss_weight: float = 20.0
    class_alpha: float = 0.25
    class_gamma: float = 2.0
    class_pos_weight: float = 10.0
    mask_focal_loss_weight: float = 200.0
    mask_dice_loss_weight: float = 10.0
    mask_focal_alpha: float = 0.25
    mask_focal_gamma: float = 2.0
    mask_num_points: int = 12544
    mask_oversample_ratio: float = 3.0
    mask_importance_sample_ratio: float = 0.75
    semantic_focal_loss_weight: float = 20.0
    semantic_dice_loss_weight: float = 30.0
    semantic_focal_alpha: float = 0.6
    semantic_focal_gamma: float = 2.0
    one_to_many_weight: float = 2.0
    one_to_many_alpha: float = 0.3
    one_to_many_threshold: float = 0.4
    one_to_many_topk: int = 4
    one_to_many_masks: bool = False

    def __post_init__(self, **kwargs):
        _check_keywords(type(self), kwargs, "loss_config", self.transformers_version)
        for field in dataclasses.fields(Sam3LiteLossConfig):
            value = getattr(self, field.name)
            if isinstance(field.default, (int, float)) and not isinstance(value, (int, float)):
                raise ValueError(f"`loss_config.{field.name}` must be a number, got {value!r}.")
        super().__post_init__(**kwargs)


@strict
class Sam3LiteConfig(Sam3Config):
    r"""
    Configuration of [`Sam3LiteModel`]. Without arguments it is the preset `lite`.

    The nested configs are those of [`Sam3Config`], so a config of any SAM 3 size can be written as one of these.
    A nested config given as a dict is completed from the preset `lite`.

    Args:
        vision_config, text_config, geometry_encoder_config, detr_encoder_config, detr_decoder_config,
        mask_decoder_config (`dict` or `PreTrainedConfig`, *optional*): the parts, as in [`Sam3Config`]. `text_config`
            can also be a [`Sam3LiteTextTextConfig`], or a dict whose `model_type` is `sam3_lite_text_text_model`:
            the text encoder is then that of SAM3-LiteText.
        loss_config (`dict` or [`Sam3LiteLossConfig`], *optional*): weights of the training loss.
        summary_token (`bool`, *optional*, defaults to `True`): whether every prompt gets the token by which the box
            encoder sums up the image, as in Meta's SAM 3, or only prompts with boxes, as in [`Sam3Model`]. `False`
            where a saved configuration does not say it.
        mask_supervision (`bool`, *optional*, defaults to `True`): whether the weights were trained with masks. `False`
            after training on boxes alone: what the mask head then says means nothing and is not shown.
        vocabulary (`list[str]`, *optional*): the only phrases that the model knows; it then stores their text features
            and has no text encoder. Set by [`~Sam3LiteModel.freeze_vocabulary`].

    Raises:
        ValueError: a field is misspelt, or sizes do not fit together; the message names the field and a valid value.

    Example:

    ```python
    >>> from sam3_hf import Sam3LiteConfig

    >>> config = Sam3LiteConfig.from_preset("lite", image_size=672)
    >>> config.image_size
    672
    ```
    """

    model_type = "sam3_lite"

    loss_config: dict | PreTrainedConfig | None = None
    summary_token: bool = True
    mask_supervision: bool = True
    vocabulary: list[str] | None = None

    def __post_init__(self, **kwargs):
        _check_keywords(type(self), kwargs, "", self.transformers_version)
        sub_config_classes = {**type(self).sub_configs, "loss_config": Sam3LiteLossConfig}
        defaults = preset_fields("lite")
        for name in defaults:
            given = getattr(self, name)
            if isinstance(given, PreTrainedConfig):
                setattr(self, name, copy.deepcopy(given))
            else:
                fields = _merge(defaults, {name: given or {}})[name]
                if name == "text_config":
                    _check_text_encoder(fields.get("model_type"))
                _check_sub_config(name, fields, sub_config_classes[name], self.transformers_version)
                setattr(self, name, fields)
        if isinstance(self.loss_config, dict):
            self.loss_config = Sam3LiteLossConfig(**self.loss_config)
        self._validate_ranges()  # before the stock configs, whose messages name no field
        super().__post_init__(**kwargs)
        vision = self.vision_config
        vision.scale_factors = [4.0, 2.0, 1.0]  # the fourth level of SAM 3 is never read
        self.mask_decoder_config.num_upsampling_stages = 2  # nor is its third stage ever run
        self.validate_architecture()
        grid = vision.backbone_config.image_size // vision.backbone_config.patch_size
        vision.backbone_feature_sizes = [[grid * 4, grid * 4], [grid * 2, grid * 2], [grid, grid]]

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """
        As [`~PreTrainedConfig.from_dict`], for the content of a file: those of older versions lack fields.

        Raises:
            ValueError: a value of a wrong type, or whatever else a damaged file holds, and as in the constructor.
        """
        return read_config(super().from_dict, {"summary_token": False, **config_dict}, **kwargs)

    @classmethod
    def from_preset(cls, name: str, text: str = "standard", **overrides) -> Sam3LiteConfig:
        r"""
        A config by name, with any size changed.

        Args:
            name (`str`): `standard`, `medium`, `depth16`, `lite-plus`, `lite`, `small-plus`, `small`, or, for tests
                and demonstrations, `tiny-standard`, `tiny-plus` and `tiny`. Those with `-plus` keep all six layers of
                the DETR decoder.
            text (`str`): the text encoder: `standard`, that of SAM 3, or one of SAM3-LiteText: `s0`, `s1` or `l`.
            overrides: fields of this config (nested dicts are merged), or the short names `image_size`,
                `patch_size`, `vision_hidden_size`, `vision_intermediate_size`, `vision_num_hidden_layers`,
                `vision_num_attention_heads`, `vision_global_attn_indexes`, `vision_window_size`,
                `text_hidden_size`, `text_intermediate_size`, `text_num_hidden_layers`, `text_num_attention_heads`,
                `detr_encoder_layers`, `detr_decoder_layers`, `num_queries`. A new width keeps the preset's head size
                and MLP ratio, a new depth of the ViT spreads its global layers evenly, unless those are given as well.

        Raises:
            ValueError: no such preset, text encoder or field, or the sizes do not fit together.
        """
        return cls._changed(preset_fields(name, text), overrides)

    def at_preset(self, name: str, **overrides) -> Sam3LiteConfig:
        """
        The sizes of a preset for what this configuration is used for: its input resolution, patches and windows,
        number of queries, summary token, mask supervision, epsilon of the ViT, vocabulary and text encoder stay.
        `overrides` as in [`~Sam3LiteConfig.from_preset`].

        Raises:
            ValueError: no such preset or field, or the sizes do not fit together.
        """
        vit = self.vision_config.backbone_config
        kept = {
            "num_queries": self.detr_decoder_config.num_queries,
            "summary_token": self.summary_token,
            "mask_supervision": self.mask_supervision,
            "vocabulary": self.vocabulary,
            "vision_config": {
                "backbone_config": {
                    name: getattr(vit, name)
                    for name in ("image_size", "patch_size", "pretrain_image_size", "window_size", "layer_norm_eps")
                }
            },
        }
        if "text" not in overrides:
            kept["text_config"] = self.text_config.to_dict()
        return self.from_preset(name, **_merge(kept, overrides))

    def changed(self, **overrides) -> Sam3LiteConfig:
        """
        A copy with other sizes; `overrides` as in [`~Sam3LiteConfig.from_preset`].

        Raises:
            ValueError: no such field, or the sizes do not fit together.
        """
        fields = self.to_dict()
        kept = (*preset_fields("lite"), "initializer_range", "summary_token", "mask_supervision", "vocabulary")
        fields = {name: fields[name] for name in kept}
        if "text" in overrides:
            fields["text_config"] = preset_fields("lite", overrides.pop("text"))["text_config"]
        return self._changed(fields, overrides)

    @classmethod
    def _changed(cls, fields: dict, overrides: dict) -> Sam3LiteConfig:
        short = {key: overrides.pop(key) for key in list(overrides) if key in _SHORT_NAMES}
        own = cls.keywords()
        for key in overrides:
            if key not in own:
                raise ValueError(_unknown_field_message(key, own))
        completed = _complete_text_sizes(_merge(fields, overrides), short)
        for key, value in _complete_vision_sizes(fields, short).items():
            _set_path(fields, _SHORT_NAMES[key], value)
        fields = _merge(fields, overrides)
        for key, value in completed.items():
            _set_path(fields, _SHORT_NAMES[key], value)
        return cls(**fields)

    @classmethod
    def keywords(cls) -> set[str]:
        """Names that [`~Sam3LiteConfig.from_preset`] takes."""
        return {field.name for field in dataclasses.fields(cls)} | _COMMON_KEYWORDS | set(_SHORT_NAMES) | {"text"}

    def validate_architecture(self):
        """
        Raises:
            ValueError: sizes that no model can have, naming the field and a valid value.
        """
        _check_text_encoder(self.text_config.model_type)
        self._validate_ranges()
        if not isinstance(self.summary_token, bool):
            raise ValueError(f"`summary_token` must be true or false, got {self.summary_token!r}.")
        if self.vocabulary is not None:
            check_vocabulary(self.vocabulary)
        vit = self.vision_config.backbone_config
        prefix = "vision_config.backbone_config"
        for field in ("image_size", "patch_size", "pretrain_image_size"):
            if not isinstance(getattr(vit, field), int):
                raise ValueError(f"`{prefix}.{field}` must be one int (images are square), got {getattr(vit, field)}.")
        for field in ("image_size", "pretrain_image_size"):
            check_multiple(f"{prefix}.{field}", getattr(vit, field), "patch_size", vit.patch_size)
        check_multiple(f"{prefix}.hidden_size", vit.hidden_size, "num_attention_heads", vit.num_attention_heads)
        head_dim = vit.hidden_size // vit.num_attention_heads
        if head_dim % 4:
            raise ValueError(
                f"`{prefix}.num_attention_heads`={vit.num_attention_heads} gives heads of {head_dim} channels at "
                f"hidden_size {vit.hidden_size}; axial rotary positions need a multiple of 4. "
                f"Valid: {_valid_head_counts(vit.hidden_size)}."
            )
        check_multiple(f"{prefix}.hidden_size", vit.hidden_size, "the neck's two halvings", 4)
        beyond = [i for i in vit.global_attn_indexes if not 0 <= i < vit.num_hidden_layers]
        if beyond:
            raise ValueError(
                f"`{prefix}.global_attn_indexes` names layers {beyond[:8]} of a ViT with "
                f"{vit.num_hidden_layers} layers; valid: {spread_global_layers(vit.num_hidden_layers, 4)}."
            )
        self._validate_detector_width()

    def _validate_ranges(self):
        """Also for nested configs that are still dicts. Values of a wrong type are left to the stock validation."""
        for name in preset_fields("lite"):
            check_values(name, getattr(self, name))
        for path, minimums in _MINIMUMS.items():
            part = self
            for name in path:
                part = _field(part, name)
            for field, minimum in minimums.items():
                value = _field(part, field)
                if isinstance(value, int) and value < minimum:
                    raise ValueError(f"`{'.'.join(path)}.{field}` must be at least {minimum}, got {value}.")
        width, heads = (_field(self.text_config, field) for field in ("hidden_size", "num_attention_heads"))
        if isinstance(width, int) and isinstance(heads, int):
            check_multiple("text_config.hidden_size", width, "num_attention_heads", heads)
        self._validate_tokens()

    def _validate_tokens(self):
        """What the two kinds of text encoder need of their tokens: positions, and windows with a middle."""
        if _field(self.text_config, "model_type") == LITE_TEXT:
            kernel = _field(self.text_config, "repmixer_kernel_size")
            if isinstance(kernel, int) and kernel % 2 == 0:
                raise ValueError(f"`text_config.repmixer_kernel_size` must be odd, got {kernel}.")
            return
        positions = _field(self.text_config, "max_position_embeddings")
        if isinstance(positions, int) and positions < MAX_TOKENS:
            raise ValueError(f"`text_config.max_position_embeddings` must be at least {MAX_TOKENS}, got {positions}.")

    def _validate_detector_width(self):
        width = self.detr_decoder_config.hidden_size
        others = {
            "vision_config.fpn_hidden_size": self.vision_config.fpn_hidden_size,
            "geometry_encoder_config.hidden_size": self.geometry_encoder_config.hidden_size,
            "detr_encoder_config.hidden_size": self.detr_encoder_config.hidden_size,
            "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
        }
        for field, value in others.items():
            if value != width:
                raise ValueError(f"`{field}`={value} must equal `detr_decoder_config.hidden_size`={width}.")
        check_multiple("mask_decoder_config.hidden_size", width, "the 8 groups of its GroupNorm", 8)
        for name in ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config"):
            heads = getattr(self, name).num_attention_heads
            check_multiple(f"{name}.hidden_size", width, "num_attention_heads", heads)


def check_vocabulary(classes: list[str]):
    """
    Raises:
        ValueError: not a list of at least one phrase, or a phrase is blank or there twice.
    """
    valid = isinstance(classes, (list, tuple)) and all(
        isinstance(phrase, str) and phrase.strip() for phrase in classes
    )
    if not classes or not valid:
        raise ValueError(f"`vocabulary` must be a list of phrases, such as ['cat', 'red car'], got {classes!r}.")
    twice = sorted({phrase for phrase in classes if classes.count(phrase) > 1})
    if twice:
        raise ValueError(f"`vocabulary` has phrases more than once: {', '.join(map(repr, twice))}.")


def context_length(text_config: PreTrainedConfig) -> int:
    """
    How many tokens a text encoder reads: it was trained with so many, padding included. Those of SAM3-LiteText resize
    their table of positions to that; a table of at most 32 positions was saved at the length that it is used at.
    """
    if text_config.model_type != LITE_TEXT:
        return MAX_TOKENS
    positions = text_config.max_position_embeddings
    return positions if positions <= MAX_TOKENS else LITE_TEXT_TOKENS


def _check_text_encoder(model_type) -> None:
    if model_type not in (CLIP_TEXT, LITE_TEXT):
        raise ValueError(
            f"`text_config.model_type` must be {CLIP_TEXT!r} (SAM 3) or {LITE_TEXT!r} (SAM3-LiteText), got "
            f"{model_type!r}."
        )


def parameter_sizes(config: Sam3LiteConfig) -> tuple:
    """The fields that decide which parameters a model has and of which shapes."""
    vit, text = config.vision_config.backbone_config, config.text_config
    layers = ("hidden_size", "intermediate_size", "num_hidden_layers")
    parts = (config.geometry_encoder_config, config.detr_encoder_config, config.detr_decoder_config)
    return (
        *(getattr(tower, name) for tower in (vit, text) for name in layers),
        *(getattr(vit, name) for name in ("num_channels", "patch_size", "pretrain_image_size")),
        *(getattr(text, name) for name in ("model_type", "vocab_size", "max_position_embeddings")),
        *(getattr(text, name, None) for name in ("use_repmixer_blocks", "repmixer_kernel_size")),
        *(getattr(part, name) for part in parts for name in ("hidden_size", "intermediate_size", "num_layers")),
        config.vision_config.fpn_hidden_size,
        config.mask_decoder_config.hidden_size,
        config.geometry_encoder_config.roi_size,
        config.detr_decoder_config.num_queries,
        config.detr_decoder_config.num_attention_heads,
        None if config.vocabulary is None else tuple(config.vocabulary),
    )


def _complete_vision_sizes(fields: dict, short: dict) -> dict:
    """Sizes that follow from the changed ones: heads and MLP from the width, global layers from the depth."""
    vit = fields["vision_config"]["backbone_config"]
    completed = _complete_width("vision", vit, MLP_RATIO, short)
    depth = short.get("vision_num_hidden_layers", vit["num_hidden_layers"])
    if isinstance(depth, int) and depth != vit["num_hidden_layers"]:
        num_global = len(vit["global_attn_indexes"])
        completed.setdefault("vision_global_attn_indexes", spread_global_layers(depth, num_global))
    return completed


def _complete_text_sizes(fields: dict, short: dict) -> dict:
    """As [`_complete_vision_sizes`]."""
    text = fields["text_config"]
    sizes = [_field(text, field) for field in ("hidden_size", "intermediate_size", "num_attention_heads")]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return short
    return _complete_width("text", text, sizes[1] / sizes[0], short)


def _complete_width(tower: str, part, mlp_ratio: float, short: dict) -> dict:
    """The sizes `short`, with heads and MLP of a tower where its width is among them."""
    completed = dict(short)
    old, heads = (_field(part, field) for field in ("hidden_size", "num_attention_heads"))
    width = short.get(f"{tower}_hidden_size", old)
    if isinstance(width, int) and width != old:
        head_dim = old // heads
        if f"{tower}_num_attention_heads" not in short:
            if width < 1 or width % head_dim:
                below = max(width // head_dim, 1) * head_dim
                raise ValueError(
                    f"`{tower}_hidden_size`={width} is not a positive multiple of the head size {head_dim}: use "
                    f"{below} or {below + head_dim}, or set `{tower}_num_attention_heads`."
                )
            completed[f"{tower}_num_attention_heads"] = width // head_dim
        completed.setdefault(f"{tower}_intermediate_size", max(round(width * mlp_ratio), 1))
    return completed


def _merge(base: dict, update: dict) -> dict:
    """Both, nested dicts merged as well, unless they are of different kinds, as two text encoders can be."""
    merged = copy.deepcopy(base)
    for key, value in update.items():
        known = merged.get(key)
        if isinstance(value, dict) and isinstance(known, dict) and not _differ_in_kind(known, value):
            merged[key] = _merge(known, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _differ_in_kind(base: dict, update: dict) -> bool:
    kinds = base.get("model_type"), update.get("model_type")
    return None not in kinds and kinds[0] != kinds[1]


def _set_path(fields: dict, path: tuple[str, ...], value) -> None:
    part = fields
    for key in path[:-1]:
        part = part[key] if isinstance(part, dict) else getattr(part, key)
    if isinstance(part, dict):
        part[path[-1]] = value
    else:
        setattr(part, path[-1], value)


def _field(part, name: str):
    """A field of a config or of a dict of fields; None if a dict leaves it to the default."""
    return part.get(name) if isinstance(part, dict) else getattr(part, name, None)


def _check_sub_config(path: str, fields: dict, config_class, saved_version: str | None) -> None:
    """Rejects misspelt fields of a nested config, and of the configs nested in it."""
    # Only the class knows its fields; `AutoConfig` entries are resolved by their `model_type`.
    if not issubclass(config_class, PreTrainedConfig):
        config_class = CONFIG_MAPPING[fields["model_type"]]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    _check_keywords(config_class, {k: v for k, v in fields.items() if k not in known}, path, saved_version)
    for name, sub_class in config_class.sub_configs.items():
        if isinstance(fields.get(name), dict):
            _check_sub_config(f"{path}.{name}", fields[name], sub_class, saved_version)


def _check_keywords(config_class, keywords: dict, path: str, saved_version: str | None) -> None:
    """
    Rejects keywords that are no field. A config file written by another version of Transformers may carry fields
    that this version lacks: those only warn.
    """
    accepted = _COMMON_KEYWORDS | set(GenerationConfig._get_default_generation_params())
    for key in keywords:
        if key in accepted or key.startswith("_"):
            continue
        known = {field.name for field in dataclasses.fields(config_class)}
        message = _unknown_field_message(f"{path}.{key}" if path else key, known)
        if saved_version in (None, transformers_version):
            raise ValueError(message)
        logger.warning(f"{message} It was saved with Transformers {saved_version} and is ignored.")


def _unknown_field_message(field: str, known) -> str:
    return f"`{field}` is no field of the configuration{did_you_mean(field.rsplit('.', 1)[-1], known)}."


def _valid_head_counts(hidden_size: int) -> list[int]:
    return [n for n in range(1, hidden_size + 1) if hidden_size % n == 0 and (hidden_size // n) % 4 == 0][:12]


__all__ = [
    "PRESETS",
    "SIZE_KEYWORDS",
    "TEXT_ENCODERS",
    "Sam3LiteConfig",
    "Sam3LiteLossConfig",
    "context_length",
    "parameter_sizes",
]
