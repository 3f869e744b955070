"""A SAM 3 with its tracker at which a film takes a second, and films for it."""

import pytest
import torch
from conftest import micro_config, stock_config
from transformers import Sam3VideoConfig, Sam3VideoModel

from sam3_hf import Sam3LiteConfig, Sam3LiteProcessor, Sam3LiteVideoConfig

PHRASES = ["cat", "red car"]
# Of a model that never saw anything: whatever it says counts.
WIDTH = 128  # of the detector: Transformers' tracker does not work with 64
TRACKER = {"memory_attention_num_layers": 2, "memory_attention_feed_forward_hidden_size": 64}
TRACKING = {"score_threshold_detection": 0.6, "new_det_thresh": 0.62, "high_conf_thresh": 0.5, "high_iou_thresh": 0.2}


def lite_config(**sizes) -> Sam3LiteConfig:
    """`sizes` as in `micro_config`."""
    parts = ("geometry_encoder_config", "detr_encoder_config", "detr_decoder_config", "mask_decoder_config")
    vision = {"fpn_hidden_size": WIDTH, "backbone_config": {"pretrain_image_size": 32}}
    return micro_config(vision_config=vision, num_queries=3, **dict.fromkeys(parts, {"hidden_size": WIDTH}), **sizes)


def stock_video_model(seed: int = 3, **sizes) -> Sam3VideoModel:
    """Random weights; `sizes` of the detector as in `micro_config`."""
    lite = Sam3LiteVideoConfig(detector_config=lite_config(**sizes))
    tracker = {**lite.tracker_config.to_dict(), **TRACKER}
    config = Sam3VideoConfig(
        detector_config=stock_config(lite.detector_config).to_dict(),
        tracker_config=tracker,
        low_res_mask_size=lite.low_res_mask_size,
        recondition_every_nth_frame=4,
        **TRACKING,
    )
    torch.manual_seed(seed)
    model = Sam3VideoModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none is zero, one, or equal to another by accident
            parameter += 0.02 * torch.randn(parameter.shape)
        detector = model.detector_model  # whose queries differ, and so do their scores
        detector.detr_decoder.query_embed.weight *= 10
        detector.dot_product_scoring.query_proj.weight *= 30
        detector.detr_decoder.presence_head.layer3.bias += 3
    return model


def film(frames: int = 12, seed: int = 0) -> torch.Tensor:
    """`(frames, 3, 48, 64)` uint8: a bright square that moves over noise."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 120, (1, 3, 48, 64), generator=generator).repeat(frames, 1, 1, 1).to(torch.uint8)
    for index, picture in enumerate(pictures):
        picture[0, 10:26, 4 + 3 * index : 20 + 3 * index] = 250
    return pictures


def follow(model, phrases=PHRASES, frames: int = 12, streaming: bool = False) -> list[dict]:
    """Of all frames of [`film`], {the field of the output: its value}, and `phrases`, the phrase of each object."""
    detector = model.config.detector_config
    processor = Sam3LiteProcessor.from_config(lite_config(image_size=detector.image_size)).to_video()
    video, followed = film(frames), []
    session = processor.init_video_session(video=None if streaming else video)
    processor.add_text_prompt(session, list(phrases))
    for index, frame in enumerate(video):
        of_phrases = {}
        if streaming:
            inputs = processor(images=frame, return_tensors="pt")
            output = model(inference_session=session, frame=inputs["pixel_values"][0])
            found = processor.postprocess_outputs(session, output, original_sizes=inputs["original_sizes"])
            assert found["masks"].shape == (len(found["object_ids"]), 48, 64)
            of_phrases = found["prompt_to_obj_ids"]
        else:
            output = model(inference_session=session, frame_idx=index)
        of_objects = {obj: session.prompts[key] for obj, key in session.obj_id_to_prompt_id.items()}
        followed.append({**output, "phrases": of_objects, "of_phrases": of_phrases})
    return followed


def check_same(first: list[dict], second: list[dict], tolerance: float = 1e-5):
    """All that is said of each frame; masks relative to their largest value, which is about 15."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for name in ("object_ids", "removed_obj_ids", "suppressed_obj_ids", "frame_idx", "phrases", "of_phrases"):
            assert one[name] == other[name]
        for name in ("obj_id_to_score", "obj_id_to_tracker_score"):
            assert one[name] == pytest.approx(other[name], abs=tolerance)
        masks, others = one["obj_id_to_mask"], other["obj_id_to_mask"]
        assert masks.keys() == others.keys()
        for key, mask in masks.items():
            assert (mask - others[key]).abs().max() <= tolerance * others[key].abs().max().clamp(min=1)
