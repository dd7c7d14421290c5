"""What is done to gradients, against the papers' formulas in numpy."""

import numpy as np
import pytest
import torch
from torch import nn

from elite.optimizations.functions.gradients import AdaptiveClipping, Centralization, Noise

CPU = torch.device("cpu")


def parameters(scale: float = 1.0) -> list[nn.Parameter]:
    """A matrix, a vector, one with units of length zero, one that got no gradient."""
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(7)), nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.randn(2, 2))]
    for parameter in made[:3]:
        parameter.grad = torch.randn_like(parameter) * scale
    return made


def gradients(made: list[nn.Parameter]) -> list[np.ndarray]:
    return [np.array(p.grad, dtype=np.float64) for p in made if p.grad is not None]


def test_centralization_takes_each_rows_mean() -> None:
    made = parameters()
    before, hook = gradients(made), Centralization("c")
    hook.gradients(made, 1)
    expected = [g - g.mean(axis=1, keepdims=True) if g.ndim > 1 else g for g in before]
    for one, two in zip(gradients(made), expected, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert hook.counts() == {"gradients": 2}


@pytest.mark.parametrize("scale", [1e-3, 0.05, 10.0])
def test_adaptive_clipping_is_equation_3(scale: float) -> None:
    made = parameters(scale)
    made[0].grad[2] = 0.0  # type: ignore[index]
    before, hook, clipped = gradients(made), AdaptiveClipping("a", 0.02, 1e-3, CPU), 0
    hook.gradients(made, 1)
    for parameter, gradient, found in zip(made, before, gradients(made), strict=False):
        rows = gradient.reshape(-1, gradient.shape[-1])
        weights = np.array(parameter.detach(), dtype=np.float64).reshape(rows.shape)
        for row, weight, after in zip(rows, weights, found.reshape(rows.shape), strict=True):
            most = 0.02 * max(float(np.sqrt((weight**2).sum())), 1e-3)
            length = float(np.sqrt((row**2).sum()))
            clipped += length > most
            np.testing.assert_allclose(after, row * most / length if length > most else row, rtol=1e-5, atol=1e-9)
    assert hook.counts() == {"clipped_units": clipped, "units": 6 + 1 + 4}


def test_what_is_not_finite_stays_so() -> None:
    made = parameters()
    made[0].grad[1, 1] = float("nan")  # type: ignore[index]
    AdaptiveClipping("a", 0.02, 1e-3, CPU).gradients(made, 1)
    assert made[0].grad is not None and made[0].grad.isnan().any()


@pytest.mark.parametrize("step", [1, 100])
def test_noise_has_the_papers_variance_and_follows_from_seed_and_step(step: int) -> None:
    def added(seed: int, at: int) -> torch.Tensor:
        parameter = nn.Parameter(torch.zeros(400, 300))
        parameter.grad = torch.ones_like(parameter)
        Noise("n", 0.3, 0.55, seed).gradients([parameter], at)
        return parameter.grad - 1

    noise = added(5, step)
    # The paper counts steps from 0.
    assert float(noise.var()) == pytest.approx(0.3 / (1 + (step - 1)) ** 0.55, rel=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert torch.equal(noise, added(5, step))
    for other in (added(6, step), added(5, step + 1)):
        assert float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) == pytest.approx(0, abs=0.02)


def test_noise_leaves_the_runs_random_state_alone_and_parameters_differ() -> None:
    pair = [nn.Parameter(torch.zeros(3, 3)) for _ in range(2)]
    for parameter in pair:
        parameter.grad = torch.zeros_like(parameter)
    before = torch.get_rng_state()
    Noise("n", 0.3, 0.55, 1).gradients(pair, 1)
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(pair[0].grad, pair[1].grad)  # type: ignore[arg-type]
