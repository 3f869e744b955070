"""The pyramids of a teacher on disk."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import micro_config, shake
from safetensors.torch import load_file, save_file

from sam3_hf import Sam3LiteModel, Sam3LiteProcessor
from sam3_hf.training import teacher_cache
from sam3_hf.training.teacher import Teacher
from sam3_hf.training.teacher_cache import PyramidCache

CPU = torch.device("cpu")


def micro_model(seed: int = 0, **sizes) -> Sam3LiteModel:
    torch.manual_seed(seed)
    return shake(Sam3LiteModel(micro_config(**sizes)), seed).eval().requires_grad_(False)


@pytest.fixture
def model() -> Sam3LiteModel:
    return micro_model()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def never(*_):
    raise AssertionError("the encoder was asked")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_picture_is_looked_at_once(tmp_path, model, pixels, monkeypatch, dtype):
    """What comes back is the same to the bit, and lies in memory in the same order."""
    model = model.to(dtype)
    seen = PyramidCache(tmp_path, model, 3)(pixels)
    whole = model.get_vision_features(pixels.to(dtype))
    monkeypatch.setattr(model, "get_vision_features", never)
    cache = PyramidCache(tmp_path, model, 3)
    held = cache(pixels)
    for first, second, plain in zip(*(f.fpn_hidden_states for f in (seen, held, whole)), strict=True):
        assert torch.equal(first, plain) and torch.equal(second, plain)
        assert second.dtype == dtype and second.stride() == plain.stride()
    sizes = [path.stat().st_size for path in files(tmp_path)]
    assert len(sizes) == 3 and all(cache.picture_bytes < size < cache.picture_bytes + 1000 for size in sizes)
    reordered = cache(pixels[[2, 0]]).fpn_hidden_states
    assert all(torch.equal(own, plain[[2, 0]]) for own, plain in zip(reordered, whole.fpn_hidden_states, strict=True))


def test_size_at_full_resolution(tmp_path):
    with torch.device("meta"):
        model = Sam3LiteModel(micro_config()).half()
    model.config.vision_config.fpn_hidden_size = 256
    backbone = model.config.vision_config.backbone_config
    backbone.image_size, backbone.patch_size = 1008, 14
    model.vision_encoder = torch.nn.Module()
    assert PyramidCache(tmp_path, model, 1).picture_bytes / 2**20 == pytest.approx(53.16, abs=0.01)


def test_a_teacher_with_a_cache_says_what_it_said_without(tmp_path, pixels):
    phrases = ["red circle", "blue square"]
    processor = Sam3LiteProcessor.from_config(micro_config())
    batch = {"pixel_values": pixels, "phrases": phrases * 2, "image_index": torch.tensor([0, 1, 1, 2])}

    def answers(cached: bool):
        model = micro_model()
        with torch.no_grad():
            model.detr_decoder.presence_head.layer3.bias.fill_(3.0)
        cache = PyramidCache(tmp_path, model, 3) if cached else None
        return Teacher(model, processor, phrases, 0.3, cache)(batch, CPU, True, True)

    levels, said = answers(cached=False)
    for _ in range(2):  # looked at, and read
        own_levels, own = answers(cached=True)
        assert all(torch.equal(one, other) for one, other in zip(own_levels, levels, strict=True))
        for name in ("logits", "boxes", "presence_logits", "hidden", "encoded"):
            assert torch.equal(own.found[name], said.found[name]), name
        assert len(said.segments.masks) and torch.equal(own.segments.masks, said.segments.masks)
    assert len(files(tmp_path)) == 3


def test_a_batch_with_a_new_picture_is_looked_at_as_a_whole(tmp_path, model, pixels, monkeypatch):
    cache = PyramidCache(tmp_path, model, 3)
    cache(pixels[:2])
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path)}
    sizes, look = [], model.get_vision_features

    def counted(images):
        sizes.append(len(images))
        return look(images)

    monkeypatch.setattr(model, "get_vision_features", counted)
    cache(pixels)
    assert sizes == [3] and len(files(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())


@pytest.mark.parametrize("harm", ["cut", "empty", "turned", "swapped", "bare"])
def test_a_damaged_file_is_made_again(tmp_path, model, pixels, caplog, harm):
    cache = PyramidCache(tmp_path, model, 3)
    levels = cache(pixels).fpn_hidden_states
    first, second, _ = files(tmp_path)
    content = first.read_bytes()
    if harm == "cut":
        first.write_bytes(content[:-100])
    elif harm == "empty":
        first.write_bytes(b"")
    elif harm == "turned":
        first.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "swapped":
        shutil.copyfile(second, first)
    else:
        save_file(load_file(first), first)
    again = cache(pixels).fpn_hidden_states
    assert all(torch.equal(one, other) for one, other in zip(again, levels, strict=True))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"teacher_cache: {first} is damaged and made again: ")
    assert first.read_bytes() == content and len(files(tmp_path)) == 3


def test_teachers_sizes_and_dtypes_are_kept_apart(tmp_path, model, pixels):
    cache = PyramidCache(tmp_path, model, 3)
    cache(pixels)
    other = micro_model(seed=1)
    levels = PyramidCache(tmp_path, other, 3)(pixels).fpn_hidden_states
    assert torch.equal(levels[0], other.get_vision_features(pixels).fpn_hidden_states[0])
    PyramidCache(tmp_path, micro_model().half(), 3)(pixels)
    folders = {path.parent for path in files(tmp_path)}
    assert len(folders) == 3 and len(files(tmp_path)) == 9

    eps = micro_model()
    eps.config.vision_config.backbone_config.layer_norm_eps = 1e-3
    larger = micro_model(image_size=128)
    assert {PyramidCache(tmp_path, each, 3).folder for each in (eps, larger)}.isdisjoint(folders)
    detector = micro_model()
    with torch.no_grad():
        detector.detr_decoder.query_embed.weight.zero_()  # which the pyramid does not depend on
    assert PyramidCache(tmp_path, detector, 3).folder == cache.folder


def test_space_is_asked_for_before_the_first_picture(tmp_path, model, pixels, monkeypatch, caplog):
    caplog.set_level("INFO")
    cache = PyramidCache(tmp_path, model, 1000)
    cache(pixels)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=997 * cache.picture_bytes))
    cache.prepare()
    lines = [record.getMessage() for record in caplog.records]
    assert f"teacher_cache {tmp_path}: 1000 pictures x 0.33 MiB (float32, 64 px) = 0.32 GiB" in lines[-1]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=996 * cache.picture_bytes))
    with pytest.raises(OSError, match=r"^teacher_cache .*: 0.32 GiB are needed for 1000 pictures, and 0.32 GiB are"):
        cache.prepare()


def test_a_disk_that_fills_up_ends_nothing_but_the_keeping(tmp_path, model, pixels, monkeypatch, caplog):
    cache = PyramidCache(tmp_path, model, 3)
    cache(pixels[:1])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(teacher_cache, "write_file", full)
    whole = model.get_vision_features(pixels).fpn_hidden_states
    for _ in range(2):
        assert torch.equal(cache(pixels).fpn_hidden_states[0], whole[0])
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("teacher_cache: no space is left for")
    assert len(files(tmp_path)) == 1


def test_what_overflows_is_not_kept(tmp_path, model, pixels):
    with torch.no_grad():
        model.vision_encoder.neck.fpn_layers[0].proj2.bias.fill_(float("inf"))
    PyramidCache(tmp_path, model, 3)(pixels)
    assert files(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(tmp_path, model):
    cache = PyramidCache(tmp_path, model, 3)
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = teacher_cache._own_mark().rpartition("-")[0]
    kept = [".a.safetensors.another-host-1.partial", f".b.safetensors.{host}-{os.getpid()}.partial"]
    for name in [*kept, f".c.safetensors.{host}-{ended.stdout.strip()}.partial"]:
        (cache.folder / name).write_bytes(b"half")
    cache.prepare()
    assert [path.name for path in files(tmp_path)] == kept
