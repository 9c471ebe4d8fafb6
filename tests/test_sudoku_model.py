"""Sudoku models: givens, starts, steps, continued runs, controls."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.sudoku import KINDS, SudokuNet


def network(kind: str = "akorn", **kwargs: object) -> SudokuNet:
    torch.manual_seed(0)
    return SudokuNet(kind, **{"embed_dim": 32, "num_heads": 4, "num_steps": 3, **kwargs})  # type: ignore[arg-type]


def puzzles(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 10, (count, 81), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients(kind: str) -> None:
    model = network(kind, depth=3 if kind == "transformer" else 1).train()
    logits = model(puzzles())
    assert logits.shape == (2, 81, 9)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_given_cells_start_from_their_digit_and_others_from_noise() -> None:
    model, digits = network(num_steps=1, gamma=0.0).eval(), puzzles()
    start = torch.randn(2, 81, 32)
    x = model.forward_oscillators(digits, start).oscillators[0].unflatten(-1, (4, -1))
    c, noise = (t.unflatten(-1, (4, -1)) for t in (model.embedding(digits), start))
    expected = torch.where((digits > 0)[..., None, None], c, noise)
    torch.testing.assert_close(x, torch.nn.functional.normalize(expected, dim=-2))


def test_steps_continue_where_they_stopped() -> None:
    model, digits = network().eval(), puzzles()
    whole = model.forward_oscillators(digits, steps=7, energy=True, trajectory=True)
    first = model.forward_oscillators(digits, steps=4)
    rest = model.forward_oscillators(digits, first.oscillators[0], steps=3, continued=True)
    torch.testing.assert_close(rest.logits, whole.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(whole.trajectory[0][4]), first.logits, rtol=1e-4, atol=1e-5)
    assert whole.energy[0].shape == (8, 2)
    with pytest.raises(ValueError, match="continued"):
        model.forward_oscillators(digits, continued=True)


def test_starts_are_seeded_in_evaluation() -> None:
    model, digits = network().eval(), puzzles()
    assert torch.equal(model(digits), model(digits))
    assert torch.equal(model(digits)[:1], model(digits[:1]))
    many = model.forward_oscillators(digits[:1].expand(5, -1), torch.randn(5, 81, 32)).logits
    assert many.std(0).max() > 0
    model.set_steps(9)
    assert torch.equal(model(digits), model(digits, steps=9))


def test_controls_have_no_oscillators() -> None:
    with pytest.raises(ValueError, match="no oscillators"):
        network("itrsa").forward_oscillators(puzzles())
    with pytest.raises(ValueError, match="one of akorn"):
        network("gcn")
    model = network("itrsa").eval()
    assert not torch.allclose(model(puzzles(), steps=8), model(puzzles()))
