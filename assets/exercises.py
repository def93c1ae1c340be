"""The README's exercises that no test of the repository tells: each test here fails until its exercise is done.

    pytest assets/exercises.py -k ddm_2
"""

import math
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import angular
import blurring
import data
import ddm
import pixel_aware
from test_all import HALF_PI, arc, blurred, forward_path, full, image_for, mixture, pixels, rand, randn, rms


def test_ddm_2_euler_leaves_noise():
    """Euler of dx/dt = h + ε/(2√t) with the truth leaves (√t - √r)²/(2√t) of ε over."""
    x0, eps, t, r = image_for("constant"), randn(6, 2, 3, 4), full(0.64, 6), full(0.25, 6)
    got = ddm.ode_step(ddm.diffuse(x0, -x0, eps, t), -x0, eps, t, r, heads="both")
    torch.testing.assert_close(got - ddm.diffuse(x0, -x0, eps, r), (0.8 - 0.5) ** 2 / 1.6 * eps)


def test_ddm_4_any_step_is_exact_for_gaussian_data():
    """From V(t) to V(r) in one step of Algorithm 2, for data N(0, .5²) and the exact mean."""
    t, r, zero, one = (full(v, 1).view(1, 1, 1, 1) for v in (0.8, 0.2, 0, 1))
    V = lambda t: (1 - t) ** 2 / 4 + t
    heads = lambda x: (-(1 - t) / 4 / V(t) * x, t.sqrt() / V(t) * x)
    step = lambda x, z: ddm.reverse_step(x, *heads(x), t.flatten(), (t - r).flatten(), z, sigma_data=0.5)
    torch.testing.assert_close(step(one, zero) ** 2 * V(t) + step(zero, one) ** 2, V(r))


def test_blurring_1_an_impulse_becomes_twice_as_wide_as_high():
    """Twice the horizontal frequency is a Gaussian of twice the width across, and the same down."""
    x = torch.zeros(1, 1, 61, 91, dtype=torch.float64)
    x[0, 0, 30, 45] = 1
    r2 = (torch.arange(61)[:, None] - 30) ** 2 + (torch.arange(91)[None] - 45) ** 2 / 4
    gaussian = torch.exp(-r2 / (2 * 3.0**2)) / (4 * math.pi * 3.0**2)
    torch.testing.assert_close(blurred(x, 3.0)[0, 0], gaussian.double(), rtol=0, atol=2e-5)


def test_blurring_3_widths_of_cauchy_blurs_add():
    """1.5 pixels and then 2 are 3.5, where Gaussians' squares add to 2.5². Catches one of two places forgotten."""
    x = rand(1, 1, 16, 20)
    torch.testing.assert_close(blurred(blurred(x, 1.5), 2.0), blurred(x, 3.5), rtol=0, atol=1e-13)


def test_blurring_5_any_eta_of_t_keeps_the_marginals():
    """Images that are 0: z_t keeps variance σ_t² at every t, but it is not Algorithm 1 any more."""
    z1, ends, ratio = randn(20000, 1, 2, 2), [], []
    net = lambda z, t: (0 * z, z / blurring.noise_schedule(t)[1])
    watch = lambda t, z, x0: ratio.append((z.var() / blurring.noise_schedule(full(t, 1))[1] ** 2).item())
    for solver, eta in (("ddim", 1.0), ("ancestral", 0.0)):
        ends.append(blurring.sample(net, z1, 10, solver, eta, generator=torch.Generator().manual_seed(0), watch=watch))
    assert np.abs(np.array(ratio[:10]) - 1).max() < 0.03 and not torch.allclose(*ends, atol=1e-6)


def test_angular_4_chord_is_exact_for_a_point_and_for_white_data():
    """Data at a point turn on the circle, white data stand still: the midpoint rule on the arc is right for both."""
    x1 = randn(9, 1, 2, 2)
    for N in (1, 2, 10):
        for mean, std, end in ((0.5, 1e-9, torch.full_like(x1, 0.5)), (0.0, 1.0, x1)):
            got = angular.sample(mixture([1.0], [mean], [std]), x1, N, "midpoint")
            torch.testing.assert_close(got, end, rtol=0, atol=1e-7)


def test_angular_5_a_named_velocity_is_a_projected_pair():
    """The pair that a velocity names agrees with x, and Eq. 12 of it is 1 + γ times the velocity's own error."""
    (x0, eps, eta), v = arc(), randn(7, 2, 3, 4, seed=5)
    model, x = angular.predictor(lambda x, t: (v,), "velocity"), angular.diffuse(x0, eps, eta)
    heads = model(x, eta / HALF_PI)
    torch.testing.assert_close(angular.project(x, *heads, eta), heads, rtol=0, atol=1e-13)
    error = (v - angular.velocity(x0, eps, eta)).square().mean((1, 2, 3))
    torch.testing.assert_close(angular.loss(model, x0, eps, eta, "velocity", gamma=3.0), 4 * error)


def test_pixel_aware_2_every_part_has_the_same_rate():
    """The chain of Eq. 2 with x_δ's α has `trajectory_noise`'s noises; `guess` finds x₀ again in x_δ; black is white
    noise at the end. (The first two hold before the exercise too.)
    """
    x, T, g = pixels(1, 1, 2, 2), 9, lambda: torch.Generator().manual_seed(3)
    scale, eps = pixel_aware.x_delta(x, 20.0), pixel_aware.trajectory_noise(x, 20.0, T, g())
    z = data.randn(x.expand(T, 1, 2, 2), g())
    torch.testing.assert_close(pixel_aware.guess(0 * x, scale, 5, T, 20.0, spread=1e-9)[0], x)
    for i in range(1, T + 1):
        x = pixel_aware.alpha(scale, T).sqrt() * x + pixel_aware.variance(scale, 1, T).sqrt() * z[i - 1]
    torch.testing.assert_close(pixel_aware.diffuse(pixels(1, 1, 2, 2), eps[:, -1], T, 20.0, T), x)
    assert pixel_aware.moments(full(0.004, 1), full(1, 1), 20.0)[1] > 0.99


def test_pixel_aware_3_jump_keeps_the_noise():
    """Between passes the noise in x_i stays what it is."""
    x0, seen, T = pixels(2, 1, 4, 4), [], 40
    noise = lambda x, i: (x - torch.exp(-10 * i / T * x0) * x0) / (1 - torch.exp(-20 * i / T * x0)).sqrt()
    G = lambda x, t, g: seen.append(noise(x, T * t[0])) or torch.exp(-20 * x0)
    R = lambda x, s, t: pixel_aware.expected_noise(seen[-1], T * t[0], torch.arange(1, T + 1), s, T)
    pixel_aware.sample(G, R, randn(2, 1, 4, 4), 5, gamma=20.0, T=T)
    assert len(seen) == 5 and all(torch.allclose(eps, seen[0]) for eps in seen)


def test_pixel_aware_4_line_9_as_printed_wants_the_steps_own_noises():
    """With z_j in place of ε̃_j, x_j = √α x_{j-1} + √(1-α) z_j, Algorithm 1 without fresh noise ends at the image."""
    x0, scale, _, xT = forward_path(0.25, 20.0, 200)
    z = torch.randn(1, 200, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert rms(pixel_aware.reverse(xT, 200, scale, z, 200, "literal", noise=False) - x0) < 1e-9


def test_pixel_aware_5_eq_17_as_printed_turns_over_sooner():
    """Between nearly white pixels x³/(e^y - 1)² turns over at 2y = 3 (1 - e^{-y}): t_δ is a third of the true one."""
    y = 0.8742
    assert math.isclose(2 * y, 3 * (1 - math.exp(-y)), rel_tol=1e-4)
    assert math.isclose(pixel_aware.t_delta(full(0.99999, 1), full(1, 1), 20.0).item(), y / 20, rel_tol=1e-3)
