"""What the oscillators do over the steps: phases as colours, coherence within and between objects, energies.

Owns: one look at a few images through a model's trajectory, for reports.

B images, T steps, N = h*w tokens, C = n*K channels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from downstream.encoder import Encoder
from downstream.metrics import by_token
from downstream.samples import Scene


@dataclass(frozen=True)
class Oscillations:
    """The last layer's oscillators on B images.

    Attributes:
        colours: [B, T+1, h, w, 3] uint8; phases by their three main directions, the same for all steps of an image.
        within, between: [T+1] mean cosine of oscillators of tokens of one object, and of two.
        energy: [B, T+1] as published; entry 0 stands for no step and is not drawn.
    """

    colours: np.ndarray
    within: np.ndarray
    between: np.ndarray
    energy: np.ndarray


@torch.inference_mode()
def look(encoder: Encoder, scene: Scene, *, start_seed: int = 0) -> Oscillations:
    """Run the model on the images of a scene, keeping every step of its last layer."""
    output = encoder.oscillations(scene.images, start_seed=start_seed, trajectory=True)
    states = output.trajectory[-1].float().cpu().transpose(0, 1)  # [B, T+1, N, C]
    grid = output.grids[-1]
    truth = tokens_of(scene.instances, grid)
    within, between = coherence(states, truth, oscillators=states.shape[-1] // encoder.model.n)
    return Oscillations(
        colours=np.stack([phase_colours(image, grid) for image in states]),
        within=within,
        between=between,
        energy=output.energy[-1].float().cpu().T.numpy(),
    )


def tokens_of(instances: Tensor, grid: tuple[int, int]) -> Tensor:
    """The most frequent label of each token's pixels, [B, N]; ignored pixels count as background."""
    return by_token(instances.clamp_min(0), grid).argmax(1)


def coherence(states: Tensor, truth: Tensor, *, oscillators: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine between oscillators of the same place K in two tokens: of one object, and of different objects.

    Args:
        states: [B, T+1, N, C], unit oscillators. truth: [B, N]; background is no object. oscillators: K.
    """
    same, apart = [], []
    for image, labels in zip(states, truth):
        objects = labels > 0
        alike = (labels[:, None] == labels) & objects[:, None] & objects & ~torch.eye(len(labels), dtype=torch.bool)
        unlike = (labels[:, None] != labels) & objects[:, None] & objects
        cosine = image @ image.mT / oscillators  # [T+1, N, N]
        if alike.any():
            same.append(cosine[:, alike].mean(1))
        if unlike.any():
            apart.append(cosine[:, unlike].mean(1))
    empty = torch.full((1, states.shape[1]), torch.nan)
    return tuple(torch.stack(one).mean(0).numpy() if one else empty[0].numpy() for one in (same, apart))  # type: ignore[return-value]


def phase_colours(states: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """States [T+1, N, C] of one image as colours [T+1, h, w, 3] uint8.

    The three main directions of the last step become red, green and blue, for all steps alike: tokens whose
    oscillators point the same way have the same colour.
    """
    last = states[-1] - states[-1].mean(0)
    axes = torch.linalg.svd(last, full_matrices=False).Vh[:3]
    if len(axes) < 3:
        axes = torch.cat([axes, axes.new_zeros(3 - len(axes), axes.shape[1])])
    projected = (states - states[-1].mean(0)) @ axes.T
    reach = projected[-1].abs().amax(0).clamp_min(1e-6)
    colours = (0.5 + 0.5 * (projected / reach).clamp(-1, 1)) * 255
    return colours.byte().view(-1, *grid, 3).numpy()


def strip(colours: np.ndarray, *, side: int = 96, gap: int = 4) -> bytes:
    """Frames [T+1, h, w, 3] side by side, as a PNG."""
    frames = [_enlarged(frame, side) for frame in colours]
    blank = np.full((frames[0].shape[0], gap, 3), 255, dtype=np.uint8)
    row = [piece for frame in frames for piece in (frame, blank)][:-1]
    return _encoded(np.concatenate(row, axis=1), "PNG")


def animation(colours: np.ndarray, images: Tensor, *, side: int = 160, frame_ms: int = 350) -> bytes:
    """Images of a batch in a row, photographs above their phases, stepping through time: an animated PNG."""
    from PIL import Image

    photos = [_enlarged((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy(), side) for image in images]
    frames = []
    for step in range(colours.shape[1]):
        phases = [_enlarged(image[step], side) for image in colours]
        columns = [np.concatenate([photo, phase], axis=0) for photo, phase in zip(photos, phases)]
        frames.append(Image.fromarray(np.concatenate(columns, axis=1)))
    buffer = io.BytesIO()
    durations = [frame_ms] * (len(frames) - 1) + [4 * frame_ms]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _enlarged(picture: np.ndarray, side: int) -> np.ndarray:
    from PIL import Image

    return np.array(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))


def _encoded(picture: np.ndarray, kind: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, optimize=True)
    return buffer.getvalue()
