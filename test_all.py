"""What the papers claim and what the scripts promise, as tests. Run: pytest test_all.py

Each test's docstring names the equation or the promise, and the bug it would catch. The identities are checked in
float64 against a derivation of their own (brute-force conditioning, quadrature, quantiles, closed-form posteriors),
not against the formula again.
"""

import errno
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

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ddm
import unet

HERE = pathlib.Path(__file__).parent
ATTENUATIONS = ["constant", "linear", "quadratic", "exponential", "sine"]
TINY = "--width 8 --mult 1 1 --blocks 1 --attention --batch-size 4 --device cpu".split()


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
    assert phi.shape[1] == 2 * {"constant": 1, "linear": 2, "quadratic": 3, "exponential": 2, "sine": 1}[h]
    torch.testing.assert_close(ddm.H(phi, full(0, 6), h), torch.zeros_like(x0), rtol=0, atol=1e-15)
    torch.testing.assert_close(ddm.H(phi, full(1, 6), h), -x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("h", ATTENUATIONS)
def test_ddm_attenuation_is_the_integral_of_h(h):
    """H_t = ∫₀ᵗ h (Eq. 6), with h written as the papers write it and integrated numerically. Catches any wrong closed
    form.
    """
    phi = ddm.draw_phi(image_for(h), h, torch.Generator().manual_seed(5))
    parts = phi.chunk({"constant": 1, "linear": 2, "quadratic": 3, "exponential": 2, "sine": 1}[h], dim=1)
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


@pytest.mark.parametrize("grid", ["quadratic", "uniform"])
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
    np.testing.assert_allclose(
        ddm.times(4, grid), [1, 0.5625, 0.25, 0.0625, 0] if grid == "quadratic" else [1, 0.75, 0.5, 0.25, 0]
    )


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


def test_unet_report_names_its_figures(capsys):
    """python unet.py's line has parameters, FLOPs and images/s for training and sampling. Catches a report that no
    longer runs.
    """
    unet.report("tiny", 2, torch.device("cpu"), width=8, mult=(1, 1), blocks=1, attention=(), size=8)
    line = capsys.readouterr().out
    assert re.search(
        r"tiny +\d+\.\d+ M parameters +\d+\.\d+ GFLOPs a call +training +[\d.,]+ images/s .*sampling +[\d.,]+ images/s",
        line,
    )


def test_unet_attends_where_it_is_told():
    """Attention lies at the levels where size / 2^level is listed, and in the middle. Catches attention by level
    number.
    """
    net = unet.UNet(width=8, mult=(1, 1, 1), blocks=2, attention=(16,), size=32)
    found = {name.split(".attention")[0] for name, m in net.named_modules() if isinstance(m, unet.Attention)}
    assert found == {"encoder.1.0", "encoder.1.1", "middle.0"} | {
        f"decoders.{d}.levels.1.{b}" for d in (0, 1) for b in range(3)
    }


def test_unet_fast_is_the_network_on_the_cpu():
    """unet.fast keeps the call's signature and values; on the CPU it is the network. Catches a wrapper that changes
    results.
    """
    net = small_net()
    assert unet.fast(net, torch.zeros(1, 3, 8, 8), torch.zeros(1)) is net


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
    assert len(seeds) == 3600
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


# ------------------------------------------------------------------------------------ the scripts' promises, in process


def run_main(capsys, *flags, status=None):
    """ddm.main(flags): its exit status and what it printed on stdout and stderr."""
    code = 0
    try:
        ddm.main([str(flag) for flag in flags])
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


def test_ddm_train_and_sample_write_what_they_name(trained, capsys):
    """--sample needs the checkpoint alone, and its last line names the files it wrote. Catches a sampler that needs
    the data or the flags.
    """
    (trained / "log.jsonl").unlink()
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


def test_ddm_resumed_equals_uninterrupted_bit_for_bit(trained, capsys, monkeypatch):
    """Three steps, then the rest, is the same run as all at once: weights, EMA, optimizer. Catches any state outside
    of the checkpoint.
    """
    whole = trained.parent / "whole"
    flags = [*TINY, "--dropout", 0.2, "--iterations", 6]
    run_main(capsys, "--train", *flags, "--run", whole, status=0)
    record = data.Training.record

    def stop_after_three(self, *a):
        record(self, *a)
        if self.steps == 3 and self.start == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(data.Training, "record", stop_after_three)
    parts = trained.parent / "parts"
    _, out, _ = run_main(capsys, "--train", *flags, "--run", parts, status=143)
    assert "stopped by SIGTERM at step 3" in out and weights(parts)["step"] == 3
    run_main(capsys, "--train", "--run", parts, status=0)  # the flags come from the checkpoint
    assert same(weights(parts), weights(whole))


def test_ddm_average_of_weights_keeps_no_graph(trained, capsys, monkeypatch):
    """The EMA is plain tensors after training: an update outside no_grad would chain a graph over all steps,
    gigabytes of it.
    """
    copies = []
    monkeypatch.setattr(unet.copy, "deepcopy", lambda net, f=unet.copy.deepcopy: copies.append(f(net)) or copies[0])
    run_main(capsys, "--train", "--iterations", 6, status=0)
    assert not any(p.requires_grad for p in copies[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(copies[0].state_dict().values(), weights(trained)["ema"].values()))


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
    """No space while saving: one sentence, exit 1, the old checkpoint whole, no rubbish left. Catches writing in place."""
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

    def never(_):
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


def test_ddm_demo_fits_its_time_budget():
    """The demo's training stays under 25 TFLOPs, which two cores at 0.1 TFLOP/s do in four of its five minutes. Catches
    defaults that grow: counted, not timed, so that a busy machine does not decide it.
    """
    settings = ddm.DEFAULTS["shapes"]
    with torch.device("meta"):
        net, size = unet.UNet(**ddm.network_of(settings, 3)), settings["image_size"]
        call = unet.flops(net, torch.randn(1, 3, size, size), torch.rand(1))
    assert 3 * call * settings["batch_size"] * settings["iterations"] < 25e12


def test_ddm_help_reads_like_a_page_and_imports_are_silent():
    """--help names every group and default; importing a file prints nothing and does nothing. Catches work at import."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import ddm, unet, data"
    quiet = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    shown = subprocess.run(
        [sys.executable, HERE / "ddm.py", "--help"], capture_output=True, text=True, timeout=120
    ).stdout
    for word in ("training:", "network:", "sampling:", "machine:", "method:", "--preset paper", "800000", "iterations"):
        assert word in shown


# ------------------------------------------------------------------------------ the scripts' promises, as processes


def process(directory, *flags, launch=(), **options):
    command = [sys.executable, *launch, str(HERE / "ddm.py"), *map(str, flags)]
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


def test_ddm_two_processes_train_the_model_that_one_does(tmp_path):
    """torchrun with two processes equals one with the same global batch up to rounding (a missing average of
    gradients would not); one log, one checkpoint.
    """
    flags = ["--train", *TINY, "--dropout", 0, "--iterations", 5, "--lr", 1e-3]
    one = process(tmp_path, *flags, "--run", "one")
    two = process(
        tmp_path,
        *flags,
        "--run",
        "two",
        launch=["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "--"],
    )
    for p in (one, two):
        out, err = p.communicate(timeout=120)
        assert p.returncode == 0, err
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = unet.UNet(**a["network"]).state_dict()
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=1e-3, atol=2e-5, msg=name)
    assert a["step"] == b["step"] == 5 and len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 1
    assert any((a["model"][n] - start[n]).abs().max() > 1e-3 for n in start)


# ------------------------------------------------------------------------------------------------------- the README


def test_readme_lines_of_python_sample_from_a_checkpoint(trained):
    """The README's Python block, run as it is, gives images. Catches documentation that has fallen behind the code."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S).group(1)
    names = {}
    exec(block, names)
    assert len(block.splitlines()) <= 6 and names["x0"].shape == (16, 3, 16, 16) and torch.isfinite(names["x0"]).all()


def test_map_is_true():
    """Every row's function and test exist, no number is missing, and every `Eq. n` tag of the scripts is in the map."""
    rows = [line.split("|")[1:-1] for line in (HERE / "README.md").read_text().splitlines() if line.startswith("| DDM")]
    numbers = [cells[1].strip() for cells in rows]
    assert sorted(numbers) == sorted([f"Eq. {n}" for n in range(1, 29)] + ["Algorithm 1", "Algorithm 2"])
    tests = globals()
    for paper, number, what, where, proofs in rows:
        places, proofs = re.findall(r"`(\w+)\.(\w+)`", where), re.findall(r"`(\w+)`", proofs)
        assert places or "not code: " in where, number
        assert all(
            callable(getattr({"ddm": ddm, "unet": unet, "data": data}[file], name)) for file, name in places
        ), number
        assert all(callable(tests[name]) for name in proofs) and (proofs or not places), number
    mapped = {number for number, cells in zip(numbers, rows) if "not code" not in cells[3]}
    for line in (HERE / "ddm.py").read_text().splitlines():
        for numbers in re.findall(r"# Eq\. ([\d, ]+)$", line):
            assert {f"Eq. {n.strip()}" for n in numbers.split(",")} <= mapped, line
