"""Attention with GTA against a loop over tokens and heads; relative encoding; resampling; convolution."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pretrain.models.backbone import initialise
from pretrain.models.connectivity import AttentionCoupling, ConvCoupling, make_coupling
from pretrain.models.positions import gta_rotations, resample_tokens, sine_cosine

GRID = (2, 3)


def test_attention_equals_a_loop_over_tokens_and_heads() -> None:
    torch.manual_seed(0)
    dim, heads = 24, 3
    width, pairs = dim // heads, dim // heads // 2
    coupling = AttentionCoupling(dim, heads, GRID)
    initialise(coupling)
    with torch.no_grad():
        coupling.gta_in += 0.3 * torch.randn_like(coupling.gta_in)
        coupling.gta_out += 0.3 * torch.randn_like(coupling.gta_out)
    x = torch.randn(1, 6, dim)
    qkv = (x[0] @ coupling.qkv.weight.t() + coupling.qkv.bias).view(6, 3, heads, 2, pairs)

    def turned(part: int, token: int, head: int) -> torch.Tensor:
        u = qkv[token, part, head]
        matrix = coupling.gta_in[:, :, token, part]
        columns = [matrix[:, :, p] @ u[:, p] for p in range(pairs)]
        return torch.stack(columns, dim=1).flatten()

    rows = []
    for i in range(6):
        out = torch.zeros(heads, 2, pairs)
        for h in range(heads):
            logits = torch.stack([turned(0, i, h) @ turned(1, j, h) for j in range(6)]) / math.sqrt(width)
            values = torch.stack([turned(2, j, h) for j in range(6)])
            mixed = (logits.softmax(0)[:, None] * values).sum(0).view(2, pairs)
            for p in range(pairs):
                out[h, :, p] = coupling.gta_out[:, :, i, p] @ mixed[:, p]
        rows.append(out.flatten() @ coupling.out.weight.t() + coupling.out.bias)
    got = coupling(x, GRID, coupling.positions(GRID))
    torch.testing.assert_close(got[0], torch.stack(rows), rtol=1e-4, atol=1e-5)


def test_gta_at_initialisation_is_a_relative_encoding() -> None:
    """Rotations depend on differences of positions only: M_i^T M_j is the same for all pairs at one displacement."""
    matrices = gta_rotations((4, 5), 12).permute(2, 3, 0, 1).view(4, 5, 6, 2, 2)
    first = matrices[0, 0].transpose(-1, -2) @ matrices[1, 2]
    other = matrices[2, 2].transpose(-1, -2) @ matrices[3, 4]
    torch.testing.assert_close(first, other)
    eye = torch.eye(2).expand(4, 5, 6, 2, 2)
    torch.testing.assert_close(matrices.transpose(-1, -2) @ matrices, eye, atol=1e-6, rtol=0)


def test_translated_neighbours_attend_alike_at_initialisation() -> None:
    """Two tokens that see the same content at the same displacements get the same output."""
    torch.manual_seed(0)
    coupling = AttentionCoupling(16, 2, (1, 8))
    initialise(coupling)
    content = torch.randn(1, 3, 16)
    outputs = []
    for shift in (0, 4):  # the same three tokens, four columns further
        matrices = coupling.positions((1, 8))
        assert matrices is not None
        window = tuple(m[:, :, shift : shift + 3] for m in matrices)
        outputs.append(coupling(content, (1, 3), window))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(4, 4), (3, 8), (1, 1)])
def test_positions_are_resampled_as_images_are(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    table = torch.randn(2, 2, 12, 3)
    planes = table.movedim(2, -1).reshape(12, 1, 3, 4)
    expected = nn.functional.interpolate(planes, size=grid, mode="bilinear")
    got = resample_tokens(table, (3, 4), grid, dim=2)
    torch.testing.assert_close(got.movedim(2, -1).reshape(12, 1, *grid), expected)
    assert resample_tokens(table, (3, 4), (3, 4), dim=2) is table


def test_another_grid_is_the_same_stored_or_resampled_in_flight() -> None:
    torch.manual_seed(0)
    coupling = AttentionCoupling(16, 2, GRID)
    initialise(coupling)
    x = torch.randn(1, 20, 16)
    before = coupling(x, (4, 5), coupling.positions((4, 5)))
    coupling.set_grid((4, 5))
    assert torch.equal(before, coupling(x, (4, 5), coupling.positions((4, 5))))


def test_convolution_sees_the_grid() -> None:
    torch.manual_seed(0)
    coupling = ConvCoupling(8, 3)
    x = torch.randn(2, 6, 8)
    expected = coupling.conv(x.view(2, 2, 3, 8).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 6, 8)
    torch.testing.assert_close(coupling(x, GRID, None), expected)


def test_absolute_positions_tell_tokens_apart() -> None:
    table = sine_cosine((5, 7), 16)
    assert table.unique(dim=0).shape == (35, 16)
    torch.testing.assert_close(table.square().sum(1), torch.full((35,), 8.0))


def test_wrong_arguments_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        AttentionCoupling(30, 8, None)
    with pytest.raises(ValueError, match="even number of channels"):
        gta_rotations(GRID, 5)
    with pytest.raises(ValueError, match="must be odd"):
        ConvCoupling(8, 4)
    with pytest.raises(ValueError, match="attn, conv or none"):
        make_coupling("gcn", 8, num_heads=2, grid=None, kernel_size=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        sine_cosine(GRID, 10)
