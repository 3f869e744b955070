"""What is in front of a tower and behind it: embeddings, the last norm, and the layers that read the stream there."""

from __future__ import annotations

import math

import torch

from ..checkpoints import CLIP, NECK, TRACKER_NECK, VIT
from .basis import Basis
from .neck import map_neck
from .signals import Stream
from .transfer import Transfer


def embedded_patches(transfer: Transfer) -> Stream:
    """The embedded patches, for pixels with the colour and position correlations of natural images."""
    weight = transfer.read(f"{VIT}.embeddings.patch_embeddings.projection.weight")
    positions = transfer.read(f"{VIT}.embeddings.position_embeddings")[0]
    kernel, patch = weight.flatten(1), weight.shape[-1]
    grid = torch.cartesian_prod(torch.arange(patch), torch.arange(patch)).float()
    near = torch.exp(-torch.cdist(grid, grid) / patch)
    colors = 0.6 + 0.4 * torch.eye(weight.shape[1])
    prior = 0.25 * torch.kron(colors, near)  # pixels in [-1, 1] have a standard deviation of about 0.5
    spread = positions - positions.mean(0)
    return Stream(positions.mean(0), kernel @ prior @ kernel.T + spread.T @ spread / len(spread))


def vision_entry(transfer: Transfer) -> Stream:
    """The stream in front of the first layer of the ViT."""
    return embedded_patches(transfer).normalized(*transfer.pair(f"{VIT}.layer_norm"))


def map_vision_ends(transfer: Transfer, basis: Basis, final: Stream):
    """Patches and positions in front of the ViT, the feature pyramids behind it."""
    projection = f"{VIT}.embeddings.patch_embeddings.projection.weight"
    positions = f"{VIT}.embeddings.position_embeddings"
    weight, table = transfer.read(projection), transfer.read(positions)
    gamma, beta = transfer.pair(f"{VIT}.layer_norm")
    if basis.folds:
        # No linear layer reads this LayerNorm alone, so its weight moves in front of it: exact if it is constant.
        matrix = basis.scale * basis.matrix.T * gamma
        matrix = matrix - matrix.mean(0, keepdim=True)
        matrix = matrix - matrix.mean(1, keepdim=True)
        length = ((matrix @ embedded_patches(transfer).normalized().moment) * matrix).sum()
        gamma = torch.full((len(matrix),), math.sqrt(length / len(matrix)))
    else:
        matrix = torch.eye(len(gamma)) if basis.matrix is None else basis.matrix.T
        gamma = basis.write(gamma)
    transfer.put(projection, torch.tensordot(matrix, weight, 1), projection, basis.action, basis.energy)
    transfer.put(positions, table @ matrix.T, positions, basis.action, basis.energy)
    transfer.put_pair(f"{VIT}.layer_norm", (gamma, basis.write(beta)), f"{VIT}.layer_norm", basis.action)
    if basis.matrix is not None:
        for neck in (NECK, TRACKER_NECK):
            if f"{neck}.0.proj1.weight" in transfer.shapes:
                map_neck(transfer, basis, final, neck)


def text_entry(transfer: Transfer) -> Stream:
    """The stream in front of the first layer of the text encoder: any token at any position."""
    tokens = transfer.read(f"{CLIP}.embeddings.token_embedding.weight")
    positions = transfer.read(f"{CLIP}.embeddings.position_embedding.weight")
    means = tokens.mean(0), positions.mean(0)
    covariance = sum(
        table.T @ table / len(table) - torch.outer(mean, mean)
        for table, mean in zip((tokens, positions), means, strict=True)
    )
    return Stream(sum(means), covariance)


def map_text_ends(transfer: Transfer, basis: Basis, final: Stream):
    """Embeddings in front of the text encoder, the projection to the detector's width behind it."""
    for module in ("token_embedding", "position_embedding"):
        name = f"{CLIP}.embeddings.{module}.weight"
        table = transfer.read(name)
        transfer.put(name, basis.write(table.T).T, name, basis.action, basis.energy)
    norm = transfer.pair(f"{CLIP}.final_layer_norm")
    projection = basis.read(*transfer.pair("text_projection"), *norm)
    for module, pair in ((f"{CLIP}.final_layer_norm", basis.norm(*norm)), ("text_projection", projection)):
        transfer.put_pair(module, pair, module, basis.action, basis.energy)


__all__ = ["map_text_ends", "map_vision_ends", "text_entry", "vision_entry"]
