"""Distillation against float64 arithmetic from the papers' equations, and against a teacher that is known."""

from __future__ import annotations

import math

import pytest
import torch

from fourstroke.schedulers.lcm import LCMScheduler
from fourstroke.train import lcd

SHAPE = (3, 4, 2, 2)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0)


def randn(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_timesteps_are_neighbours_on_the_grid_that_the_scheduler_samples_on() -> None:
    later, earlier = lcd.draw_timesteps(4000, generator=torch.Generator().manual_seed(0))
    assert set(later.tolist()) == {20 * i - 1 for i in range(1, 51)}
    assert torch.equal(earlier, (later - 20).clamp(min=0))
    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    assert set(scheduler.timesteps.tolist()) <= set(later.tolist())


def test_timesteps_without_a_generator_and_with_another_skip() -> None:
    later, earlier = lcd.draw_timesteps(50, original_inference_steps=10)
    assert ((later + 1) % 100 == 0).all()
    assert ((earlier == later - 100) | ((later == 99) & (earlier == 0))).all()


def test_guidance_is_drawn_from_its_range_less_one() -> None:
    w = lcd.draw_guidance(2000, 3.0, 8.0, torch.Generator().manual_seed(0))
    assert 2.0 <= w.min() < 2.1 and 6.9 < w.max() <= 7.0
    assert torch.equal(lcd.draw_guidance(3, 1.0, 1.0), torch.zeros(3))


@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (3.0, 2.0)])
def test_a_wrong_guidance_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"must be 1 <= low <= high"):
        lcd.draw_guidance(2, low, high)


def test_guided_is_classifier_free_guidance() -> None:
    conditional, unconditional, scale = randn(0), randn(1), torch.tensor([1.0, 4.0, 7.5], dtype=torch.float64)
    expected = unconditional + scale.view(3, 1, 1, 1) * (conditional - unconditional)
    torch.testing.assert_close(lcd.guided(conditional, unconditional, scale - 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_teacher_step_moves_a_known_picture_and_noise_along_their_trajectory(prediction_type: str) -> None:
    """A teacher that knows x0 and the noise must carry x_t exactly to x_s, whatever it is asked to predict."""
    x0, noise = randn(2), randn(3)
    t, s = torch.tensor([999, 499, 19]), torch.tensor([979, 479, 0])

    def at(timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alphas = ALPHAS[timesteps].view(3, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    alpha, sigma = at(t)
    output = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}[prediction_type]
    w = torch.tensor([0.0, 3.0, 6.5], dtype=torch.float64)
    moved = lcd.teacher_step(output, output, alpha * x0 + sigma * noise, t, s, w, ALPHAS, prediction_type)
    alpha, sigma = at(s)
    torch.testing.assert_close(moved, alpha * x0 + sigma * noise, rtol=1e-9, atol=1e-9)


def test_teacher_step_guides_the_noise() -> None:
    """DDIM, eq. 12 with sigma = 0, on the guided noise, element by element."""
    conditional, unconditional, sample = randn(4), randn(5), randn(6)
    t, s, w = torch.tensor([999, 499, 19]), torch.tensor([979, 479, 0]), torch.tensor([2.0, 3.0, 4.0]).double()
    moved = lcd.teacher_step(conditional, unconditional, sample, t, s, w, ALPHAS)
    for row in range(3):
        noise = (1 + w[row]) * conditional[row] - w[row] * unconditional[row]
        a, b = ALPHAS[t[row]], ALPHAS[s[row]]
        x0 = (sample[row] - math.sqrt(1 - a) * noise) / math.sqrt(a)
        torch.testing.assert_close(moved[row], math.sqrt(b) * x0 + math.sqrt(1 - b) * noise, rtol=1e-9, atol=1e-9)


def test_consistency_is_the_identity_at_timestep_zero() -> None:
    sample, output = randn(7), randn(8)
    zero = torch.zeros(3, dtype=torch.int64)
    assert torch.equal(lcd.consistency(output, sample, zero, ALPHAS), sample)


def test_consistency_is_what_the_scheduler_denoises_to() -> None:
    """The function that training fits is the one that `LCMScheduler` evaluates."""
    sample, output = randn(9).float(), randn(10).float()
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        expected = scheduler.step(output, timestep, sample, return_dict=True).denoised
        found = lcd.consistency(output, sample, timestep.expand(3), ALPHAS.float())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    near, far = zero + 1e-6, zero + 100.0
    torch.testing.assert_close(lcd.pseudo_huber(near, zero, 1e-2), near**2 / 2e-2, rtol=1e-6, atol=0)
    torch.testing.assert_close(lcd.pseudo_huber(far, zero, 1e-2), far - 1e-2, rtol=1e-6, atol=0)
    assert lcd.pseudo_huber(zero, zero).item() == 0.0


def test_a_perfect_student_of_a_point_has_no_loss_and_another_one_is_pulled_to_it() -> None:
    """When all pictures are one point, the exact student jumps to it from every timestep; a wrong one learns to."""
    point = randn(11)[:1].expand(8, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    offset = torch.full((1, 4, 2, 2), 0.5, dtype=torch.float64, requires_grad=True)

    def loss(shift: torch.Tensor) -> torch.Tensor:
        t, s = lcd.draw_timesteps(8, generator=generator)
        noise = torch.randn(point.shape, dtype=torch.float64, generator=generator)
        a, b = (ALPHAS[i].view(8, 1, 1, 1) for i in (t, s))
        x_t = a.sqrt() * point + (1 - a).sqrt() * noise
        x_s = lcd.teacher_step(noise, noise, x_t, t, s, torch.zeros(8), ALPHAS)
        target = lcd.consistency((x_s - b.sqrt() * point) / (1 - b).sqrt(), x_s, s, ALPHAS)
        output = (x_t - a.sqrt() * (point + shift)) / (1 - a).sqrt()
        return lcd.pseudo_huber(lcd.consistency(output, x_t, t, ALPHAS), target).mean()

    assert loss(torch.zeros_like(offset)).item() < 1e-4
    optimizer = torch.optim.SGD([offset], lr=0.5)
    before = loss(offset).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(offset).backward()
        optimizer.step()
    assert before > 0.4 and offset.abs().max().item() < 0.05
