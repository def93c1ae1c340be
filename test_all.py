"""What the papers claim and what the scripts promise, as tests. Run: pytest test_all.py

Each test's docstring names the equation or the promise, and the bug it would catch. The identities are checked in
float64 against a derivation of their own (brute-force conditioning, quadrature, quantiles, closed-form posteriors),
not against the formula again.
"""

import csv
import errno
import functools
import json
import math
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image

import angular
import blurring
import data
import ddm
import pixel_aware
import unet

torch.set_num_threads(1)  # of tensors this small, threads only wait for each other: minutes, on a busy machine
HERE = pathlib.Path(__file__).parent
SCRIPTS = pytest.mark.parametrize("script", [ddm, blurring, angular, pixel_aware], ids=lambda script: script.__name__)
ATTENUATIONS = list(ddm.ATTENUATIONS)
TINY = "--width 8 --mult 1 1 --blocks 1 --attention --batch-size 4 --device cpu".split()


def network_of(script, arguments):
    """A script's network, and the name of its first layer's weights."""
    if script is pixel_aware:
        return pixel_aware.PixelAware(**arguments), "parallel.trunk.first.weight"
    return unet.UNet(**arguments), "first.weight"


def rand(*shape, seed=0, low=-1.0, high=1.0):
    g = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(value, n):
    return torch.full((n,), value, dtype=torch.float64)


def image_for(h, n=6, seed=1):
    """Random images that the attenuation can take to zero."""
    return rand(n, 2, 3, 4, seed=seed, low=-0.72 if h == "sine" else -1, high=0.72 if h == "sine" else 1)


# ------------------------------------------------------------------------------------------------ ddm: the schedule


@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_attenuation_goes_from_image_to_zero(h):
    """Eq. 6's two ends, H_0 = 0 and x0 + H_1 = 0. Catches a wrong solution for φ, or a wrong branch of the sine's."""
    x0 = image_for(h)
    phi = ddm.draw_phi(x0, h, torch.Generator().manual_seed(3))
    assert phi.shape[1] == 2 * ddm.ATTENUATIONS[h]
    torch.testing.assert_close(ddm.H(phi, full(0, 6), h), torch.zeros_like(x0), rtol=0, atol=1e-15)
    torch.testing.assert_close(ddm.H(phi, full(1, 6), h), -x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_attenuation_is_the_integral_of_h(h):
    """H_t = ∫₀ᵗ h (Eq. 6), with h written as the papers write it and integrated numerically. Catches any wrong closed
    form.
    """
    phi = ddm.draw_phi(image_for(h), h, torch.Generator().manual_seed(5))
    parts = phi.chunk(ddm.ATTENUATIONS[h], dim=1)
    rate = {
        "constant": lambda t, c: c + 0 * t,
        "linear": lambda t, a, c: a * t + c,
        "quadratic": lambda t, a, b, c: a * t * t + b * t + c,
        "exponential": lambda t, a, c: torch.exp(a * t) + c,
        "sine": lambda t, a: torch.sin(a * t),
    }[h]
    nodes, weights = np.polynomial.legendre.leggauss(20)
    t = rand(6, seed=2, low=0, high=1)
    integral = sum(
        w / 2 * t[:, None, None, None] * rate((t * (x + 1) / 2)[:, None, None, None], *parts)
        for x, w in zip(nodes, weights)
    )
    torch.testing.assert_close(ddm.H(phi, t, h), integral, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h", ["exponential", "sine"])
def test_ddm_attenuation_keeps_its_digits_near_a_equal_zero(h):
    """e^{at} and 1 - cos(at) lose all float32 digits for small a, and are 0/0 at a = 0. Catches expm1 -> exp - 1 and
    a missing half-angle.
    """
    a = torch.tensor([0.0, 1e-38, 1e-12, 1e-6, -1e-4, 1e-2]).view(6, 1, 1, 1)
    phi = torch.cat([a, torch.zeros_like(a)], 1) if h == "exponential" else a
    exact = [
        0.7 + 0.49 * v / 2 + 0.343 * v * v / 6 if h == "exponential" else 0.49 * v / 2
        for v in a.flatten().double().tolist()
    ]
    got = ddm.H(phi, torch.full((6,), 0.7), h).flatten().double()
    np.testing.assert_allclose(got, exact, rtol=3e-5 if h == "sine" else 1e-6)


def test_ddm_sine_reaches_no_further_than_its_bound():
    """(1 - cos a)/a has its maximum 0.7246 (found here on a fine grid). Catches solving beyond it, where there is no
    solution.
    """
    a = np.linspace(1e-6, 2 * np.pi, 2_000_001)
    bound = ((1 - np.cos(a)) / a).max()
    assert abs(bound - ddm.SINE_BOUND) < 1e-6 and abs(a[((1 - np.cos(a)) / a).argmax()] - ddm.SINE_RANGE) < 1e-4
    with pytest.raises(ValueError, match="scale"):
        ddm.draw_phi(full(bound + 1e-4, 1).view(1, 1, 1, 1), "sine")
    assert ddm.draw_phi(rand(1, 1, 100, 100, low=-0.7246, high=0.7246), "sine").abs().max() <= ddm.SINE_RANGE + 1e-6


@pytest.mark.parametrize("grid", ddm.GRIDS)
@pytest.mark.parametrize("final", [False, True])
def test_ddm_times_start_at_one_fall_strictly_and_stay_above_delta(grid, final):
    """N steps have N call times in [δ, 1], the first 1, and end at exactly 0 (Algorithm 2). Catches "10 steps" that
    are 11 calls, and repeats.
    """
    for steps in (1, 2, 3, 10, 31, 32, 333, 2000):
        ts = ddm.times(steps, grid, 1e-3, final)
        assert len(ts) == steps + 1 and ts[0] == 1 and ts[-1] == 0 and min(ts[:-1]) >= 1e-3
        assert all(a > b for a, b in zip(ts, ts[1:]))
        if final and steps > 1:
            assert math.isclose(ts[-2], 1e-3)
    if grid in ("uniform", "quadratic"):
        by_hand = {"uniform": [1, 0.75, 0.5, 0.25, 0], "quadratic": [1, 0.5625, 0.25, 0.0625, 0]}
        np.testing.assert_allclose(ddm.times(4, grid), by_hand[grid])
    with pytest.raises(ValueError):
        ddm.times(4, "cubes")


# ------------------------------------------------------------------------------------------------- ddm: the forward


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_forward_ends_at_pure_noise_whatever_the_image(h, noise):
    """x_1 = ε and x_0 = x0 exactly (Eq. 6 and the condition below it). Catches a forward process that leaks the image
    at t = 1.
    """
    x0, eps = image_for(h), randn(6, 2, 3, 4)
    phi = ddm.draw_phi(x0, h, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ddm.diffuse(x0, phi, eps, full(1, 6), h, noise), eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(ddm.diffuse(x0, phi, eps, full(0, 6), h, noise), x0, rtol=0, atol=1e-15)


def test_ddm_forward_has_the_moments_of_a_wiener_process():
    """q(x_t | x0) = N(x0 + H_t, t) (Eq. 7), by simulating dx = h dt + dw (Eq. 14) in 400 small steps. Catches std t
    where √t is meant.
    """
    x0, t, g = 0.8, 0.36, torch.Generator().manual_seed(0)
    path = torch.full((20000,), x0, dtype=torch.float64)
    for _ in range(400):
        path += -x0 * t / 400 + math.sqrt(t / 400) * torch.randn(20000, generator=g, dtype=torch.float64)
    x = torch.full((20000, 1, 1, 1), x0, dtype=torch.float64)
    ours = ddm.diffuse(x, -x, randn(20000, 1, 1, 1, seed=9), full(t, 20000))
    assert abs(ours.mean() - path.mean()) < 0.02 and abs(ours.std() - path.std()) < 0.02


# ---------------------------------------------------------------------------------------------------- ddm: the loss


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
def test_ddm_preconditioned_heads_have_one_unit_variance_target(noise):
    """For x0 ~ N(0, σ_d²) both raw targets are the same, of mean 0 and variance 1, and independent of x_t. Catches a
    wrong skip or scale.
    """
    n, sigma = 40000, 0.5
    x0, eps, t = sigma * randn(n, 1, 1, 1, seed=1), randn(n, 1, 1, 1, seed=2), full(0.3, n)
    xt = ddm.diffuse(x0, -x0, eps, t, noise=noise)

    def with_raw_output(value):
        return ddm.predictor(lambda x, t: (torch.full_like(x, value),) * 2, sigma_data=sigma, noise=noise)(xt, t)

    (phi_0, eps_0), (phi_1, eps_1) = with_raw_output(0.0), with_raw_output(1.0)  # heads are affine in the raw outputs
    target = (-x0 - phi_0) / (phi_1 - phi_0)
    torch.testing.assert_close(target, (eps - eps_0) / (eps_1 - eps_0), rtol=0, atol=1e-10)
    assert abs(target.mean()) < 0.02 and abs(target.std() - 1) < 0.02
    assert abs(np.corrcoef(target.flatten(), xt.flatten())[0, 1]) < 0.02
    seen = []
    ddm.predictor(lambda x, t: seen.append(x.std()) or (x, x), sigma_data=sigma, noise=noise)(xt, t)
    assert abs(seen[0] - 1) < 0.02


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
def test_ddm_edm_weights_give_raw_outputs_unit_weight(noise):
    """With preconditioning for data of variance 1, "edm" weights make Eq. 10 the plain squared error of both raw
    outputs to v-prediction's target. Catches wrong weights.
    """
    x0, eps, t, sigma = rand(5, 2, 3, 4), randn(5, 2, 3, 4), rand(5, seed=4, low=0.01, high=0.98), 1.0
    raw = randn(5, 2, 3, 4, seed=7), randn(5, 2, 3, 4, seed=8)
    ours = ddm.loss(ddm.predictor(lambda x, t: raw, sigma_data=sigma, noise=noise), x0, -x0, eps, t, noise=noise)
    n, k = (t.sqrt() if noise == "sqrt" else t).view(5, 1, 1, 1), (1 - t).view(5, 1, 1, 1)
    angle = torch.atan2(n, k)  # x_t = scale (cos x0 + sin ε): v = cos ε - sin x0
    v = angle.cos() * eps - angle.sin() * x0
    torch.testing.assert_close(ours, sum(((r - v) ** 2).mean((1, 2, 3)) for r in raw), rtol=1e-9, atol=0)


def test_ddm_weights_are_those_of_table_v_and_finite_on_the_closed_interval():
    """ADM Table V at t = 1/2 and t = 1/4, worked out by hand; all finite on [0, 1]. Catches swapped λs, a missing
    square, an infinite end.
    """
    t = torch.tensor([0.5, 0.25], dtype=torch.float64)
    by_hand = {
        "one": [[1, 1], [1, 1]],
        "inverse": [[2, 4], [2, 4 / 3]],
        "exponential": [[math.e**0.5, math.e**0.25], [math.e**0.5, math.e**0.75]],
        "edm": [[1.5, 3.25], [3, 13 / 9]],
    }
    for kind, rows in by_hand.items():
        for got, want in zip(ddm.loss_weights(t, kind), rows):
            np.testing.assert_allclose(got, want, rtol=1e-12)
        for weight in ddm.loss_weights(torch.linspace(0, 1, 1001), kind):
            assert torch.isfinite(weight).all() and (weight > 0).all()


def test_ddm_loss_is_zero_for_the_truth_and_never_mixes_examples():
    """Eq. 10 per example: 0 for the true (φ, ε), and example i depends on example i alone. Catches a (B,) x (B, 1)
    broadcast.
    """
    x0, eps, t = rand(4, 3, 4, 4), randn(4, 3, 4, 4), torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    for norm in ("l1", "l2", "l1+l2"):
        assert ddm.loss(lambda x, t: (-x0, eps), x0, -x0, eps, t, norm=norm).abs().max() == 0
        wrong = eps.clone()
        wrong[2] += 1
        values = ddm.loss(lambda x, t: (-x0, wrong), x0, -x0, eps, t, weights="one", norm=norm)
        np.testing.assert_allclose(values, [0, 0, 2 if norm == "l1+l2" else 1, 0], atol=1e-12)


@pytest.mark.parametrize("predict", ["both", "noise", "image"])
def test_ddm_loss_supervises_what_predict_names(predict):
    """ADM Table VI: "with AIA" has only the noise term of Eq. 10. Catches a term that is left on, or off."""
    x0, eps, t = rand(2, 3, 4, 4), randn(2, 3, 4, 4), full(0.5, 2)
    got = ddm.loss(lambda x, t: (-x0 + 2, eps + 3), x0, -x0, eps, t, weights="one", predict=predict)
    np.testing.assert_allclose(got, {"both": 13, "noise": 9, "image": 4}[predict])


@pytest.mark.parametrize("predict,precondition", [("noise", True), ("image", True), ("image", False)])
def test_ddm_one_output_means_a_consistent_pair(predict, precondition):
    """A one-output network's two meanings satisfy x_t = (1-t) x̂0 + √t ε̂ (Eq. 20). Catches a pair that forgets x_t,
    and the noise-only 0/0.
    """
    x, t = randn(5, 2, 3, 4), torch.tensor([1e-3, 0.1, 0.5, 0.999, 1.0], dtype=torch.float64)
    phi, eps = ddm.predictor(lambda x, t: (torch.tanh(x),), predict, precondition)(x, t)
    keep, n = (1 - t).view(5, 1, 1, 1), t.sqrt().view(5, 1, 1, 1)
    assert torch.isfinite(phi).all() and torch.isfinite(eps).all()
    torch.testing.assert_close(n * eps - keep * phi, x, rtol=0, atol=1e-12)


def test_ddm_combinations_that_cannot_be_are_refused():
    """A raw noise-only network and preconditioning of another attenuation than the constant are refused in a
    sentence, as are their solvers.
    """
    for arguments in ({"predict": "noise", "precondition": False}, {"h": "linear"}):
        with pytest.raises(ValueError):
            ddm.predictor(None, **arguments)
    for options in ({"solver": "ode2"}, {"solver": "ode", "heads": "project"}):
        with pytest.raises(ValueError):
            ddm.sample(None, torch.zeros(1, 1, 2, 2), 2, h="sine", **options)


# ------------------------------------------------------------------------------------------------ ddm: single steps


@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_reverse_step_is_gaussian_conditioning(h):
    """Eq. 11 against conditioning the joint Gaussian of (x_r, x_t) given x0, a Wiener process: cov = min(r, t).
    Catches any wrong coefficient.
    """
    x0, n = image_for(h), 6
    phi, t, r = (
        ddm.draw_phi(x0, h, torch.Generator().manual_seed(2)),
        rand(n, seed=5, low=0.3, high=1),
        rand(n, seed=6, low=0.01, high=0.29),
    )
    xt = randn(n, 2, 3, 4, seed=8)
    zero, one = torch.zeros_like(xt), torch.ones_like(xt)
    for noise, cov in (("sqrt", lambda a, b: torch.minimum(a, b)), ("linear", lambda a, b: torch.minimum(a, b) ** 2)):
        tt, rr, rt = [v.view(n, 1, 1, 1) for v in (cov(t, t), cov(r, r), cov(r, t))]
        eps = (xt - x0 - ddm.H(phi, t, h)) / tt.sqrt()
        mean = ddm.reverse_step(xt, phi, eps, t, t - r, zero, h, noise)
        spread = ddm.reverse_step(xt, phi, eps, t, t - r, one, h, noise) - mean
        torch.testing.assert_close(
            mean, x0 + ddm.H(phi, r, h) + rt / tt * (xt - x0 - ddm.H(phi, t, h)), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(spread**2, (rr - rt**2 / tt).expand_as(spread), rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
def test_ddm_reverse_steps_compose_to_the_marginal(noise):
    """Eq. 11 over any random grid, given the true x0, keeps q(x_r | x0) of Eq. 7: "arbitrary step size". Mean and
    variance in closed form.
    """
    x0 = rand(1, 1, 1, 1, seed=3)
    x, zero, one = x0 - x0, torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean, variance, t = x, one, full(1, 1)  # x_1 ~ N(0, 1)
    for r in sorted(rand(12, seed=4, low=0.001, high=0.999).tolist(), reverse=True):

        def step(x, z):
            scale = t.sqrt() if noise == "sqrt" else t
            return ddm.reverse_step(x, -x0, (x - (1 - t) * x0) / scale, t, t - r, z, noise=noise)

        slope = step(one, zero) - step(zero, zero)
        variance = slope**2 * variance + (step(zero, one) - step(zero, zero)) ** 2
        mean, t = step(mean, zero), full(r, 1)
        torch.testing.assert_close(mean, (1 - r) * x0, rtol=0, atol=1e-13)
        torch.testing.assert_close(variance.flatten(), t if noise == "sqrt" else t**2, rtol=0, atol=1e-13)


@pytest.mark.parametrize("heads", ["forget", "both", "image"])
@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_ode_step_with_the_truth_lands_on_the_same_path(h, heads):
    """With the true (x0, ε) held, a step of any size from x_t lands on x_r of the same (x0, ε), for any attenuation.
    Catches a wrong form.
    """
    x0, eps = image_for(h), randn(6, 2, 3, 4)
    phi = ddm.draw_phi(x0, h, torch.Generator().manual_seed(4))
    for noise in ("sqrt", "linear"):
        t, r = rand(6, seed=1, low=0.4, high=1), rand(6, seed=2, low=0, high=0.4)
        got = ddm.ode_step(ddm.diffuse(x0, phi, eps, t, h, noise), phi, eps, t, r, h, noise, heads)
        torch.testing.assert_close(got, ddm.diffuse(x0, phi, eps, r, h, noise), rtol=0, atol=1e-12)


def test_ddm_projection_removes_the_residual_by_the_least_change():
    """The projected heads satisfy the constraint, and are the nearest such pair (a least-squares solver's). Catches a
    wrong normal.
    """
    x, x0, eps, t = (
        randn(5, 1, 1, 1),
        rand(5, 1, 1, 1),
        randn(5, 1, 1, 1, seed=3),
        torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64),
    )
    for noise, n in (("sqrt", t.sqrt()), ("linear", t)):
        phi, e = ddm.project(x, -x0, eps, t, noise)
        for i in range(5):
            a = torch.stack([1 - t[i], n[i]])[None]
            change = torch.linalg.pinv(a) @ (
                x[i].flatten() - a @ torch.stack([x0[i].flatten(), eps[i].flatten()])
            ).view(1, 1)
            np.testing.assert_allclose(
                torch.stack([-phi[i], e[i]]).flatten(),
                torch.stack([x0[i], eps[i]]).flatten() + change.flatten(),
                atol=1e-12,
            )


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
def test_ddm_second_order_term_is_the_integral_of_the_slope(noise):
    """B(t, r): the ODE dx/dτ = -x̂0 + ε̂ d(std)/dτ with x̂0 = τ - t and x(t) = 0, by quadrature with its integrating
    factor. Catches B's algebra.
    """
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for t, r in ((1.0, 0.64), (0.5, 0.49), (0.3, 0.01), (0.81, 0.2)):
        tau = (r - t) * (nodes + 1) / 2 + t
        # dx/dτ = n'/n x - x̂0 (1 + (1-τ) n'/n), and n(τ) is the integrating factor
        n, slope = (np.sqrt(tau), 1 / (2 * tau)) if noise == "sqrt" else (tau, 1 / tau)
        end = math.sqrt(r) if noise == "sqrt" else r
        integral = end * np.sum(weights * (r - t) / 2 * -(tau - t) * (1 + (1 - tau) * slope) / n)
        assert math.isclose(ddm.second_order(t, r, noise), integral, rel_tol=1e-8)
    assert ddm.second_order(0.3, 0, noise) == -0.3


# ----------------------------------------------------------------------------------- ddm: the sampler on exact oracles

WEIGHTS, MEANS, STDS = np.array([0.3, 0.5, 0.2]), np.array([-1.5, 0.2, 1.6]), np.array([0.25, 0.35, 0.3])


def oracle(noise="sqrt", calls=None):
    """The exact posterior means (φ, ε) of a smooth 1-D Gaussian mixture, as a network."""
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (WEIGHTS, MEANS, STDS))

    def net(x, t):
        if calls is not None:
            calls.append(t.clone())
        k, n = (1 - t).view(-1, 1, 1, 1, 1), (t.sqrt() if noise == "sqrt" else t).view(-1, 1, 1, 1, 1)
        x_, var = x[..., None], k**2 * s**2 + n**2
        resp = torch.softmax(w.log() - (x_ - k * m) ** 2 / (2 * var) - var.log() / 2, dim=-1)
        x0 = (resp * (m + k * s**2 / var * (x_ - k * m))).sum(-1)
        eps = (resp * (n / var * (x_ - k * m))).sum(-1)
        return -x0, eps

    return net


def quantiles(n=400):
    """x1 at n quantiles of N(0, 1), and the mixture's value at the same quantiles: where the exact ODE must take them."""
    p = (np.arange(n) + 0.5) / n
    normal = torch.special.ndtri(torch.tensor(p)).view(n, 1, 1, 1)
    low, high = np.full(n, -6.0), np.full(n, 6.0)
    for _ in range(80):
        mid = (low + high) / 2
        below = (WEIGHTS * 0.5 * (1 + np.vectorize(math.erf)((mid[:, None] - MEANS) / STDS / math.sqrt(2)))).sum(1) < p
        low, high = np.where(below, mid, low), np.where(below, high, mid)
    return normal, torch.tensor(mid).view(n, 1, 1, 1)


@pytest.mark.parametrize("noise", ["sqrt", "linear"])
@pytest.mark.parametrize("solver,order", [("ode", 1), ("ode2", 2)])
def test_ddm_solvers_have_their_order(solver, order, noise):
    """The 1-D ODE keeps quantiles, so its exact end is known: errors at N and 2N give order 1 and 2. Catches a wrong
    step or history.
    """
    x1, exact = quantiles()

    def error(steps):
        return (
            (ddm.sample(oracle(noise), x1, steps, solver, noise=noise, delta=1e-9) - exact).pow(2).mean().sqrt().item()
        )

    measured = math.log2(error(100) / error(200))
    assert abs(measured - order) < 0.12, measured


@pytest.mark.parametrize("heads", ["project", "image", "both", "forget"])
def test_ddm_all_heads_are_one_step_for_an_exact_network(heads):
    """With exact posterior means there is no residual, and the four ways to use two heads agree. Catches a form that
    is not the same ODE.
    """
    x1, _ = quantiles(50)
    for noise in ("sqrt", "linear"):
        torch.testing.assert_close(
            ddm.sample(oracle(noise), x1, 12, "ode", heads=heads, noise=noise),
            ddm.sample(oracle(noise), x1, 12, "ode", heads="image", noise=noise),
            rtol=0,
            atol=1e-9,
        )


def test_ddm_algorithm_2_draws_the_mixture():
    """Algorithm 2 with exact means and 200 uniform steps has the mixture's mean and spread. Catches a variance that
    is not s(t-s)/t.
    """
    mean = (WEIGHTS * MEANS).sum()
    spread = math.sqrt((WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2)
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(8000, 1, 1, 1, generator=g, dtype=torch.float64)
    x0 = ddm.sample(oracle(), x1, 200, "ddm", "uniform", generator=g)
    assert abs(x0.mean() - mean) < 0.05 and abs(x0.std() - spread) < 0.05


def test_ddm_few_stochastic_steps_are_too_narrow():
    """ "Arbitrary step size" holds given x0 only: on N(0, .5²), 5 uniform steps of Algorithm 2 give the closed-form
    standard deviation .301.
    """

    def net(x, t):  # exact for Gaussian data
        k, var = (1 - t).view(-1, 1, 1, 1), ((1 - t) ** 2 / 4 + t).view(-1, 1, 1, 1)
        return -k / 4 / var * x, t.sqrt().view(-1, 1, 1, 1) / var * x

    g = torch.Generator().manual_seed(1)
    x0 = ddm.sample(
        net, torch.randn(60000, 1, 1, 1, generator=g, dtype=torch.float64), 5, "ddm", "uniform", generator=g
    )
    variance, ts = 1.0, [1, 0.8, 0.6, 0.4, 0.2, 0]  # by hand: x_r = slope x_t + noise
    for t, r in zip(ts, ts[1:]):
        V = (1 - t) ** 2 / 4 + t
        variance *= (1 + (t - r) * (1 - t) / 4 / V - (t - r) / V) ** 2
        variance += (t - r) * r / t
    assert abs(math.sqrt(variance) - 0.301) < 0.001 and abs(x0.std().item() - 0.301) < 0.004


@pytest.mark.parametrize("solver", ["ddm", "ode", "ode2"])
def test_ddm_n_steps_are_n_network_calls(solver):
    """N steps make N calls, the first at t = 1 and none below δ, N = 1 included, and the result is finite in float32.
    Catches an off-by-one.
    """
    x1 = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps in (1, 2, 3, 10, 333):
        calls = []
        net = oracle(calls=calls)
        x0 = ddm.sample(lambda x, t: tuple(out.float() for out in net(x, t)), x1, steps, solver)
        assert len(calls) == steps and (calls[0] == 1).all() and min(c.min() for c in calls) >= 1e-3 * (1 - 1e-6)
        assert x0.dtype == torch.float32 and torch.isfinite(x0).all()


def test_ddm_last_step_adds_no_noise():
    """s = t exactly in the last step: variance 0 (float32 1 - N(1/N) would make it -7.5e-8), so a frozen network's x0
    is returned.
    """
    x1 = torch.randn(4, 3, 4, 4)
    truth = torch.rand(4, 3, 4, 4)

    def frozen(x, t):
        k, n = (1 - t).view(-1, 1, 1, 1), t.sqrt().view(-1, 1, 1, 1)
        return -truth, (x - k * truth) / n

    for grid in ("uniform", "quadratic"):
        torch.testing.assert_close(ddm.sample(frozen, x1, 10, "ddm", grid), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_every_attenuation_samples_and_clips(h):
    """With the true φ as the network every attenuation ends at its image, clipped or not; and clipping keeps wild
    estimates in [-1, 1].
    """
    x0 = image_for(h)
    phi = ddm.draw_phi(x0, h, torch.Generator().manual_seed(2))

    def frozen(x, t):
        return phi, (x - x0 - ddm.H(phi, t, h)) / t.sqrt().view(-1, 1, 1, 1)

    for solver in ("ddm", "ode"):
        for clip in (False, True):
            got = ddm.sample(frozen, randn(6, 2, 3, 4), 7, solver, h=h, clip=clip)
            torch.testing.assert_close(got, x0, rtol=0, atol=1e-10)
    wild = ddm.sample(lambda x, t: (50 * phi, x), randn(6, 2, 3, 4), 3, "ode", h=h, clip=True)
    assert wild.abs().max() <= 1 + 1e-9


def test_ddm_sampling_is_deterministic_per_image():
    """Image i is a function of (seed, i): the stochastic sampler draws the same image alone and in a batch. Catches a
    shared generator.
    """

    def net(x, t):
        return -torch.tanh(x), x

    def draw(numbers):
        generators = data.image_generators(5, numbers)
        return ddm.sample(net, data.randn(torch.empty(len(numbers), 3, 4, 4), generators), 4, generator=generators)

    together = draw([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(draw([i])[0], together[i])
    assert not torch.equal(together[0], together[1])


# ------------------------------------------------------------------------------------------ blurring: the transform


SETTINGS = [dict(sigma_blur_max=b, schedule=s) for b in (0.0, 1.0, 10.0, 20.0) for s in ("sin2", "sin")]
HEAT = dict(process="ihdm", schedule="log", d_min=0.0, sigma_blur_max=24.0, levels=200)


def test_blurring_dct_is_the_sum_of_cosines():
    """The orthonormal DCT-II with its sums written out, any H and W. Catches another type or scale, and a swap of the
    axes.
    """
    x = randn(2, 3, 5, 8)
    u = blurring.dct(x)
    for k, l in [(0, 0), (0, 3), (2, 0), (4, 7), (1, 5)]:
        scale = math.sqrt((1 if k == 0 else 2) / 5) * math.sqrt((1 if l == 0 else 2) / 8)
        total = sum(
            x[:, :, n, m] * math.cos(math.pi * (2 * n + 1) * k / 10) * math.cos(math.pi * (2 * m + 1) * l / 16)
            for n in range(5)
            for m in range(8)
        )
        torch.testing.assert_close(u[:, :, k, l], scale * total, rtol=0, atol=1e-13)
    big = randn(1, 1, 32, 48)
    assert abs(blurring.dct(big)[0, 0, 0, 0] - math.sqrt(32 * 48) * big.mean()) < 1e-12
    for size in (1, 2, 31, 64, 128):
        y = randn(1, 1, size, size + 3, seed=size)
        torch.testing.assert_close(blurring.idct(blurring.dct(y)), y, rtol=0, atol=5e-13)
        torch.testing.assert_close(blurring.dct(y).square().sum(), y.square().sum(), rtol=1e-13, atol=0)


def test_blurring_dct_keeps_float32s_digits():
    """The float32 transform is as good as rounding allows (2e-6 at 128 pixels). Catches a matrix built in float32."""
    x = randn(1, 1, 128, 128)
    error = (blurring.dct(x.float()).double() - blurring.dct(x)).abs().max()
    assert error < 6e-6 and blurring.dct(x.float()).dtype == torch.float32
    C = blurring.dct_matrix(128, torch.float32, torch.device("cpu")).double()
    k, i = np.arange(128)[:, None], np.arange(128)[None]
    exact = np.sqrt(np.where(k == 0, 1, 2) / 128) * np.cos(np.pi * (2 * i + 1) * k / 256)
    assert np.abs(C.numpy() - exact).max() < 1e-8


# ------------------------------------------------------------------------------------------- blurring: the schedules


def blurred(x, sigma, **options):
    """x blurred by sigma pixels, without noise."""
    options = {"process": "cold", "d_min": 0.0, "sigma_blur_max": sigma, **options}
    return blurring.diffuse(x, torch.zeros_like(x), full(1, len(x)), **options)


def test_blurring_is_a_gaussian_blur_in_pixels():
    """Dissipation for τ = σ_B²/2 is a Gaussian of σ_B pixels (Eq. 9): an impulse becomes exp(-r²/2σ²)/2πσ². Catches
    Appendix A's sigma_t² / 2, and λ without its square or its π.
    """
    x = torch.zeros(1, 1, 61, 71, dtype=torch.float64)
    x[0, 0, 30, 35] = 1
    r2 = (torch.arange(61)[:, None] - 30) ** 2 + (torch.arange(71)[None] - 35) ** 2
    for sigma in (1.5, 3.0, 5.0):
        gaussian = torch.exp(-r2 / (2 * sigma**2)) / (2 * math.pi * sigma**2)
        torch.testing.assert_close(blurred(x, sigma)[0, 0], gaussian.double(), rtol=0, atol=2e-5)
    torch.testing.assert_close(blurred(blurred(x, 1.5), 2.0), blurred(x, 2.5), rtol=0, atol=1e-13)
    y = rand(2, 3, 32, 48)
    torch.testing.assert_close(blurred(y, 7.0).mean((2, 3)), y.mean((2, 3)), rtol=0, atol=1e-13)


def test_blurring_blur_grows_from_none_to_its_maximum():
    """Eq. 26 and its Table 4 at t = 0, 1/2 and 1 by hand; IHDM's levels are exp(linspace(ln ½, ln max, K)). Catches a
    missing square and an index off by one.
    """
    t = torch.tensor([0, 1 / 2, 1], dtype=torch.float64)
    for schedule, middle in (("sin2", 10), ("sin", 20 * math.sqrt(0.5))):
        np.testing.assert_allclose(blurring.sigma_blur(t, 20.0, schedule), [0, middle, 20], rtol=1e-12)
    levels = blurring.sigma_blur(torch.arange(201, dtype=torch.float64) / 200, 24.0, "log", 200)
    np.testing.assert_allclose(levels, [0, *np.exp(np.linspace(np.log(0.5), np.log(24), 200))], rtol=1e-12)


def test_blurring_damping_keeps_d_min():
    """Eq. 27: 1 for the mean, exactly between d_min and 1, falling in t and in frequency. Catches exp(-λτ) + d_min."""
    t = torch.linspace(0, 1, 21, dtype=torch.float64)
    a, _ = blurring.noise_schedule(t)
    d = blurring.alpha_sigma(t, 32)[0] / a
    assert (d[:, :, 0, 0] - 1).abs().max() < 1e-14 and (d[0] - 1).abs().max() < 1e-14 and abs(d[-1].min() - 1e-3) < 1e-9
    assert (d.diff(dim=0) <= 1e-15).all() and (d.diff(dim=2) <= 0).all() and (d.diff(dim=3) <= 0).all()
    half = blurring.alpha_sigma(full(0.5, 1), (16, 32))[0] / blurring.noise_schedule(full(0.5, 1))[0]
    assert abs(half[0, 0, 0, 1].item() - (0.001 + 0.999 * math.exp(-((math.pi / 32) ** 2) * 50))) < 1e-12


def test_blurring_noise_schedule_is_that_of_the_appendix():
    """a² + σ² = 1, log-SNR exactly ± 10 at the ends, and Appendix A's logsnr between, by its tan and sigmoid. Catches
    a clipped log-SNR, which is another schedule.
    """
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    a, sigma = (v.flatten() for v in blurring.noise_schedule(t))
    low, span = np.arctan(np.exp(-5)), np.arctan(np.exp(5)) - np.arctan(np.exp(-5))
    logsnr = -2 * np.log(np.tan(span * t.numpy() + low))
    np.testing.assert_allclose(a, 1 / np.sqrt(1 + np.exp(-logsnr)), rtol=1e-10)
    np.testing.assert_allclose(sigma, 1 / np.sqrt(1 + np.exp(logsnr)), rtol=1e-10)
    np.testing.assert_allclose((2 * (a / sigma).log())[[0, -1]], [10, -10], rtol=1e-10)
    np.testing.assert_allclose(a**2 + sigma**2, 1, rtol=1e-12)


@pytest.mark.parametrize("schedule", ["sin2", "sin", "log"])
def test_blurring_schedules_follow_the_dtype_and_shape(schedule):
    """float32 in, float32 out; any height and width; [B, 1, H, W] and [B, 1, 1, 1]. Catches a constant in float64."""
    alpha, sigma = blurring.alpha_sigma(torch.tensor([0.2, 0.9, 1.0]), (12, 20), schedule=schedule)
    assert alpha.shape == (3, 1, 12, 20) and sigma.shape == (3, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32 and torch.isfinite(alpha).all() and (alpha > 0).all()


# ---------------------------------------------------------------------------- blurring: transition and posterior


def pairs(n=9):
    """All s < t of a grid on [0, 1], as two tensors."""
    grid = torch.linspace(0, 1, n, dtype=torch.float64)
    i, j = torch.triu_indices(n, n, 1)
    return grid[j], grid[i]


@pytest.mark.parametrize("blur", SETTINGS)
def test_blurring_every_transition_is_a_distribution(blur):
    """σ²_t|s > 0 at every frequency, for near and far times, in float32 too (Eq. 16): the process is Markov. Catches
    Appendix A's sigma2_ts.
    """
    t, s = pairs(41)
    assert blurring.transition(t, s, 32, **blur)[1].min() > 0
    near = torch.linspace(0, 1, 1001)
    assert blurring.transition(near[1:], near[:-1], 32, **blur)[1].min() > 0
    exact = blurring.transition(near[1:].double(), near[:-1].double(), 32, **blur)[1]
    torch.testing.assert_close(
        blurring.transition(near[1:], near[:-1], 32, **blur)[1].double(), exact, rtol=3e-4, atol=0
    )


@pytest.mark.parametrize("blur", [SETTINGS[0], SETTINGS[6], SETTINGS[7], HEAT])
def test_blurring_transitions_compose(blur):
    """Going r -> s -> t is going r -> t: α_t|r = α_t|s α_s|r, σ²_t|r = α²_t|s σ²_s|r + σ²_t|s; and from the marginal
    at s to that at t (Eq. 16, 20). Catches a transition that does not belong to the marginals.
    """
    r, s, t = full(0.15, 1), full(0.4, 1), full(0.85, 1)
    (a_sr, v_sr), (a_ts, v_ts), (a_tr, v_tr) = (
        blurring.transition(late, early, (8, 16), **blur) for late, early in ((s, r), (t, s), (t, r))
    )
    torch.testing.assert_close(a_tr, a_ts * a_sr, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close(v_tr, a_ts**2 * v_sr + v_ts, rtol=1e-10, atol=1e-14)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (blurring.alpha_sigma(v, (8, 16), **blur) for v in (s, t))
    torch.testing.assert_close(a_ts * alpha_s, alpha_t, rtol=1e-11, atol=1e-300)
    torch.testing.assert_close((a_ts**2 * sigma_s**2 + v_ts).sqrt(), sigma_t.expand_as(v_ts), rtol=1e-11, atol=0)


@pytest.mark.parametrize("blur", [*SETTINGS, HEAT])
def test_blurring_posterior_is_gaussian_conditioning(blur):
    """Eq. 18, 19 against conditioning the joint Gaussian of (u_s, u_t) given x, cov = α_t|s σ_s². Catches any wrong
    coefficient, and 0 · ∞ where a coefficient is not diffused at all (IHDM's mean, and all that underflows).
    """
    t, s = pairs()
    n = len(t)
    ut, ux = randn(n, 1, 8, 12, seed=1), randn(n, 1, 8, 12, seed=2)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (blurring.alpha_sigma(v, (8, 12), **blur) for v in (s, t))
    covariance = blurring.transition(t, s, (8, 12), **blur)[0] * sigma_s**2
    mean, variance = blurring.posterior(ut, ux, t, s, **blur)
    expected = alpha_s * ux + covariance / sigma_t**2 * (ut - alpha_t * ux)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(variance, sigma_s**2 - covariance**2 / sigma_t**2, rtol=0, atol=1e-12)
    assert (variance >= -1e-18).all()


@pytest.mark.parametrize("blur", SETTINGS)
def test_blurring_posterior_mean_from_the_noise_is_the_same(blur):
    """Eq. 24 printed in full, from u_ε, has the mean of Eq. 19 from u_x: and so has its short form here. Catches the
    three slips of Appendix A's `denoise`.
    """
    t, s = pairs()
    ux, u_eps = randn(len(t), 1, 8, 12, seed=1), randn(len(t), 1, 8, 12, seed=2)
    (_, sigma_s), (alpha_t, sigma_t) = (blurring.alpha_sigma(v, (8, 12), **blur) for v in (s, t))
    ut = alpha_t * ux + sigma_t * u_eps
    mean, variance = blurring.posterior(ut, ux, t, s, **blur)
    short = blurring.posterior_mean_from_noise(ut, u_eps, t, s, **blur)
    torch.testing.assert_close(short, mean, rtol=1e-9, atol=1e-9)
    alpha_ts, sigma2_ts = blurring.transition(t, s, (8, 12), **blur)
    printed = variance * (alpha_ts / sigma2_ts * ut + (ut - sigma_t * u_eps) / (alpha_ts * sigma_s**2))
    torch.testing.assert_close(printed, mean, rtol=1e-8, atol=1e-8)


def test_blurring_without_blur_is_denoising_diffusion():
    """σ_B,max = 0 is Eq. 1 to 7: α = a, and in pixels, without any transform, the posterior of Eq. 3 and 4 with
    scalars, written out. Catches blur that does not switch off.
    """
    x0, eps, t, s = rand(5, 3, 8, 8), randn(5, 3, 8, 8), rand(5, seed=3, low=0.5), rand(5, seed=4, low=0.0, high=0.49)
    t = t.abs().clamp(0.5, 1)
    off = {"sigma_blur_max": 0.0}
    (a_t, n_t), (a_s, n_s) = blurring.noise_schedule(t), blurring.noise_schedule(s)
    torch.testing.assert_close(blurring.alpha_sigma(t, 8, **off)[0], a_t.expand(5, 1, 8, 8), rtol=1e-15, atol=0)
    zt = blurring.diffuse(x0, eps, t, **off)
    torch.testing.assert_close(zt, a_t * x0 + n_t * eps, rtol=0, atol=1e-13)
    mean, variance = blurring.posterior(blurring.dct(zt), blurring.dct(x0), t, s, **off)
    a_ts = a_t / a_s
    n2_ts = n_t**2 - a_ts**2 * n_s**2
    precision = 1 / n_s**2 + a_ts**2 / n2_ts
    torch.testing.assert_close(
        blurring.idct(mean), (a_ts / n2_ts * zt + a_s / n_s**2 * x0) / precision, rtol=0, atol=1e-10
    )
    torch.testing.assert_close(variance, (1 / precision).expand_as(variance), rtol=1e-10, atol=0)


def test_blurring_ihdm_posterior_is_finite_where_everything_underflows():
    """IHDM at its last levels in float32: d is 0, α_t|s = d_t/d_s known all the same (Eq. 17), the mean is not
    diffused at all. Catches 0/0 and 0 · ∞.
    """
    ut, ux = torch.randn(200, 1, 32, 32), torch.randn(200, 1, 32, 32)
    t = torch.arange(1, 201) / 200
    mean, variance = blurring.posterior(ut, ux, t, t - 1 / 200, **HEAT)
    assert torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()
    assert (blurring.alpha_sigma(t, 32, **HEAT)[0] == 0).any()
    torch.testing.assert_close(mean[..., 0, 0], ut[..., 0, 0])


# ------------------------------------------------------------------------------------------- blurring: network and loss


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
@pytest.mark.parametrize("blur", [SETTINGS[0], SETTINGS[3], SETTINGS[6], SETTINGS[7]])
def test_blurring_true_outputs_give_the_true_image_and_noise(predict, blur):
    """A network that answers with the truth is decoded to the true (x0, ε) (Eq. 21, 22), at every time for v and x0.
    Catches the determinant of v, which is a² d + σ² and not 1.
    """
    x0, eps, t = rand(9, 3, 8, 12), randn(9, 3, 8, 12), torch.linspace(0, 1, 9, dtype=torch.float64)
    angle = math.atan(math.exp(-5)) + t.view(9, 1, 1, 1) * (math.pi / 2 - 2 * math.atan(math.exp(-5)))
    truth = {"eps": eps, "x0": x0, "v": angle.cos() * eps - angle.sin() * x0}[predict]
    model = blurring.predictor(lambda z, t: (truth,), predict, **blur)
    *image, noise = model(blurring.diffuse(x0, eps, t, **blur), t)
    torch.testing.assert_close(noise, eps, rtol=0, atol=1e-11)
    for x in image:
        torch.testing.assert_close(x, x0, rtol=0, atol=1e-11)
    assert len(image) == (predict != "eps")
    assert blurring.loss(model, x0, eps, t, predict, **blur).max() < 1e-20


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_blurring_loss_is_the_networks_own_squared_error(predict):
    """Eq. 25 per example, for any wrong answer: the mean square of answer minus target in pixels, and example i is
    example i's alone. Catches a weight, and a v-loss that is not v's.
    """
    x0, eps, t = rand(4, 3, 8, 8), randn(4, 3, 8, 8), torch.tensor([0.01, 0.3, 0.7, 1.0], dtype=torch.float64)
    a, sigma = blurring.noise_schedule(t)
    answer = randn(4, 3, 8, 8, seed=7)
    values = blurring.loss(blurring.predictor(lambda z, t: (answer,), predict), x0, eps, t, predict)
    target = {"eps": eps, "x0": x0, "v": a * eps - sigma * x0}[predict]
    torch.testing.assert_close(values, ((answer - target) ** 2).mean((1, 2, 3)), rtol=1e-9, atol=0)


def test_blurring_ihdm_learns_the_level_before():
    """Eq. 12 and its input: A_k x + σ n in, A_{k-1} x out, with blurs made without our schedule; the network adds to
    its input. Catches a target with noise, and level k for k - 1.
    """
    x0, eps, k = rand(3, 1, 16, 16), randn(3, 1, 16, 16), torch.tensor([1, 2, 200])
    widths = [0, *np.exp(np.linspace(np.log(0.5), np.log(24), 200))]
    now, before = (
        torch.cat([blurred(x0[i : i + 1], widths[int(k[i]) - j], schedule="sin") for i in range(3)]) for j in (0, 1)
    )
    seen = []

    def net(z, t):
        seen.append((z, t))
        return (before - z + 0.5,)

    values = blurring.loss(blurring.predictor(net, "mean", **HEAT), x0, eps, k.double() / 200, "mean", **HEAT)
    np.testing.assert_allclose(values, 0.25, rtol=1e-9)
    torch.testing.assert_close(seen[0][0], now + 0.02 * eps, rtol=0, atol=1e-12)


def test_blurring_cold_diffusion_has_no_noise_and_an_absolute_loss():
    """Bansal et al.: the input is blurred only, the loss is L1 on the image. Catches noise that stays on."""
    x0, eps, t = rand(2, 1, 16, 16), randn(2, 1, 16, 16), full(1, 2)
    cold = {**HEAT, "process": "cold"}
    seen = []
    model = blurring.predictor(lambda z, t: seen.append(z) or (x0 - 0.5,), "x0", **cold)
    np.testing.assert_allclose(blurring.loss(model, x0, eps, t, "x0", **cold), 0.5, rtol=1e-12)
    torch.testing.assert_close(seen[0], blurred(x0, 24.0), rtol=0, atol=1e-13)


def test_blurring_training_covers_every_time():
    """t is even in [0, 1); blur-only processes draw each level 1/K ... K/K, the last included, equally often. Catches
    the released IHDM's range, which leaves out the level where its sampler starts.
    """
    g = torch.Generator().manual_seed(0)
    t = blurring.draw_times(20000, "blurring", 200, g)
    assert t.min() >= 0 and t.max() < 1 and np.abs(np.histogram(t, 10, (0, 1))[0] / 2000 - 1).max() < 0.15
    k = (blurring.draw_times(20000, "ihdm", 5, g) * 5).round().long()
    assert np.abs(np.bincount(k, minlength=6) / 4000 - [0, 1, 1, 1, 1, 1]).max() < 0.1


# ------------------------------------------------------------------------------------------- blurring: single steps


@pytest.mark.parametrize("blur", SETTINGS)
def test_blurring_ddim_with_the_truth_stays_on_the_path(blur):
    """With the true x, u_t of (x, ε) goes to u_s of the same (x, ε), whatever the step. Catches a wrong coefficient of
    the deterministic step, in any frequency.
    """
    t, s = pairs()
    x0, eps = rand(len(t), 1, 8, 12), randn(len(t), 1, 8, 12)
    ut, us = (blurring.dct(blurring.diffuse(x0, eps, v, **blur)) for v in (t, s))
    torch.testing.assert_close(blurring.ddim_step(ut, blurring.dct(x0), t, s, **blur), us, rtol=0, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_blurring_eta_keeps_the_marginal_and_ends_at_the_posterior(eta):
    """For every eta a step turns N(α_t x, σ_t²) into N(α_s x, σ_s²), by the step's own slopes; eta = 1 is Eq. 19.
    Catches a variance that is not taken from the direction of ε.
    """
    t, s = pairs()
    shape = (len(t), 1, 8, 12)
    ux, zero, one = randn(*shape), torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (blurring.alpha_sigma(v, (8, 12)) for v in (s, t))
    mean = blurring.ddim_step(alpha_t * ux, ux, t, s, eta, zero)
    torch.testing.assert_close(mean, alpha_s * ux, rtol=0, atol=1e-12)
    slope = blurring.ddim_step(one, zero, t, s, eta, zero)
    spread = blurring.ddim_step(zero, zero, t, s, eta, one)
    torch.testing.assert_close(slope**2 * sigma_t**2 + spread**2, (sigma_s**2).expand(shape), rtol=1e-9, atol=0)
    ut = randn(*shape, seed=5)
    mean, variance = blurring.posterior(ut, ux, t, s)
    torch.testing.assert_close(spread, (eta * variance.sqrt()).expand(shape), rtol=1e-9, atol=0)
    if eta == 1:
        torch.testing.assert_close(blurring.ddim_step(ut, ux, t, s, 1.0, zero), mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize("blur", [SETTINGS[0], SETTINGS[6], SETTINGS[7]])
def test_blurring_second_order_term_is_the_integral_of_the_slope(blur):
    """σ_s ∫ₜˢ (r - t) d(α/σ) by the trapezoidal rule on 20,000 points. Catches its integration by parts."""
    for t, s in ((1.0, 0.95), (0.6, 0.5), (0.3, 0.0)):
        r = torch.linspace(t, s, 20001, dtype=torch.float64)
        alpha, sigma = blurring.alpha_sigma(r, (4, 6), **blur)
        middle = ((r[1:] + r[:-1]) / 2 - t).view(-1, 1, 1, 1)
        integral = sigma[-1] * (middle * (alpha / sigma).diff(dim=0)).sum(0)
        torch.testing.assert_close(blurring.second_order(t, s, (4, 6), **blur)[0], integral, rtol=2e-5, atol=1e-12)


# ------------------------------------------------------------------------- blurring: the sampler on exact oracles


def spectrum(size=32):
    """The variances of natural images' coefficients, falling as 1/frequency², for a pixel variance of 1/4."""
    k = torch.arange(size, dtype=torch.float64)
    c = 1 / (k[:, None] ** 2 + k[None] ** 2).clamp(min=1)
    return c * size**2 / 4 / c.sum()


def gaussian_oracle(c, calls=None, error=0.0, heads="x0", **blur):
    """The exact posterior means for images with independent Gaussian coefficients of variances c, as a network."""

    def net(z, t):
        if calls is not None:
            calls.append(t.clone())
        alpha, sigma = blurring.alpha_sigma(t.to(c.dtype), c.shape, **blur)
        ut = blurring.dct(z.to(c.dtype))
        scale = ut / (alpha**2 * c + sigma**2)
        noise = randn(*z.shape, seed=int(1e6 * t[0]) if error else 0) * error
        if heads == "eps":
            return ((blurring.idct(sigma * scale) + noise).to(z.dtype),)
        return (blurring.idct(alpha * c * scale) + noise).to(z.dtype), blurring.idct(sigma * scale).to(z.dtype)

    return net


def gains(steps, solver, c, **blur):
    """The factor by which the (linear) sampler with the exact oracle multiplies each coefficient of its noise."""
    z1 = blurring.idct(torch.ones(1, 1, *c.shape, dtype=c.dtype))
    return blurring.dct(blurring.sample(gaussian_oracle(c, **blur), z1, steps, solver, **blur))[0, 0]


def exact_gains(c, **blur):
    """The same for the exact flow, which for Gaussian data scales by the ratio of standard deviations at the two ends."""
    (alpha_0, sigma_0), (alpha_1, sigma_1) = (blurring.alpha_sigma(full(v, 1), c.shape, **blur) for v in (0.0, 1.0))
    return (((alpha_0**2 * c + sigma_0**2) / (alpha_1**2 * c + sigma_1**2)).sqrt())[0, 0]


@pytest.mark.parametrize("sigma_blur_max", [0.0, 20.0])
@pytest.mark.parametrize("solver,order", [("ddim", 1), ("ddim2", 2)])
def test_blurring_deterministic_solvers_have_their_order(solver, order, sigma_blur_max):
    """On images with a natural spectrum the exact end is known for every coefficient: errors at N and 2N give order 1
    and 2. Catches a wrong step, history or quadrature.
    """
    c, blur = spectrum(8), {"sigma_blur_max": sigma_blur_max}
    error = [(gains(n, solver, c, **blur) - exact_gains(c, **blur)).norm().item() for n in (200, 400)]
    assert abs(math.log2(error[0] / error[1]) - order) < 0.15, error


def test_blurring_few_steps_cost_more_with_blur():
    """First order at 50 steps keeps less of the highest band with blur than without; second order mends it. Catches a
    sampler, or a claim in the README, that has changed.
    """
    c = spectrum()
    high = torch.arange(32)[:, None] ** 2 + torch.arange(32)[None] ** 2 > 16**2

    def kept(solver, sigma_blur_max):
        g = gains(50, solver, c, sigma_blur_max=sigma_blur_max)
        return (g[high] ** 2).sum().item() / c[high].sum().item()

    assert kept("ddim", 20.0) < 0.75 < 0.85 < kept("ddim", 0.0) < 0.95
    assert abs(kept("ddim2", 20.0) - 1) < 0.1 and abs(kept("ddim2", 0.0) - 1) < 0.1


@pytest.mark.parametrize("heads", ["x0", "eps"])
def test_blurring_ancestral_sampling_draws_the_data(heads):
    """Algorithm 1 with the exact oracle, from either head, has in every band the spectrum that the recursion of the
    variance gives by hand, and that is the data's for many steps. Catches a wrong variance in any frequency.
    """
    c = spectrum(16)

    def by_hand(steps):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        alpha, sigma = blurring.alpha_sigma(grid, 16)
        variance = torch.ones_like(c)
        for i in range(steps):
            (a_t, n_t), (a_s, n_s) = (alpha[i, 0], sigma[i, 0]), (alpha[i + 1, 0], sigma[i + 1, 0])
            pull = a_t / a_s * n_s**2 / n_t**2  # of u_s towards u_t, given x: cov / var
            slope = pull + (a_s - pull * a_t) * a_t * c / (a_t**2 * c + n_t**2)
            variance = slope**2 * variance + (n_s**2 - pull**2 * n_t**2 if i + 1 < steps else 0)
        return variance

    assert (by_hand(4000) / c - 1).abs().max() < 0.03
    g = torch.Generator().manual_seed(0)
    z1 = torch.randn(800, 1, 16, 16, generator=g, dtype=torch.float64)
    u = blurring.dct(blurring.sample(gaussian_oracle(c, heads=heads), z1, 60, generator=g))
    radius = (torch.arange(16)[:, None] ** 2 + torch.arange(16)[None] ** 2).sqrt()
    for low, high in ((1, 3), (3, 8), (8, 16), (16, 30)):
        band = (radius >= low) & (radius < high)
        assert abs((u[:, 0, band] ** 2).mean() / by_hand(60)[band].mean() - 1) < 0.04, (low, high)


@pytest.mark.parametrize("solver,eta", [("ancestral", 0.0), ("ddim", 0.0), ("ddim", 0.6), ("ddim2", 0.0)])
def test_blurring_either_head_samples_the_same_image(solver, eta):
    """An exact ε̂ and an exact x̂₀ are the same knowledge (Eq. 22): every solver draws the same image from either.
    Catches a wrong conversion.
    """
    c, z1 = spectrum(8), randn(3, 1, 8, 8)
    a, b = (
        blurring.sample(gaussian_oracle(c, heads=h), z1, 9, solver, eta, generator=torch.Generator().manual_seed(2))
        for h in ("eps", "x0")
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "ddim2", "improved", "naive"])
def test_blurring_n_steps_are_n_network_calls(solver):
    """N steps make N calls, at 1, 1 - 1/N, ..., 1/N (Algorithm 1), N = 1 included; finite in float32 from either head.
    Catches the printed "T - 1/T" and an off-by-one.
    """
    c = spectrum(8).float()
    for steps in (1, 2, 3, 10, 250):
        for heads in ("x0", "eps"):
            calls, seen = [], []
            net = gaussian_oracle(c, calls, heads=heads)
            x = blurring.sample(net, torch.randn(2, 1, 8, 8), steps, solver, watch=lambda t, z, x0: seen.append(t))
            np.testing.assert_allclose(torch.stack(calls)[:, 0], 1 - np.arange(steps) / steps, atol=1e-6)
            assert len(seen) == steps + 1 and seen[-1] == 0 and x.dtype == torch.float32 and torch.isfinite(x).all()


@pytest.mark.parametrize(
    "solver,eta", [("ancestral", 0.0), ("ddim", 0.5), ("ddim", 0.0), ("ddim2", 0.0), ("ihdm", 0.0)]
)
def test_blurring_last_step_returns_its_mean(solver, eta, monkeypatch):
    """Noise is drawn for all steps but the last, and by stochastic solvers only. Catches a grain left on the images."""
    draws = []
    monkeypatch.setattr(data, "randn", lambda like, g=None, f=data.randn: draws.append(1) or f(like, g))
    net = (lambda z, t: (z,)) if solver == "ihdm" else gaussian_oracle(spectrum(8))
    blurring.sample(net, randn(2, 1, 8, 8), 5, solver, eta)
    assert len(draws) == (4 if eta or solver in ("ancestral", "ihdm") else 0)


def test_blurring_ihdm_sampler_is_the_papers():
    """Eq. 11: u <- f(u, k) + δ n for k = K ... 1, and the last mean without noise; against the recursion with δ's
    variance by hand. Catches noise that is σ, or a mean that is added twice.
    """
    z1 = randn(20000, 1, 1, 1)
    out = blurring.sample(lambda z, t: (0.5 * z + t.view(-1, 1, 1, 1),), z1, 3, "ihdm", delta=0.3)
    mean, variance = 0.5 * (0.5 * 1 + 2 / 3) + 1 / 3, 0.5**6 + 0.3**2 * (0.5**2 + 0.5**4)
    assert abs(out.mean() - mean) < 0.01 and abs(out.var() / variance - 1) < 0.04


def test_blurring_cold_rules():
    """Cold diffusion's second rule is the deterministic step at constant σ, path and end; and of a constant error e of
    x̂0 the first leaves e, the second (1 - d_1) e. Catches either rule's sign.
    """
    z1, error = rand(2, 1, 16, 16), rand(1, 1, 16, 16, seed=9)
    net = lambda z, t: (torch.tanh(2 * z) - 0.1 * t.view(-1, 1, 1, 1), z)
    cold = {**HEAT, "process": "cold"}
    torch.testing.assert_close(
        blurring.sample(net, z1, 20, "improved", **cold),
        blurring.sample(net, z1, 20, "ddim", **HEAT),
        rtol=0,
        atol=1e-11,
    )
    x0 = rand(2, 1, 16, 16, seed=3)
    start = blurred(x0, 24.0)
    wrong = lambda z, t: (x0 + error, z)
    torch.testing.assert_close(blurring.sample(wrong, start, 20, "naive", **cold) - x0, error.expand_as(x0))
    torch.testing.assert_close(
        blurring.sample(wrong, start, 20, "improved", **cold) - x0, (error - blurred(error, 24.0)).expand_as(x0)
    )


def test_blurring_an_eps_network_must_not_be_clipped():
    """At t = 1 an error of ε̂ comes back 148 (mean) to 148,000 (finest detail) times in x̂0 = (u_t - σ û_ε)/α, so that
    clipping x̂0 ruins the sample, where with x̂0 from an x0-network it is harmless. Catches the docstring's claim.
    """
    alpha, sigma = blurring.alpha_sigma(full(1, 1), 32)
    assert abs((sigma / alpha)[0, 0, 0, 0] / 148.4 - 1) < 1e-3 and abs((sigma / alpha).max() / 1.484e5 - 1) < 1e-3
    c, z1 = spectrum(), randn(4, 1, 32, 32)
    for heads, ruined in (("eps", True), ("x0", False)):
        free = blurring.sample(gaussian_oracle(c, heads=heads), z1, 50, "ddim")
        far = {}
        for clip in (False, True):
            net = gaussian_oracle(c, error=0.03, heads=heads)
            far[clip] = (blurring.sample(net, z1, 50, "ddim", clip=clip) - free).pow(2).mean().sqrt().item()
        assert far[False] < 0.15 and (far[True] > 0.2) == ruined, (heads, far)


def test_blurring_sampling_is_deterministic_per_image():
    """Image i is a function of (seed, i): Algorithm 1 draws the same image alone and in a batch, of any height and
    width. Catches a shared generator.
    """
    net = blurring.predictor(lambda z, t: (torch.tanh(z),), "v")

    def draw(numbers):
        generators = data.image_generators(5, numbers)
        return blurring.sample(net, data.randn(torch.empty(len(numbers), 3, 4, 6), generators), 4, generator=generators)

    together = draw([0, 1, 2, 3])
    for i in range(4):
        torch.testing.assert_close(draw([i])[0], together[i], rtol=0, atol=1e-6)
    assert not torch.equal(together[0], together[1])


def test_blurring_combinations_that_cannot_be_are_refused():
    """eta is for ddim alone, and an unknown solver is a sentence. Catches a flag that does nothing."""
    for options in ({"solver": "ancestral", "eta": 0.5}, {"solver": "ddim2", "eta": 0.1}, {"solver": "euler"}):
        with pytest.raises(ValueError):
            blurring.sample(None, torch.zeros(1, 1, 2, 2), 2, **options)


# ---------------------------------------------------------------------------------------------- angular: the schedule

HALF_PI = math.pi / 2
SOLVERS = list(angular.SOLVERS)


def test_angular_betas_multiply_to_alpha_bar():
    """ᾱ_i = Π (1 - β) (the text under Eq. 3) for all three schedules, ᾱ_0 = 1, and ᾱ = cos²η on the quarter circle.
    Catches a β of one schedule with the ᾱ of another, and the text's swapped ends.
    """
    for T in (1, 4, 1000):
        i = torch.arange(T + 1)
        for schedule in ("angular", "linear", "jsd"):
            bar, b = angular.alpha_bar(i, T, schedule), angular.beta(i[1:], T, schedule)
            assert bar.dtype == b.dtype == torch.float64 and bar[0] == 1
            np.testing.assert_allclose((1 - b).cumprod(0), bar[1:], rtol=1e-10, atol=1e-15)
            assert (b > 0).all() and (b <= 1).all() and (bar.diff() < 0).all()
        np.testing.assert_allclose(angular.alpha_bar(i, T), np.cos(np.arange(T + 1) / T * np.pi / 2) ** 2, atol=1e-15)
        np.testing.assert_allclose(angular.alpha_bar(i, T, "jsd"), 1 - np.arange(T + 1) / T, atol=1e-15)


def test_angular_last_betas_reach_one_and_the_first_keeps_its_digits():
    """β_T = 1, β_{T-1} = .75, β_{T-2} = 5/9 (to O(1/T²)): no division by ᾱ_T = 0; and β_1 = sin² of the first angle,
    of which 1 - cos²/cos² keeps half the digits. Catches the naive quotient.
    """
    last = angular.beta(torch.tensor([998, 999, 1000]), 1000)
    np.testing.assert_allclose(last, [5 / 9, 3 / 4, 1], rtol=1e-5)
    assert last[-1] == 1 and angular.alpha_bar(torch.tensor(1000), 1000) == 0
    for T in (1000, 10**6):
        first, angle = angular.beta(torch.tensor([1]), T).item(), math.pi / 2 / T
        assert math.isclose(first, angle**2 - angle**4 / 3, rel_tol=1e-11)


def test_angular_linear_schedule_is_ddpms_and_jsd_is_corrected():
    """DDPM's linear β: from 1e-4 to .02, with Σ log(1 - β) summed here. JSD as printed, β_t = 1/t, has β_1 = 1 and
    would leave no image at t = 1; turned round it loses the same part each time. Catches an off-by-one in either.
    """
    betas = np.linspace(1e-4, 0.02, 1000)
    np.testing.assert_allclose(angular.beta(torch.arange(1, 1001), 1000, "linear"), betas, rtol=1e-12)
    np.testing.assert_allclose(
        angular.alpha_bar(torch.arange(1, 1001), 1000, "linear"), np.exp(np.log1p(-betas).cumsum()), rtol=1e-10
    )
    jsd = angular.beta(torch.arange(1, 6), 5, "jsd")
    np.testing.assert_allclose(jsd, [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-14)


def test_angular_times_are_the_schedules():
    """Even angles from the noise, or from `start`, to the image; for the linear schedule those of whole times, so that
    200 steps of 1000 are every fifth. Catches a sampler on another schedule than the training's.
    """
    np.testing.assert_allclose(angular.angles(4), np.array([1, 0.75, 0.5, 0.25, 0]) * HALF_PI, atol=1e-15)
    np.testing.assert_allclose(angular.angles(2, start=0.5), np.array([0.5, 0.25, 0]) * HALF_PI, atol=1e-15)
    bar = np.exp(np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum())
    got = angular.angles(200, "linear")
    np.testing.assert_allclose(np.cos(got[:-1]) ** 2, bar[4::5][::-1], rtol=1e-9)
    assert got[-1] == 0 and len(got) == 201 and got[0] < HALF_PI
    for steps in (1, 3, 7, 333, 1000):
        assert all(
            a > b
            for schedule in ("angular", "linear")
            for a, b in zip(*[angular.angles(steps, schedule)[k:] for k in (0, 1)])
        )
    for wrong in ((1001, "linear"), (10, "cosine"), (0,), (10, "angular", 0.0), (10, "angular", 1.5)):
        with pytest.raises(ValueError):
            angular.angles(*wrong)


def test_angular_training_covers_every_angle():
    """Angles of training: even in [0, π/2] on the quarter circle; DDPM's thousand, each as often, on the linear
    schedule, half of them within .25 of the noise. Catches training on one schedule for sampling on the other.
    """
    g = torch.Generator().manual_seed(0)
    eta = angular.draw_angles(40000, "angular", g)
    np.testing.assert_allclose(np.quantile(eta, [0, 0.25, 0.5, 0.75, 1]), np.linspace(0, HALF_PI, 5), atol=0.02)
    assert eta.min() >= 0 and eta.max() <= HALF_PI
    eta, bar = angular.draw_angles(200000, "linear", g), np.exp(np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum())
    values, counts = torch.unique(eta, return_counts=True)
    np.testing.assert_allclose(np.cos(values.double().numpy()) ** 2, bar, rtol=2e-3)
    assert counts.min() > 120 and counts.max() < 290 and (eta > HALF_PI - 0.29).float().mean() > 0.49


# ------------------------------------------------------------------------------------------------ angular: the circle


def arc(n=7, seed=0):
    return rand(n, 2, 3, 4, seed=seed), randn(n, 2, 3, 4, seed=seed + 1), rand(n, seed=seed + 2, low=0, high=HALF_PI)


def test_angular_velocity_is_the_derivative():
    """dx/dη by central differences (Eq. 10, in η), at the ends too, where it is ε and -x0 and d/dᾱ is infinite.
    Catches a sign, and a factor η' = π/2T.
    """
    x0, eps, eta = arc()
    eta[0], eta[1], d = 0, HALF_PI, 1e-5
    slope = (angular.diffuse(x0, eps, eta + d) - angular.diffuse(x0, eps, eta - d)) / (2 * d)
    torch.testing.assert_close(angular.velocity(x0, eps, eta), slope, rtol=0, atol=1e-8)
    torch.testing.assert_close(angular.velocity(x0, eps, eta)[0], eps[0], rtol=0, atol=1e-15)
    torch.testing.assert_close(angular.velocity(x0, eps, eta)[1], -x0[1], rtol=0, atol=1e-15)


def test_angular_is_older_models_marginal():
    """x_T of DDPM's chain, step by step with its own noises (Eq. 3), has the moments of Eq. 9 at every i: the linear
    map of (x0, noises) is composed here. Catches cos η for cos²η.
    """
    T, image, noise2 = 50, 1.0, 0.0
    betas = angular.beta(torch.arange(1, T + 1), T).tolist()
    for i, b in enumerate(betas, 1):
        image, noise2 = math.sqrt(1 - b) * image, (1 - b) * noise2 + b
        one, zero, eta = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), full(i / T * HALF_PI, 1)
        assert abs(angular.diffuse(one, zero, eta).item() - image) < 3e-8  # √(1 - β_T) is a root of rounding
        assert abs(angular.diffuse(zero, one, eta).item() ** 2 - noise2) < 1e-9


def test_angular_projection_is_the_nearest_consistent_pair_of_the_same_velocity():
    """The projected heads lie on the arc through x, differ from the heads along (cos, sin) only, and name the same
    velocity. Catches a wrong normal, and a projection that would change what Euler does.
    """
    R, E, eta = arc()
    x = randn(7, 2, 3, 4, seed=9)
    x0, eps = angular.project(x, R, E, eta)
    torch.testing.assert_close(angular.diffuse(x0, eps, eta), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(angular.velocity(x0, eps, eta), angular.velocity(R, E, eta), rtol=0, atol=1e-13)
    v = angular.velocity(R, E, eta)  # and so the pair is x and v, turned back
    c, s = eta.cos().view(7, 1, 1, 1), eta.sin().view(7, 1, 1, 1)
    torch.testing.assert_close(x0, c * x - s * v, rtol=0, atol=1e-13)
    torch.testing.assert_close(eps, s * x + c * v, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------ angular: network and loss


@pytest.mark.parametrize("predict", ["both", "image", "noise"])
def test_angular_true_outputs_give_the_true_image_and_noise(predict):
    """From what each network is asked for follow x0 and ε, for one output by Eq. 6 or 8; and the network is told t in
    [0, 1]. Catches swapped outputs, and an angle in place of t.
    """
    x0, eps, eta = arc()
    told, raw = [], {"both": (x0, eps), "image": (x0,), "noise": (eps,)}[predict]
    model = angular.predictor(lambda x, t: told.append(t) or raw, predict)
    for got, want in zip(model(angular.diffuse(x0, eps, eta), eta / HALF_PI), (x0, eps)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(told[0], eta / HALF_PI)


def test_angular_losses_add_up_on_the_circle():
    """Eq. 12's three squared terms are not independent: |e_R|² + |e_E|² = |r|² + |e_v|², r the residual of the heads,
    so γ weighs the same error once more (Pythagoras). Catches a velocity in t units (2.5e-6 of it), a wrong sign.
    """
    x0, eps, eta = arc()
    R, E = randn(7, 2, 3, 4, seed=5), randn(7, 2, 3, 4, seed=6)
    told = []
    got = [angular.loss(lambda x, t: told.append(t) or (R, E), x0, eps, eta, gamma=g) for g in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(told[0], eta / HALF_PI)
    r = angular.diffuse(R, E, eta) - angular.diffuse(x0, eps, eta)
    of_residual = (r**2).mean((1, 2, 3))
    of_velocity = got[1] - got[0]
    torch.testing.assert_close(got[0], of_residual + of_velocity, rtol=1e-12, atol=0)
    torch.testing.assert_close(got[2], got[0] + 3 * of_velocity, rtol=1e-12, atol=0)
    c, s = eta.cos().view(7, 1, 1, 1), eta.sin().view(7, 1, 1, 1)
    eR, eE = R - x0, E - eps
    cross = s**2 * eR**2 + c**2 * eE**2 - 2 * s * c * eR * eE
    torch.testing.assert_close(of_velocity, cross.mean((1, 2, 3)), rtol=1e-12, atol=0)


def test_angular_loss_supervises_what_predict_names():
    """Eq. 5, Eq. 7 and Eq. 12, squared and plain, worked out by hand for constant errors 2 (image) and 3 (noise) at
    η = π/6, where v's is -2/2 + 3 cos; and no example leaks into another. Catches a term that is left on.
    """
    x0, eps, eta = rand(3, 3, 4, 4), randn(3, 3, 4, 4), full(math.pi / 6, 3)
    truth = torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    truth[1] = 1.0
    v = -1 + 1.5 * math.sqrt(3)
    by_hand = {"image": (4, 2), "noise": (9, 3), "both": (4 + 9 + 0.5 * v**2, 2 + 3 + 0.5 * v)}
    for predict, values in by_hand.items():
        for norm, value in zip(("squared", "plain"), values):
            model = lambda x, t: (x0 + 2 * truth, eps + 3 * truth)
            got = angular.loss(model, x0, eps, eta, predict, 0.5, norm)
            np.testing.assert_allclose(got, [0, value, 0], atol=1e-12)


def test_angular_plain_norms_have_gradients_at_zero_error():
    """The plain norm of Eq. 12 has a kink at zero, where its gradient must be 0 and not NaN. Catches sqrt(sum)."""
    x0, eps, eta = arc()
    R = x0.clone().requires_grad_()
    angular.loss(lambda x, t: (R, eps), x0, eps, eta, norm="plain").sum().backward()
    assert torch.isfinite(R.grad).all()


# ------------------------------------------------------------------------------------------------ angular: single steps


def test_angular_ancestral_step_is_gaussian_conditioning():
    """DDPM's posterior q(x_s | x, x0) by conditioning the joint Gaussian of the chain (Eq. 1, 3): cov(x_s, x) =
    cos η/cos s sin²s. Finite from η = π/2, where β = 1. Catches any coefficient, and the ε-form's 0/0.
    """
    x0, x, z = rand(1, 2, 3, 4), randn(1, 2, 3, 4), torch.ones(1, 2, 3, 4, dtype=torch.float64)
    for eta, s in ((HALF_PI, 1.4), (HALF_PI, 0.1), (1.2, 1.1), (0.7, 0.05), (0.4, 0.0)):
        cov, tt, ss = math.cos(eta) / math.cos(s) * math.sin(s) ** 2, math.sin(eta) ** 2, math.sin(s) ** 2
        mean = angular.ancestral_step(x, x0, eta, s, 0 * z)
        spread = angular.ancestral_step(x, x0, eta, s, z) - mean
        want = math.cos(s) * x0 + cov / tt * (x - math.cos(eta) * x0)
        torch.testing.assert_close(mean, want, rtol=0, atol=1e-13)
        torch.testing.assert_close(spread**2, (ss - cov**2 / tt) * z, rtol=0, atol=1e-13)


def test_angular_ancestral_steps_compose():
    """Two draws, η to m to s, given x0, are one from η to s: the posterior is that of a Markov chain (Eq. 1). By the
    linear map of (x, x0, z) in each. Catches a mean and a variance that fit each other in a single step only.
    """
    one, zero = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    for eta, m, s in ((HALF_PI, 1.0, 0.2), (1.3, 1.29, 0.7), (0.9, 0.4, 0.0)):
        of = lambda a, b: [
            angular.ancestral_step(*v, a, b, z).item()
            for v, z in (((one, zero), zero), ((zero, one), zero), ((zero, zero), one))
        ]
        (x1, i1, z1), (x2, i2, z2), (x, i, z) = of(eta, m), of(m, s), of(eta, s)
        np.testing.assert_allclose([x2 * x1, x2 * i1 + i2, x2**2 * z1**2 + z2**2], [x, i, z**2], atol=1e-14)


def test_angular_ddim2_ends_at_the_truth_where_x0_is_linear_in_the_angle():
    """If x̂0 = c + d η whatever x is, the image is c, and ddim2 finds it exactly in any N > 1, DDIM does not. Catches
    a slope of the wrong sign or step.
    """
    c, d, x1 = rand(3, 1, 4, 4), rand(3, 1, 4, 4, seed=1), randn(3, 1, 4, 4)

    def net(x, t):
        eta = HALF_PI * t.view(-1, 1, 1, 1)
        return c + d * eta, (x - eta.cos() * (c + d * eta)) / eta.sin()

    for N in (2, 5, 10):
        torch.testing.assert_close(angular.sample(net, x1, N, "ddim2"), c, rtol=0, atol=1e-13)
        assert (angular.sample(net, x1, N, "ddim") - c).abs().max() > 0.1


def frozen(x0, eps, calls=None):
    return lambda x, t: (x0, eps) if calls is None else calls.append(t[0].item()) or (x0, eps)


def test_angular_frozen_network_shows_what_each_solver_leaves():
    """With the true (x0, ε) at every call only the quadrature errs. DDIM is exact; Euler leaves the circle by
    A = (h/2)(1 + cot h/2), B = 1 - (h/2)(cot h/2 - 1), sums of sines; midpoint by h²/24, Heun by -h²/12, RK4 by
    h⁴/2880. Catches any wrong weight or stage.
    """
    x0, eps, _ = arc()
    for N in (1, 4, 10, 100):
        h = HALF_PI / N
        A, B = h / 2 * (1 + 1 / math.tan(h / 2)), 1 - h / 2 * (1 / math.tan(h / 2) - 1)
        torch.testing.assert_close(angular.sample(frozen(x0, eps), eps, N), A * x0 + B * eps, rtol=0, atol=1e-12)
        for heads in ("project", "raw"):
            for solver in ("ddim", "ddim2"):
                got = angular.sample(frozen(x0, eps), eps, N, solver, heads)
                torch.testing.assert_close(got, x0, rtol=0, atol=1e-12)
    one, zero, h = torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), HALF_PI / 20
    left = [angular.sample(frozen(*pair), pair[1], 10).item() for pair in ((one, zero), (zero, one))]
    np.testing.assert_allclose(left, [1.0765, 0.0806], atol=1e-4)  # the README's 108 % and 8 %
    for solver, of_image in (("midpoint", h**2 / 24), ("heun", -(h**2) / 12), ("rk4", h**4 / 2880)):
        A = angular.sample(frozen(one, zero), zero, 20, solver).item()
        B = angular.sample(frozen(zero, one), one, 20, solver).item()
        np.testing.assert_allclose([A - 1, B], [of_image, -of_image], rtol=0.05)


def test_angular_ddim_is_a_rotation_and_forgets_nothing():
    """A DDIM step is cos h x - sin h v. With raw heads it is cos(h)(x + r) - sin(h) v, r their residual: it drops x,
    and puts the residual into the image anew at every step; projected heads have none. Euler sees v alone.
    """
    R, E, x = randn(5, 2, 3, 4, seed=1), randn(5, 2, 3, 4, seed=2), randn(5, 2, 3, 4, seed=3)
    eta, h = full(0.4, 5), 0.4  # one step from t = .4 to 0, by start
    model = frozen(R, E)
    v, r = angular.velocity(R, E, eta), angular.diffuse(R, E, eta) - x
    step = lambda solver, heads: angular.sample(model, x, 1, solver, heads, start=0.4 / HALF_PI)
    torch.testing.assert_close(step("ddim", "project"), math.cos(h) * x - math.sin(h) * v, rtol=0, atol=1e-13)
    torch.testing.assert_close(step("ddim", "raw"), math.cos(h) * (x + r) - math.sin(h) * v, rtol=0, atol=1e-13)
    for heads in ("raw", "project"):
        torch.testing.assert_close(step("euler", heads), x - h * v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("schedule", ["angular", "linear"])
def test_angular_ddim_of_a_noise_network_is_songs(schedule):
    """A noise-only network sampled by `ddim` is Eq. 6 as Song et al. wrote it, in ᾱ, from the last angle at which
    1/cos is finite; coded here. Catches a sampler that starts a noise-only network at π/2, or on the other
    schedule.
    """
    net = lambda x, t: (torch.tanh(x) * (1 + t.view(-1, 1, 1, 1)),)
    x1 = randn(3, 1, 4, 4)
    start = 0.999 if schedule == "angular" else 1.0
    bar = (
        np.cos(0.999 * HALF_PI * (1 - np.arange(11) / 10)) ** 2
        if schedule == "angular"
        else np.append(np.exp(np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum())[99::100][::-1], 1)
    )
    x = x1
    for a, b in zip(bar, bar[1:]):
        e = net(x, full(math.acos(math.sqrt(a)) / HALF_PI, 3))[0]
        x = math.sqrt(b) * (x - math.sqrt(1 - a) * e) / math.sqrt(a) + math.sqrt(1 - b) * e
    got = angular.sample(angular.predictor(net, "noise"), x1, 10, "ddim", schedule=schedule, start=start)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)


def test_angular_second_order_term_is_the_integral_of_the_slope():
    """What x̂0 = η' - η adds on the way from x(η) = 0: dx/dη' = (cos η' x - x̂0)/sin η', by quadrature with its
    integrating factor 1/sin. Catches its algebra, and the limit at s = 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(80)
    for eta, s in ((HALF_PI, 1.2), (1.0, 0.3), (0.3, 0.1), (0.2, 0.19)):
        e = eta + (s - eta) * (nodes + 1) / 2
        integral = math.sin(s) * np.sum(weights * (s - eta) / 2 * -(e - eta) / np.sin(e) ** 2)
        assert math.isclose(angular.second_order(eta, s), integral, rel_tol=1e-9)
    assert angular.second_order(0.3, 0.0) == -0.3
    assert math.isclose(angular.second_order(0.3, 1e-9), -0.3, rel_tol=1e-6)


def test_angular_cold_rule_is_ddim_for_an_image_network():
    """Cold diffusion's rule (Eq. 8) takes x̂0 and the noise that x then holds. For an image-only network that is DDIM
    (the paper's Sec. 4); with two heads it ignores the second. Catches a rule with the network's own noise.
    """
    x1 = randn(3, 1, 4, 4)
    image = angular.predictor(lambda x, t: (torch.tanh(x),), "image")
    both = [angular.sample(image, x1, 7, solver) for solver in ("cold", "ddim")]
    torch.testing.assert_close(*both, rtol=0, atol=1e-12)
    junk = angular.sample(lambda x, t: (torch.tanh(x), 100 * x), x1, 7, "cold")
    torch.testing.assert_close(junk, both[0], rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- angular: the sampler on exact oracles


def mixture(weights=WEIGHTS, means=MEANS, stds=STDS, calls=None):
    """The exact posterior means (x0, ε) of a 1-D Gaussian mixture on the quarter circle, as a network."""
    w, m, s = (torch.tensor(v, dtype=torch.float64) for v in (weights, means, stds))

    def net(x, t):
        if calls is not None:
            calls.append(t[0].item())
        c, n = (HALF_PI * t).cos().view(-1, 1, 1, 1, 1), (HALF_PI * t).sin().view(-1, 1, 1, 1, 1)
        off, var = x[..., None].double() - c * m, c**2 * s**2 + n**2
        resp = torch.softmax(w.log() - off**2 / (2 * var) - var.log() / 2, dim=-1)
        x0, eps = (resp * (m + c * s**2 / var * off)).sum(-1), (resp * (n / var * off)).sum(-1)
        return x0.to(x.dtype), eps.to(x.dtype)

    return net


@pytest.mark.parametrize(
    "solver,order", [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("ddim", 1), ("ddim2", 2)]
)
def test_angular_solvers_have_their_order(solver, order):
    """The ODE keeps quantiles, so its exact end is known: errors at 200 and 400 steps, on a smooth mixture, through
    the public sampler. (ddim2's is h² log 1/h, as cot η is singular at the end.) Catches a stage at the wrong angle,
    which would still look right at 10 steps.
    """
    x1, exact = quantiles(100)
    error = [(angular.sample(mixture(), x1, n, solver) - exact).pow(2).mean().sqrt().item() for n in (200, 400)]
    logs = math.log2(math.log(200 / HALF_PI) / math.log(400 / HALF_PI)) if solver == "ddim2" else 0
    assert abs(math.log2(error[0] / error[1]) - order - logs) < (0.03 if logs else 0.1), error


def test_angular_solvers_rank_otherwise_on_a_smooth_mixture():
    """With exact means of a smooth mixture, 10 calls: midpoint is nearer to the truth than Euler, Euler than ddim2,
    and that than DDIM. Trained networks rank them otherwise, as the README says. Catches a README that says more.
    """
    x1, exact = quantiles(100)
    runs = {"midpoint": 5, "euler": 10, "ddim2": 10, "ddim": 10}
    errors = [(angular.sample(mixture(), x1, n, solver) - exact).pow(2).mean() for solver, n in runs.items()]
    assert errors == sorted(errors) and errors[0] < errors[1] / 2


def test_angular_linear_schedule_walks_the_same_ode():
    """The schedule says where on the arc the steps are, not what the arc is: on uneven angles midpoint still converges
    to the exact quantiles. (DDPM's last time is 6e-3 short of the noise, which bounds how well.)
    """
    x1, exact = quantiles(100)
    errors = [(angular.sample(mixture(), x1, n, "midpoint", schedule="linear") - exact).abs().max() for n in (10, 100)]
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3


def test_angular_euler_stands_still_on_white_data_and_ddim_shrinks_it():
    """Why Euler can beat DDIM: where the data are as wide as the noise, the path x(η) is a point. Euler stays; DDIM,
    which turns towards x̂0 = cos η x as if it were final, multiplies by cos h in every step: .88 in 10, .55 in 2.
    """
    x1 = randn(9, 1, 2, 2)
    net = mixture([1.0], [0.0], [1.0])
    for N in (1, 2, 10):
        torch.testing.assert_close(angular.sample(net, x1, N), x1, rtol=0, atol=1e-13)
        shrunk = angular.sample(net, x1, N, "ddim")
        torch.testing.assert_close(shrunk, math.cos(HALF_PI / N) ** N * x1, rtol=0, atol=1e-13)
    assert abs(math.cos(HALF_PI / 10) ** 10 - 0.883) < 1e-3


def test_angular_euler_is_no_worse_than_ddim_on_gaussian_data():
    """On N(0, s²), s from .001 to 100, Euler's standard deviation is off by no more than DDIM's in 10 and 50 steps;
    in 5 for s from .01, and not for .005; nor in 10 for a point. Catches a README that says more.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def off(s, N, solver):
        return abs(abs(angular.sample(mixture([1.0], [0.0], [s]), one, N, solver).item()) - s)

    for N, low in ((5, 0.01), (10, 0.001), (50, 0.001)):
        for s in np.geomspace(low, 100, 12):
            assert off(s, N, "euler") <= off(s, N, "ddim") + 1e-12, (s, N)
    for s, N in ((0.005, 5), (1e-5, 10)):
        assert off(s, N, "euler") > off(s, N, "ddim")
    assert abs(off(1e-9, 10, "euler") - 0.0015) < 1e-4


def test_angular_velocity_of_the_mean_field_at_both_ends():
    """For any data v(x, π/2) = -E[x0] whatever x is, and v(x, 0) = 0: ε is independent of x0 (what Heun and RK4 ask at
    η = 0 is no direction). Catches an oracle, and a sampler's first call, that is not at π/2.
    """
    x = randn(5, 1, 2, 2)
    for t, want in ((1.0, -(WEIGHTS * MEANS).sum()), (0.0, 0.0)):
        heads = mixture()(x, full(t, 5))
        v = angular.velocity(*heads, full(t * HALF_PI, 5))
        torch.testing.assert_close(v, torch.full_like(v, want), rtol=0, atol=1e-12)


def test_angular_heun_and_rk4_leave_noise_at_the_end_and_midpoint_does_not():
    """Fine detail has hardly any variance: for data at a point, a last stage at η = 0, where E[ε | x0] = 0, leaves h/2
    (Heun) or h/6 (RK4) of the noise. Midpoint never asks there; a last step by midpoint or Euler is the remedy, at a
    price. Figures of the README: 20 calls.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    left = lambda steps, solver, **o: angular.sample(mixture([1.0], [0.0], [1e-9]), one, steps, solver, **o).item()
    for N in (20, 40):
        h = HALF_PI / N
        assert abs(left(N, "heun") / (h / 2) - 1) < 0.1 and abs(left(N, "rk4") / (h / 6) - 1) < 0.1
        for solver in ("heun", "rk4"):
            for last in ("euler", "midpoint"):
                assert abs(left(N, solver, last=last)) < left(N, solver) / 5, (N, solver, last)
        assert abs(left(N, "midpoint")) < h**2 / 2
    got = [left(n, s) for n, s in ((10, "heun"), (5, "rk4"), (10, "midpoint"))]
    np.testing.assert_allclose(got, [0.078, 0.054, -0.001], atol=5e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_angular_steps_make_the_calls_that_are_printed(solver):
    """1, 2, 2 and 4 network calls a step, at the angles of the rule, the first at η = π/2, N = 1 included; finite in
    float32, no call at 0 but Heun's and RK4's last. Catches a count in stdout that is not the network's.
    """
    x1, per_step = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), {
        "midpoint": 2,
        "heun": 2,
        "rk4": 4,
        **dict.fromkeys(("euler", "ddim", "ddim2", "cold", "ddpm"), 1),
    }
    for steps in (1, 2, 3, 10):
        for last in (None, "euler", "midpoint"):
            calls, watched = [], []
            watch = lambda t, x, x0: watched.append(t)
            x0 = angular.sample(mixture(calls=calls), x1, steps, solver, last=last, watch=watch)
            a_step = per_step.get(solver, angular.SOLVERS[solver])
            total = (steps - 1) * a_step + {None: a_step, "euler": 1, "midpoint": 2}[last]
            assert len(calls) == angular.calls(solver, steps, last) == total and calls[0] == 1
            np.testing.assert_allclose(watched, [*calls, 0], atol=1e-7)
            assert (min(calls) == 0) == (solver in ("heun", "rk4") and last is None)
            assert x0.dtype == torch.float32 and torch.isfinite(x0).all()


def test_angular_ancestral_sampling_draws_the_mixture():
    """DDPM's sampler with exact means and 200 steps has the mixture's mean and spread, and its last step adds no
    noise. Catches a variance that is β instead of the posterior's.
    """
    mean = (WEIGHTS * MEANS).sum()
    spread = math.sqrt((WEIGHTS * (STDS**2 + MEANS**2)).sum() - mean**2)
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(8000, 1, 1, 1, generator=g, dtype=torch.float64)
    x0 = angular.sample(mixture(), x1, 200, "ddpm", generator=g)
    assert abs(x0.mean() - mean) < 0.05 and abs(x0.std() - spread) < 0.05
    truth = rand(4, 3, 4, 4)
    got = angular.sample(frozen(truth, truth), randn(4, 3, 4, 4), 5, "ddpm", "raw", generator=g)
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_angular_clipping_keeps_estimates_in_range(solver):
    """With clip every x̂0 that a solver uses is in [-1, 1], whatever the heads say, and at the end of those rules that
    end at x̂0 the image is; and nothing changes for the truth. Catches a clip before the projection, which undoes
    it.
    """
    x0, eps, _ = arc()
    raw = lambda x, t: (torch.tanh(9 * x) / 2,)
    for net in (angular.predictor(raw, "noise"), lambda x, t: (50 * x0, eps)):
        seen, g = [], torch.Generator().manual_seed(0)
        options = {"start": 0.999, "generator": g, "watch": lambda t, x, x0_hat: seen.append((t, x0_hat))}
        image = angular.sample(net, eps, 10, solver, clip=True, **options)
        assert all(x0_hat.abs().max() <= 1 for t, x0_hat in seen if t) and torch.isfinite(image).all()
        if solver in ("ddim", "cold", "ddpm"):
            assert image.abs().max() <= 1 + 1e-12
        assert angular.sample(net, eps, 10, solver, **{**options, "watch": None}).abs().max() > 2
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    truth = [angular.sample(frozen(x0, eps), eps, 5, solver, clip=c, generator=g[c]) for c in (True, False)]
    if solver in ("ddim", "ddim2", "cold"):  # the others leave the arc, on which alone x̂0 names ε̂
        torch.testing.assert_close(*truth, rtol=0, atol=1e-12)


def test_angular_sampling_is_deterministic_per_image():
    """Image i is a function of (seed, i) alone, also for the stochastic sampler. Catches a shared generator."""
    net = lambda x, t: (torch.tanh(x), x / 2)

    def draw(numbers):
        generators = data.image_generators(5, numbers)
        return angular.sample(
            net, data.randn(torch.empty(len(numbers), 3, 4, 4), generators), 4, "ddpm", generator=generators
        )

    together = draw([0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(draw([i])[0], together[i])
    assert not torch.equal(together[0], together[1])


# ----------------------------------------------------------------------------------------------- pixel_aware: schedule


def pixels(*shape, seed=0):
    """Random pixel values in the paper's range."""
    return rand(*shape, seed=seed, low=0.004, high=1)


def test_pixel_aware_alpha_bar_is_the_product_of_alphas():
    """Eq. 8 and 9: the product of i equal α is ᾱ_i, is e^{-γ i x₀/T}, and α lies in (0, 1) even where γ > T, where the
    paper fears for the Markov chain. Catches Eq. 10's second division by T.
    """
    x0, T = pixels(3, 1, 4, 4), 7
    for gamma in (1.0, 6.0, 50.0):
        scale = pixel_aware.x_delta(x0, gamma)
        a, product = pixel_aware.alpha(scale, T), torch.ones_like(x0)
        assert 0 < a.min() and a.max() < 1
        for i in range(T + 1):
            torch.testing.assert_close(pixel_aware.alpha_bar(scale, i, T), product, rtol=1e-12, atol=0)
            exact = torch.tensor(np.exp(-gamma * i / T * x0.numpy()))
            torch.testing.assert_close(product, exact, rtol=1e-12, atol=0)
            torch.testing.assert_close(pixel_aware.variance(scale, i, T), 1 - exact, rtol=1e-12, atol=1e-15)
            product = product * a
        i = torch.tensor([0, 3, 7])
        each = torch.cat([pixel_aware.alpha_bar(scale[k : k + 1], int(i[k]), T) for k in range(3)])
        torch.testing.assert_close(pixel_aware.alpha_bar(scale, i, T), each, rtol=0, atol=0)


def test_pixel_aware_schedule_keeps_its_digits_in_float32():
    """1 - ᾱ_1 of a dark pixel, 4e-4 and less, to float32's precision, against float64. Catches 1 - exp for expm1."""
    x0 = torch.tensor([0.004, 0.01, 0.5, 1.0]).view(1, 1, 2, 2)
    for gamma, T in ((20.0, 200), (50.0, 500), (20.0, 5000)):
        scale, exact = pixel_aware.x_delta(x0, gamma), pixel_aware.x_delta(x0.double(), gamma)
        f = pixel_aware.variance
        torch.testing.assert_close(f(scale, 1, T).double(), f(exact, 1, T), rtol=3e-5, atol=0)


def test_pixel_aware_snr_and_its_slope():
    """Eq. 11 is the squared mean over the variance of Eq. 9; its slope, corrected, is the numerical
    derivative. Catches Eq. 17 as printed, without e^y, and a decay of t⁻²: as t → 0 the SNR is x₀/(γ t).
    """
    x0, T, gamma, h = pixels(2, 1, 3, 3), 100, 20.0, 1e-6
    scale = pixel_aware.x_delta(x0, gamma)
    for i in (1, 13, 100):
        mean, std = pixel_aware.moments(x0, i / T, gamma)
        ratio = pixel_aware.alpha_bar(scale, i, T) * x0**2 / (1 - pixel_aware.alpha_bar(scale, i, T))
        torch.testing.assert_close(pixel_aware.snr(x0, i / T, gamma), ratio, rtol=1e-9, atol=0)
        torch.testing.assert_close(mean**2 / std**2, ratio, rtol=1e-9, atol=0)
    for t in (0.01, 0.2, 1.0):
        slope = (pixel_aware.snr(x0, t + h * t, gamma) - pixel_aware.snr(x0, t - h * t, gamma)) / (2 * h * t)
        torch.testing.assert_close(pixel_aware.snr_slope(x0, t, gamma), slope, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(pixel_aware.snr(x0, 1e-7, gamma), x0 / (gamma * 1e-7), rtol=1e-5, atol=0)


def test_pixel_aware_proposition_1_holds_until_t_delta_and_reverses():
    """Until t_δ the brighter pixel loses SNR faster, from then on the darker; t_δ lies between y*/(γ x_k) and y*/(γ
    x_j), y* = 2.5757, and is y*/γ between two nearly white ones. Catches a t_δ taken from the proof, which gives none.
    """
    dark, bright = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.05, 0.1, 0.1, 0.5, 0.9], [0.1, 0.5, 1.0, 1.0, 1.0])
    )
    y = np.linspace(1e-3, 10, 2_000_001)
    y_star = y[(y / np.tanh(y / 2) < 3).sum()]
    assert abs(y_star - 2.5757) < 1e-4
    t = pixel_aware.t_delta(dark, bright, 20.0)
    assert t[0] > 1 and ((y_star / (20 * bright) < t) & (t < y_star / (20 * dark))).all()

    def faster(t):  # by differences of the SNR itself
        drop = [pixel_aware.snr(x, t, 20.0) - pixel_aware.snr(x, t * (1 + 1e-6), 20.0) for x in (bright, dark)]
        return drop[0] > drop[1]

    for share in (1e-3, 0.1, 0.5, 0.99):
        assert faster(share * t).all() and not faster(t / share).any()
    torch.testing.assert_close(
        pixel_aware.t_delta(full(0.99999, 1), full(1, 1), 50.0), full(y_star / 50, 1), rtol=1e-4, atol=0
    )


def test_pixel_aware_proposition_2_needs_more_than_its_condition():
    """With γ x₀ = 20 and DDPM's β = 5 t the condition γ x₀ > a t holds for all t, and yet from t = .28 on the mean
    falls more slowly than DDPM's: it is already near 0. And dark pixels end farther from N(0, 1) than DDPM's.
    """
    t, x0, gamma, a = np.linspace(1e-4, 1, 20001), 1.0, 20.0, 5.0
    ours = np.gradient(pixel_aware.moments(torch.tensor(x0), torch.tensor(t), gamma)[0].numpy(), t)
    theirs = np.gradient(x0 * np.exp(-a * t * t / 4), t)  # dE[x]/dt = -β_t/2 E[x]: not /2, as Eq. 22 has it
    slower = t[np.abs(ours) < np.abs(theirs)]
    assert abs(slower.min() - 0.28) < 0.01 and slower.max() == 1 and len(slower) > 14000
    kept = pixel_aware.ddpm_alpha_bar(torch.tensor([500]), 500).item()  # of 500 steps with β from 1e-4 to .02
    assert math.isclose(-math.log(kept), 5.06, abs_tol=0.01)
    mean, std = pixel_aware.moments(full(0.09, 1), 1.0, 50.0)
    assert mean.item() / 0.09 > math.sqrt(kept) and std.item() < math.sqrt(1 - kept)


def test_pixel_aware_dark_pixels_do_not_end_at_white_noise():
    """The law of x_T for x₀ = .004, .05, .1 and .25, simulated step by step (Eq. 2), is that of `moments`, and is
    N(0, 1) only for bright pixels. Catches a terminal law taken for granted.
    """
    x0 = torch.tensor([0.004, 0.05, 0.1, 0.25], dtype=torch.float64).view(4, 1, 1, 1)
    x, beta = x0.expand(4, 1, 200, 200), 1 - pixel_aware.alpha(pixel_aware.x_delta(x0, 20.0), 200)
    for step in range(200):
        x = (1 - beta).sqrt() * x + beta.sqrt() * randn(*x.shape, seed=step)
    mean, std = pixel_aware.moments(x0, 1.0, 20.0)
    torch.testing.assert_close(x.mean((1, 2, 3)), mean.flatten(), rtol=0, atol=0.02)
    torch.testing.assert_close(x.std((1, 2, 3)), std.flatten(), rtol=0.01, atol=0)
    np.testing.assert_allclose(std.flatten(), [0.277, 0.795, 0.930, 0.9966], atol=1e-3)


# ------------------------------------------------------------------------------------------------ pixel_aware: forward


@pytest.mark.parametrize("gamma", [2.0, 20.0, 50.0])
def test_pixel_aware_trajectory_noise_is_the_chains(gamma):
    """The chain of Eq. 2, step by step from the same draws, has these ε̃_j in Eq. 9 at every step. Catches a wrong
    increment, and noises that are drawn independently of each other.
    """
    x0, T = pixels(2, 3, 2, 2), 9
    eps = pixel_aware.trajectory_noise(x0, gamma, T, torch.Generator().manual_seed(3))
    z = torch.randn(2, T, 3, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x, a = x0, torch.exp(-gamma / T * x0)
    for i in range(1, T + 1):
        x = a.sqrt() * x + (1 - a).sqrt() * z[:, i - 1]
        torch.testing.assert_close(pixel_aware.diffuse(x0, eps[:, i - 1], i, gamma, T), x, rtol=0, atol=1e-12)
    short = pixel_aware.trajectory_noise(x0.float(), gamma, T, torch.Generator().manual_seed(3))
    assert eps.shape == (2, T, 3, 2, 2) and short.dtype == torch.float32 and torch.isfinite(short).all()


def rows_of(monkeypatch, draw, n):
    """The matrix W of the linear map from white noise to `draw()` [n, m], one pixel each: by unit vectors."""
    monkeypatch.setattr(data, "randn", lambda like, generator=None: torch.eye(n, dtype=like.dtype).view(like.shape))
    return draw().T


def test_pixel_aware_noises_have_the_right_correlations(monkeypatch):
    """corr(ε̃_i, ε̃_j) = √(u_i/u_j), i < j, for all steps, for any few of them, and between ε̃_i and the heads' as
    training draws them, an i among the heads included. Catches a lost order, and a second draw for the same step.
    """
    T, gamma, v = 12, 20.0, 0.3
    u = torch.expm1(gamma * v / T * torch.arange(1, T + 1, dtype=torch.float64))
    exact = (torch.minimum(u, u[:, None]) / torch.maximum(u, u[:, None])).sqrt()
    x0 = lambda n: torch.full((n, 1, 1, 1), v, dtype=torch.float64)
    W = rows_of(monkeypatch, lambda: pixel_aware.trajectory_noise(x0(T), gamma, T).flatten(1), T)
    torch.testing.assert_close(W @ W.T, exact, rtol=0, atol=1e-12)
    few = torch.tensor([2, 3, 7, 12])
    W = rows_of(monkeypatch, lambda: pixel_aware.trajectory_noise(x0(4), gamma, T, times=few).flatten(1), 4)
    torch.testing.assert_close(W @ W.T, exact[few - 1][:, few - 1], rtol=0, atol=1e-12)
    for i in (1, 7, 10):

        def drawn():
            own, heads = pixel_aware.draw_trajectory(x0(5), torch.full((5,), i), few, gamma, T)
            return torch.cat([own[:, None], heads], 1).flatten(1)

        W, steps = rows_of(monkeypatch, drawn, 5), torch.tensor([i, *few]) - 1
        torch.testing.assert_close(W @ W.T, exact[steps][:, steps], rtol=0, atol=1e-12)


def test_pixel_aware_expected_noise_is_gaussian_conditioning(monkeypatch):
    """E[ε̃_j | x_i, x₀] by conditioning the joint law of the draws, j <= i. Catches the ratio upside down."""
    T, gamma, i = 8, 5.0, 6
    x0 = pixels(1, 1, 1, 1)
    u = torch.expm1(gamma * x0.item() / T * torch.arange(1, T + 1, dtype=torch.float64))
    W = torch.tril((u - torch.cat([u.new_zeros(1), u[:-1]])).sqrt().expand(T, T)) / u.sqrt()[:, None]
    eps, cov = randn(1, 1, 1, 1), W @ W.T
    got = pixel_aware.expected_noise(eps, i, torch.arange(1, i + 1), pixel_aware.x_delta(x0, gamma), T)
    torch.testing.assert_close(got.flatten(), cov[:i, i - 1] / cov[i - 1, i - 1] * eps.item(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("i,s", [(9, 8), (9, 4), (5, 1), (2, 1), (1, 0), (9, 0)])
def test_pixel_aware_posterior_is_gaussian_conditioning(i, s):
    """q(x_s | x_i, x₀) by conditioning the joint law of (x_s, x_i), for a step and for jumps; no variance and x₀
    itself at s = 0. Catches a β̃ that is not 0 at the last step.
    """
    x0, gamma, T = pixels(2, 1, 3, 3), 12.0, 9
    scale, xi = pixel_aware.x_delta(x0, gamma), randn(2, 1, 3, 3)
    kept = lambda k: torch.exp(-gamma * k / T * x0)
    cov = (kept(i) / kept(s)).sqrt() * (1 - kept(s))
    mean = kept(s).sqrt() * x0 + cov / (1 - kept(i)) * (xi - kept(i).sqrt() * x0)
    got = pixel_aware.posterior(xi, x0, scale, i, s, T)
    torch.testing.assert_close(got[0], mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got[1], 1 - kept(s) - cov**2 / (1 - kept(i)), rtol=1e-9, atol=1e-12)
    if s == 0:
        assert torch.equal(got[1], torch.zeros_like(x0)) and torch.allclose(got[0], x0, rtol=1e-14)


def test_pixel_aware_jumps_are_composed_steps():
    """One jump from i to s has the law of the i - s single steps: means and variances chained. Catches a jump that
    fits itself alone.
    """
    x0, gamma, T, i, s = pixels(2, 1, 3, 3), 12.0, 9, 8, 3
    scale, xi = pixel_aware.x_delta(x0, gamma), randn(2, 1, 3, 3)
    mean, variance = xi, torch.zeros_like(xi)
    for j in range(i, s, -1):
        at_zero = pixel_aware.posterior(torch.zeros_like(x0), x0, scale, j, j - 1, T)[0]
        slope = pixel_aware.posterior(torch.ones_like(x0), x0, scale, j, j - 1, T)[0] - at_zero
        mean, own = pixel_aware.posterior(mean, x0, scale, j, j - 1, T)
        variance = own + slope**2 * variance
    got = pixel_aware.posterior(xi, x0, scale, i, s, T)
    torch.testing.assert_close(got[0], mean, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got[1], variance, rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------- pixel_aware: networks and loss


def test_pixel_aware_heads_are_separate_networks():
    """Grouped layers equal a loop over T networks of two convolutions, norm and skip, any few of them equal those of
    all, and the gradient of one head touches no other's weights. Catches groups that mix channels of two heads.
    """
    torch.manual_seed(0)
    heads, h = pixel_aware.Heads(8, 3, 5).double(), randn(2, 8, 4, 4)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    every, conv2d = torch.arange(1, 6), torch.nn.functional.conv2d
    together = heads(h, every)
    for j in range(5):
        own = slice(3 * j, 3 * j + 3)
        z = conv2d(h, heads.first.weight[own], heads.first.bias[own], padding=1)
        z = (z - z.mean((1, 2, 3), keepdim=True)) / (z.var((1, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        z = z * heads.norm.weight[own][:, None, None] + heads.norm.bias[own][:, None, None]
        z = conv2d(z * z.sigmoid(), heads.second.weight[own], heads.second.bias[own], padding=1)
        z = z + conv2d(h, heads.skip.weight[own], heads.skip.bias[own])
        torch.testing.assert_close(together[:, j], z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(heads(h, torch.tensor([2, 5])), together[:, [1, 4]], rtol=1e-12, atol=1e-12)
    heads(h, torch.tensor([4])).sum().backward()
    for parameter in heads.parameters():
        touched = parameter.grad.flatten(1).abs().sum(1) if parameter.dim() > 1 else parameter.grad.abs()
        assert not touched[[*range(9), *range(12, 15)]].any()


def tiny_model(seed=0, **changes):
    """A small PixelAware whose last layers are not 0."""
    torch.manual_seed(seed)
    arguments = dict(channels=3, size=8, width=8, mult=(1, 1), blocks=1, attention=(), dropout=0.0, T=6, gamma=20.0)
    arguments |= dict(low=0.004, grid="uniform", latent=32, vae="conditional", scale="image", predict="x0")
    net = pixel_aware.PixelAware(**{**arguments, **changes}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("grid", pixel_aware.GRIDS)
@pytest.mark.parametrize("predict", ["eps", "x0"])
def test_pixel_aware_mask_keeps_the_heads_up_to_i(predict, grid):
    """Eq. 14: Z^j is exactly 0 for j > i, and Z^i is not: the step from x_i itself needs it; for every step of long
    trajectories, in float32 and float64. Catches j < i, and a step that rounding moves to its neighbour.
    """
    for T, kind in ((6, torch.float32), (6, torch.float64), (777, torch.float32), (777, torch.float64)):
        net, shown = tiny_model(predict=predict, grid=grid, T=T), [1, 2, 3, T - 2, T - 1, T]
        places = [pixel_aware.place(j, T, grid) / T for j in shown]
        xi, scale = rand(6, 3, 2, 2).to(kind), pixel_aware.x_delta(rand(6, 3, 2, 2, low=0.1, high=0.9), 20.0).to(kind)
        t = torch.tensor(places, dtype=torch.float64).to(kind)
        Z = pixel_aware.Noises(net, torch.ones(6, T, 3, 2, 2), xi, scale, t)
        Z = torch.stack([Z[:, j] for j in range(T)], 1)
        active = Z.flatten(2).abs().amax(2) > 0
        assert Z.shape == (6, T, 3, 2, 2) and Z.dtype == kind
        assert torch.equal(active, torch.arange(1, T + 1) <= torch.tensor(shown)[:, None])


@pytest.mark.parametrize("vae", ["conditional", "denoising"])
@pytest.mark.parametrize("scale", ["delta", "image"])
def test_pixel_aware_networks_see_what_they_should(vae, scale):
    """The VAE's output depends on x_i, on t and on the code's noise, the heads' on x_i, on t and on x̂_δ, dark or
    bright; the heads' loss sends the VAE no gradient and all else some. Catches a condition that is fused nowhere, and
    a level that is forgotten.
    """
    net = tiny_model(vae=vae, scale=scale)
    xi, t, z, heads = rand(2, 3, 8, 8).float(), torch.tensor([0.5, 1.0]), randn(2, 32).float(), torch.arange(1, 7)
    other = pixels(2, 3, 8, 8, seed=1).float()
    delta = pixel_aware.x_delta(0.95 + other / 20, 20.0)  # of bright pixels: 0 to float32 once 1 is taken from it
    with torch.no_grad():
        for call, inputs in (
            (lambda *a: net.vae(*a)[0], (xi, t, z)),
            (lambda *a: net.parallel(*a, heads), (xi, delta, t)),
        ):
            for k, changed in enumerate(inputs):
                inputs_ = [*inputs[:k], changed.flip(0), *inputs[k + 1 :]]
                assert not torch.allclose(call(*inputs), call(*inputs_)), k
    raw, kl, shown, out = net(xi, t, z, other, heads)
    torch.testing.assert_close(shown, pixel_aware.read_scale(raw, scale, 20.0))
    out.square().sum().backward()
    assert all(p.grad is None for p in net.vae.parameters()) and kl.shape == (2,)
    assert all(p.grad.abs().sum() > 0 for p in net.parallel.parameters())
    (raw.sum() + kl.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.vae.parameters())


def test_pixel_aware_kl_is_that_of_two_gaussians(monkeypatch):
    """The VAE's KL against torch.distributions: of the posterior from the prior of x_i, or from N(0, I) without one;
    and the code drawn is mean + std z of the posterior in training, of the prior in sampling. Catches them exchanged.
    """
    from torch.distributions import Normal, kl_divergence

    for vae in ("conditional", "denoising"):
        net = tiny_model(vae=vae).vae
        xi, truth, t, z = (
            rand(2, 3, 8, 8).float(),
            pixels(2, 3, 8, 8).float(),
            full(0.3, 2).float(),
            randn(2, 32).float(),
        )
        seen, codes = [], []
        for encoder in filter(None, (net.prior, net.posterior)):
            encoder.register_forward_hook(
                lambda module, _, out: seen.append((module, Normal(out[0], (out[1] / 2).exp())))
            )
        net.first.register_forward_hook(lambda module, inputs, _: codes.append(inputs[0]))
        with torch.no_grad():
            kl = net(xi, t, z, truth)[1]
            net(xi, t, z)
        laws = dict(seen)
        q, p = (laws[net.posterior], laws[net.prior]) if vae == "conditional" else (laws[net.prior], Normal(0.0, 1.0))
        torch.testing.assert_close(kl, kl_divergence(q, p).sum(1), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(codes[0], q.mean + q.stddev * z)
        torch.testing.assert_close(codes[1], laws[net.prior].mean + laws[net.prior].stddev * z)


def test_pixel_aware_scale_stays_in_its_range():
    """x̂_δ is clamped to [e^-γ, e^{-γ low}] whatever the VAE says, and with it a whole reverse path is finite in
    float32 at γ = 50. Catches x̂_δ = 1, where the schedule is 0/0, and x̂_δ <= 0, where it is not a number.
    """
    raw = torch.tensor([-1e9, -1.0, 0.0, 1e-30, 0.004, 0.5, 1.0, 2.0, 1e9]).view(1, 1, 3, 3)
    for kind in ("delta", "image"):
        scale = pixel_aware.read_scale(raw, kind, 50.0)
        assert torch.isfinite(scale.log()).all() and scale.max() <= math.exp(-0.2) + 1e-6 and scale.min() >= 1.9e-22
        order = scale.flatten().tolist()
        assert order == sorted(order, reverse=kind == "image") and len({*order}) >= 3
        for mode in ("mean", "literal"):
            Z = randn(1, 500, 1, 3, 3).float()
            x0 = pixel_aware.reverse(randn(1, 1, 3, 3).float(), 500, scale, Z, 500, mode)
            assert torch.isfinite(x0).all() and (mode == "literal" or (0.004 <= x0.min() and x0.max() <= 1))


def test_pixel_aware_guess_is_gaussian_conditioning():
    """The mean and the standard deviation of x₀ ~ N(x̂₀, spread²) given x_i = √ᾱ x₀ + √(1-ᾱ) ε: by quadrature of Bayes'
    rule. Catches a gain that is not the posterior's.
    """
    T, gamma, i = 50, 20.0, 7
    x0_hat, xi = pixels(5, 1, 1, 1), randn(5, 1, 1, 1)
    mean, std = pixel_aware.guess(xi, pixel_aware.x_delta(x0_hat, gamma), i, T, gamma)
    for k in range(5):
        x = np.linspace(-3, 4, 400_001)
        kept = math.exp(-gamma * i / T * x0_hat[k].item())
        prior = (x - x0_hat[k].item()) / pixel_aware.SPREAD["image"]
        log = -(prior**2) / 2 - (xi[k].item() - math.sqrt(kept) * x) ** 2 / (1 - kept) / 2
        p = np.exp(log - log.max())
        m = (p * x).sum() / p.sum()
        assert math.isclose(mean[k].item(), m, abs_tol=1e-6)
        assert math.isclose(std[k].item(), math.sqrt((p * (x - m) ** 2).sum() / p.sum()), rel_tol=1e-5)


def test_pixel_aware_heads_that_name_the_image_reverse_to_it():
    """Heads that name an image have the Z of that image, and one pass of the mean form gives it back, whatever x̂_δ is.
    Catches Z of another schedule.
    """
    T, gamma, x0 = 40, 20.0, pixels(3, 1, 4, 4)
    xi, heads, i = randn(3, 1, 4, 4), torch.arange(1, 41), torch.tensor([40, 17, 1])
    for scale in (pixel_aware.x_delta(x0, gamma), pixel_aware.x_delta(pixels(3, 1, 4, 4, seed=5), gamma)):
        mean, std = pixel_aware.guess(xi, scale, i, T, gamma)
        raw = ((x0 - mean) / std)[:, None].expand(-1, T, -1, -1, -1)
        Z = pixel_aware.read_heads(raw, xi, scale, i, heads, T, gamma, "x0")
        torch.testing.assert_close(pixel_aware.reverse(xi, i, scale, Z, T), x0, rtol=0, atol=1e-8)
    true = pixel_aware.x_delta(x0, gamma)
    mean, std = pixel_aware.guess(xi, true, i, T, gamma)
    Z = pixel_aware.read_heads(((x0 - mean) / std)[:, None], xi, true, i, heads, T, gamma, "x0")
    eps = (xi - (-gamma / T / 2 * i.view(3, 1, 1, 1) * x0).exp() * x0) / (
        1 - (-gamma / T * i.view(3, 1, 1, 1) * x0).exp()
    ).sqrt()
    torch.testing.assert_close(Z[0, 39], eps[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Z[1, 16], eps[1], rtol=1e-9, atol=1e-9)


def test_pixel_aware_head_weights_average_over_what_is_active():
    """The mean over the batch of the weighted sums is the mean over examples of each one's mean over its heads j <= i,
    or the mean over heads of each one's mean over the examples that have it; heads that none has count for nothing.
    Catches a mean over all, which starves the last heads.
    """
    i, heads, errors = torch.tensor([3, 9, 1, 6]), torch.tensor([1, 3, 7, 10]), rand(4, 4, low=0, high=1)
    active = lambda b, k: heads[k] <= i[b]
    by_head = [np.mean([errors[b, k].item() for b in range(4) if active(b, k)]) for k in range(3)]
    by_example = [np.mean([errors[b, k].item() for k in range(4) if active(b, k)]) for b in range(4)]
    for average, means in (("heads", by_head), ("examples", by_example)):
        got = (pixel_aware.head_weights(i, heads, average) * errors).sum(1).mean()
        assert math.isclose(got.item(), np.mean(means), rel_tol=1e-6)


def test_pixel_aware_training_always_has_the_first_head():
    """A training step's heads are m different ones, rising, the first among them, all in turn; m = T is all. Catches a
    head 0, and examples that no head is trained on.
    """
    g = torch.Generator().manual_seed(0)
    seen = torch.zeros(41)
    for _ in range(500):
        heads = pixel_aware.draw_heads(5, 40, g)
        assert heads[0] == 1 and len(heads) == 5 and (heads.diff() > 0).all() and heads[-1] <= 40
        seen[heads] += 1
    assert seen[1:].min() > 0 and seen[2] > 2 * seen[40]
    for m, T in ((40, 40), (1, 1), (2, 2)):
        assert pixel_aware.draw_heads(m, T, g).tolist() == [*range(1, m + 1)]


@pytest.mark.parametrize("predict", ["eps", "x0"])
@pytest.mark.parametrize("scale", ["delta", "image"])
def test_pixel_aware_loss_is_zero_for_the_truth_and_never_mixes_examples(predict, scale):
    """A model that names the truth has loss 0, and what one example's model says wrong costs that example alone; the
    KL counts by its weight over the pixels. Catches a wrong target for any of the four combinations.
    """
    x0, T, gamma, heads, i = pixels(3, 2, 4, 4), 10, 20.0, torch.arange(1, 11), torch.tensor([10, 4, 1])
    eps_i, eps = pixel_aware.draw_trajectory(x0, i, heads, gamma, T, torch.Generator().manual_seed(0))
    xi = pixel_aware.diffuse(x0, eps_i, i, gamma, T)
    estimate = pixel_aware.x_delta(pixels(3, 2, 4, 4, seed=3), gamma)

    def model(x, t, z, truth, heads, off=0.0):
        torch.testing.assert_close(x, xi)
        assert torch.equal(t, i / T)
        raw = torch.exp(-gamma * x0) if scale == "delta" else x0
        torch.testing.assert_close(truth, raw)
        if predict == "eps":
            out = eps.clone()
        else:
            mean, std = pixel_aware.guess(xi, estimate, i, T, gamma, pixel_aware.SPREAD[scale])
            out = ((x0 - mean) / std)[:, None].repeat(1, 10, 1, 1, 1)
        out[1] += off
        return raw, full(off, 3), estimate, out

    weights = pixel_aware.head_weights(i, heads)
    common = (x0, i, eps_i, eps, weights, None, heads, T, gamma, scale, predict)
    assert pixel_aware.loss(model, *common).abs().max() < 1e-12
    values = pixel_aware.loss(lambda *a: model(*a, off=0.5), *common, kl=0.1)
    kl = 0.1 * 0.5 / 32
    expected = [kl, kl + 0.25 * weights[1].sum().item(), kl]
    np.testing.assert_allclose(values, expected, rtol=1e-6)


# ------------------------------------------------------------------------------------------------- pixel_aware: sampler

SETTINGS_OF_THE_PAPER = [(20.0, 200), (50.0, 500)]


def forward_path(value, gamma, T, side=32):
    """(x0, x_δ, ε̃ [1, T, 1, side, side], x_T) of a flat image."""
    x0 = torch.full((1, 1, side, side), value, dtype=torch.float64)
    eps = pixel_aware.trajectory_noise(x0, gamma, T, torch.Generator().manual_seed(1))
    return x0, torch.exp(-gamma * x0), eps, pixel_aware.diffuse(x0, eps[:, -1], T, gamma, T)


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("gamma,T", SETTINGS_OF_THE_PAPER)
@pytest.mark.parametrize("value", [0.05, 0.25, 1.0])
def test_pixel_aware_algorithm_1_diverges_as_its_formula(value, gamma, T):
    """Algorithm 1 with the true ε̃_j, the paper's own toy check, ends √(2 Σ α^{-(j-1)} β̃_j) from the image, about
    √(2(e^{γ x₀} - 1)); without fresh noise, 1/√2 of it. Catches a literal mode that quietly reconstructs.
    """
    x0, scale, eps, xT = forward_path(value, gamma, T)
    a, j = math.exp(-gamma * value / T), np.arange(1, T + 1)
    beta = (1 - a ** (j - 1)) / (1 - a**j) * (1 - a)
    exact = math.sqrt(2 * (a ** -(j - 1.0) * beta).sum())
    literal = pixel_aware.reverse(xT, T, scale, eps, T, "literal", torch.Generator().manual_seed(2))
    assert (
        abs(rms(literal - x0) / exact - 1) < 0.05 and abs(math.sqrt(2 * math.expm1(gamma * value)) / exact - 1) < 0.06
    )
    silent = pixel_aware.reverse(xT, T, scale, eps, T, "literal", noise=False)
    assert abs(rms(silent - x0) / exact * math.sqrt(2) - 1) < 0.05


@pytest.mark.parametrize("value", [0.05, 0.25, 1.0])
def test_pixel_aware_what_does_reconstruct(value):
    """From x_T of γ = 20 back to the image: with Z^j = E[ε̃_j | x_T, x₀] and no noise, in the literal form and in the
    mean form; with the steps' own noises z_j and √(1-α); and with ε̃ made anew of every x̂_j, noise included. With
    fresh noise the first fails too. Catches an index that is off by one in Z, α or ᾱ.
    """
    gamma, T = 20.0, 200
    x0, scale, eps, xT = forward_path(value, gamma, T)
    j, a = torch.arange(1, T + 1).double(), math.exp(-gamma * value / T)
    Z = (torch.expm1(gamma * value / T * j) / math.expm1(gamma * value)).sqrt().view(1, T, 1, 1, 1) * eps[:, -1:]
    assert rms(pixel_aware.reverse(xT, T, scale, Z, T, "literal", noise=False) - x0) < 1e-9
    assert rms(pixel_aware.reverse(xT, T, scale, Z, T) - x0) < 1e-9
    assert rms(pixel_aware.reverse(xT, T, scale, Z, T, "literal", torch.Generator().manual_seed(0)) - x0) > 1
    z = torch.randn(1, T, 1, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = xT
    for k in range(T, 0, -1):
        x = (x - math.sqrt(1 - a) * z[:, k - 1]) / math.sqrt(a)
    assert rms(x - x0) < 1e-9
    x, g = xT, torch.Generator().manual_seed(5)
    for k in range(T, 0, -1):
        again = (x - a ** (k / 2) * x0) / math.sqrt(1 - a**k)
        x = pixel_aware.posterior(x, (x - math.sqrt(1 - a**k) * again) / a ** (k / 2), scale, k, k - 1, T)
        x = x[0] + x[1].sqrt() * torch.randn(x[0].shape, generator=g, dtype=torch.float64)
    assert rms(x - x0) < 1e-9


def test_pixel_aware_reverse_is_its_linear_closed_form():
    """Without noise, Algorithm 1 is x_i/√ᾱ_i - Σ_j α^{-j/2} (1-α)/√(1-ᾱ_j) Z^j, for any Z; with it, noise of variance
    Σ α^{-(j-1)} β̃_j more. Catches an α or ᾱ in the wrong place in line 9.
    """
    x0, gamma, T, i = pixels(2, 1, 4, 4), 6.0, 15, 11
    scale, xi, Z = torch.exp(-gamma * x0), randn(2, 1, 4, 4), randn(2, T, 1, 4, 4, seed=1)
    a = torch.exp(-gamma / T * x0)
    exact = xi * a ** (-i / 2) - sum(a ** (-j / 2) * (1 - a) / (1 - a**j).sqrt() * Z[:, j - 1] for j in range(1, i + 1))
    silent = pixel_aware.reverse(xi, i, scale, Z, T, "literal", noise=False)
    torch.testing.assert_close(silent, exact, rtol=1e-11, atol=1e-11)
    both = torch.tensor([11, 4])  # a step of its own for every example
    one = pixel_aware.reverse(xi[1:], 4, scale[1:], Z[1:], T)
    torch.testing.assert_close(pixel_aware.reverse(xi, both, scale, Z, T)[1:], one, rtol=0, atol=1e-14)
    wide = [v.repeat(1, 1, 50, 50) for v in (xi, scale)]
    noisy = pixel_aware.reverse(
        wide[0], i, wide[1], Z.repeat(1, 1, 1, 50, 50), T, "literal", torch.Generator().manual_seed(0)
    )
    extra = (noisy - exact.repeat(1, 1, 50, 50)).unflatten(-1, (50, 4)).unflatten(-3, (50, 4)).var((2, 4))
    beta = sum(a ** -(j - 1.0) * (1 - a ** (j - 1)) / (1 - a**j) * (1 - a) for j in range(1, i + 1))
    torch.testing.assert_close(extra, beta, rtol=0.15, atol=0)


def test_pixel_aware_mean_form_is_the_same_step_where_nothing_is_clipped():
    """By way of x̂₀ or of ε̃, it is one step (Eq. 4): the mean form with a [low, 1] that holds everything equals the
    literal form without noise. Catches posterior coefficients that belong to another schedule.
    """
    x0, gamma, T = pixels(2, 1, 4, 4), 3.0, 12
    scale, xi, Z = torch.exp(-gamma * x0), randn(2, 1, 4, 4), 0.02 * randn(2, T, 1, 4, 4, seed=1)
    seen = []
    literal = pixel_aware.reverse(xi, T, scale, Z, T, "literal", noise=False, low=-1e9, watch=lambda *f: seen.append(f))
    inside = (torch.stack([x for _, _, x in seen]) < 1).all(0)
    mean = pixel_aware.reverse(xi, T, scale, Z, T, low=-1e9)
    assert inside.sum() > 8 and [j for j, _, _ in seen] == [*range(12, 0, -1)]
    torch.testing.assert_close(mean[inside], literal[inside], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grid", pixel_aware.GRIDS)
@pytest.mark.parametrize("passes", [1, 2, 5, 40])
def test_pixel_aware_a_pass_is_one_call_of_each_network(grid, passes):
    """K passes call G and R exactly K times each, at falling steps from T; watch sees all T steps and the image. With
    a G and an R that know the image they end at it. Catches a hidden extra call, and a jump by another schedule.
    """
    T, gamma, x0, calls, frames = 40, 20.0, pixels(2, 3, 4, 4), [], []
    places = torch.tensor([pixel_aware.place(j, T, grid) for j in range(T + 1)], dtype=torch.float64)

    def G(x, t, generator):
        calls.append(("G", t[0].item()))
        return torch.exp(-gamma * x0)

    def R(x, scale, t):
        calls.append(("R", t[0].item()))
        i = t[0].item() * T
        eps = (x - torch.exp(-gamma * i / T / 2 * x0) * x0) / (1 - torch.exp(-gamma * i / T * x0)).sqrt()
        return pixel_aware.expected_noise(eps, i, places[1:], scale, T)

    options = dict(gamma=gamma, T=T, grid=grid, generator=torch.Generator().manual_seed(0))
    out = pixel_aware.sample(G, R, randn(2, 3, 4, 4), passes, **options, watch=lambda *frame: frames.append(frame))
    times = [t for name, t in calls if name == "G"]
    assert [name for name, _ in calls] == ["G", "R"] * passes and times == sorted(times, reverse=True)
    assert times[0] == 1 and len({*times}) == passes and T * times[-1] in places.tolist()
    np.testing.assert_allclose([frame[0] * T for frame in frames], places.flip(0), rtol=1e-12)
    torch.testing.assert_close(out, pixel_aware.from_pixels(x0), rtol=0, atol=1e-9)
    assert torch.equal(frames[-1][2], out)
    for wrong in (0, 41):
        with pytest.raises(ValueError, match="passes"):
            pixel_aware.sample(G, R, randn(2, 3, 4, 4), wrong, **options)


def two_values(T, gamma, a=0.01, b=0.6):
    """(G, R) that know: every pixel is a or b, with even odds, independently. G draws it from its law given x_i, R
    names the noise that goes with G's pixel.
    """

    def G(x, t, generator):
        t = t[0].item()
        logs = []
        for v in (a, b):
            kept = math.exp(-gamma * v * t)
            logs.append(-((x - math.sqrt(kept) * v) ** 2) / (1 - kept) / 2 - math.log(1 - kept) / 2)
        dark = torch.rand(x.shape, generator=generator, dtype=x.dtype) < torch.sigmoid(logs[0] - logs[1])
        return torch.exp(-gamma * (a * dark + b * ~dark).to(x.dtype))

    def R(x, scale, t):
        i, x0 = round(t[0].item() * T), -scale.log() / gamma
        eps = (x - (-gamma * i / T / 2 * x0).exp() * x0) / (1 - (-gamma * i / T * x0).exp()).sqrt()
        return pixel_aware.expected_noise(eps, i, torch.arange(1, T + 1), scale, T)

    return G, R


@pytest.mark.parametrize("passes,miss", [(1, 0.109), (2, 0.041), (10, 0.001)])
def test_pixel_aware_exact_networks_draw_the_data_from_a_forwarded_start(passes, miss):
    """With exact networks any number of passes ends at the data's own law, if x_T is a forwarded image; from N(0, I),
    as in the paper, dark pixels come too rarely, for the variance of x_T is what tells them: 39 % for 50 % in one
    pass, by quadrature. More passes forget a wrong start, by the fresh noise between them. Catches a biased jump, and the claim that x_T is white
    noise.
    """
    T, gamma, n = 50, 20.0, 200
    g = torch.Generator().manual_seed(0)
    dark = torch.rand(1, 1, n, n, generator=g, dtype=torch.float64) < 0.5
    x0 = (0.01 * dark + 0.6 * ~dark).double()
    xT = pixel_aware.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), T, gamma, T)
    G, R = two_values(T, gamma)
    shares = []
    for start in (xT, torch.randn(x0.shape, generator=g, dtype=torch.float64)):
        out = pixel_aware.to_pixels(pixel_aware.sample(G, R, start, passes, gamma=gamma, T=T, generator=g))
        near = (out - 0.01).abs() < 1e-6
        assert (near | ((out - 0.6).abs() < 1e-6)).all()
        shares.append(near.double().mean().item())
    kept = math.exp(-20 * 0.01)  # the share from N(0, 1), by quadrature
    x = np.linspace(-6, 6, 20001)
    p = np.exp(-((x - 0.01 * math.sqrt(kept)) ** 2) / (1 - kept) / 2) / math.sqrt(1 - kept)
    q = np.exp(-(x**2) / 2)
    wrong = (q * p / (p + q)).sum() / q.sum()
    assert abs(shares[0] - 0.5) < 0.01 and abs(0.5 - shares[1] - miss) < 0.01 and abs(wrong - 0.391) < 1e-3


def test_pixel_aware_sampling_is_deterministic_per_image():
    """Image i is a function of (seed, i): drawn alone or in a batch, in one pass or three, literal or not. Catches one
    generator for all.
    """
    T, gamma = 12, 20.0
    G, R = two_values(T, gamma)

    def G_each(x, t, generators):
        return torch.cat([G(x[k : k + 1], t, g) for k, g in enumerate(generators)])

    for passes, mode in ((1, "mean"), (3, "mean"), (1, "literal")):

        def draw(numbers):
            generators = data.image_generators(0, numbers)
            x = data.randn(torch.empty(len(numbers), 1, 3, 3, dtype=torch.float64), generators)
            return pixel_aware.sample(G_each, R, x, passes, gamma=gamma, T=T, mode=mode, generator=generators)

        batch = draw([4, 5, 6])
        torch.testing.assert_close(batch[1:2], draw([5]), rtol=0, atol=1e-12)
        assert not torch.allclose(batch[0], batch[1])


def test_pixel_aware_ssim_is_wang_and_bovik():
    """1 for equal images; for one window, the formula with NumPy's own weighted moments. Catches a window that does
    not sum to one, and a lost factor of two.
    """
    a, b = pixels(2, 3, 11, 11), pixels(2, 3, 11, 11, seed=1)
    torch.testing.assert_close(pixel_aware.ssim(a, a), full(1, 2))
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g).ravel() / np.outer(g, g).sum()
    values = []
    for x, y in zip(a.flatten(2)[0].numpy(), b.flatten(2)[0].numpy()):
        c = np.cov(x, y, aweights=w, ddof=0)
        mx, my = np.average(x, weights=w), np.average(y, weights=w)
        values.append(
            (2 * mx * my + 1e-4) * (2 * c[0, 1] + 9e-4) / ((mx**2 + my**2 + 1e-4) * (c[0, 0] + c[1, 1] + 9e-4))
        )
    assert math.isclose(pixel_aware.ssim(a, b)[0].item(), np.mean(values), rel_tol=1e-9)


# ------------------------------------------------------------------------------------------------------------ unet


def small_net(seed=0, **arguments):
    """A small U-Net with every parameter random, so that nothing is zero by its initialisation."""
    torch.manual_seed(seed)
    net = unet.UNet(
        **{"width": 8, "mult": (1, 2), "blocks": 1, "attention": (4,), "size": 8, "dropout": 0.0, **arguments}
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("second", ["decoder", "conv"])
def test_unet_gives_a_tensor_for_every_output(second):
    """A tuple of [B, c, H, W] per entry of outputs, also for one, and exactly zero at the start. Catches a bare
    tensor, or a head not zeroed.
    """
    for outputs in ((3,), (6, 3), (3, 3, 1)):
        net = unet.UNet(outputs=outputs, width=8, mult=(1, 2), blocks=1, attention=(8,), size=16, second=second)
        out = net(torch.randn(2, 3, 16, 16), torch.rand(2))
        assert isinstance(out, tuple) and [o.shape for o in out] == [(2, c, 16, 16) for c in outputs]
        assert all(o.abs().max() == 0 for o in out)


@pytest.mark.parametrize("second", ["decoder", "conv"])
def test_unet_every_head_teaches_the_trunk_and_depends_on_everything(second):
    """Each output alone sends gradient to the first convolution and the time embedding. Catches a detached branch."""
    for head in (0, 1):
        net = small_net(second=second)
        net(torch.randn(2, 3, 8, 8), torch.rand(2))[head].square().sum().backward()
        for p in (net.first.weight, net.time[0].weight, net.middle[0].conv1.weight):
            assert p.grad.abs().max() > 0
    net.zero_grad()
    sum(o.square().sum() for o in net(torch.randn(2, 3, 8, 8), torch.rand(2))).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_unet_time_matters_and_examples_do_not_mix():
    """Different t give different outputs, neighbouring times nearly the same, and example i is example i's alone.
    Catches t that is ignored.
    """
    net, x = small_net().double(), randn(3, 3, 8, 8)
    (a,) = net(x, full(0.2, 3))[:1]
    assert (a - net(x, full(0.8, 3))[0]).abs().max() > 1e-3 > (a - net(x, full(0.2 + 1e-7, 3))[0]).abs().max()
    t = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    torch.testing.assert_close(net(x, t)[0][:1], net(x[:1], t[:1])[0], rtol=1e-9, atol=1e-9)


def test_unet_float64_agrees_with_float32():
    """A .double() network computes in float64 throughout. Catches a constant or an embedding that is built in float32."""
    net, x, t = small_net(), randn(2, 3, 8, 8), rand(2, low=0)
    out32 = net(x.float(), t.float())[0]
    out64 = net.double()(x, t)[0]
    assert out64.dtype == torch.float64
    torch.testing.assert_close(out32.double(), out64, rtol=1e-3, atol=1e-3)
    angle = math.sin(1000 * t[0].item() * math.exp(-math.log(1e4) * 1 / 4))  # the embedding keeps all of t's digits
    assert abs(unet.time_embedding(t, 8)[0, 5].item() - angle) < 1e-12


def test_unet_other_sizes_work_and_odd_ones_are_refused():
    """Any size divisible by the stride works, not square too; others are a ValueError with a sentence. Catches a
    crash deep inside a cat.
    """
    net = small_net()
    assert net(torch.randn(1, 3, 12, 20), torch.rand(1))[0].shape == (1, 3, 12, 20)
    with pytest.raises(ValueError, match="multiples of 2, not 9x8"):
        net(torch.randn(1, 3, 9, 8), torch.rand(1))
    for wrong in ({"width": 12}, {"size": 9}, {"second": "both"}):
        with pytest.raises(ValueError):
            small_net(**wrong)


def test_unet_compact_network_is_ddpms():
    """One decoder at width 128 has DDPM's published 35.7 M parameters; a second decoder adds one decoder, "conv" two
    convolutions.
    """
    with torch.device("meta"):
        one, two, light = [
            sum(p.numel() for p in unet.UNet(**a).parameters()) for a in ({"outputs": (3,)}, {}, {"second": "conv"})
        ]
        decoder = sum(p.numel() for p in unet.UNet().decoders[1].parameters())
    assert 35.7e6 <= one < 35.8e6
    assert two - one == decoder + 2 * 128 + 3 * (128 * 9 + 1)
    assert light - one == 2 * 128 + 128 * 128 * 9 + 128 + 3 * (128 * 9 + 1)


def test_unet_flops_are_ddpms():
    """torch's counter gives DDPM's CIFAR-10 network its known 6.06 G multiply-adds, twice that in FLOPs, attention
    included (within 4%).
    """
    with torch.device("meta"):
        net, x = unet.UNet(outputs=(3,)), torch.randn(1, 3, 32, 32)
        attention_free = unet.UNet(outputs=(3,), attention=())
        assert abs(unet.flops(net, x, torch.rand(1)) / 12.12e9 - 1) < 0.04
        qkv, scores = 4 * 256 * 256 * 256, 2 * 256 * 256 * 256  # multiply-adds of one attention at 16x16, width 256
        assert unet.flops(net, x, torch.rand(1)) - unet.flops(attention_free, x, torch.rand(1)) == 2 * 5 * (
            qkv + scores
        )


def test_unet_report_names_its_figures(capsys, monkeypatch):
    """python unet.py names parameters, FLOPs, and for training and sampling images/s, TFLOP/s and their share of what a
    large matrix product reaches; the sweep and the profile run, and shares add up. Catches a rate of batches, and a
    report that no longer runs.
    """
    cpu, tiny = torch.device("cpu"), dict(width=16, mult=(1, 1), blocks=1, attention=(), size=32, dropout=0.5)
    unet.report("tiny", 2, cpu, **tiny)
    first, *ways = capsys.readouterr().out.splitlines()
    work = float(re.fullmatch(r"tiny: \d+\.\d+ M parameters, (\d+\.\d+) GFLOPs a call", first).group(1))
    for way, line, cost in zip(("training", "sampling"), ways, (3, 1)):
        rate, done, share, best = re.fullmatch(
            rf" +{way} +([\d.,]+) images/s +([\d.e-]+) TFLOP/s, +(\d+)% of a large product's ([\d.]+)", line
        ).groups()
        assert abs(float(rate.replace(",", "")) * cost * work / 1e3 / float(done) - 1) < 0.2
        assert abs(float(done) / float(best) - int(share) / 100) < 0.02
    clock = iter(range(10**6))
    monkeypatch.setattr(unet.time, "perf_counter", lambda: float(next(clock)))  # every call takes a second
    assert unet.rates({"a": lambda: None, "b": lambda: None}, 7, cpu) == {"a": 7, "b": 7}
    assert unet.seconds(lambda: None, cpu) == 1
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr(unet, "rates", lambda calls, batch, *_: dict.fromkeys(calls, 2.0 * batch))  # half a second each
        unet.sweep(cpu, tiny)
    out = capsys.readouterr().out
    assert re.findall(r"batches of +(\d+): training ([\d.]+) images", out)[:2] == [("1", "2.0"), ("4", "8.0")]
    assert re.findall(r"(\d+x\d+), batches of +(\d+)", out) == [("16x16", "64"), ("32x32", "16"), ("64x64", "4")]
    assert re.findall(r"(\d+) network calls .* of 64: ([\d.]+)", out)[-1] == ("50", "128.0")
    unet.profile("tiny", 2, cpu, **tiny)
    shares = re.findall(r"^ +([\d.]+)% +\d+ calls +aten", capsys.readouterr().out, re.M)
    assert len(shares) > 8 and 50 < sum(map(float, shares)) <= 201


def test_unet_warns_of_a_long_training_and_of_no_other(capsys):
    """On a CPU the first process says what a long training will cost; a short one, a GPU and the others say nothing.
    Catches an hour's wait without a word.
    """
    net = small_net()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for steps, place, said in (
        (10**7, (cpu, 0, 1), True),
        (1, (cpu, 0, 1), False),
        (10**7, (cpu, 1, 2), False),
        (10**7, (gpu, 0, 1), False),
    ):
        unet.warn_cost(net, (3, 8, 8), 8, steps, data.Processes(*place))
        assert ("steps take" in capsys.readouterr().out) == said


def test_unet_attends_where_it_is_told():
    """Attention lies at the levels where size / 2^level is listed, and in the middle. Catches attention by level
    number.
    """
    net = unet.UNet(width=8, mult=(1, 1, 1), blocks=2, attention=(16,), size=32)
    found = {name.split(".attention")[0] for name, m in net.named_modules() if isinstance(m, unet.Attention)}
    assert found == {"encoder.1.0", "encoder.1.1", "middle.0"} | {
        f"decoders.{d}.levels.1.{b}" for d in (0, 1) for b in range(3)
    }


def test_unet_fuses_a_condition_at_every_level():
    """An image given as condition enters where every level begins, down and up, at that level's size, and adds nothing
    before training; outputs=() is the trunk alone. Catches a level without it, and weights that change for all others.
    """
    arguments = dict(width=8, mult=(1, 2, 2), blocks=1, attention=(), dropout=0.0, size=16)
    torch.manual_seed(0)
    net, x, t = unet.UNet(outputs=(), condition=2, **arguments).eval(), randn(2, 3, 16, 16).float(), torch.rand(2)
    sizes = []
    for module in net.modules():
        if isinstance(module, unet.Fusion):
            module.register_forward_hook(lambda module, inputs, _: sizes.append(inputs[0].shape[-1]))
    ones, zeros = torch.ones(2, 2, 16, 16), torch.zeros(2, 2, 16, 16)
    with torch.no_grad():
        assert net(x, t, ones) == () and sizes == [16, 8, 4, 4, 8, 16]
        before = net.features(x, t, zeros)
        assert len(before) == 1 and torch.equal(before[0], net.features(x, t, ones)[0])
        torch.nn.init.ones_(net.fuse[1].map[2].weight)
        assert not torch.allclose(before[0], net.features(x, t, ones)[0])
    torch.manual_seed(0)
    plain = unet.UNet(outputs=(3,), **arguments)
    assert not [name for name in plain.state_dict() if "fuse" in name]


def test_unet_fast_is_the_network_on_the_cpu():
    """unet.fast keeps the call's signature and values; on the CPU it is the network. Catches a wrapper that changes
    results.
    """
    net = small_net()
    assert unet.fast(net, torch.zeros(1, 3, 8, 8), torch.zeros(1)) is net


# --------------------------------------------------------------------------------------- unet: conditions and windows


@functools.cache
def conditioned(encoder, fuse):
    """A small U-Net told a grey image and a mask, whose zero layers are not zero. (Made once: Swin-B has 88 M
    weights.)
    """
    torch.manual_seed(0)
    arguments = dict(outputs=(2, 2), width=8, mult=(1, 2, 2, 3), blocks=1, attention=(), dropout=0.0, size=16)
    net = unet.UNet(2, condition=2, encoder=encoder, fuse=fuse, **arguments).eval()
    for p in net.parameters():
        if p.abs().max() == 0:
            torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("encoder, fuse", [("compact", "concat"), ("compact", "attention"), ("swin_b", "concat")])
def test_unet_condition_is_used_at_every_level(encoder, fuse):
    """Each example's outputs depend on its own condition and on no other's; the gradient reaches the condition; the
    features of each level matter, at that level's size; encoding once is the same. Catches a condition that is
    dropped, shuffled, or met at one level only.
    """
    net, x, t, c = (
        conditioned(encoder, fuse),
        randn(3, 2, 32, 16).float(),
        torch.rand(3),
        randn(3, 2, 32, 16, seed=1).float(),
    )
    c.requires_grad_(True)
    out = net(x, t, c)
    (gradient,) = torch.autograd.grad(sum(o[0].square().sum() for o in out), c)
    assert (gradient[0].abs().amax((1, 2)) > 0).all() and (gradient[1:] == 0).all()
    with torch.no_grad():
        features = net.encode(c)
        assert [f.shape[-2:] for f in features] == [(32, 16), (16, 8), (8, 4), (4, 2)]
        assert all(torch.equal(a, b) for a, b in zip(net(x, t, features), out))
        shuffled = net(x, t, c[[1, 2, 0]])
        assert all((a - b).abs().amax((1, 2, 3)).min() > 1e-3 for a, b in zip(shuffled, out))
        for i in range(4):
            others = tuple(f + (i == k) * randn(*f.shape, seed=7).float() for k, f in enumerate(features))
            assert all((a - b).abs().max() > 1e-4 for a, b in zip(net(x, t, others), out))


def test_unet_swin_sees_the_image_as_imagenet_does(monkeypatch):
    """Swin-B gets ImageNet's normalisation of the first three channels, grey made three; every stage reaches the level
    of its stride, or the last. Weights that can't be downloaded are an OSError with a sentence. Catches [-1, 1] pixels
    in a network of other statistics, and a stage left out.
    """
    from torchvision.models import Swin_B_Weights

    net = conditioned("swin_b", "concat").encode  # of a grey image, and inpainting's mask, which Swin is not shown
    with torch.device("meta"):
        assert net.level == [2, 3, 3, 3] and unet.SwinEncoder(1, [8] * 6).level == [2, 3, 4, 5]
    seen, given = [], torch.cat([torch.full((1, 1, 32, 32), 0.5), -torch.ones(1, 1, 32, 32)], 1)
    net.swin[0].register_forward_hook(lambda module, inputs, _: seen.append(inputs[0]))
    for k in range(4):
        net.swin[2 * k + 1].register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    net(given)
    pixels = Image.new("RGB", (1, 1), (191,) * 3)  # .5 of [-1, 1], about: (x + 1)/2 = .75
    wanted = Swin_B_Weights.IMAGENET1K_V1.transforms(crop_size=32, resize_size=32)(pixels.resize((32, 32)))
    torch.testing.assert_close(seen[0][0], wanted, rtol=0, atol=0.01)
    assert seen[1:] == [(1, 8, 8, 128), (1, 4, 4, 256), (1, 2, 2, 512), (1, 1, 1, 1024)]
    for k, i in enumerate(net.level):
        before = [f.clone() for f in net(given)]
        torch.nn.init.normal_(net.maps[k].weight)
        assert [not torch.equal(a, b) for a, b in zip(before, net(given))] == [j == i for j in range(4)]

    def offline(*a, **k):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="--no-pretrained"):
        net.load_imagenet()
    state = {f"features.{name}": torch.full_like(v, 0.25) for name, v in net.swin.state_dict().items()}
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: {**state, "head.bias": 0})
    net.load_imagenet()
    assert all((p == 0.25).all() for p in net.swin.parameters())


def test_unet_without_a_condition_is_as_it_was():
    """Recorded before conditions existed: sums over the weights that seed 0 makes, and over an output. Catches weights
    drawn in another order, and a layer that a condition adds for all.
    """
    torch.manual_seed(0)
    net = unet.UNet(width=16, mult=(1, 2), blocks=1, attention=(8,), dropout=0.0, size=16).eval()
    assert len(net.state_dict()) == 194
    total = sum(p.double().abs().sum().item() for p in net.parameters())
    features = net.features(torch.linspace(-1, 1, 1536).view(2, 3, 16, 16), torch.tensor([0.2, 0.9]))
    assert math.isclose(total, 8636.246709, rel_tol=1e-6)
    np.testing.assert_allclose([f.double().abs().sum().item() for f in features], [1095.481811, 1206.569428], rtol=1e-4)


@pytest.mark.parametrize(
    "length, size, overlap", [(64, 64, 16), (65, 64, 16), (481, 64, 16), (321, 64, 63), (100, 32, 1)]
)
def test_unet_windows_cover_exactly(length, size, overlap):
    """Windows begin at 0, end at the image's end, and neighbours share the overlap or more, with none to spare.
    Catches an uncovered strip, a window over the edge, and twice the work.
    """
    starts = unet.window_starts(length, size, overlap)
    assert starts[0] == 0 and starts[-1] + size == length
    assert all(0 < b - a <= size - overlap for a, b in zip(starts, starts[1:]))
    assert len(starts) == 1 or (len(starts) - 2) * (size - overlap) + size < length


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_unet_windows_blend_to_the_whole_image(batch):
    """Where the outputs of a pixel don't depend on the window, windowed calls are the call on the whole image, with
    each window's own condition; one window is that call bit for bit; features are computed once, and no more than a
    batch at a time. Catches weights that don't sum to one, a window pasted elsewhere, and a padded batch counted
    twice.
    """
    encoded, calls = [], []

    def encode(c):
        encoded.append(len(c))
        return c**2, c[:, :1]

    def model(x, t, seen):
        calls.append(x.shape)
        return torch.cat([x * seen[0], x], 1), t[:, None, None, None] + seen[1]

    x, c, t = randn(1, 2, 53, 40), randn(1, 2, 53, 40, seed=1), full(0.3, 1)
    whole = model(x, t, encode(c))
    encoded.clear()
    call = unet.windowed(model, encode, 16, 5, batch)(c)
    assert sum(encoded) >= 20 and max(encoded) <= batch  # 5 by 4 windows
    before = len(encoded)
    for _ in range(2):
        for a, b in zip(call(x, t), whole):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert len(encoded) == before and {s[-2:] for s in calls[1:]} == {(16, 16)}
    one = unet.windowed(model, encode, 64, 5, batch)(c)(x, t)
    assert all(torch.equal(a, b) for a, b in zip(one, whole))


def test_unet_windows_fade_towards_their_borders():
    """Two windows that disagree are blended without a seam: along the overlap the mean goes from one to the other in
    small steps. Catches plain averaging, whose steps at a window's ends are visible.
    """
    turn = iter([0.0, 1.0])

    def model(x, t, seen):
        return (torch.full_like(x, next(turn)),)

    x = torch.zeros(1, 1, 8, 40)
    (out,) = unet.windowed(model, lambda c: (c,), 24, 8, 1)(x)(x, torch.ones(1))
    line = out[0, 0, 4]
    assert (line[:16] == 0).all() and (line[24:] == 1).all()
    assert (line[1:] >= line[:-1]).all() and (line[1:] - line[:-1]).max() < 0.15


# ------------------------------------------------------------------------------------------------------------ data


def test_data_uint8_round_trip_is_exact():
    """Every uint8 value survives the way to [-1, 1] and back. Catches a truncation instead of rounding."""
    values = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(values)
    assert x.min() == -1 and x.max() == 1 and torch.equal(data.to_uint8(x), values)
    assert torch.equal(data.to_uint8(torch.tensor([-9.0, 9.0])), torch.tensor([0, 255], dtype=torch.uint8))


def test_data_batch_is_a_function_of_its_seed_and_flips_each_image():
    """The same generator gives the same batch, a process's slice is a slice of it, and each image is flipped by its
    own coin.
    """
    images = torch.arange(10 * 3 * 2 * 4, dtype=torch.uint8).view(10, 3, 2, 4)
    whole = data.draw_batch(images, 64, torch.Generator().manual_seed(1))
    assert torch.equal(whole, data.draw_batch(images, 64, torch.Generator().manual_seed(1)))
    assert not torch.equal(whole, data.draw_batch(images, 64, torch.Generator().manual_seed(2)))
    source = data.to_float(images)
    straight = [any(torch.equal(x, s) for s in source) for x in whole]
    flipped = [any(torch.equal(x, s.flip(-1)) for s in source) for x in whole]
    assert all(a != b for a, b in zip(straight, flipped)) and 16 < sum(flipped) < 48


def test_data_seeds_do_not_collide():
    """Seeds of neighbouring (seed, step) pairs all differ. Catches seed + step, which repeats one run's steps in
    another's.
    """
    seeds = {data.seed(purpose, a, b) for purpose in data.PURPOSES for a in range(30) for b in range(30)}
    assert len(seeds) == 900 * len(data.PURPOSES)
    assert len({data.seed("batch", 3), data.seed("batch", 3, 1), data.seed("weights", 3)}) == 3


def test_data_shapes_are_the_same_everywhere_and_all_there():
    """The embedded images are reproducible and of all five kinds, with the kinds' areas in their order. Catches a
    change of the default data.
    """
    images = data.shapes(50, 16)
    assert (
        images.dtype == np.uint8
        and images.shape == (50, 3, 16, 16)
        and np.array_equal(images[:10], data.shapes(10, 16))
    )
    area = (images.max(1) > 80).reshape(10, 5, -1).mean((0, 2))  # disk, ring, square, triangle, cross
    assert area[2] > area[0] > area[1] and area[0] > area[3]
    hole = images[1::5].max(1) > 80
    assert all(
        not m[tuple(np.round(np.argwhere(m).mean(0)).astype(int))] for m in hole
    )  # a ring has nothing in its middle


def here(device="cpu"):
    return data.Processes(torch.device(device), 0, 1)


def test_data_folder_of_images_any_size_grey_or_colour(tmp_path, monkeypatch):
    """A folder is read recursively, centre-cropped, resized, cached outside of itself under a key of its listing.
    Catches stretched images.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200  # the centred square
    Image.fromarray(wide).save(folder / "a.png")
    Image.fromarray(np.full((33, 9), 25750, np.uint16)).save(folder / "deep" / "b.png")
    images = data.load("folder", folder, 10, here())
    assert images.shape == (2, 1, 10, 10) and (images[0] == 200).all() and (images[1] == 100).all()
    assert (
        sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["a.png", "b.png"]
        and len(list((tmp_path / "data").iterdir())) == 1
    )
    Image.fromarray(np.full((12, 12, 3), 7, np.uint8)).save(
        folder / "c.png"
    )  # one coloured image makes all of them RGB
    assert data.load("folder", folder, 10, here()).shape == (3, 3, 10, 10)


def test_data_celeba_crop_is_the_papers(tmp_path):
    """CelebA is cropped to the central 140x140 before it is resized. Catches the largest square, which takes in more
    background.
    """
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[39:179, 19:159] = 255
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / "celeba" / "img_align_celeba" / "000001.png")
    images = data.load("celeba", tmp_path, 64, here())
    assert images.shape == (1, 3, 64, 64) and images.min() == 255
    assert data.square(Image.fromarray(pixels), 64).min() == 0


def test_data_cifar10_is_converted_once_and_exactly(tmp_path, monkeypatch):
    """torchvision's [N, 32, 32, 3] becomes the .npy bit for bit, once; then the file alone is enough, and other sizes
    come from it.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    asked = []

    class Source:
        data = pixels

    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *a, **k: asked.append(a) or Source())
    for _ in range(2):
        images = data.load("cifar10", tmp_path, 32, here())
        assert np.array_equal(images.numpy().transpose(0, 2, 3, 1), pixels)
    half = data.load("cifar10", tmp_path, 16, here())
    assert len(asked) == 1 and half.shape == (20, 3, 16, 16)
    assert abs(half.float() - torch.nn.functional.avg_pool2d(images.float(), 2)).max() <= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cifar10-train-16.npy", "cifar10-train-32.npy"]


def test_data_failed_download_is_a_sentence(tmp_path, monkeypatch):
    """No network: one sentence that says what is missing and where it may be put. Catches torchvision's traceback."""

    def offline(*_, **__):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", offline)
    with pytest.raises(data.Problem, match="cannot be downloaded"):
        data.load("cifar10", tmp_path, 32, here())


def test_data_bad_sources_are_sentences(tmp_path, monkeypatch):
    """An empty folder, a broken image, a truncated, foreign or pickled .npy: one sentence that names the file.
    Catches any traceback.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    for folder, words in (
        ("empty", "has no images"),
        ("broken", "half.png is not a readable image"),
        ("absent", "absent is none"),
    ):
        with pytest.raises(data.Problem, match=words):
            data.load("folder", tmp_path / folder, 16, here())
    assert not list(tmp_path.rglob("*.partial"))
    whole = tmp_path / "whole.npy"
    np.save(whole, np.zeros((9, 3, 32, 32), np.uint8))
    cases = {"truncated": whole.read_bytes()[:5000], "text": b"hello", "empty": b"", "pickled": pickle.dumps([1])}
    for name, content in cases.items():
        (tmp_path / "cifar10-train-32.npy").write_bytes(content)
        with pytest.raises(data.Problem, match="cifar10-train-32.npy is damaged"):
            data.load("cifar10", tmp_path, 32, here())
    np.save(tmp_path / "cifar10-train-32.npy", np.zeros((9, 3, 32, 32), np.float32))
    with pytest.raises(data.Problem, match="float32"):
        data.load("cifar10", tmp_path, 32, here())


def test_data_noise_of_an_image_does_not_depend_on_its_batch():
    """Generators per image: image 7's noise is the same alone and among others, and two seeds differ. Catches one
    generator for a batch.
    """
    like = torch.empty(3, 2, 2, 2)
    a = data.randn(like, data.image_generators(0, [5, 6, 7]))
    assert torch.equal(a[2:], data.randn(like[:1], data.image_generators(0, [7])))
    assert not torch.equal(a, data.randn(like, data.image_generators(1, [5, 6, 7])))


# -------------------------------------------------------------------------------------------- tasks: pairs and metrics


def pair_folder(root, *, n=3, targets="edges", images="images", bits=None):
    """A folder of images with targets, of different sizes; a target's pixels are its image's red channel."""
    (root / images).mkdir(parents=True), (root / targets).mkdir()
    for k in range(n):
        pixels = np.random.default_rng(k).integers(0, 256, (30 + k, 44 - 2 * k, 3), np.uint8)
        Image.fromarray(pixels).save(root / images / f"a{k}.png")
        Image.fromarray(pixels[:, :, 0] if bits is None else bits(pixels[:, :, 0])).save(root / targets / f"a{k}.png")
    return root


ALONE = data.Processes(torch.device("cpu"), 0, 1)


def settings_for(task, folder=None, size=16, **given):
    place = {"dataset": "folder", "data_dir": str(folder)} if folder else {"dataset": "shapes", "data_dir": "data"}
    return {"task": task, "image_size": size, "edge_bits": False, **place, **given}


@pytest.mark.parametrize("task, targets", [("edges", "edges"), ("saliency", "masks")])
def test_tasks_pairs_stay_aligned(task, targets, tmp_path, monkeypatch):
    """Here a target is its image's red channel: so it must be after crops, flips and resizing. A batch is a function
    of its seed, both ways round are drawn, and no corner is left out. Catches an image flipped or cropped without its
    target.
    """
    monkeypatch.chdir(tmp_path)
    size = 28
    pairs = data.load_pairs(settings_for(task, pair_folder(tmp_path / "d", targets=targets), size), ALONE)
    assert pairs.shape == (3, 3, size, size)
    draw = torch.Generator().manual_seed(5)
    x0, condition = pairs.draw(64, draw)
    assert x0.shape == (64, 1, size, size) and condition.shape == (64, 3, size, size)
    torch.testing.assert_close(x0, condition[:, :1], rtol=0, atol=1.5 / 127.5 if task == "saliency" else 0)
    again = data.load_pairs(settings_for(task, tmp_path / "d", size), ALONE).draw(64, torch.Generator().manual_seed(5))
    assert torch.equal(again[0], x0) and torch.equal(again[1], condition)
    assert not torch.equal(pairs.draw(64, torch.Generator().manual_seed(6))[0], x0)
    if task == "edges":  # the patches are pieces of the images, either way round, up to the last row and column
        image = data.to_float(pairs[2])
        h, w = image.shape[-2:]
        found = {
            (a, b, way)
            for k in range(60)
            for x in torch.cat(pairs.draw(64, torch.Generator().manual_seed(k))[::-1], 1)
            for way in (0, 1)
            for a in (0, h - size)
            for b in (0, w - size)
            if torch.equal(x.flip(-1) if way else x, image[:, a : a + size, b : b + size])
        }
        assert len(found) == 8


def test_tasks_photos_turned_by_their_camera(tmp_path, monkeypatch):
    """A photo that EXIF turns by a quarter is measured and read the same way, and small ones grow to the patch.
    Catches a cache whose rows are another image's columns.
    """
    monkeypatch.chdir(tmp_path)
    exif, image = Image.Exif(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8))
    exif[0x0112] = 6
    (tmp_path / "d").mkdir()
    image.save(tmp_path / "d" / "a.png", exif=exif)
    image.save(tmp_path / "d" / "b.png")
    assert [data.fitted(tmp_path / "d" / name, "inpainting", 16) for name in ("a.png", "b.png")] == [(40, 20), (20, 40)]
    assert data.fitted(tmp_path / "d" / "a.png", "inpainting", 30) == (60, 30)
    assert data.fitted(tmp_path / "d" / "a.png", "saliency", 30) == (30, 30)
    pairs = data.load_pairs(settings_for("inpainting", tmp_path / "d"), ALONE)
    turned, plain = pairs[0].permute(1, 2, 0).numpy(), pairs[1].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(plain, np.asarray(image))
    np.testing.assert_array_equal(turned, np.rot90(plain, -1))
    assert data.load_pairs(settings_for("inpainting", tmp_path / "d", 30), ALONE)[0].shape == (3, 60, 30)


def test_tasks_edge_bits_are_annotators(tmp_path, monkeypatch):
    """Bit k of an edge PNG is annotator k's map, the target their mean, over those who marked anything; without the
    flag it is grey, and an edge from 128 up. Catches the bits' number taken for a strength.
    """
    monkeypatch.chdir(tmp_path)
    pixels = np.zeros((4, 4), np.uint8)
    pixels[0, 0], pixels[1, 1], pixels[2, 2], pixels[3, 3] = 0b10001, 0b10000, 0b100, 200
    (tmp_path / "images").mkdir(), (tmp_path / "edges").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(pixels).save(tmp_path / "edges" / "a.png")
    ((image, target),) = data.partners(tmp_path, "edges")
    _, mean, annotators = data.open_pair("edges", image, target, True)
    used = [0, 2, 3, 4, 6, 7]  # 200 = 0b11001000
    assert annotators.shape == (len(used), 4, 4) and annotators.sum() == 2 + 1 + 1 + 3
    np.testing.assert_array_equal(np.diag(np.asarray(mean)), np.round(255 * np.array([2, 1, 1, 3]) / 6))
    _, grey, one = data.open_pair("edges", image, target, False)
    np.testing.assert_array_equal(np.asarray(grey), pixels)
    assert one.shape == (1, 4, 4) and one.sum() == 1 and one[0, 3, 3]


def test_tasks_folders_are_paired_and_the_test_folder_is_left_out(tmp_path):
    """images/x with edges/x or masks/x, at any depth, DUTS's names too; targets are no images; a folder named test, or
    ending in -TE, is for testing unless it is the folder asked for. Catches training on the test set.
    """
    for part in ("train", "val", "test"):
        pair_folder(tmp_path / "b" / part, n=2)
    pair_folder(tmp_path / "duts" / "DUTS-TR", images="DUTS-TR-Image", targets="DUTS-TR-Mask", n=1)
    pair_folder(tmp_path / "duts" / "DUTS-TE", images="DUTS-TE-Image", targets="DUTS-TE-Mask", n=2)

    def names(*a, **k):
        return [str(f.relative_to(tmp_path)) if f else None for pair in data.partners(*a, **k) for f in pair]

    assert names(tmp_path / "b", "edges") == [
        f"b/{part}/{kind}/a{k}.png" for part in ("train", "val") for k in (0, 1) for kind in ("images", "edges")
    ]
    assert names(tmp_path / "b", "super_resolution")[::2] == [
        f"b/{p}/images/a{k}.png" for p in ("train", "val") for k in (0, 1)
    ]
    assert len(data.partners(tmp_path / "b" / "test", "edges", test=True)) == 2
    assert names(tmp_path / "duts", "saliency") == [
        "duts/DUTS-TR/DUTS-TR-Image/a0.png",
        "duts/DUTS-TR/DUTS-TR-Mask/a0.png",
    ]
    assert len(data.partners(tmp_path / "duts" / "DUTS-TE", "saliency", test=True)) == 2
    args = types.SimpleNamespace(train=False, data_dir=None, trained_on="b")
    assert data.test_folder({"data_dir": tmp_path / "duts"}, args) == tmp_path / "duts" / "DUTS-TE"
    assert data.test_folder({"data_dir": tmp_path / "b"}, args) == tmp_path / "b" / "test"
    (tmp_path / "b" / "val" / "edges" / "a1.png").unlink()
    with pytest.raises(data.Problem, match=r"val/images/a1.png has no partner named a1 in a folder of edges"):
        data.partners(tmp_path / "b", "edges")
    with pytest.raises(data.Problem, match="beside folders of masks"):
        data.partners(tmp_path / "b" / "train" / "edges", "saliency")
    Image.new("L", (9, 9)).save(tmp_path / "b" / "val" / "edges" / "a1.png")
    with pytest.raises(data.Problem, match="a1.png is 9x9, and its image 42x31"):
        data.open_pair("edges", *data.partners(tmp_path / "b", "edges")[3], False)


def test_tasks_shapes_know_their_targets():
    """The shapes' masks are exact: 0 where the image is ground, 255 where it is a shape's colour; an outline is one
    pixel of mask beside ground. Catches a mask of another image.
    """
    pairs = data.shape_pairs("saliency", 20, 32)
    image, mask = pairs[:, :3].int(), pairs[:, 3].int()
    assert torch.equal(pairs[:, :3], torch.from_numpy(data.shapes(20, 32)))
    ground = (image - torch.tensor([16, 20, 40])[:, None, None]).abs().sum(1)
    assert torch.equal(mask == 0, ground == 0) and (ground[mask == 255] > 100).all()
    outline = data.shape_pairs("edges", 20, 32)[:, 3] == 255
    inside = torch.nn.functional.pad(mask >= 128, (1,) * 4)
    beside = sum((~inside)[:, 1 + i : 33 + i, 1 + j : 33 + j].int() for i in (-1, 0, 1) for j in (-1, 0, 1))
    assert torch.equal(outline, (mask >= 128) & (beside > 0)) and outline.any()
    assert not torch.equal(data.shape_pairs("edges", 20, 32, seed=1), data.shape_pairs("edges", 20, 32))


def test_tasks_low_resolution_is_pillows():
    """Down and up by four is Pillow's bicubic, which is MATLAB's kernel and the papers' baseline, to a grey level.
    Catches torch's default kernel (a = -3/4), no antialiasing, and a shift by half a pixel.
    """
    image = (
        data.shape_pairs("inpainting", 3, 64)[:, :3] // 2 + 64
    )  # so that nothing is clipped between Pillow's two passes
    low = data.to_uint8(data.shrink(data.to_float(image)))
    assert torch.equal(data.to_float(low), data.shrink(data.to_float(image)))  # the low-resolution image has 8 bits
    up = data.to_uint8(data.enlarge(data.to_float(low)))
    for i in range(3):
        small = Image.fromarray(image[i].permute(1, 2, 0).numpy()).resize((16, 16), Image.BICUBIC)
        assert np.abs(np.asarray(small).astype(int) - low[i].permute(1, 2, 0).numpy()).max() <= 1
        large = data.pil(low[i]).resize((64, 64), Image.BICUBIC)
        assert np.abs(np.asarray(large).astype(int) - up[i].permute(1, 2, 0).numpy()).max() <= 2


def test_tasks_examples_finish_as_the_truth():
    """A perfect x0 finishes as the image; the low-resolution condition holds no more than 1/16 of the pixels; known
    pixels are pasted back bit for bit and those in the hole are not told. Catches a leak of the answer into the
    condition.
    """
    image = data.to_float(data.shape_pairs("inpainting", 4, 32))
    x0, condition = data.example("super_resolution", image)
    torch.testing.assert_close(data.finish("super_resolution", x0, condition), image, rtol=0, atol=1e-6)
    other = data.enlarge(data.shrink(image))
    assert torch.equal(other, condition) and (x0 - 4 * (image - other)).abs().max() < 1e-6
    hole = torch.stack([data.draw_hole(32, 32, 32, np.random.default_rng(k)) for k in range(4)])[:, None]
    x0, condition = data.example("inpainting", image, hole=hole)
    assert torch.equal(x0, image) and condition.shape == (4, 4, 32, 32)
    assert (condition[:, :3][hole.expand(-1, 3, -1, -1)] == 0).all() and torch.equal(condition[:, 3:] == 1, hole)
    painted = data.finish("inpainting", torch.full_like(image, 0.125), condition)
    wanted = torch.where(hole, torch.tensor(0.125), image)
    assert torch.equal(painted, wanted)


def test_tasks_holes_are_seeded_and_neither_nothing_nor_all():
    """A hole is a function of its generator, covers some of the image and never all, boxes and strokes both come up,
    and a larger image gets more of them. Catches an empty mask, whose PSNR is 0/0.
    """
    holes = torch.stack([data.draw_hole(32, 32, 32, np.random.default_rng(k)) for k in range(300)])
    share = holes.float().mean((1, 2))
    assert holes.dtype == torch.bool and share.min() > 0.005 and share.max() < 0.75 and 0.08 < share.mean() < 0.3
    assert torch.equal(holes[7], data.draw_hole(32, 32, 32, np.random.default_rng(7)))
    box = [torch.equal(h, h.any(0) & h.any(1)[:, None]) for h in holes]
    assert 0.35 < np.mean(box) < 0.65
    large = torch.stack([data.draw_hole(96, 128, 32, np.random.default_rng(k)) for k in range(20)]).float().mean()
    assert 0.5 * share.mean() < large < 1.5 * share.mean()


def test_tasks_psnr_by_hand():
    """PSNR of a constant error of 16 is 20 log10(255/16), masked or not; Y of white is 235, of black 16, and of the
    primaries BT.601's; borders of four are cropped. Catches an error averaged in [-1, 1], and Y in [0, 255].
    """
    a, b = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 16.0)
    assert math.isclose(data.psnr(a, b), 24.0484, abs_tol=1e-3)
    hole = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    hole[..., 5, 5] = True
    b[..., 5, 5] = 255 / 10
    assert math.isclose(data.psnr(a, b, hole), 20, abs_tol=1e-4)
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255.0]])[:, :, None, None]
    np.testing.assert_allclose(data.luma(colours).flatten(), [16, 235, 81.481, 144.553, 40.966], atol=1e-3)
    assert math.isclose(float(data.luma(torch.full((1, 1, 1, 1), 255.0))), 235, abs_tol=1e-3)
    c = a.clone()
    c[..., :4, :], c[..., -4:, :], c[..., :, :4], c[..., :, -4:] = 200, 200, 200, 200
    c[..., 4, 4] = 10
    got = data.score("super_resolution", c, a)
    assert math.isclose(got["PSNR on RGB, dB"], 10 * math.log10(255**2 / (100 / 64)), abs_tol=1e-4)
    assert math.isclose(got["PSNR on Y, dB"], 10 * math.log10(255**2 / ((10 * 219 / 255) ** 2 / 64)), abs_tol=1e-4)
    assert math.isclose(data.score("saliency", a[:, :1] + 51, a[:, :1])["MAE"], 0.2, abs_tol=1e-6)
    assert math.isclose(data.score("inpainting", a, b, hole)["PSNR in the hole, dB"], 20, abs_tol=1e-4)


def test_tasks_edge_counts_by_hand():
    """A line of 20 pixels marked by two annotators; ten of them found three rows off at strength .8, again five rows
    of that beside each other, and five far away at .3: all counts by hand. Catches precision and recall changed about,
    and a mark that two found pixels share.
    """
    marks = torch.zeros(2, 40, 40, dtype=torch.bool)
    marks[:, 20, 10:30] = True
    p = torch.zeros(40, 40)
    p[23, 10:20], p[2, 5:10] = 0.8, 0.3
    thresholds, tolerance = torch.tensor([0.2, 0.5, 0.9]), 3.5 / math.hypot(40, 40)
    counts = data.edge_counts(p, marks, thresholds, tolerance)
    assert counts.tolist() == [[15, 10, 40, 20], [10, 10, 40, 20], [0, 0, 40, 0]]
    precision, recall = 1.0, 20 / 40
    assert math.isclose(float(data.f_score(counts[1])), 2 * precision * recall / (precision + recall), abs_tol=1e-12)
    marks[1] = False
    marks[1, 3, 0:8] = True  # the second annotator's: under three of the five, and taken for the other two
    assert data.edge_counts(p, marks, thresholds, tolerance)[0].tolist() == [15, 10 + 3, 28, 10 + 3]
    marks[1] = marks[0]
    p[20:25, 10:20] = 0.8  # a band of five rows: its first meets ten marks, its end two more, nearest first; 22 is left
    counts = data.edge_counts(p, marks, thresholds, tolerance)
    assert counts[1].tolist() == [50, 12, 40, 24]
    ods, ois = data.ods_ois(torch.stack([counts, counts]))
    assert math.isclose(ods, float(data.f_score(counts).max())) and math.isclose(ois, ods)
    # two images whose best thresholds differ: for the dataset one must serve both
    first = torch.tensor([[10, 10, 10, 10], [0, 0, 10, 0]]).double()
    second = torch.tensor([[90, 10, 10, 10], [10, 10, 10, 10]]).double()
    ods, ois = data.ods_ois(torch.stack([first, second]))
    assert math.isclose(ods, 2 / 3) and ois == 1


def test_tasks_edge_matching_is_one_to_one_and_nearly_the_largest():
    """Against the largest matching there is (augmenting paths, Kuhn's algorithm): never more pairs, at least half of
    them by any greedy rule, and 90 % here. As many found as marked pixels have partners, each with one in reach.
    Catches a mark used twice, and a reach that is a square.
    """
    radius, total, best = 2.3, 0, 0
    for k in range(6):
        found, marked = (torch.from_numpy(np.random.default_rng((k, m)).random((1, 12, 17)) < 0.12) for m in (0, 1))
        a, b = (m[0] for m in data.match(found, marked, radius))
        assert a.sum() == b.sum() and not (a & ~found[0]).any() and not (b & ~marked[0]).any()
        distance = torch.cdist(found[0].nonzero().double(), marked[0].nonzero().double())
        near, owner = (distance <= radius), {}

        def augment(v, seen):
            for u in near[v].nonzero().flatten().tolist():
                if u not in seen:
                    seen.add(u)
                    if u not in owner or augment(owner[u], seen):
                        owner[u] = v
                        return True
            return False

        total, best = total + int(a.sum()), best + sum(augment(v, set()) for v in range(len(near)))
        assert all(
            (torch.cdist(x.nonzero().double(), y.nonzero().double()).amin(1) <= radius).all()
            for x, y in ((a, b), (b, a))
        )
    assert 0.9 * best <= total <= best and total > 50


def test_tasks_thinning_keeps_crests():
    """A soft ridge becomes a line on its crest, whatever its direction, and a plateau of 1 pixel stays. Catches the
    direction along the ridge taken for the one across, and a saturated edge that counts as wide as it is.
    """
    y, x = np.mgrid[:48, :48] - 23.5
    for angle in np.linspace(0, np.pi, 13):
        off = x * np.cos(angle) + y * np.sin(angle)
        p = torch.tensor(0.9 * np.exp(-(off**2) / 8)).float()
        kept = data.thin(p)
        middle = torch.from_numpy((np.hypot(x, y) < 18) & (np.abs(off) < 8))
        assert (torch.from_numpy(np.abs(off))[(kept > 0) & middle] <= 1.1).all()
        assert ((kept > 0) & middle).sum() >= 24  # of a line of 36, or of 25 at 45 degrees
    line = torch.zeros(32, 32)
    line[16] = 1
    assert torch.equal(data.thin(line), line)
    line[12:21] = 1  # a flat band of nine rows: its middle stays
    assert (data.thin(line)[:, 8:-8].nonzero()[:, 0] == 16).all() and data.thin(line)[16].sum() == 32


# ------------------------------------------------------------------------------------ the scripts' promises, in process


def run_main(capsys, *flags, status=None, script=ddm):
    """script.main(flags): its exit status and what it printed on stdout and stderr."""
    code = 0
    try:
        script.main([str(flag) for flag in flags])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    if status is not None:
        assert code == status, (code, out)
    return code, out.out, out.err


def weights(run):
    return data.load_checkpoint(pathlib.Path(run) / "checkpoint.pt")


def same(a, b):
    """Whether two checkpoints are equal bit for bit, tensors and numbers alike."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def trained(tmp_path, monkeypatch, capsys):
    """A tiny run of four steps in runs/ddm-shapes of an empty current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, size, draw=data.shapes: draw(50, size))
    run_main(capsys, "--train", *TINY, "--iterations", 4, status=0)
    return tmp_path / "runs" / "ddm-shapes"


def test_ddm_train_and_sample_write_what_they_name(trained, capsys, monkeypatch):
    """--sample needs the checkpoint alone, and its last line names the files it wrote. Catches a sampler that needs
    the data or the flags.
    """
    (trained / "log.jsonl").unlink()
    monkeypatch.setattr(unet, "batch_like", lambda n, *a, f=unet.batch_like: f(4, *a))  # two batches, of 4 and 1
    run_main(capsys, "--sample", "--steps", 23, "--n", 5, status=0)
    assert Image.open(trained / "trajectory.png").width == 11 * 66 + 2  # eleven of the calls, evenly
    code, out, _ = run_main(capsys, "--sample", "--steps", 3, "--n", 5, status=0)
    assert (
        out.splitlines()[-1].startswith("wrote ")
        and "samples.png" in out.splitlines()[-1]
        and "3" in out
        and "ode2" in out
    )
    assert Image.open(trained / "samples.png").width == 3 * (4 * 16 + 2) + 2
    rows, columns = 8, 4  # x_t and x̂0 of four images; three calls and the end
    assert Image.open(trained / "trajectory.png").size == (columns * 66 + 2, rows * 66 + 2 + 14)
    saved = weights(trained)
    assert list(saved) == ["network", "method", "model", "ema", "optimizer", "step"] and saved["step"] == 4


def test_ddm_log_has_its_fields(trained):
    """log.jsonl: step, loss, loss per time bin, images/s, learning rate, seconds; the bins' losses are of the loss's
    size.
    """
    line = json.loads((trained / "log.jsonl").read_text().splitlines()[-1])
    assert (
        line["step"] == 4
        and len(line["loss_by_time"]) == 5
        and line["lr"] > 0
        and line["images_per_s"] > 0
        and line["seconds"] > 0
    )
    known = [v for v in line["loss_by_time"] if v is not None]
    assert min(known) <= line["loss"] <= max(known)


def stopped_and_resumed(flags, directory, capsys, monkeypatch, script=ddm):
    """Train six steps at once, and again with a SIGTERM after the third; the second run's flags come from its
    checkpoint. Asserts that both are equal bit for bit.
    """
    whole, parts, record = directory / "whole", directory / "parts", data.Training.record
    run_main(capsys, "--train", *flags, "--iterations", 6, "--run", whole, status=0, script=script)

    def stop_after_three(self, *a):
        record(self, *a)
        if self.steps == 3 and self.start == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(data.Training, "record", stop_after_three)
    _, out, _ = run_main(capsys, "--train", *flags, "--iterations", 6, "--run", parts, status=143, script=script)
    assert "stopped by SIGTERM at step 3" in out and weights(parts)["step"] == 3
    run_main(capsys, "--train", "--run", parts, status=0, script=script)
    assert same(weights(parts), weights(whole))


@SCRIPTS
def test_resumed_equals_uninterrupted_bit_for_bit(script, trained, capsys, monkeypatch):
    """Three steps, then the rest, is the same run as all at once: weights, EMA, optimizer. Catches any state outside
    of the checkpoint.
    """
    stopped_and_resumed([*TINY, "--dropout", 0.2], trained.parent, capsys, monkeypatch, script)


@SCRIPTS
def test_seed_makes_the_weights(script, trained, capsys):
    """Two seeds start from different weights, farther apart than a step takes them, and one seed from the same.
    Catches a seed that the network never sees.
    """
    runs = {}
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        flags = ["--seed", value, "--run", trained.parent / name, *TINY, "--iterations", 1]
        run_main(capsys, "--train", *flags, status=0, script=script)
        saved = weights(trained.parent / name)
        runs[name] = saved["model"][network_of(script, saved["network"])[1]]
    assert torch.equal(runs["a"], runs["b"]) and (runs["a"] - runs["c"]).abs().max() > 0.05


@SCRIPTS
def test_average_of_weights_keeps_no_graph(script, trained, capsys, monkeypatch):
    """The EMA is plain tensors after training: an update outside no_grad would chain a graph over all steps,
    gigabytes of it.
    """
    copies = []
    monkeypatch.setattr(unet.copy, "deepcopy", lambda net, f=unet.copy.deepcopy: copies.append(f(net)) or copies[0])
    run = trained.parent / "average"
    run_main(capsys, "--train", *TINY, "--iterations", 6, "--run", run, status=0, script=script)
    assert not any(p.requires_grad for p in copies[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(copies[0].state_dict().values(), weights(run)["ema"].values()))


@SCRIPTS
def test_training_step_clips_averages_and_records(script, trained, capsys, monkeypatch):
    """The average of the weights is A ← A + (1 - d)(W - A) with d = (1 + k)/(10 + k), at most --ema, replayed here;
    the gradient is clipped at norm 1; the times recorded are in [0, 1] and spread. Catches 1 - d for d, a late
    clip, angles.
    """
    created, seen, norms, times = [], [], [], []
    monkeypatch.setattr(unet, "create", lambda *a, f=unet.create: created.append(f(*a)) or created[0])
    clip, record = torch.nn.utils.clip_grad_norm_, data.Training.record
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append(most) or clip(p, most))

    def spy(self, values, t, *rest):
        times.extend(t.tolist())
        seen.append({k: v.clone() for k, v in self.parts["model"].state_dict().items()})
        record(self, values, t, *rest)

    monkeypatch.setattr(data.Training, "record", spy)
    flags = [*TINY, "--batch-size", 16, "--iterations", 4, "--ema", 0.2, "--run", trained.parent / "step"]
    run_main(capsys, "--train", "--seed", 7, *flags, status=0, script=script)
    torch.manual_seed(data.seed("weights", 7))
    net, name = network_of(script, weights(trained.parent / "step")["network"])
    average = net.state_dict()[name]
    for W, d in zip(seen, (1 / 10, 2 / 11, 0.2, 0.2)):
        average = average + (1 - d) * (W[name] - average)
    torch.testing.assert_close(created[0][1].state_dict()[name], average, rtol=0, atol=1e-6)
    networks = 2 if script is pixel_aware else 1  # each network's gradient is clipped by itself
    assert norms == [1.0] * 4 * networks and len(times) == 64 and 0 <= min(times) < 0.1 and 0.9 < max(times) <= 1


def test_ddm_cifar10_is_found_in_the_default_and_the_saved_folder(tmp_path, monkeypatch, capsys):
    """Without --data-dir CIFAR-10 lies in data/; a resumed run reads from where it was told at first. Catches a None
    for a folder.
    """
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "cifar10-train-32.npy", np.zeros((9, 3, 32, 32), np.uint8))
    run_main(capsys, "--train", "--dataset", "cifar10", *TINY, "--iterations", 1, status=0)
    flags = ("--train", "--dataset", "cifar10", "--run", "runs/ddm-other")
    run_main(capsys, *flags, *TINY, "--iterations", 1, "--data-dir", "elsewhere", status=0)
    (tmp_path / "data" / "cifar10-train-32.npy").unlink()
    run_main(capsys, *flags, "--iterations", 2, status=0)
    assert weights("runs/ddm-other")["step"] == 2


def test_ddm_finished_run_says_so_and_more_iterations_go_on(trained, capsys):
    """A finished run exits 0 with a sentence and touches nothing; a larger --iterations goes on from there, log
    included.
    """
    before = (trained / "checkpoint.pt").stat().st_mtime_ns
    _, out, _ = run_main(capsys, "--train", status=0)
    assert "4 of 4" in out and (trained / "checkpoint.pt").stat().st_mtime_ns == before
    with open(trained / "log.jsonl", "a") as log:  # as a kill after the checkpoint leaves it
        log.write('{"step": 99, "loss": 1}\n{"step": 100, "lo')
    run_main(capsys, "--train", "--iterations", 5, status=0)
    assert weights(trained)["step"] == 5
    assert [json.loads(line)["step"] for line in (trained / "log.jsonl").read_text().splitlines()] == [4, 5]


def test_ddm_another_configuration_is_refused_with_the_difference(trained, capsys):
    """A run directory of another configuration is refused, spelled out, exit 2, and nothing in it changes. Catches a
    silent overwrite.
    """
    before = (trained / "checkpoint.pt").read_bytes()
    _, _, err = run_main(capsys, "--train", "--width", 16, "--lr", 0.5, status=2)
    assert "--width 8, not 16" in err and "--lr 0.002, not 0.5" in err and err.count("\n") == 1
    _, _, err = run_main(capsys, "--sample", "--dataset", "shapes", "--noise", "linear", status=2)
    assert "--noise sqrt, not linear" in err
    run_main(capsys, "--sample", "--seed", 9, "--n", 1, "--steps", 1, status=0)  # the samples' seed is free
    assert (trained / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    "flags",
    [
        "--no-precondition --predict both --weights one --norm l1+l2",
        "--predict noise --noise linear",
        "--second decoder --predict image",
        "--h sine --no-precondition",
        "--h quadratic --no-precondition --weights inverse",
        "--h exponential --no-precondition",
    ],
)
def test_ddm_every_row_of_the_papers_tables_is_a_command(flags, tmp_path, monkeypatch, capsys):
    """ADM Tables V and VI and Figure 7: each variant trains and samples by flags alone. Catches a combination that
    crashes.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, size, draw=data.shapes: draw(20, size))
    _, out, _ = run_main(
        capsys, "--train", "--sample", "--n", 2, "--steps", 2, *TINY, "--iterations", 2, *flags.split(), status=0
    )
    assert "samples.png" in out


def test_ddm_not_a_number_stops_and_keeps_the_last_good_checkpoint(trained, capsys, monkeypatch):
    """A loss that is not finite: one sentence, exit 1, and the checkpoint is the last good one. Catches a poisoned
    checkpoint.
    """
    good = (trained / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(ddm, "loss", lambda *a, f=ddm.loss, **k: f(*a, **k) * math.nan)
    _, _, err = run_main(capsys, "--train", "--iterations", 8, "--save-every", 0, status=1)
    assert "not finite" in err and err.count("\n") == 1 and (trained / "checkpoint.pt").read_bytes() == good


def test_ddm_full_disk_is_a_sentence_and_loses_nothing(trained, capsys, monkeypatch):
    """No space while saving: one sentence, exit 1, the old checkpoint whole, no rubbish left. Catches writing in
    place.
    """
    good = (trained / "checkpoint.pt").read_bytes()

    def full_disk(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    _, _, err = run_main(capsys, "--train", "--iterations", 8, "--save-every", 0, status=1)
    assert "No space left" in err and err.count("\n") == 1
    assert (trained / "checkpoint.pt").read_bytes() == good and not list(trained.glob(".*"))


def test_ddm_bad_checkpoints_are_sentences_and_never_executed(trained, capsys):
    """Truncated, foreign, of another network, or malicious: exit 1, one sentence, file kept. Catches torch.load
    without weights_only.
    """
    path, good = trained / "checkpoint.pt", (trained / "checkpoint.pt").read_bytes()
    flag = trained / "executed"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(flag),)

    torch.save({"step": Evil()}, trained / "evil.pt")
    torch.save({"step": 3}, trained / "foreign.pt")
    torch.save({**weights(trained), "model": {}, "ema": {"first.weight": torch.zeros(1)}}, trained / "other.pt")
    torch.save({**weights(trained), "method": {"script": "angular"}}, trained / "script.pt")
    torch.save({**weights(trained), "network": {"depth": 9}}, trained / "network.pt")
    odd = weights(trained)
    torch.save({**odd, "network": {**odd["network"], "width": "x"}}, trained / "type.pt")
    torch.save({**odd, "method": {**odd["method"], "dataset": "nope"}}, trained / "dataset.pt")
    contents = [
        good[: len(good) // 2],
        b"",
        b"not a checkpoint",
        pickle.dumps(Evil()),
        *((trained / f"{name}.pt").read_bytes() for name in ("evil", "foreign", "other", "script", "network", "type")),
        (trained / "dataset.pt").read_bytes(),
    ]
    for content in contents:
        path.write_bytes(content)
        for what in ("--sample", "--train"):
            code, _, err = run_main(capsys, what, "--run", trained, "--iterations", 9)
            assert code == 1 and err.startswith("ddm: ") and err.count("\n") == 1, (content[:40], err)
        assert path.read_bytes() == content and not flag.exists()


def test_ddm_wrong_flags_are_sentences(tmp_path, monkeypatch, capsys):
    """Bad arguments: exit 2 and a sentence, before any training. Catches a traceback, and an exit status of 0."""
    monkeypatch.chdir(tmp_path)

    def never(*_):
        raise AssertionError("the training began")

    monkeypatch.setattr(data.Training, "__enter__", never)
    for flags in (
        "",
        "--train --widht 8",
        "--train --width 12",
        "--train --steps 0",
        "--train --h linear",
        "--train --batch-size x",
        "--train --image-size 18",
        "--train --predict noise --no-precondition",
        "--train --dataset folder",
        "--train --dataset folder --data-dir nowhere",
        "--train --preset paper",
        "--train --ema 2",
        "--train --delta 0",
        "--train --h linear --no-precondition --solver ode2",
        "--sample --device cuda" if not torch.cuda.is_available() else "--sample --n 0",
    ):
        code, _, err = run_main(capsys, *flags.split())
        assert code == 2 or (code == 1 and flags.startswith("--sample")), (flags, code, err)
        assert "Traceback" not in err and err.strip()
    code, _, err = run_main(capsys, "--sample")
    assert code == 1 and "train first" in err
    (tmp_path / "file").write_text("")
    code, _, err = run_main(capsys, "--train", *TINY, "--iterations", 1, "--run", "file/run")
    assert code == 1 and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_ddm_sample_folder_resumes_and_refuses_others(trained, capsys):
    """--out writes n PNGs and nothing else, only those missing, and refuses a folder of another seed, solver or
    origin. Catches mixed sets.
    """
    folder = trained.parent / "pngs"
    run_main(capsys, "--sample", "--steps", 2, "--n", 3, "--out", folder, status=0)
    first = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert sorted(first) == ["000000.png", "000001.png", "000002.png"]
    (folder / "000001.png").unlink()
    _, out, _ = run_main(capsys, "--sample", "--steps", 2, "--n", 5, "--out", folder, status=0)
    assert "wrote 3 PNGs" in out and len(list(folder.iterdir())) == 5
    assert {name: (folder / name).read_bytes() for name in first} == first
    for other in (("--steps", 3), ("--steps", 2, "--seed", 1), ("--steps", 2, "--solver", "ddm")):
        _, _, err = run_main(capsys, "--sample", *other, "--out", folder, status=1)
        assert "choose another --out" in err and len(list(folder.iterdir())) == 5
    (trained.parent / "notes").mkdir()
    (trained.parent / "notes" / "a.txt").write_text("mine")
    run_main(capsys, "--sample", "--out", trained.parent / "notes", status=1)


def test_ddm_newest_run_is_sampled(trained, capsys):
    """--sample alone takes the script's newest run, --dataset or --run another. Catches sampling the wrong model in
    silence.
    """
    other = trained.parent / "ddm-other"
    run_main(capsys, "--train", *TINY, "--iterations", 2, "--run", other, status=0)
    _, out, _ = run_main(capsys, "--sample", "--n", 1, "--steps", 1, status=0)
    assert "ddm-other" in out
    _, out, _ = run_main(capsys, "--sample", "--dataset", "shapes", "--n", 1, "--steps", 1, status=0)
    assert "ddm-shapes" in out


@SCRIPTS
def test_demo_fits_its_time_budget(script):
    """The demo's training stays under 25 TFLOPs, which two cores at 0.1 TFLOP/s do in four of its five minutes.
    Catches defaults that grow: counted, not timed, so that a busy machine does not decide it.
    """
    settings = script.DEFAULTS["shapes"]
    with torch.device("meta"):
        net, _ = network_of(script, script.network_of(settings, 3))
        if script is pixel_aware:
            net = script.costly(net, settings["heads"])
        size = settings["image_size"]
        call = unet.flops(net, torch.randn(1, 3, size, size), torch.rand(1))
    assert 3 * call * settings["batch_size"] * settings["iterations"] < 25e12


def test_imports_are_silent():
    """Importing any file prints nothing and does nothing. Catches work at import, and a file that must come first."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import angular, blurring, ddm, pixel_aware, unet, data"
    quiet = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@SCRIPTS
def test_help_reads_like_a_page(script, capsys):
    """--help names every group, what the paper's preset is, and each default. Catches a default that is not shown."""
    _, shown, _ = run_main(capsys, "--help", status=0, script=script)
    iterations = str(script.PAPER["cifar10"]["iterations"])
    groups = ("training:", "network:", "sampling:", "machine:", "method:")
    for word in (*groups, "--preset paper", iterations, "batch-size"):
        assert word in shown, word


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty current directory, and few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, size, draw=data.shapes: draw(20, size))
    return tmp_path


@pytest.mark.parametrize(
    "flags,said",
    [
        *[(f"--sigma-blur-max {b} --schedule {s}", "ddim2") for b in (0, 1, 10, 20) for s in ("sin2", "sin")],
        ("--predict eps --solver ancestral", "solver ancestral"),
        ("--predict eps --sigma-blur-max 0 --solver ddim --eta 0.5", "eta 0.5"),
        ("--predict x0 --solver ddim2", "clip on"),
        ("--process ihdm --levels 3", "solver ihdm"),
        ("--process cold --levels 9", "solver improved"),
        ("--process cold --levels 9 --solver naive", "solver naive"),
    ],
)
def test_blurring_every_row_of_the_papers_tables_is_a_command(flags, said, empty, capsys):
    """Tables 1, 3 and 4: each process, blur and schedule trains and samples by flags alone, with clipping only where
    it is safe. Catches a combination that crashes.
    """
    common = ["--train", "--sample", "--n", 2, "--steps", 3, *TINY, "--iterations", 2]
    _, out, _ = run_main(capsys, *common, *flags.split(), status=0, script=blurring)
    assert said in out and "network calls per image 3" in out
    assert ("clip on" in out) == (("eps" not in flags and "solver ihdm" not in said) or "max 0" in flags)


def test_blurring_default_steps_are_the_solvers(empty, capsys, monkeypatch):
    """1000 ancestral steps on CIFAR-10 as the paper, 50 and 20 of the deterministic solvers, 20 of the second order
    for the demo, the levels for IHDM, and Algorithm 1 for an ε network. Catches 10 steps for all.
    """
    asked = []
    monkeypatch.setattr(blurring, "sample", lambda net, z1, steps, solver, **_: asked.append((solver, steps)) or z1)
    monkeypatch.setattr(data, "draw_samples", lambda draw, x, *_: draw(x[:1], data.image_generators(0, [0]), None))
    np.save("cifar10-train-32.npy", np.zeros((9, 3, 32, 32), np.uint8))
    flags = ["--dataset", "cifar10", "--data-dir", ".", "--train", *TINY, "--iterations", 1]
    run_main(capsys, *flags, status=0, script=blurring)
    for more in ([], ["--solver", "ddim"], ["--solver", "ddim2"], ["--steps", 7]):
        run_main(capsys, "--sample", *more, status=0, script=blurring)
    run_main(capsys, "--train", "--sample", *TINY, "--iterations", 1, status=0, script=blurring)
    run_main(capsys, *flags, "--sample", "--process", "ihdm", "--run", "heat", status=0, script=blurring)
    noise = ["--train", "--sample", "--predict", "eps", "--run", "noise"]
    run_main(capsys, *noise, *TINY, "--iterations", 1, status=0, script=blurring)
    shapes, neighbour = [("ddim2", 20)], [("ihdm", 200), ("ancestral", 1000)]
    assert asked == [("ancestral", 1000), ("ddim", 50), ("ddim2", 20), ("ancestral", 7), *shapes, *neighbour]


@pytest.mark.parametrize("process", ["ihdm", "cold"])
def test_blurring_neighbours_start_from_blurred_training_images(process, empty, capsys, monkeypatch):
    """IHDM and cold diffusion start from A_K x of a training image, one by the image's own seed, without noise.
    Catches a start from noise, which they have never seen.
    """
    starts = []
    monkeypatch.setattr(blurring, "sample", lambda net, z1, *_, **__: starts.append(z1) or z1)
    flags = ["--train", "--sample", "--n", 6, "--process", process, *TINY, "--iterations", 1]
    monkeypatch.setattr(data, "draw_samples", lambda draw, x, *_: draw(x + 1, data.image_generators(0, range(6)), None))
    run_main(capsys, *flags, status=0, script=blurring)
    images = blurred(data.to_float(torch.from_numpy(data.shapes(20, 16))).double(), 12.0)
    (z1,) = starts
    distance = (z1.double()[:, None] - images[None]).abs().amax((2, 3, 4))
    assert distance.amin(1).max() < 1e-5 and len(set(distance.argmin(1).tolist())) > 1


def test_blurring_presets_are_table_5():
    """Table 5 row by row: the CIFAR-10 network attends with one head of 256 channels, LSUN churches at 64 and at 128
    have networks of their own. Catches a head size, or the wrong church.
    """
    known = {**blurring.DEFAULTS["cifar10"], **blurring.PAPER["cifar10"]}
    with torch.device("meta"):
        net = unet.UNet(**blurring.network_of(known, 3))
    attention = [m for m in net.modules() if isinstance(m, unet.Attention)]
    assert {m.heads for m in attention} == {1} and len(attention) == 2 * 3 + 2 * 4 + 1
    assert {m.qkv.in_channels for m in attention} == {256} and known["iterations"] == 2_000_000
    with torch.device("meta"):
        for church, size in ((blurring.PAPER["lsun-church"], 128), (blurring.CHURCH_64, 64)):
            known = {**blurring.DEFAULTS["lsun-church"], **church, "image_size": size}
            net = unet.UNet(**blurring.network_of(known, 3))
            widths = [m.conv2.out_channels for m in [stack[-1] for stack in net.encoder]]
            assert widths == ([64, 128, 256, 384, 512] if size == 128 else [128, 256, 384, 512])
            assert {m.heads for m in net.modules() if isinstance(m, unet.Attention)} <= {w // 64 for w in widths}


def test_blurring_wrong_flags_are_sentences(empty, capsys, monkeypatch):
    """What can't go together is said before anything starts, exit 2. Catches a combination that trains for nothing."""

    def never(*_):
        raise AssertionError("the training began")

    monkeypatch.setattr(data.Training, "__enter__", never)
    for flags in (
        "--predict mean",
        "--process ihdm --predict v",
        "--process cold --predict eps",
        "--process ihdm --solver ddim",
        "--process ihdm --steps 10",
        "--process ihdm --clip",
        "--process cold --steps 30",
        "--process cold --solver ancestral",
        "--solver naive",
        "--solver ancestral --eta 0.5",
        "--solver ddim --delta 0.1",
        "--eta 2",
        "--d-min 0",
        "--d-min 2",
        "--schedule log --sigma-blur-max 0.3",
        "--sigma-blur-max -1",
        "--levels 1",
        "--preset paper",
    ):
        _, _, err = run_main(capsys, "--train", *flags.split(), status=2, script=blurring)
        assert "Traceback" not in err and err.strip(), flags
    assert not (empty / "runs").exists()


def test_blurring_neighbours_blur_by_the_image_and_match_its_channels(empty, capsys):
    """The blur of IHDM and cold diffusion goes with --image-size and the paper's preset; and start images with other
    channels than the network's are a sentence. Catches a blur wider than the image, and a traceback from a
    convolution.
    """
    for size, widest in ((None, 24.0), (16, 12.0), (64, 32.0)):
        assert blurring.defaults_for(blurring.DEFAULTS, "cold", size)["cifar10"]["sigma_blur_max"] == widest
    assert blurring.defaults_for(blurring.PAPER, "ihdm", None)["cifar10"]["predict"] == "mean"
    for name, shape in (("grey", (8, 8)), ("colour", (8, 8, 3))):
        (empty / name).mkdir()
        Image.fromarray(np.full(shape, 90, np.uint8)).save(empty / name / "a.png")
    flags = [
        "--train",
        "--process",
        "cold",
        "--dataset",
        "folder",
        "--data-dir",
        "grey",
        "--image-size",
        8,
        "--levels",
        2,
    ]
    run_main(capsys, *flags, *TINY, "--iterations", 1, "--run", "r", status=0, script=blurring)
    run_main(capsys, "--sample", "--run", "r", "--n", 2, "--out", "pngs", status=0, script=blurring)
    _, _, err = run_main(capsys, "--sample", "--run", "r", "--data-dir", "colour", status=1, script=blurring)
    assert "channels" in err and err.count("\n") == 1
    (empty / "grey").rename("elsewhere")
    other = ["--sample", "--run", "r", "--data-dir", "elsewhere", "--n", 3, "--out", "pngs"]
    assert "choose another --out" in run_main(capsys, *other, status=1, script=blurring)[2]


def test_blurring_and_ddm_refuse_each_others_runs(trained, capsys):
    """A run of ddm.py is no run of blurring.py: exit 1, one sentence. Catches weights that fit by accident."""
    _, _, err = run_main(capsys, "--sample", "--run", trained, status=1, script=blurring)
    assert "another script" in err and err.startswith("blurring: ") and err.count("\n") == 1


ANGULAR_FLAGS = [
    ("", "network calls per image 3, steps 3, solver ddim2, heads project, schedule angular, start 1.0"),
    ("--predict noise --schedule linear", "schedule linear, clip on"),
    ("--predict noise --solver ddpm", "clip on, start 0.999"),
    ("--norm plain --solver rk4", "network calls per image 12"),
    ("--predict image --solver cold", "solver cold"),
    ("--predict image --solver heun --last midpoint", "network calls per image 6"),
    ("--solver ddim --heads raw", "heads raw"),
    ("--solver ddpm --heads raw --second conv", "heads raw"),
]


@pytest.mark.parametrize("flags,said", ANGULAR_FLAGS)
def test_angular_baselines_and_solvers_are_commands(flags, said, empty, capsys):
    """Figure 4's baselines and all kinds of solver train and sample by flags alone, and stdout has the schedule and
    the calls. Catches a combination that crashes, and a noise-only network at 1/cos = ∞.
    """
    common = ["--train", "--sample", "--n", 2, "--steps", 3, *TINY, "--iterations", 2]
    _, out, _ = run_main(capsys, *common, *flags.split(), status=0, script=angular)
    assert said in out and "steps 3" in out and "samples.png" in out


def test_angular_wrong_flags_are_sentences(empty, capsys, monkeypatch):
    """What can't go together is said before anything starts, exit 2. Catches a flag that is silently ignored."""

    def never(*_):
        raise AssertionError("the training began")

    monkeypatch.setattr(data.Training, "__enter__", never)
    for flags in (
        "--predict image --solver heun",
        "--predict image --solver rk4",
        "--predict noise --gamma 2",
        "--last midpoint",
        "--solver midpoint --last euler",
        "--solver euler --heads raw",
        "--predict noise --heads raw",
        "--schedule linear --steps 1001",
        "--schedule jsd",
        "--gamma -1",
        "--solver rk5",
        "--sample --estimates euler",
        "--predict noise --second conv",
        "--gamma inf",
        "--width 12",
    ):
        _, _, err = run_main(capsys, "--train", *flags.split(), status=2, script=angular)
        assert "Traceback" not in err and err.strip(), flags
    assert not (empty / "runs").exists()


def test_angular_figures_refuse_what_they_would_ignore(empty, capsys):
    """A figure is drawn alone, of runs that are there, with solvers that its network can have: one sentence before
    anything is done. Catches a traceback, and a flag that is silently ignored.
    """
    run_main(capsys, "--train", *TINY, "--iterations", 1, status=0, script=angular)
    run_main(
        capsys, "--train", "--run", "image", "--predict", "image", *TINY, "--iterations", 1, status=0, script=angular
    )
    for flags, status in (
        ("--estimates euler rk5", 2),
        ("--estimates euler heun --last midpoint", 2),
        ("--estimates euler --solver ddim", 2),
        ("--estimates euler --out pngs", 2),
        ("--schedules --estimates euler", 2),
        ("--sample --schedules", 2),
        ("--schedules --out q", 2),
        ("--run image --errors runs/angular-shapes", 2),
        ("--errors", 2),
        ("--errors nowhere", 1),
        ("--run image --estimates euler heun", 2),
        ("--errors runs/angular-shapes nowhere", 1),
        ("", 2),
    ):
        _, _, err = run_main(capsys, *flags.split(), status=status, script=angular)
        assert "Traceback" not in err and err.strip(), flags
    assert sorted(path.name for path in empty.rglob("*.*")) == 2 * ["checkpoint.pt"] + 2 * ["log.jsonl"]


def test_angular_presets_are_ddims(empty, capsys):
    """--preset paper has DDIM's three networks, of 35.7 M, 79 M and 114 M parameters with one
    output. Catches another's network in the paper's name.
    """
    sizes = {"cifar10": (32, 35.7), "celeba": (64, 78.7), "lsun-church": (256, 113.7)}
    for dataset, (size, millions) in sizes.items():
        known = {**angular.DEFAULTS[dataset], **angular.PAPER[dataset]}
        assert known["image_size"] == size
        with torch.device("meta"):
            net = unet.UNet(**angular.network_of({**known, "predict": "noise"}, 3))
        assert abs(sum(p.numel() for p in net.parameters()) / 1e6 / millions - 1) < 0.01


def curves_of(path):
    """The CSV of a figure: {column: numbers}."""
    header, *rows = csv.reader(path.read_text().splitlines())
    return {name: np.array(column, float) for name, column in zip(header, zip(*rows))}


@pytest.fixture
def drawn(monkeypatch):
    """A stand-in for matplotlib, which the tests do without: the names of the curves that each picture shows."""
    shown = []

    class Axes:
        def plot(self, x, y, label):
            assert len(x) == len(y)
            shown.append(label)
            return [types.SimpleNamespace(get_color=lambda: "red")]

        def __getattr__(self, name):
            return lambda *_, **__: None

    class Figure:
        def __init__(self, **_):
            pass

        def subplots(self, rows, columns, squeeze):
            return [[Axes() for _ in range(columns)]]

        def savefig(self, buffer, **_):
            buffer.write(b"picture")

    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=Figure))
    return shown


def test_forward_figures_stand_side_by_side(empty, capsys, drawn):
    """--forward needs no run. Every script draws the same image and the same noise, above what is left of the image
    alone; and beside itself the other scripts, but not another image's. The signal to noise ratio is, in each, what
    the process makes of an image of ones over what it makes of a noise of ones. Catches a ratio of amplitudes, a time
    upside down, and pictures of two images in one.
    """
    for script in (ddm, blurring, angular, pixel_aware):
        _, out, _ = run_main(capsys, "--forward", status=0, script=script)
    folder, names = empty / "runs" / "forward-shapes-16", ["angular", "blurring", "ddm", "pixel_aware"]
    assert f"forward.png: {', '.join(names)}" in out and drawn[-8:] == [
        *("angular", "blurring, mean colour", "blurring, middle frequency", "blurring, highest frequency", "ddm"),
        *("pixel_aware, white", "pixel_aware, half of it", "pixel_aware, a twentieth"),
    ]
    first = [np.asarray(Image.open(folder / f"{name}.png"), int)[16:80, 2:66] for name in names]
    assert all(np.abs(image - first[0]).max() <= 5 for image in first)  # blurring begins with a noise of .007
    height = 14 + 2 * 66 + 2 + 14
    assert Image.open(folder / "forward.png").size == (11 * 66 + 2, 4 * height)
    left = np.asarray(Image.open(folder / "ddm.png"), int)[82:146, 2 + 5 * 66 : 66 + 5 * 66]  # t = .5, without noise
    np.testing.assert_allclose(left, (first[2] + 127.5) / 2, atol=1.01)

    curves, zero = curves_of(folder / "snr.csv"), torch.zeros(100, 1, 16, 16, dtype=torch.float64)
    one, t = zero + 1, torch.from_numpy(curves["t"])

    def check(name, image, noise):
        shown = curves[f"signal to noise ratio, {name}"]
        assert (np.diff(shown) < 0).all() and 0 < t.min() and t.max() < 1
        np.testing.assert_allclose(shown, (image / noise).flatten(1)[:, 0].square().numpy(), rtol=1e-4)

    phi = ddm.draw_phi(one)
    check("ddm", ddm.diffuse(one, phi, zero, t), ddm.diffuse(zero, 0 * phi, one, t))
    eta = t * HALF_PI
    check("angular", angular.diffuse(one, zero, eta), angular.diffuse(zero, one, eta))
    for name, k in (("mean colour", 0), ("middle frequency", 8), ("highest frequency", 15)):
        u = zero.clone()
        u[..., k, k] = 1
        kept = blurring.dct(blurring.diffuse(blurring.idct(u), zero, t, sigma_blur_max=4.0))[..., k, k, None, None]
        check(f"blurring, {name}", kept, blurring.diffuse(zero, one, t))
    for name, value in (("white", 1), ("half of it", 0.5), ("a twentieth", 0.05)):
        clean = pixel_aware.diffuse(value * one, zero, 200 * t, 20, 200)
        check(f"pixel_aware, {name}", clean, pixel_aware.diffuse(value * one, one, 200 * t, 20, 200) - clean)
    run_main(capsys, "--forward", "--seed", 1, status=0, script=ddm)
    assert Image.open(folder / "forward.png").size == (11 * 66 + 2, height)


@SCRIPTS
def test_solver_figures_show_what_sampling_draws(script, empty, capsys):
    """--solvers: from the same noises, each solver's images in 5, 10 and 20 network calls are those of --sample with
    as many. Catches steps for calls, fresh noise, and a solver under another's name.
    """
    more = ["--T", 30, "--latent", 16] if script is pixel_aware else []
    run_main(capsys, "--train", *TINY, *more, "--iterations", 3, "--lr", 0.05, status=0, script=script)
    _, out, _ = run_main(capsys, "--solvers", status=0, script=script)
    run = empty / "runs" / f"{script.__name__}-shapes"
    solvers = re.findall(r"(\w+) \((\d) a step\)", out)
    picture = np.asarray(Image.open(run / "solvers.png"), int)
    assert picture.shape == (14 + 66 * len(solvers) + 2, 10 * 66 + 2, 3) and len(solvers) == len({*solvers})
    known = {ddm: 3, blurring: 3, angular: len(angular.SOLVERS), pixel_aware: 2}
    assert len(solvers) == known[script]
    for row, (solver, cost) in enumerate(solvers):
        for column, calls in enumerate((5, 10, 20)):
            if (column, row) not in ((0, 0), (1, 1), (2, len(solvers) - 1), (0, 3)):
                continue
            flags = ["--sample", "--solver", solver, "--steps", max(1, calls // int(cost)), "--n", 3]
            run_main(capsys, *flags, status=0, script=script)
            drawn = np.asarray(Image.open(run / "samples.png"), int)
            for k, (i, j) in enumerate(((0, 0), (0, 1), (1, 0))):  # a grid of two columns
                tile = picture[16 + 66 * row :, 2 + 66 * (1 + 3 * column + k) :][:64, :64]
                assert np.abs(tile - drawn[2 + 66 * i :, 2 + 66 * j :][:64, :64]).max() <= 1, (solver, calls)


def test_blurring_solver_figure_gives_eta_to_ddim_alone(empty, capsys):
    """--solvers --eta draws: η changes ddim's row and no other; blur-only processes are refused by their name. Catches
    a traceback of the other solvers, which refuse --eta.
    """
    run_main(capsys, "--train", *TINY, "--iterations", 3, "--lr", 0.05, status=0, script=blurring)
    rows = []
    for eta in (0, 1):
        run_main(capsys, "--solvers", "--eta", eta, status=0, script=blurring)
        picture = np.asarray(Image.open(empty / "runs" / "blurring-shapes" / "solvers.png"), int)
        rows.append([picture[16 + 66 * i :][:64] for i in range(3)])
    assert [(a == b).all() for a, b in zip(*rows)] == [True, False, True]
    run_main(
        capsys, "--train", *TINY, "--iterations", 1, "--process", "ihdm", "--run", "ihdm", status=0, script=blurring
    )
    _, _, err = run_main(capsys, "--solvers", "--run", "ihdm", status=2, script=blurring)
    assert "--process ihdm does not" in err


@SCRIPTS
def test_compile_is_of_training_and_of_sampling(script, empty, capsys, monkeypatch):
    """--compile has torch compile the network once for the training and once for the samples, and not without it; the
    checkpoint's weights keep their names. Catches a flag that only one of the two heeds.
    """
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or (lambda *inputs: net(*inputs)))
    more = ["--T", 20, "--latent", 16] if script is pixel_aware else []
    run_main(capsys, "--train", *TINY, *more, "--iterations", 1, "--compile", status=0, script=script)
    assert len(compiled) == 1 and isinstance(compiled[0], torch.nn.Module)
    for flags, count in (((), 1), (("--compile",), 3 if script is pixel_aware else 2)):
        run_main(capsys, "--sample", "--n", 2, "--steps", 2, *flags, status=0, script=script)
        assert len(compiled) == count


@SCRIPTS
def test_figures_refuse_what_they_would_ignore(script, empty, capsys):
    """A figure is drawn alone, and every flag that it would not heed is refused by name, exit 2; one that needs a run
    says so. Catches a flag silently ignored.
    """
    for flags, status in (
        ("--forward --sample", 2),
        ("--forward --solvers", 2),
        ("--forward --n 3", 2),
        ("--forward --run there", 2),
        ("--forward --dataset folder", 2),
        ("--solvers --steps 3", 2),
        ("--solvers --image-size 16", 2),
        ("--solvers --compile", 2),
        ("--solvers", 1),
        ("", 2),
    ):
        _, _, err = run_main(capsys, *flags.split(), status=status, script=script)
        assert err.strip() and "Traceback" not in err, flags
        named = flags.split()[1:2]
        assert status == 1 or not named or named[0].strip("-") in err, flags
    assert not (empty / "runs").exists()


@pytest.mark.parametrize(
    "flags,said",
    [
        ("", "passes 1, start noise, mode mean"),
        ("--vae denoising --scale delta --predict eps --average heads --heads 0 --solver literal", "noise on"),
        ("--scale delta --steps 3 --grid uniform", "passes 3"),
        ("--low 0.25 --start forward --heads 2", "start forward"),
        ("--predict eps --solver literal --no-noise", "mode literal"),
    ],
)
def test_pixel_aware_every_variant_is_a_command(flags, said, empty, capsys):
    """Each variant of the README's tables trains and samples by flags alone, two network calls a pass, and says so.
    Catches a combination that crashes.
    """
    common = ["--train", "--sample", "--n", 3, "--T", 12, "--latent", 32, *TINY, "--iterations", 2]
    _, out, _ = run_main(capsys, *common, *flags.split(), status=0, script=pixel_aware)
    assert said in out and f"network calls per image {6 if '--steps' in flags else 2}" in out
    assert ("noise on" in out) == ("literal" in flags and "no-noise" not in flags)
    saved = weights("runs/pixel_aware-shapes")
    assert saved["network"]["T"] == 12 and saved["step"] == 2
    assert Image.open("runs/pixel_aware-shapes/trajectory.png").width == 11 * 66 + 2  # of its twelve steps and the end


def test_pixel_aware_forwarded_start_needs_the_images(empty, capsys):
    """--start forward begins at a training image's own x_T, another one for every sample; --out too depends on the
    seed and number alone. Catches noise in its place, and one image for all.
    """
    seen = []
    sample = pixel_aware.sample
    monkey = pytest.MonkeyPatch()
    monkey.setattr(pixel_aware, "sample", lambda G, R, x, *a, **k: seen.append(x) or sample(G, R, x, *a, **k))
    flags = ["--n", 3, "--T", 12, "--gamma", 0.5, "--latent", 32, *TINY, "--iterations", 1]
    run_main(capsys, "--train", "--sample", "--start", "forward", *flags, status=0, script=pixel_aware)
    monkey.undo()
    images = pixel_aware.to_pixels(data.to_float(torch.from_numpy(data.shapes(20, 16)).double()))
    x, fits = seen[0].flatten(1), []
    for image in images.flatten(1):  # at γ = .5 most of an image is left: its own residual is the noise's alone
        residual = (x - torch.exp(-0.25 * image) * image) / (1 - torch.exp(-0.5 * image)).sqrt()
        fits.append(residual.square().mean(1))
    best = torch.stack(fits).min(0)
    assert ((best.values - 1).abs() < 0.2).all() and len({*best.indices.tolist()}) > 1
    run_main(capsys, "--sample", "--start", "forward", "--n", 3, "--out", "pngs", status=0, script=pixel_aware)
    first = (empty / "pngs" / "000001.png").read_bytes()
    (empty / "pngs" / "000001.png").unlink()
    run_main(capsys, "--sample", "--start", "forward", "--n", 3, "--out", "pngs", status=0, script=pixel_aware)
    assert (empty / "pngs" / "000001.png").read_bytes() == first
    _, _, err = run_main(capsys, "--sample", "--n", 3, "--out", "pngs", status=1, script=pixel_aware)
    assert "another --out" in err


def test_pixel_aware_wrong_flags_are_sentences(empty, capsys, monkeypatch):
    """What can't go together is said before anything starts, exit 2. Catches a flag that is silently ignored."""
    monkeypatch.setattr(data.Training, "__enter__", lambda *_: pytest.fail("the training began"))
    for flags in (
        "--train --noise",
        "--train --steps 201",
        "--train --grid even",
        "--train --gamma 0",
        "--train --gamma 81",
        "--train --low 0",
        "--train --low 1",
        "--train --T 0",
        "--train --low 1e-6",
        "--train --heads 1",
        "--strips --n 3",
        "--strips --save-every 3",
        "--moments --no-noise",
        "--train --image-size 24",
        "--train --image-size 2",
        "--train --width 12",
        "--train --solver euler",
        "--train --moments",
        "--moments --algorithm1",
        "--moments --steps 3",
        "--algorithm1 --iterations 9",
        "--strips --out q",
        "--estimates --steps 2",
        "--estimates --kl 0",
        "--moments --dropout 0",
        "",
    ):
        _, _, err = run_main(capsys, *flags.split(), status=2, script=pixel_aware)
        assert "Traceback" not in err and err.strip(), flags
    assert not (empty / "runs").exists()


def test_pixel_aware_figures(empty, capsys, drawn):
    """Figure 2 and the picture of Algorithm 1 need no run; the strips and the estimates are a run's. The numbers are
    what the figures say: a mean that falls and a variance that grows, an error of the closed form's size and one of
    nothing.
    """
    run_main(capsys, "--moments", "--image-size", 32, status=0, script=pixel_aware)
    curves = curves_of(empty / "pixel_aware-moments.csv")
    ours, ddpm = curves["mean, pixel-aware"], curves["mean, DDPM"]
    assert len(ours) == 201 and ours[0] == ddpm[0] > 0.1 and abs(ours[50:].mean()) < ddpm[50:].mean()
    assert curves["variance, pixel-aware"][100] > curves["variance, DDPM"][100] + 0.2
    run_main(capsys, "--algorithm1", "--T", 50, status=0, script=pixel_aware)
    curves = curves_of(empty / "pixel_aware-algorithm1.csv")
    names = [name for name in curves if name != "γ x₀"]
    literal, silent, means, formula = (curves[name] for name in names)
    np.testing.assert_allclose(literal, formula, rtol=0.35)  # 50 steps: the formula is of many
    assert (silent < literal).all() and means.max() < 1e-9 and drawn[-4:] == [n.split(", ", 1)[1] for n in names]
    assert Image.open(empty / "pixel_aware-algorithm1-images.png").size == (5 * 66 + 2, 4 * 66 + 2 + 14)
    run_main(capsys, "--train", *TINY, "--T", 20, "--latent", 32, "--iterations", 1, status=0, script=pixel_aware)
    for flags in ("--strips", "--strips --steps 2 --solver literal"):
        run_main(capsys, *flags.split(), status=0, script=pixel_aware)
        assert Image.open(empty / "runs/pixel_aware-shapes/strips.png").size == (11 * 66 + 2, 12 * 66 + 2 + 14)
    _, out, _ = run_main(capsys, "--estimates", "--n", 5, status=0, script=pixel_aware)
    table = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [float(row[0]) for row in table] == [0.05, 1.25, 5, 20] and all(len(row) == 7 for row in table)
    assert all(-1 <= float(v) <= 1 for row in table for v in row[1:4])
    assert 0 < float(re.search(r"SSIM (\S+) with x_δ", out).group(1)) < 1
    assert Image.open(empty / "runs/pixel_aware-shapes/estimates.png").size == (14 * 66 + 2, 5 * 66 + 2 + 14)


def test_pixel_aware_presets_are_the_papers():
    """--preset paper trains the paper's own: the scale, the noises, one encoder, all heads; 71.5 M and 145.5 M
    parameters in the paper. Catches our defaults in the paper's name.
    """
    for dataset, T, gamma, millions in (("cifar10", 200, 20.0, 71.5), ("celeba", 500, 50.0, 145.5)):
        known = {**pixel_aware.DEFAULTS[dataset], **pixel_aware.PAPER[dataset]}
        assert (known["T"], known["gamma"], known["low"], known["heads"]) == (T, gamma, 0.004, 0)
        assert (known["vae"], known["scale"], known["predict"]) == ("denoising", "delta", "eps")
        with torch.device("meta"):
            net = pixel_aware.PixelAware(**pixel_aware.network_of(known, 3))
        assert 0.5 < sum(p.numel() for p in net.parameters()) / 1e6 / millions < 1.2


def test_angular_figures_2_and_3(empty, capsys, monkeypatch):
    """--schedules writes its curves' numbers with or without matplotlib, and says how to get it. Catches a CSV that
    needs the picture, and numbers under another's name.
    """
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    _, _, err = run_main(capsys, "--schedules", status=1, script=angular)
    assert "pip install matplotlib" in err and err.count("\n") == 1
    table = curves_of(empty / "angular-schedules.csv")
    assert len(table) == 1 + 4 + 3 and all(len(column) == 1000 for column in table.values())
    last = {name: column[-1] for name, column in table.items()}
    assert last["β_t, angular"] == last["β_t, jsd"] == 1 and last["β_t, linear"] == 0.02
    assert last["ᾱ_t, angular"] == 0 and abs(last["ᾱ_t, linear"] - 4.04e-5) < 1e-7
    assert table["β_t, jsd as printed, 1/t"][0] == 1 and not list(empty.glob("*.png"))


def test_angular_schedules_are_drawn(empty, capsys, drawn):
    """With matplotlib both panels have their curves, in one picture. Catches a picture that is never saved."""
    _, out, _ = run_main(capsys, "--schedules", status=0, script=angular)
    assert drawn == ["angular", "linear", "jsd", "jsd as printed, 1/t", "angular", "linear", "jsd"]
    assert "angular-schedules.png" in out and (empty / "angular-schedules.png").read_bytes() == b"picture"


def test_angular_figure_4_compares_runs(empty, capsys, drawn):
    """--errors measures x̂0 and ε̂ of several runs on the same images and noise. A new network answers 0 to all it is
    asked: so the image-only's error is the images' own square, at every t, and the noise-only's about 1; the other
    output's follows from Eq. 6 and 8. Catches swapped columns, and errors of x_t on another η.
    """
    fresh = [*TINY, "--iterations", 1, "--lr", 1e-9]
    for predict in ("both", "noise", "image"):
        flags = ["--train", *fresh, "--predict", predict, "--run", predict]
        run_main(capsys, *flags, status=0, script=angular)
    _, out, _ = run_main(capsys, "--errors", "both", "noise", "image", "--n", 40, status=0, script=angular)
    assert "errors.png" in out and drawn[:4] == drawn[4:]
    assert drawn[:4] == ["both (both)", "both (both) projected", "noise (noise)", "image (image)"]
    table = curves_of(empty / "both" / "errors.csv")
    t = table["t = η / (π/2)"]
    of = lambda head, predict: table[f"squared error of {head}, {predict} ({predict})"]
    x0, eps = of("x̂₀", "image")[0], of("ε̂", "noise")[0]
    assert 0.3 < x0 < 0.9 and abs(eps - 1) < 0.1
    for predict in ("both", "image"):
        np.testing.assert_allclose(of("x̂₀", predict), x0, rtol=1e-3)
    for predict in ("both", "noise"):
        np.testing.assert_allclose(of("ε̂", predict), eps, rtol=1e-3)
    tangent = np.tan(t * HALF_PI)  # of the other: x/cos - x0 = tan ε, and x/sin - ε = x0/tan
    np.testing.assert_allclose(of("x̂₀", "noise"), eps * tangent**2, rtol=1e-2)
    np.testing.assert_allclose(of("ε̂", "image"), x0 / tangent**2, rtol=1e-2)
    spread = table["squared error of x̂₀, image (image), std"]
    assert (spread > 0.01).all() and (spread < x0 / 2).all()
    projected = table["squared error of x̂₀, both (both) projected"]  # cos x - x0 = sin (cos ε - sin x0)
    c, s = np.cos(t * HALF_PI), np.sin(t * HALF_PI)
    np.testing.assert_allclose(projected, s**2 * (c**2 * eps + s**2 * x0), rtol=0.1)
    for seed in (0, 1):  # the run's own seed is 0
        run_main(capsys, "--errors", "both", "--n", 40, "--seed", seed, status=0, script=angular)
        again = curves_of(empty / "both" / "errors.csv")["squared error of x̂₀, both (both)"]
        assert (again == of("x̂₀", "both")).all() == (seed == 0)
    run_main(capsys, "--train", *fresh, "--image-size", 8, "--run", "small", status=0, script=angular)
    for runs in (["both", "small"], ["both", empty / "both"]):
        _, _, err = run_main(capsys, "--errors", *runs, status=2, script=angular)
        assert "different runs, trained on the same images" in err


def test_angular_figure_9_shows_samplers_from_one_noise(empty, capsys):
    """--estimates: a row for each sampler and noise, all from the same noise, so that their first x̂0 are equal; the
    last is the image, also for Heun, who asks at t = 0 before he is there. Catches two noises, x for x̂0, another's
    seed.
    """
    run_main(capsys, "--train", *TINY, "--iterations", 3, status=0, script=angular)
    flags = ["--estimates", "ddim2", "ddpm", "heun", "--n", 4, "--steps", 10]
    _, out, _ = run_main(capsys, *flags, status=0, script=angular)
    run = empty / "runs" / "angular-shapes"
    assert "ddim2, then one by ddpm, then one by heun" in out

    def tiles():
        pixels = np.asarray(Image.open(run / "estimates.png"), int)
        return [[pixels[16 + 66 * i : 80 + 66 * i, 2 + 66 * j : 66 + 66 * j] for j in range(11)] for i in range(12)]

    rows = tiles()
    for i in (0, 3, 6, 9):
        assert (rows[i][0] == rows[i + 1][0]).all() and (rows[i][0] == rows[i + 2][0]).all()
        assert (rows[i][-1] != rows[i + 1][-1]).any()
    assert rows[0][0].std() < 30  # x̂0 at t = 1, not the noise
    for solver, i in (("ddim2", 0), ("heun", 2)):
        run_main(capsys, "--sample", "--solver", solver, "--n", 4, status=0, script=angular)
        image = np.asarray(Image.open(run / "samples.png"), int)[2:66, 2:66]
        assert np.abs(image - rows[i][-1]).max() <= 1
    for seed in (0, 1):  # the run's own seed is 0
        run_main(capsys, *flags, "--seed", seed, status=0, script=angular)
        assert (tiles()[0][-1] == rows[0][-1]).all() == (seed == 0)


def test_angular_linear_schedule_takes_as_long_as_figure_9_says():
    """Figure 9's "150 steps" against "400 to 500" needs no better network: the angle that the quarter circle reaches
    in 150 of 1000 steps, DDPM's linear β reaches in 465. Catches a README that credits the network.
    """
    bar = np.exp(np.log1p(-np.linspace(1e-4, 0.02, 1000)).cumsum())
    there = math.cos(0.85 * HALF_PI) ** 2
    steps = 1000 - np.interp(-there, -bar, np.arange(1, 1001))
    circle, linear = (np.array(angular.angles(1000, schedule)) for schedule in ("angular", "linear"))
    assert np.argmax(linear <= circle[150]) == math.ceil(steps) == 465


# ------------------------------------------------------------------------------ the scripts' promises, as processes


def process(directory, *flags, launch=(), script=ddm, **options):
    command = [sys.executable, *launch, str(HERE / f"{script.__name__}.py"), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_ddm_killed_at_any_moment_goes_on(tmp_path):
    """kill -9 while it saves at every step: the checkpoint is whole, and the same command ends as an undisturbed run
    does, bit for bit.
    """
    flags = ["--train", *TINY, "--iterations", 400, "--save-every", 0]
    checkpoint = tmp_path / "runs" / "ddm-shapes" / "checkpoint.pt"
    for later in (0.05, 0.4):
        victim, before = process(tmp_path, *flags), checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        wait_for(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns > before)
        time.sleep(later)
        victim.kill()
        victim.communicate()
        step = weights(checkpoint.parent)["step"]
        assert 0 < step < 400
    end = step + 3
    last = process(tmp_path, "--train", "--iterations", end)
    assert last.wait(60) == 0, last.communicate()
    lines = [json.loads(line)["step"] for line in (checkpoint.parent / "log.jsonl").read_text().splitlines()]
    assert weights(checkpoint.parent)["step"] == end and lines == sorted(set(lines)) and lines[-1] == end
    assert not list(checkpoint.parent.glob("*.partial"))


def test_ddm_ctrl_c_saves_and_exits_130(tmp_path):
    """SIGINT, as Ctrl-C sends: the step is finished, saved, named on stdout, exit 130, no traceback."""
    victim = process(tmp_path, "--train", *TINY, "--iterations", 100000)
    log = tmp_path / "runs" / "ddm-shapes"
    wait_for(lambda: log.exists())
    time.sleep(1.0)
    victim.send_signal(signal.SIGINT)
    out, err = victim.communicate(timeout=60)
    assert victim.returncode == 130 and err == "" and "stopped by SIGINT" in out
    assert weights(log)["step"] > 0


TWO = [*TINY, "--train", "--dropout", "0", "--iterations", "5", "--lr", "1e-3", "--image-size", "16"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """A directory where torchrun's two processes have trained every script, and a task, one after the other."""
    directory = tmp_path_factory.mktemp("two")
    (directory / "all.py").write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport ddm, blurring, angular, pixel_aware\n"
        "import torch.distributed as dist\nbegin = dist.init_process_group\n"  # one group for all: torchrun has but one
        "dist.init_process_group = lambda *a, **k: dist.is_initialized() or begin(*a, **k)\n"
        "dist.destroy_process_group = lambda: None\n"
        "import data\ndraw = data.shapes\ndata.shapes = lambda n, *a, **k: draw(min(n, 50), *a, **k)\n"
        f"for script in (ddm, blurring, angular, pixel_aware):\n    script.main([*{TWO}, '--run', script.__name__])\n"
        f"ddm.main([*{TWO}, '--run', 'inpainting', '--task', 'inpainting'])\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "all.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.mark.parametrize("name", ["ddm", "blurring", "angular", "pixel_aware", "inpainting"])
def test_two_processes_train_the_model_that_one_does(name, two_processes, few, capsys):
    """torchrun with two processes equals one with the same global batch up to rounding (a missing average of gradients
    would not); one log, one checkpoint. The same for a task's pairs and holes.
    """
    script, task = (ddm, ["--task", name]) if name == "inpainting" else (globals()[name], [])
    run_main(capsys, *TWO, *task, "--run", few / "one", status=0, script=script)
    a, b = weights(few / "one"), weights(two_processes / name)
    start = network_of(script, a["network"])[0].state_dict()
    for key in a["model"]:
        torch.testing.assert_close(a["model"][key], b["model"][key], rtol=1e-3, atol=2e-5, msg=key)
    assert a["step"] == b["step"] == 5 and len((two_processes / name / "log.jsonl").read_text().splitlines()) == 1
    assert any((a["model"][n] - start[n]).abs().max() > 1e-3 for n in start)


# ------------------------------------------------------------------------------------------- tasks: the command line


@pytest.fixture
def few(tmp_path, monkeypatch):
    """An empty current directory, and few shapes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "shapes", lambda n, *a, draw=data.shapes, **k: draw(min(n, 50), *a, **k))
    return tmp_path


@pytest.mark.parametrize("task", list(data.TARGETS))
def test_tasks_train_sample_and_evaluate(task, few, capsys):
    """Each task trains, samples, evaluates against its baseline, and answers an image of any size, with the run's
    files where they belong. Catches a task that only some commands know.
    """
    run = few / "runs" / f"ddm-shapes-{task}"
    flags = [*TINY, "--image-size", 16, "--iterations", 2]
    _, out, _ = run_main(capsys, "--train", "--sample", "--task", task, *flags, "--n", 3, "--steps", 2, status=0)
    network = weights(run)["network"]
    one = task in ("saliency", "edges")
    assert network["outputs"] == ((1, 1) if one else (3, 3)) and network["condition"] == (
        4 if task == "inpainting" else 3
    )
    assert (
        (run / "samples.png").exists() and (run / "trajectory.png").exists() and "samples.png" in out.splitlines()[-1]
    )
    _, out, _ = run_main(
        capsys, "--evaluate", "--sample", "--task", task, "--n", 3, "--steps", 2, "--ensemble", 2, status=0
    )
    assert "evaluation.png" in out and "trajectory.png" in out
    floor = {"super_resolution": "bicubic", "inpainting": "mean fill", "saliency": "empty mask", "edges": "gradient"}
    assert floor[task] in out and "ode2, 2 calls × 2 samples" in out and (run / "evaluation.png").exists()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (21, 35, 3), np.uint8)).save("own.png")
    Image.fromarray(rng.integers(0, 256, (9, 50), np.uint8)).save("grey.jpg")
    _, out, _ = run_main(capsys, "--sample", "--task", task, "--steps", 1, "--input", "own.png", "grey.jpg", status=0)
    scale = 4 if task == "super_resolution" else 1
    for name, size in (("own", (35, 21)), ("grey", (50, 9))):
        image = Image.open(run / f"{name}-{task}.png")
        assert image.size == (scale * size[0], scale * size[1]) and image.mode == ("L" if one else "RGB")


@pytest.mark.parametrize("fuse", ["concat", "attention"])
def test_tasks_resumed_equals_uninterrupted(fuse, few, capsys, monkeypatch):
    """Three steps, then three more, are the run of six bit for bit: patches, holes and noise are functions of the
    step. Catches a generator that goes on by itself.
    """
    flags = [*TINY, "--image-size", 16, "--task", "inpainting", "--fuse", fuse]
    stopped_and_resumed(flags, few, capsys, monkeypatch)


def test_tasks_predictions_are_functions_of_seed_image_and_member(few, capsys, monkeypatch):
    """What is drawn for an image depends on the seed, its number and the ensemble's member alone, and a prediction is
    the members' mean; a regression has one answer whatever the seed, from no noise and in one call. Catches an
    ensemble of one noise, noise that depends on the images before, and a baseline that sees noise.
    """
    size, noises, shown = 16, [], []
    settings, args = settings_for("saliency"), types.SimpleNamespace(
        input=None, mask=None, n=3, evaluate=True, seed=None, ensemble=None, out=None, data_dir=None, train=False
    )

    def draw(condition, generators, watch):
        noises.append(data.randn(condition[:, :1], generators))
        return noises[-1]

    def predicted(**changes):
        noises.clear(), shown.clear()
        checkpoint = {"ema": {}}
        data.answer({"own": draw}, few, {**settings, "seed": 3}, types.SimpleNamespace(**{**vars(args), **changes}),
                     checkpoint, 3, 1, {}, ALONE)  # fmt: skip
        return list(noises), list(shown)

    monkeypatch.setattr(data, "score", lambda task, p, *a: shown.append(p) or {"MAE": 0.0})
    one, pictures = predicted()
    assert len(one) == 3 and not torch.equal(one[0], one[1])
    torch.testing.assert_close(pictures[0], data.to_uint8(one[0].clamp(-1, 1)).float(), rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(one, predicted(seed=3)[0]))
    assert not torch.equal(one[0], predicted(seed=4)[0][0])
    many, pictures = predicted(ensemble=3, n=2)
    assert len(many) == 6 and torch.equal(many[0], one[0]) and torch.equal(many[3], one[1])
    assert not any(torch.equal(many[a], many[b]) for a in range(6) for b in range(a))
    mean = sum(x.clamp(-1, 1) for x in many[:3]) / 3
    torch.testing.assert_close(pictures[0], data.to_uint8(mean).float(), rtol=0, atol=1)
    capsys.readouterr()
    flags = [*TINY, "--image-size", size, "--task", "saliency", "--iterations", 2]
    run_main(capsys, "--train", "--regression", *flags, "--run", "guess", status=0)
    noise = []
    monkeypatch.setattr(
        ddm,
        "sample",
        lambda net, x1, steps, *a, f=ddm.sample, **k: noise.append((x1, steps)) or f(net, x1, steps, *a, **k),
    )
    run_main(capsys, "--evaluate", "--run", "guess", "--n", 2, "--seed", 5, status=0)
    assert len(noise) == 2 and all(steps == 1 and (x1 == 0).all() for x1, steps in noise)


def test_tasks_one_call_answers_with_the_mean_and_many_with_a_sample():
    """Of what a condition leaves open, N(m, s²) here with exact networks, one call answers m, whose mean squared error
    is s², and many calls draw a sample, whose error is 2 s²: 3 dB less. Why more calls can cost accuracy.
    """
    m, s, n = 0.3, 0.2, 20_000

    def net(x, t):
        t = t[:, None, None, None]
        x0 = m + (1 - t) * s**2 / ((1 - t) ** 2 * s**2 + t) * (x - (1 - t) * m)
        return -x0, (x - (1 - t) * x0) / t.sqrt()

    truth = m + s * randn(n, 1, 1, 1, seed=1)
    for steps, ratio in ((1, 1), (50, 2)):
        error = (ddm.sample(net, randn(n, 1, 1, 1), steps, "ode2", heads="image") - truth).square().mean().item()
        assert abs(error / s**2 - ratio) < 0.06


def test_tasks_loss_tells_the_model_its_condition():
    """A model that reads the answer off its condition has no loss, example by example; told another's it has. Catches
    a condition that the loss drops.
    """
    x0, eps, t = rand(4, 1, 3, 3), randn(4, 1, 3, 3), full(0.4, 4)
    values = ddm.loss(lambda x, t, told, noise: (-told, noise), x0, -x0, eps, t, condition=(x0, eps))
    torch.testing.assert_close(values, torch.zeros_like(values))
    assert (ddm.loss(lambda x, t, told: (-told, eps), x0, -x0, eps, t, condition=(x0.flip(0),)) > 0.01).all()


def test_tasks_training_gives_each_example_its_own_condition(few, capsys, monkeypatch):
    """In training a condition and its x0 make up one of the dataset's images, or its mirror image. Catches conditions
    that are shuffled between the batch's examples.
    """
    images = data.shape_pairs("super_resolution", 50, 16).float()
    images = torch.cat([images, images.flip(-1)])

    def keep(model, x0, *a, f=ddm.loss, condition=(), **k):
        whole = data.to_uint8(data.finish("super_resolution", x0, *condition)).float()
        seen.append((whole[:, None] - images).abs().amax((2, 3, 4)).amin(1).max())
        return f(model, x0, *a, condition=condition, **k)

    seen = []
    monkeypatch.setattr(ddm, "loss", keep)
    run_main(capsys, "--train", *TINY, "--image-size", 16, "--task", "super_resolution", "--iterations", 3, status=0)
    assert len(seen) == 3 and max(seen) <= 1


def test_tasks_regression_is_trained_at_t_equal_one_without_noise(few, capsys, monkeypatch):
    """--regression trains on x_t = 0 at t = 1, where the loss is the image's error and nothing else. Catches a
    baseline that is a diffusion model.
    """
    seen = []

    def keep(model, x0, phi, eps, t, *a, f=ddm.loss, condition=(), **k):
        values = f(model, x0, phi, eps, t, *a, condition=condition, **k)
        guess = -model(torch.zeros_like(x0), torch.ones_like(t), *condition)[0]
        seen.append((t, eps, values, ((guess - x0) ** 2).mean((1, 2, 3))))
        return values

    monkeypatch.setattr(ddm, "loss", keep)
    flags = [*TINY, "--image-size", 16, "--task", "super_resolution", "--iterations", 2, "--regression"]
    run_main(capsys, "--train", *flags, status=0)
    for t, eps, values, error in seen:
        assert (t == 1).all() and (eps == 0).all()
        torch.testing.assert_close(values, error, rtol=0.01, atol=0)


def test_tasks_folder_is_cached_once_trained_on_and_evaluated(few, capsys, monkeypatch):
    """A folder of pairs is decoded once, trains, and is evaluated on its test folder, with another run beside; --out
    gets one PNG an image, of its size. Catches test images in training, and predictions of another size.
    """
    for part in ("train", "test"):
        pair_folder(few / "photos" / part, n=3 if part == "train" else 2)
    flags = ["--task", "edges", "--dataset", "folder", "--data-dir", few / "photos", *TINY, "--image-size", 16]
    _, out, _ = run_main(capsys, "--train", *flags, "--iterations", 2, status=0)
    assert "3 images below" in out and len(list((few / "data").glob("pairs-*.npy"))) == 1
    run_main(capsys, "--train", *flags, "--iterations", 1, "--regression", "--run", "guess", status=0)
    monkeypatch.setattr(data, "open_pair", None)
    run_main(capsys, "--train", *flags, "--iterations", 3, status=0)  # from the cache
    monkeypatch.undo(), monkeypatch.chdir(few)
    _, out, _ = run_main(
        capsys, "--evaluate", "--task", "edges", "--steps", 2, "--against", "guess", "--out", "pngs", status=0
    )
    assert "2 of 2 images" in out and "ODS" in out and re.search(r"^  guess +ODS", out, re.M)
    assert [f.name for f in sorted((few / "pngs").iterdir())] == ["images-a0.png", "images-a1.png"]
    assert Image.open(few / "pngs" / "images-a1.png").size == (42, 31)
    _, out, _ = run_main(capsys, "--evaluate", "--task", "edges", "--data-dir", few / "photos", "--steps", 1, status=0)
    assert "2 of 2 images" in out  # the test folder still
    Image.new("RGB", (9, 9)).save(few / "pngs" / "images-a1.png")
    _, _, err = run_main(capsys, "--evaluate", "--task", "edges", "--out", "pngs", status=1)
    assert "was not made here" in err and Image.open(few / "pngs" / "images-a1.png").size == (9, 9)
    (few / "photos" / "test").rename(few / "photos" / "later")
    for flags in (["--evaluate"], ["--train", "--evaluate", "--dataset", "folder", "--data-dir", few / "photos"]):
        _, _, err = run_main(capsys, *flags, "--task", "edges", status=2)
        assert "has no folder named test" in err  # and never those of training
    (few / "photos" / "later").rename(few / "photos" / "test")
    truth = few / "photos" / "test" / "edges" / "a0.png"
    truth.unlink()
    _, _, err = run_main(capsys, "--evaluate", "--task", "edges", status=1)
    assert "has no partner" in err


@pytest.mark.parametrize(
    "task, targets, size", [("super_resolution", "edges", (44, 28)), ("saliency", "masks", (44, 30))]
)
def test_tasks_evaluate_odd_sizes(task, targets, size, few, capsys):
    """Images whose sides four, or the network's stride, does not divide: super-resolution is measured on what four
    divides, a mask at its image's own size. Catches a truth of another size than the prediction.
    """
    pair_folder(few / "d", n=1, targets=targets)
    flags = [
        "--task",
        task,
        "--dataset",
        "folder",
        "--data-dir",
        few / "d",
        *TINY,
        "--image-size",
        16,
        "--mult",
        1,
        1,
        1,
    ]
    run_main(capsys, "--train", *flags, "--iterations", 1, status=0)
    more = ["--task", task, "--data-dir", pair_folder(few / "e", n=1, targets=targets), "--steps", 1]
    _, out, _ = run_main(capsys, "--evaluate", *more, "--out", "pngs", status=0)
    assert "1 of 1 images" in out and [Image.open(f).size for f in (few / "pngs").iterdir()] == [size]


def test_tasks_preset_is_table_i(few):
    """--preset paper is ADM's Table I, column by column, with Swin-B. Catches a task with another's numbers."""
    table = {
        "inpainting": (256, 48, 4e-5, 400_000, 96, (1, 2, 4, 8), 2, 1e-4),
        "super_resolution": (512, 12, 5e-5, 200_000, 128, (1, 2, 4, 4), 2, 1e-4),
        "saliency": (384, 16, 5e-5, 200_000, 128, (1, 2, 4, 4), 2, 1e-4),
        "edges": (320, 16, 5e-5, 200_000, 128, (1, 2, 4, 4), 2, 1e-4),
    }
    keys = ("image_size", "batch_size", "lr", "iterations", "width", "mult", "blocks", "delta")
    for task, row in table.items():
        args = ddm.arguments(["--train", "--task", task, "--dataset", "folder", "--data-dir", "d", "--preset", "paper"])
        settings = data.open_run("ddm", args, ddm.DEFAULTS, ddm.PAPER, ddm.NETWORK, ddm.TASKS)[1]
        assert tuple(settings[key] for key in keys) == row and settings["encoder"] == "swin_b"
        assert ddm.network_of(settings, 3)["encoder"] == "swin_b" and not settings["precondition"]


def test_tasks_wrong_flags_are_sentences(few, capsys):
    """What has no meaning for a task, or without one, is said: exit 2, one sentence, nothing trained. Catches a flag
    that is silently ignored.
    """
    Image.new("RGB", (20, 20)).save("a.png"), Image.new("L", (9, 9)).save("m.png")
    Image.new("RGB", (1, 1)).save("dot.png")
    for flags, words in [
        (["--train", "--regression"], "--regression has no meaning without --task"),
        (["--train", "--encoder", "swin_b"], "--encoder has no meaning without --task"),
        (["--train", "--task", "edges", "--dataset", "cifar10"], "needs targets, which cifar10 has not"),
        (
            ["--train", "--task", "saliency", "--edge-bits"],
            "--edge-bits has no meaning here: it goes with --task edges",
        ),
        (["--train", "--task", "edges", "--against", "x"], "--against has no meaning here: it goes with --evaluate"),
        (["--train", "--task", "edges", "--no-precondition", "--regression"], "--regression is for"),
        (["--train", "--task", "edges", "--fuse", "sum"], "invalid choice"),
        (["--train", "--task", "super_resolution", "--image-size", 18], "an --image-size that 4 divides"),
        (
            ["--train", "--task", "super_resolution", "--h", "sine", "--no-precondition"],
            "larger than the sine can reach",
        ),
    ]:
        _, _, err = run_main(capsys, *flags, "--device", "cpu", "--iterations", 1, status=2)
        assert words in err, err
    assert not list(few.glob("runs/*/checkpoint.pt"))
    flags = [*TINY, "--image-size", 16, "--iterations", 1]
    run_main(capsys, "--train", "--task", "inpainting", *flags, status=0)
    run_main(capsys, "--train", *flags, status=0)
    for flags, words in [
        (["--sample", "--task", "saliency"], "no run of ddm.py --task saliency"),
        (["--sample", "--task", "inpainting", "--mask", "m.png"], "--mask has no meaning here: it goes with"),
        (["--sample", "--task", "inpainting", "--input", "a.png", "--mask", "m.png"], "m.png is 9x9, and a 20x20"),
        (["--sample", "--task", "inpainting", "--input", "a.png", "--mask", "a.png"], "a.png has no white in it"),
        (["--sample", "--task", "inpainting", "--input", "none.png"], "--input none.png: there is no such file"),
        (["--sample", "--task", "inpainting", "--input", "a.png", "./a.png"], "two of the images have one name"),
        (["--sample", "--task", "inpainting", "--input", "dot.png"], "dot is 1x1, too small: the task needs 2x2"),
        (
            ["--sample", "--task", "inpainting", "--input", "a.png", "--n", 3],
            "--n has no meaning here: --input says which",
        ),
        (["--evaluate", "--dataset", "shapes"], "--evaluate has no meaning without --task"),
        (["--evaluate", "--task", "inpainting", "--overlap", 16], "--overlap 16 must be less than the window, 16"),
        (
            ["--evaluate", "--task", "inpainting", "--against", "runs/ddm-shapes"],
            "is no run of --task inpainting at the same",
        ),
        (["--train", "--task", "inpainting", "--fuse", "attention"], "was trained with --fuse concat, not attention"),
    ]:
        code, _, err = run_main(capsys, *flags, "--device", "cpu")
        assert code in (1, 2) and words in err and err.count("\n") == 1, (flags, err)


# ------------------------------------------------------------------------------------------------------- the README


def test_readme_lines_of_python_sample_from_a_checkpoint(trained):
    """The README's Python block, run as it is, gives images. Catches documentation that has fallen behind the code."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(block, names)
    assert len(block.splitlines()) <= 6 and names["x0"].shape == (16, 3, 16, 16) and torch.isfinite(names["x0"]).all()


def test_readme_rows_of_table_2_are_commands(empty, capsys):
    """Each row of the README's Table 2 trains and samples by the flags it names, Eq. 6's pair as it stands but for
    "Ours". Catches a row that crashes, or that clips or projects in silence.
    """
    text = (HERE / "README.md").read_text().split("| Table 2 | training | sampling |\n|-|-|-|\n")[1].split("\n\n")[0]
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert [name for name, _, _ in rows][0] == "DDIM" and rows[-1][:2] == ["Ours", "(the defaults)"] and len(rows) == 5
    for i, (name, training, sampling) in enumerate(rows):
        flags = ["--run", f"r{i}", *(training.split() if "--" in training else [])]
        run_main(capsys, "--train", *flags, *TINY, "--iterations", 1, status=0, script=angular)
        _, out, _ = run_main(
            capsys, "--sample", "--run", f"r{i}", *sampling.split(), "--n", 2, status=0, script=angular
        )
        two_heads, saved = "x̂₀, ε̂" in name, weights(f"r{i}")["method"]
        assert (
            "clip on" not in out and ("heads raw" in out) == two_heads and ("solver ddim," in out) == (name != "Ours")
        )
        assert (saved["predict"] == "both") == (two_heads or name == "Ours") and (saved["gamma"] == 0) == two_heads
        assert (saved["schedule"] == "linear") == (name in ("DDIM", "DDIM + x̂₀, ε̂"))


def test_map_is_true():
    """Every row's function and test exist, no number is missing, and every `Eq. n` tag of the scripts is in the map."""
    papers = {"DDM": (28, 2, ddm), "Blurring": (30, 2, blurring), "Angular": (13, 0, angular)}
    papers |= {"Pixel-aware": (26, 1, pixel_aware)}
    lines = (HERE / "README.md").read_text().splitlines()
    for paper, (last, algorithms, script) in papers.items():
        rows = [line.split("|")[1:-1] for line in lines if line.startswith(f"| {paper}")]
        numbers = [cells[1].strip() for cells in rows]
        wanted = {f"Eq. {n}" for n in range(1, last + 1)} | {f"Algorithm {n}" for n in range(1, algorithms + 1)}
        assert sorted(numbers) == sorted(wanted)
        for _, number, _, where, proofs in rows:
            places, proofs = re.findall(r"`(\w+)\.(\w+)`", where), re.findall(r"`(\w+)`", proofs)
            assert places or "not code: " in where, number
            for file, name in places:
                assert callable(getattr(sys.modules[file], name)), number
            assert all(callable(globals()[name]) for name in proofs) and (proofs or not places), number
        mapped = {number for number, cells in zip(numbers, rows) if "not code" not in cells[3]}
        tagged = 0
        for line in (HERE / f"{script.__name__}.py").read_text().splitlines():
            for found in re.findall(r"# Eq\. ([\d, ]+)", line):
                found = {f"Eq. {n.strip()}" for n in found.split(",") if n.strip()}
                tagged += len(found)
                assert found <= mapped, line
        assert tagged > 5
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| ADM |")]  # the tasks, which have no equations
    assert {cells[1].strip() for cells in rows} >= {
        "Fig. 4",
        "Sec. V-A",
        "Sec. V-C",
        "Table I",
        "Table III",
        "Table IV",
    }
    for _, number, _, where, proofs in rows:
        places, proofs = re.findall(r"`(\w+)\.(\w+)`", where), re.findall(r"`(\w+)`", proofs)
        assert places and all(callable(getattr(sys.modules[file], name)) for file, name in places), number
        assert proofs and all(callable(globals()[name]) for name in proofs), number
