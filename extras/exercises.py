"""Tests of the exercises in docs/ that no other test tells. Each fails until its exercise is done.

    pytest extras/exercises.py -k ddm_2
"""

import math

import torch

import angular
import blurring
import ddm
import pixel_aware

torch.set_num_threads(1)
HALF_PI = math.pi / 2


def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


def rand(*shape, low=-1.0):
    """Even numbers from low to 1, in float64."""
    return low + (1 - low) * torch.rand(*shape, generator=seeded(), dtype=torch.float64)


def randn(*shape, seed=1):
    """Normal numbers, in float64."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def full(value, n=1):
    """n times a number, in float64."""
    return torch.full((n,), value, dtype=torch.float64)


def close(got, want, atol=1e-12):
    """Fail unless the tensors are equal to atol."""
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_ddm_2_euler_leaves_noise():
    """Euler of dx/dt = h + ε/(2√t) with the truth leaves (√t - √r)²/(2√t) of ε over."""
    x0 = rand(6, 2, 3, 4)
    eps = randn(6, 2, 3, 4)
    t = full(0.64, 6)
    r = full(0.25, 6)
    xt = ddm.diffuse(x0, -x0, eps, t)
    xr = ddm.diffuse(x0, -x0, eps, r)
    got = ddm.ode_step(xt, -x0, eps, t, r)
    close(got - xr, 0.3 ** 2 / 1.6 * eps)


def test_ddm_4_any_step_is_exact_for_gaussian_data():
    """From V(t) to V(r) in one step of Algorithm 2, for data N(0, .5²) and the exact mean."""
    t = full(0.8)
    r = full(0.2)
    V = (1 - t) ** 2 / 4 + t

    def step(x, z):
        phi = -(1 - t) / 4 / V * x
        eps = t.sqrt() / V * x
        return ddm.reverse_step(x, phi, eps, t, t - r, z, sigma_data=0.5).flatten()

    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    kept = step(one, 0 * one)
    added = step(0 * one, one)
    close(kept ** 2 * V + added ** 2, (1 - r) ** 2 / 4 + r)


def blurred(x, sigma):
    """x blurred by sigma pixels, without noise."""
    alpha, _ = blurring.alpha_sigma(full(1.0), x.shape[-2:], sigma, d_min=0.0)
    a, _ = blurring.noise_schedule(full(1.0))
    return blurring.idct(alpha / a * blurring.dct(x))


def test_blurring_1_an_impulse_becomes_twice_as_wide_as_high():
    """Twice the horizontal frequency is a Gaussian of twice the width across. Catches its half."""
    x = torch.zeros(1, 1, 61, 91, dtype=torch.float64)
    x[0, 0, 30, 45] = 1
    down = torch.arange(61, dtype=torch.float64)[:, None] - 30
    across = torch.arange(91, dtype=torch.float64) - 45
    r2 = down ** 2 + across ** 2 / 4
    gaussian = torch.exp(-r2 / 18) / (36 * math.pi)
    close(blurred(x, 3.0)[0, 0], gaussian, 2e-5)


def test_blurring_3_widths_of_cauchy_blurs_add():
    """1.5 pixels and 2 are 3.5, where Gaussians' squares add. Catches one place forgotten."""
    x = rand(1, 1, 16, 20)
    close(blurred(blurred(x, 1.5), 2.0), blurred(x, 3.5), 1e-13)


def test_blurring_5_eta_leads_from_the_path_to_the_posterior():
    """Fresh noise of η² times the posterior's variance. With η = 1 the mean is the posterior's."""
    t, s = full(0.7, 1), full(0.4, 1)
    ut, ux = randn(2, 1, 5, 6), randn(2, 1, 5, 6, seed=1)
    mean, variance = blurring.posterior(ut, ux, t, s)
    alpha_t, sigma_t = blurring.alpha_sigma(t, (5, 6))
    alpha_s, sigma_s = blurring.alpha_sigma(s, (5, 6))
    u_eps = (ut - alpha_t * ux) / sigma_t
    for eta in (0.0, 0.3, 1.0):
        drawn = blurring.ddim_step(ut, ux, t, s, eta=eta, noise=1j)       # imaginary: the noise
        close(drawn.imag ** 2, eta ** 2 * variance.expand_as(ut))
        old = (drawn.real - alpha_s * ux) / u_eps                         # of the old noise
        close(old ** 2 + drawn.imag ** 2, (sigma_s ** 2).expand_as(ut), 1e-9)
    close(drawn.real, mean, 1e-9)


def gaussian(mean, std):
    """The exact (x̂₀, ε̂) of N(mean, std²) on the quarter circle, as a network."""

    def net(x, t):
        eta = HALF_PI * t.view(-1, 1, 1, 1)
        c = eta.cos()
        n = eta.sin()
        variance = c ** 2 * std ** 2 + n ** 2
        off = (x - c * mean) / variance
        return mean + c * std ** 2 * off, n * off

    return net


def test_angular_4_chord_is_exact_for_a_point_and_for_white_data():
    """The midpoint rule on the arc is right for data at a point, and for data N(0, 1)."""
    x1 = randn(9, 1, 2, 2)
    for N in (1, 2, 10):
        close(angular.sample(gaussian(0.5, 1e-9), x1, N, "midpoint"), 0 * x1 + 0.5, 1e-7)
        close(angular.sample(gaussian(0.0, 1.0), x1, N, "midpoint"), x1, 1e-7)


def test_angular_5_a_named_velocity_is_a_projected_pair():
    """A velocity's pair agrees with x, and its Eq. 12 is 1 + γ times the velocity's error."""
    x0 = rand(7, 2, 3, 4)
    eps = randn(7, 2, 3, 4)
    v = randn(7, 2, 3, 4, seed=5)
    eta = HALF_PI * rand(7, low=0.0)
    model = angular.predictor(lambda x, t: (v,), "v")
    x = angular.diffuse(x0, eps, eta)
    heads = model(x, eta / HALF_PI)
    for got, want in zip(angular.project(x, *heads, eta), heads):
        close(got, want)
    error = v - angular.velocity(x0, eps, eta)
    got = angular.loss(model, x0, eps, eta, "v", gamma=3.0)
    close(got, 4 * error.square().mean((1, 2, 3)))


def test_pixel_aware_2_every_part_has_the_same_rate():
    """The chain of Eq. 2 has `trajectory_noise`'s noises, and black ends at white noise."""
    x0 = rand(1, 1, 2, 2, low=0.004)
    T = 9
    eps = pixel_aware.trajectory_noise(x0, 20.0, T, seeded(3))
    z = randn(T, 1, 2, 2, seed=3)
    alpha = pixel_aware.x_delta(x0, 20.0) ** (1 / T)
    x = x0
    for i in range(T):
        x = alpha.sqrt() * x + (1 - alpha).sqrt() * z[i]
    close(pixel_aware.diffuse(x0, eps[:, -1], T, 20.0, T), x)
    assert pixel_aware.x_delta(full(0.004), 20.0) < 0.01
    assert pixel_aware.snr(full(0.004), 1.0, 20.0) < 1e-6


def test_pixel_aware_3_jump_forgets():
    """Every pass but the first begins at a draw of q(x_s | x_i, x̂₀)."""
    x0 = rand(2, 1, 4, 4, low=0.004)
    T = 40
    rate = 20 / T * x0
    seen = []

    def G(x, t, z):
        seen.append((T * t[0].item(), x))
        return torch.exp(-20 * x0)

    def R(x, scale, t):
        kept = pixel_aware.kept(rate, T * t[0])
        eps = (x - kept.sqrt() * x0) / (1 - kept).sqrt()
        return pixel_aware.expected_noise(eps, T * t[0], torch.arange(1, T + 1), rate)

    pixel_aware.sample(G, R, randn(2, 1, 4, 4), 5, gamma=20.0, T=T, generator=seeded(3))
    g = seeded(3)
    torch.randn(2, 1, generator=g)                            # the code's z is drawn first
    assert len(seen) == 5
    for (i, x), (s, y) in zip(seen, seen[1:]):
        mean, variance = pixel_aware.posterior(x, x0, rate, i, s)
        z = torch.randn(x.shape, generator=g, dtype=x.dtype)
        close(y, mean + variance.sqrt() * z, 1e-8)


def test_pixel_aware_4_line_9_as_printed_wants_the_steps_own_noises():
    """With x_j = √α x_{j-1} + √(1-α) z_j, and no fresh noise, the z_j lead to the image."""
    T = 200
    x0 = 0 * randn(1, 1, 32, 32) + 0.25
    z = randn(1, T, 1, 32, 32)
    scale = pixel_aware.x_delta(x0, 20.0)
    alpha = scale ** (1 / T)
    x = x0
    for j in range(T):
        x = alpha.sqrt() * x + (1 - alpha).sqrt() * z[:, j]
    close(pixel_aware.reverse(x, T, scale, z, T, "literal", noise=False), x0, 1e-9)


def test_pixel_aware_5_eq_10_as_printed_would_hold_proposition_1_to_the_end():
    """As printed, the brighter pixel loses SNR faster to the end, and white keeps 9.5 of it."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    white = pixel_aware.snr(full(1.0), t, 20.0)
    grey = pixel_aware.snr(full(0.1), t, 20.0)
    assert (white.diff() < grey.diff()).all()
    close(white[-1], full(9.5).squeeze(), 0.02)
