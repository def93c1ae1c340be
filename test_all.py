"""What the papers claim and what the scripts promise, as tests. Run: pytest test_all.py

First what all scripts have in common, then the papers, each under a list of its claims; then unet,
data, and the promises of the command line. A test's name is its claim; its docstring says where it
comes from, and which bug it catches. Identities are checked in float64 by another derivation
(conditioning of Gaussians, quadrature, quantiles, sums by hand), never by the formula again.
"""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import angular
import blurring
import data
import ddm
import pixel_aware
import unet

torch.set_num_threads(1)          # with tensors this small, threads only wait for each other
HERE = pathlib.Path(data.__file__).parent
FOUR = [ddm, blurring, angular, pixel_aware]
SCRIPTS = pytest.mark.parametrize("script", FOUR, ids=lambda script: script.__name__)
HALF_PI = math.pi / 2

# ------------------------------------------------------------------------------------------ helpers

def seeded(seed=0):
    """A generator."""
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, low=-1.0, high=1.0):
    """Even draws in [low, high], float64."""
    u = torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)
    return low + (high - low) * u


def randn(*shape, seed=0):
    """Standard normal draws, float64."""
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def full(value, n):
    """[n] times this value, float64."""
    return torch.full((n,), value, dtype=torch.float64)


def like_image(t):
    """t [B] -> [B, 1, 1, 1]. Numbers and images stay what they are."""
    return t[:, None, None, None] if torch.is_tensor(t) and t.dim() == 1 else t


def close(got, want, rtol=1e-12, atol=None):
    """Fail unless `got` is `want`, of its shape or one number, up to an error. atol: as rtol."""
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol if atol is None else atol)


def recorded(net):
    """(net, the list of the times t[0] with which it is called from now on)."""
    calls = []

    def call(x, t):
        calls.append(t[0].item())
        return net(x, t)

    return call, calls


def conditioned(seen, mean, variance, mean_seen, variance_seen, covariance):
    """(mean, variance) of one of two Gaussians, when the other has been seen."""
    pull = covariance / variance_seen
    return mean + pull * (seen - mean_seen), variance - pull * covariance


class Mixture:
    """Images of independent draws of Gaussian mixtures. means, stds: [K], or [H, W, K]."""

    def __init__(self, weights=(0.3, 0.5, 0.2), means=(-1.5, 0.2, 1.6), stds=(0.25, 0.35, 0.3)):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        self.mean = (self.weights * self.means).sum(-1)
        squares = self.means ** 2 + self.stds ** 2
        self.std = ((self.weights * squares).sum(-1) - self.mean ** 2).sqrt()

    def heads(self, x, a, b):
        """(E[x₀ | x], E[ε | x]) for x = a x₀ + b ε. a, b: numbers, [B], or like x [B, ...]."""
        a = torch.as_tensor(like_image(a), dtype=torch.float64)[..., None]
        b = torch.as_tensor(like_image(b), dtype=torch.float64)[..., None]
        variance = a ** 2 * self.stds ** 2 + b ** 2
        off = x[..., None] - a * self.means
        logs = self.weights.log() - off ** 2 / (2 * variance) - variance.log() / 2
        share = torch.softmax(logs, dim=-1) / variance        # how likely each Gaussian is
        x0 = (share * (self.means * b ** 2 + a * self.stds ** 2 * x[..., None])).sum(-1)
        eps = (share * b * off).sum(-1)
        return x0.to(x.dtype), eps.to(x.dtype)

    def quantiles(self, n=400, a=1.0, b=0.0):
        """n even quantiles of a x₀ + b ε, [n, 1, 1, 1], by bisection. The exact ODE keeps them."""
        p = (torch.arange(n).double() + 0.5) / n
        low = full(-9.0, n)
        high = full(9.0, n)
        for _ in range(80):
            middle = (low + high) / 2
            z = (middle[:, None] - a * self.means) / (a ** 2 * self.stds ** 2 + b ** 2).sqrt()
            below = (self.weights * torch.special.ndtr(z)).sum(-1) < p
            low = torch.where(below, middle, low)
            high = torch.where(below, high, middle)
        return like_image(middle)


MIXTURE = Mixture()


def signal_and_noise(script, t, noise="sqrt"):
    """(a, b) of x_t = a x₀ + b ε, of the three scripts that have it (blurring: without blur)."""
    if script is ddm:
        return 1 - t, t if noise == "linear" else t ** 0.5
    first = math.atan(math.exp(-5)) if script is blurring else 0.0
    angle = first + (HALF_PI - 2 * first) * torch.as_tensor(t, dtype=torch.float64)
    return angle.cos(), angle.sin()


def oracle(script, mixture=MIXTURE, noise="sqrt"):
    """The exact posterior means as a network of this script. (For blurring, of images of 1x1.)"""

    def net(x, t):
        x0, eps = mixture.heads(x, *signal_and_noise(script, t, noise))
        return (-x0 if script is ddm else x0), eps

    return net


# -------------------------------------------------------------------------- what all have in common
#
# The image becomes noise. N steps are N calls of the network; the last adds no noise. Image i is a
# function of its own seed. Deterministic solvers have their order. (Losses: see each paper.)

ORDERS = {
    ddm: dict(ode=1, ode2=1.94, ode3=2),
    blurring: dict(ddim=1, ddim2=2),
    angular: dict(euler=1, midpoint=2, heun=2, rk4=4, ddim=1, ddim2=1.86, ddim3=2)}
CASES = [(script, solver) for script in ORDERS for solver in script.SOLVERS]
X0 = rand(6, 2, 3, 4, low=-0.72, high=0.72)
EPS = randn(6, 2, 3, 4, seed=1)
EARLY = rand(6, seed=2, low=0.01, high=0.4)
LATE = rand(6, seed=3, low=0.4)


def test_the_image_becomes_noise():
    """x_t is the image at t = 0, and the noise at t = 1. Blurring keeps e⁻⁵ of each to the other's
    end (its log-SNR is ±10), and so does a pixel of .5 at γ = 20. Catches an image that leaks.
    """
    x0 = 0.75 + X0 / 3
    for t, end in ((0, x0), (1, EPS)):
        times = full(t, 6)
        left = 0.03 if t else 0
        close(ddm.diffuse(x0, -x0, EPS, times), end, 0)
        close(angular.diffuse(x0, EPS, HALF_PI * times), end, 0, 1e-15)
        close(pixel_aware.diffuse(x0, EPS, 200 * t, 20.0, 200), end, 0, left)
        close(blurring.diffuse(x0, EPS, times), end, 0, 0.03)


@pytest.mark.parametrize("script, solver", CASES)
def test_n_steps_are_n_network_calls(script, solver):
    """N calls (midpoint, Heun 2 N, RK4 4 N), the first at t = 1, each yielded; the last step adds
    no noise. Catches "10 steps" that are 11, the printed T - 1/T, and a grain on the images.
    """
    each = {"midpoint": 2, "heun": 2, "rk4": 4}.get(solver, 1)
    stochastic = solver in ("ddm", "ancestral", "ddpm")
    x1 = EPS.float()
    for steps in (1, 2, 3, 10, 333):
        net, calls = recorded(lambda x, t: (torch.tanh(x), x / 2))
        *looks, (end, image, same) = script.walk(net, x1, steps, solver, generator=seeded())
        close([t for t, _, _ in looks], calls, 1e-6)
        assert len(calls) == steps * each and calls[0] == 1 and end == 0
        if script is blurring:
            close(calls, 1 - np.arange(steps) / steps, 1e-6)
        assert image is same and image.dtype == torch.float32
        assert image.isfinite().all()
        again = script.sample(net, x1, steps, solver, generator=seeded(1))
        assert torch.equal(image, again) == (steps == 1 or not stochastic)


@pytest.mark.parametrize("script, solver", [
    *CASES,
    (pixel_aware, "mean"),
    (pixel_aware, "literal")])
def test_image_i_is_a_function_of_its_own_seed(script, solver):
    """By a list of generators, one an image, it is the same in a batch of another size and order.
    Catches one generator for the whole batch, and what mixes its images.
    """

    def G(x, t, z):
        return pixel_aware.x_delta(torch.sigmoid(x + z[..., None, None]), 20.0)

    def R(x, scale, t):
        return x[:, None].expand(-1, 12, -1, -1, -1)

    def draw(*numbers):
        g = data.image_generators(5, numbers)
        x1 = data.randn(torch.empty(len(numbers), 3, 4, 6), g)
        if script is pixel_aware:
            options = dict(gamma=20.0, T=12, mode=solver)
            return script.sample(G, R, x1, 4, generator=g, **options)
        net = lambda x, t: (torch.tanh(x), x / 2)
        return script.sample(net, x1, 4, solver, generator=g)

    together = draw(0, 1, 2, 3)
    close(draw(2), together[[2]], 1e-6)
    close(draw(3, 0), together[[3, 0]], 1e-6)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("script, solver, order", [
    (script, *rule) for script, rules in ORDERS.items() for rule in rules.items()])
def test_deterministic_solvers_have_their_order(script, solver, order):
    """The ODE of a 1-D mixture keeps quantiles: its end is known. (h² ln 1/h is a little less than
    2; `ode3` is 2, by its ends.) Catches a wrong step, stage or history, right only at 10 steps.
    """
    for noise in ("sqrt", "linear") if script is ddm else (None,):
        options = dict(noise=noise, delta=1e-9) if noise else {}
        net = oracle(script, noise=noise)
        start, end = (
            MIXTURE.quantiles(100, *signal_and_noise(script, t, noise)) for t in (1.0, 0.0))
        coarse, fine = (
            script.sample(net, start, steps, solver, **options) - end for steps in (200, 400))
        assert abs(math.log2(coarse.norm() / fine.norm()) - order) < 0.1


# --------------------------------------------------------------------------------------------- ddm
#
# Schedule: H_t is the integral of h_t, from 0 to -x₀. The sampler's N times fall from 1 to 0.
# Loss: preconditioned outputs have one target of variance 1. One output names both. Table V.
# Steps: Eq. 11 is Gaussian conditioning, and steps compose. The deterministic step keeps its path.
# Sampling: outputs agree by the least change. Every attenuation samples and clips.

HS = pytest.mark.parametrize("h", list(ddm.ATTENUATIONS))
NOISES = pytest.mark.parametrize("noise", ["sqrt", "linear"])
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)          # ∫₋₁¹ f = Σ WEIGHTS f(NODES)


@pytest.mark.parametrize("h, rate", [
    ("constant", lambda t, c: c),
    ("linear", lambda t, a, c: a * t + c),
    ("quadratic", lambda t, a, b, c: a * t ** 2 + b * t + c),
    ("exponential", lambda t, a, c: torch.exp(a * t) + c),
    ("sine", lambda t, a: torch.sin(a * t))])
def test_ddm_attenuation_is_the_integral_of_h(h, rate):
    """Eq. 6: H_t = ∫₀ᵗ h, with h as the papers write it, by quadrature; and x₀ + H₁ = 0. Catches
    a wrong closed form, and a φ that leaves some of the image at t = 1.
    """
    phi = ddm.draw_phi(X0, h, seeded())
    parts = phi.chunk(ddm.ATTENUATIONS[h], dim=1)
    integral = 0
    for node, weight in zip(NODES, WEIGHTS):
        t = 0.3 + 0.3 * node
        integral = integral + 0.3 * weight * rate(t, *parts)
    close(ddm.H(phi, full(0.6, 6), h), integral)
    close(ddm.H(phi, full(1, 6), h), -X0)
    close(ddm.image_of(phi, h), X0)


@pytest.mark.parametrize("grid, by_hand", [
    ("uniform", [1, 0.75, 0.5, 0.25, 0]),
    ("quadratic", [1, 0.5625, 0.25, 0.0625, 0]),
    ("flow", [1, (1205 ** 0.5 - 7) ** 2 / 34 ** 2, (149 ** 0.5 - 7) ** 2 / 10 ** 2,
              (53 ** 0.5 - 7) ** 2 / 2 ** 2, 0])])
def test_ddm_times_fall_from_one_to_zero_and_stay_above_delta(grid, by_hand):
    """Algorithm 2: N times for the network, in [δ, 1] and no two alike, and then exactly 0.
    By hand: where √t/(1 - t + √t) is 17/24, 10/24 and 3/24. Catches an off-by-one, and a network
    that is asked below δ.
    """
    close(ddm.times(4, grid), by_hand)
    for steps in (1, 2, 3, 31, 32, 333, 2000):
        times = np.array(ddm.times(steps, grid, 1e-3))
        assert len(times) == steps + 1
        assert (np.diff(times) < 0).all()
        assert times[0] == 1 and times[-2] >= 1e-3 and times[-1] == 0


@NOISES
@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_ddm_preconditioned_outputs_have_one_target_of_variance_one(sigma, noise):
    """x_t/√V, the input, is x₀/σ_d and ε turned by an angle; turned by 90° more it is the target,
    v. By "edm" weights, Eq. 10 is its squared error if σ_d = 1. Catches any wrong factor.
    """
    a, b = signal_and_noise(ddm, EARLY, noise)
    angle = like_image(torch.atan2(b, a * sigma))
    seen = angle.cos() * X0 / sigma + angle.sin() * EPS
    v = angle.cos() * EPS - angle.sin() * X0 / sigma

    def model(off):
        def net(x, t):
            close(x, seen)
            return v + off,

        return ddm.predictor(net, sigma_data=sigma, noise=noise)

    xt = ddm.diffuse(X0, -X0, EPS, EARLY, noise=noise)
    phi, eps = model(0)(xt, EARLY)
    close(phi, -X0)
    close(eps, EPS)
    if sigma == 1:
        losses = ddm.loss(model(X0), X0, -X0, EPS, EARLY, noise=noise)
        close(losses, 2 * X0.square().mean((1, 2, 3)))


@NOISES
@pytest.mark.parametrize("predict, precondition, h", [
    ("eps", True, "constant"),
    ("x0", True, "constant"),
    *(("x0", False, h) for h in ddm.ATTENUATIONS)])
def test_ddm_one_output_means_a_consistent_pair(predict, precondition, h, noise):
    """Eq. 20: the φ̂ and ε̂ of one output add up to x_t, at δ as at 1. Catches a pair that forgets
    x_t, and the 0/0 of an ε-network.
    """
    t = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999, 1.0]).double()
    output = torch.tanh(EPS).repeat(1, ddm.ATTENUATIONS[h], 1, 1)
    options = dict(h=h, noise=noise)
    model = ddm.predictor(lambda x, t: [output], predict, precondition, **options)
    phi, eps = model(EPS, t)
    image = ddm.image_of(phi, h)
    close(ddm.diffuse(image, phi, eps, t, **options), EPS)


@pytest.mark.parametrize("norm, of_image, of_noise", [
    ("l2", 6, 27),
    ("l1", 3, 9),
    ("l1+l2", 9, 36)])
def test_ddm_loss_is_of_what_predict_names(norm, of_image, of_noise):
    """Eq. 10 and Table VI at t = 1/2, where λ is 1.5 and 3. One example of six has errors of 2 in
    the image and 3 in the noise. Catches a term that is left on, and [B] times [B, 1].
    """
    one = torch.eye(6).double()[2]
    outputs = 2 * like_image(one) - X0, EPS + 3 * like_image(one)
    truth = X0, -X0, EPS, full(0.5, 6)
    costs = dict(x0=of_image, eps=of_noise, both=of_image + of_noise)
    for predict, cost in costs.items():
        options = dict(norm=norm, predict=predict)
        close(ddm.loss(lambda x, t: outputs, *truth, **options), cost * one)


@pytest.mark.parametrize("kind, by_hand", [
    ("one", [[1, 1], [1, 1]]),
    ("inverse", [[2, 4], [2, 4 / 3]]),
    ("exponential", np.exp([[0.5, 0.25], [0.5, 0.75]])),
    ("edm", [[1.5, 3.25], [3, 13 / 9]])])
def test_ddm_weights_are_those_of_table_v(kind, by_hand):
    """ADM's λ₁ and λ₂ at t = 1/2 and 1/4, by hand; and finite on all of [0, 1]. Catches λs that are
    swapped, a missing square, an infinite end.
    """
    t = torch.tensor([0.5, 0.25])
    close(ddm.loss_weights(t, kind), by_hand, 1e-6)
    for weights in ddm.loss_weights(torch.linspace(0, 1, 1001), kind):
        assert torch.isfinite(weights).all() and weights.min() > 0


@NOISES
@HS
def test_ddm_ode_step_with_the_truth_keeps_its_path(h, noise):
    """Eq. 6, 7: x_t goes from x₀ to ε by any attenuation; with the true φ and ε, a step of any size
    stays on this path. Catches an image that leaks, and a growth of another deviation.
    """
    phi = ddm.draw_phi(X0, h, seeded())
    options = dict(h=h, noise=noise)
    start, early, late, end = (
        ddm.diffuse(X0, phi, EPS, t, **options)
        for t in (full(0, 6), EARLY, LATE, full(1, 6)))
    close(start, X0)
    close(end, EPS)
    close(ddm.ode_step(late, phi, EPS, LATE, EARLY, **options), early)


@NOISES
@HS
def test_ddm_reverse_step_is_gaussian_conditioning_and_composes(h, noise):
    """Eq. 11: x_r given x_t and x₀, for a Wiener process (cov: the variance at the earlier time).
    It keeps Eq. 7, so all steps compose. Catches any coefficient. (1j parts off the deviation.)
    """
    phi = ddm.draw_phi(X0, h, seeded())
    power = 2 if noise == "linear" else 1
    at_t = X0 + ddm.H(phi, LATE, h)
    at_r = X0 + ddm.H(phi, EARLY, h)
    v_t = like_image(LATE ** power)
    v_r = like_image(EARLY ** power)

    def step(x):
        eps = (x - at_t) / v_t.sqrt()
        return ddm.reverse_step(x, phi, eps, LATE, LATE - EARLY, 1j, h, noise)

    mean, variance = conditioned(EPS, at_r, v_r, at_t, v_t, v_r)
    close(step(EPS).real, mean)
    close(step(EPS).imag ** 2, variance.expand_as(EPS))
    slope = step(EPS + 1).real - mean
    close(slope ** 2 * v_t + variance, v_r.expand_as(EPS))


@NOISES
def test_ddm_projection_is_the_least_change(noise):
    """The outputs then agree with x_t = a x̂₀ + b ε̂, and have moved along (a, b) alone. Catches a
    wrong normal, and a residual that is taken out of one of them.
    """
    x = randn(6, 2, 3, 4, seed=4)
    phi, eps = ddm.project(x, -X0, EPS, LATE, noise=noise)
    a, b = map(like_image, signal_and_noise(ddm, LATE, noise))
    close(b * eps - a * phi, x)
    close(b * (-phi - X0), a * (eps - EPS))


@NOISES
@HS
@pytest.mark.parametrize("solver", ["ddm", "ode"])
def test_ddm_every_attenuation_samples_and_the_constant_one_clips(solver, h, noise):
    """By the true φ every attenuation ends at its image; clip keeps wild ones in [-1, 1]. Catches
    what knows the constant one only, and an ε̂ as it was beside a clipped or a projected φ̂.
    """
    phi = ddm.draw_phi(X0, h, seeded())
    off = float(h != "constant")          # there the projection changes both, and here ε̂ alone
    options = dict(solver=solver, h=h, noise=noise, heads="project")
    true = lambda x, t: (phi, ddm.noise_of(x, phi, t, h, noise) + off)
    wild = lambda x, t: (50 * phi, x)
    close(ddm.sample(true, EPS, 7, **options), X0, 1e-10)
    if h == "constant":
        close(ddm.sample(true, EPS, 7, clip=True, **options), X0, 1e-10)
        for _, _, image in ddm.walk(wild, EPS, 3, clip=True, **options):
            assert image.abs().max() <= 1 + 1e-9


def test_ddm_algorithm_2_takes_outputs_raw_and_the_others_make_them_agree():
    """One step from t = 1, by hand, of outputs that are φ̂ and ε̂ as printed, but do not agree with
    x₁. Catches outputs that are swapped, and another default of `heads`.
    """
    phi, eps = randn(2, *X0.shape, seed=5)
    net = ddm.predictor(lambda x, t: (phi, eps), precondition=False)
    images = dict(ddm=EPS - phi - eps, ode=-phi, ode2=-phi, ode3=-phi)
    for solver, image in images.items():
        close(ddm.sample(net, EPS, 1, solver), image)


@pytest.mark.parametrize("call, wrong", [
    (ddm.predictor, dict(h="linear")),
    (ddm.predictor, dict(predict="eps", precondition=False)),
    (ddm.sample, dict(solver="euler")),
    (ddm.sample, dict(heads="image")),
    (ddm.sample, dict(grid="cubes")),
    (ddm.sample, dict(solver="ode2", h="sine")),
    (ddm.sample, dict(clip=True, h="sine")),
    (blurring.sample, dict(solver="euler")),
    (blurring.sample, dict(grid="flow"))])
def test_what_cannot_be_is_refused(call, wrong):
    """A ValueError, before the network is called. Catches 0/0 at t = 1, and an idle flag."""
    inputs = (None,) if call is ddm.predictor else (None, EPS, 2)
    with pytest.raises(ValueError):
        call(*inputs, **wrong)


# ---------------------------------------------------------------------------------------- blurring
#
# Schedule: the cosine transform, and heat as a Gaussian blur in pixels; how it grows; the noise.
# Chain: transitions, posterior and ddim are those of one Markov chain, in every frequency.
# Loss: from v or x₀ follow image and noise; an answer costs its own squared error.
# Sampling: either output draws the same image, and ddim's extremes are known.

BLUR = pytest.mark.parametrize("blur", [
    dict(sigma_blur_max=0.0),
    dict(sigma_blur_max=1.0),
    dict(sigma_blur_max=20.0),
    dict(sigma_blur_max=10.0, schedule="sin", d_min=0.01)])


def cosines(n):
    """The orthonormal DCT-II as a matrix, by its definition."""
    i = np.arange(n)
    waves = np.cos(np.pi / n * (i + 0.5) * i[:, None])
    scale = np.where(i == 0, 1, 2) / n
    return waves * np.sqrt(scale)[:, None]


def test_blurring_dct_is_the_sum_of_cosines():
    """Of any height and width, back and forth, in float32 as good as rounding allows. Catches
    another type or scale, swapped axes, and a matrix that is made in float32.
    """
    x = randn(2, 3, 5, 128)
    u = np.einsum("kh, lw, bchw -> bckl", cosines(5), cosines(128), x)
    close(blurring.dct(x), u)
    close(blurring.idct(blurring.dct(x)), x)
    close(blurring.dct(x.float()), u, 0, 6e-6)
    C = blurring.dct_matrix(128, torch.float32, x.device)
    close(C, cosines(128), 0, 1e-8)


@pytest.mark.parametrize("sigma", [1.5, 3.0, 5.0])
def test_blurring_is_a_gaussian_blur_in_pixels(sigma):
    """Eq. 9: heat for a time σ²/2 turns an impulse into exp(-r²/2σ²)/2πσ². Catches Appendix A's
    σ_t², and λ without its square or its π.
    """
    impulse = torch.zeros(1, 1, 61, 71).double()
    impulse[0, 0, 30, 35] = 1
    options = dict(sigma_blur_max=sigma, d_min=0.0)
    z = blurring.diffuse(impulse, 0 * impulse, full(1, 1), **options)
    a, _ = signal_and_noise(blurring, 1.0)
    rows = torch.arange(61)[:, None] - 30
    columns = torch.arange(71) - 35
    gaussian = torch.exp(-(rows ** 2 + columns ** 2) / (2 * sigma ** 2))
    close(z[0, 0] / a, gaussian / (2 * math.pi * sigma ** 2), 0, 2e-5)


def test_blurring_times_are_the_papers_or_dense_near_the_image():
    """T, T - 1/T, ..., 1/T and 0; or u^1.75 of these: (1/4)^1.75 = 2^-3.5. Catches a time less."""
    close(blurring.times(4), [1, 0.75, 0.5, 0.25, 0])
    close(blurring.times(4, "dense"), [1, 0.75 ** 1.75, 0.5 ** 1.75, 2 ** -3.5, 0])


def test_blurring_blur_grows_to_its_maximum_and_leaves_d_min():
    """Eq. 26, Table 4 and Eq. 27, by hand: d is 1 at t = 0, and at last d_min.
    Catches a missing square, and exp(-λτ) + d_min.
    """
    t = torch.tensor([0.0, 0.5, 1.0]).double()
    close(blurring.sigma_blur(t), [0, 10, 20])
    close(blurring.sigma_blur(t, 20.0, "sin"), [0, 200 ** 0.5, 20])
    alpha, _ = blurring.alpha_sigma(t, (16, 32))
    a, _ = map(like_image, signal_and_noise(blurring, t))
    d = (alpha / a)[:, 0]
    close(d[0], 1)
    close(d[1, 0, 1], 0.001 + 0.999 * math.exp(-50 * (math.pi / 32) ** 2))
    close(d[2, -1, -1], 0.001)
    alpha, _ = blurring.alpha_sigma(t, (16, 32), schedule="sin")
    damped = 0.001 + 0.999 * math.exp(-100 * (math.pi / 32) ** 2)
    close(alpha[1, 0, 0, 1] / a[1].item(), damped)


def test_blurring_noise_schedule_is_that_of_the_appendix():
    """Its log-SNR, by tan, runs from 10 to -10, and a² + σ² = 1. Without blur z_t is a x₀ + σ ε, as
    in Eq. 1 to 7. Catches a clipped log-SNR, another schedule, and blur that does not switch off.
    """
    t = torch.linspace(0, 1, 6).double()
    a, sigma = blurring.noise_schedule(t)
    low = math.atan(math.exp(-5))
    high = math.atan(math.exp(5))
    log_snr = -2 * torch.tan(low + (high - low) * t).log()
    close(2 * (a / sigma).log().flatten(), log_snr, 1e-9)
    close(a ** 2 + sigma ** 2, 1)
    zt = blurring.diffuse(X0, EPS, t, sigma_blur_max=0.0)
    close(zt, a * X0 + sigma * EPS)


@BLUR
def test_blurring_chain_and_posterior_are_gaussian_conditioning(blur):
    """Eq. 16 takes the marginal at s to that at t, so transitions compose. Eq. 18, 19 condition by
    cov(u_s, u_t) = α_t|s σ_s², and Eq. 24 has their mean. ddim keeps x and ε. Catches any
    coefficient; Appendix A has three wrong ones.
    """
    s, t = torch.triu_indices(9, 9, 1).double() / 8
    alpha_s, sigma_s = blurring.alpha_sigma(s, (8, 12), **blur)
    alpha_t, sigma_t = blurring.alpha_sigma(t, (8, 12), **blur)
    alpha_ts, sigma2_ts = blurring.transition(t, s, (8, 12), **blur)
    covariance = alpha_ts * sigma_s ** 2
    close(alpha_ts * alpha_s, alpha_t)
    close(alpha_ts * covariance + sigma2_ts, sigma_t.expand_as(alpha_t) ** 2)
    assert sigma2_ts.min() > 0

    ux, u_eps = randn(2, 36, 1, 8, 12)
    ut = alpha_t * ux + sigma_t * u_eps
    mean, variance = conditioned(
        ut, alpha_s * ux, sigma_s ** 2, alpha_t * ux, sigma_t ** 2, covariance)
    law = blurring.posterior(ut, ux, t, s, **blur)
    close(law[0], mean, 1e-10)
    close(law[1], variance)
    close(blurring.posterior_mean_from_noise(ut, u_eps, t, s, **blur), mean, 1e-9)

    close(blurring.ddim_step(ut, ux, t, s, **blur), alpha_s * ux + sigma_s * u_eps, 1e-10)


@BLUR
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_blurring_outputs_mean_image_and_noise_and_cost_their_squared_error(predict, blur):
    """Eq. 21, 22: the true answer is read as x₀ and ε; Eq. 25: a wrong one costs its squared error
    in pixels. Catches v's determinant, a² d + σ² and not 1, a weight, and examples that mix.
    """
    t = torch.linspace(0, 1, 6).double()
    a, sigma = map(like_image, signal_and_noise(blurring, t))
    truth = dict(eps=EPS, x0=X0, v=a * EPS - sigma * X0)[predict]
    zt = blurring.diffuse(X0, EPS, t, **blur)

    def model(off):
        def net(z, t):
            close(z, zt)
            return [truth + off]

        return blurring.predictor(net, predict, **blur)

    *image, noise = model(0)(zt, t)
    close(noise, EPS, 1e-10)
    assert len(image) == (predict != "eps")
    for x0 in image:
        close(x0, X0, 1e-10)
    losses = blurring.loss(model(X0), X0, EPS, t, predict, **blur)
    close(losses, X0.square().mean((1, 2, 3)), 1e-9)


@pytest.mark.parametrize("solver", blurring.SOLVERS)
def test_blurring_either_output_draws_the_same_image(solver):
    """Eq. 22: true ε̂ or true x̂₀ draw one image. Without noise it is the path's end. Catches a
    wrong conversion, and another blur.
    """
    blur = dict(sigma_blur_max=5.0, schedule="sin", d_min=0.01)
    net = blurring.predictor(lambda z, t: [X0], "x0", **blur)
    alone = lambda z, t: net(z, t)[1:]

    def draw(net, *options):
        return blurring.sample(net, EPS, 9, *options, generator=seeded(), **blur)

    image = draw(net, solver)
    close(draw(net, solver, True), image, 1e-9)
    close(draw(alone, solver), image, 1e-9)
    if solver != "ancestral":
        eps, = alone(EPS, full(1, 6))
        end = blurring.diffuse(X0, eps, full(0, 6), **blur)
        close(image, end, 1e-9)


# ----------------------------------------------------------------------------------------- angular
#
# Schedule: ᾱ is the product of 1 - β. The angles of sampling and of training are the schedule's.
# Circle: x is the older models' x_t. The velocity is its derivative. Projected outputs keep it.
# Loss: every output learns what `predict` names. γ adds weight to the velocity's error alone.
# Steps: DDPM's is Bayes' rule. DDIM is a rotation; ddim2 follows a slope; cold's rule is DDIM.
# Sampler: what each solver leaves of true outputs; it clips, counts its calls, and refuses.

PIXEL = torch.ones(1, 1, 1, 1, dtype=torch.float64)


def arc():
    """Images, noises, and angles up to π/2."""
    x0 = rand(7, 2, 3, 4, seed=1)
    eps = randn(7, 2, 3, 4, seed=2)
    return x0, eps, HALF_PI * rand(7, low=0)


def ddpm(T=1000):
    """ᾱ_0 ... ᾱ_T of DDPM's linear β."""
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    logs = torch.log1p(-betas).cumsum(0)
    return nn.functional.pad(logs, (1, 0)).exp()


@pytest.mark.parametrize("T", (1, 4, 1000))
def test_angular_betas_multiply_to_alpha_bar(T):
    """ᾱ_i = Π (1 - β) from ᾱ_0 = 1 (Eq. 3). Catches swapped ends, and β_0 for β_1."""
    i = torch.arange(T + 1)
    even = i.double() / T
    curves = dict(
        angular=(HALF_PI * even).cos() ** 2,
        linear=ddpm(T))
    assert set(curves) == set(angular.SCHEDULES)
    for schedule, curve in curves.items():
        betas = angular.beta(i[1:], T, schedule)
        close(angular.alpha_bar(i, T, schedule), curve)
        close((1 - betas).cumprod(0), curve[1:])


def test_angular_sampling_takes_the_schedules_angles():
    """Even from `start` on, or every fifth of DDPM's. Catches another schedule than training's."""
    close(angular.angles(2, start=0.5), [HALF_PI / 2, HALF_PI / 4, 0])
    linear = torch.tensor(angular.angles(200, "linear"))
    every_fifth = ddpm()[::5]
    close(linear.cos() ** 2, every_fifth.flip(0), 1e-6)


def test_angular_training_covers_every_angle():
    """Even angles, or DDPM's thousand, each as often. Catches another schedule than sampling's."""
    even = angular.draw_angles(40_000, "angular", seeded())
    close(even.sort()[0], torch.linspace(0, HALF_PI, 40_000), 0.02)
    drawn = angular.draw_angles(200_000, "linear", seeded())
    values, counts = drawn.unique(return_counts=True)
    close(values.cos() ** 2, ddpm()[1:], 1e-6)
    close(counts, 200, 0, 85)


def test_angular_x_is_that_of_older_models():
    """Eq. 9 is √ᾱ x₀ + √(1 - ᾱ) ε, with ᾱ made of β. Catches cos η for cos²η."""
    x0, eps, _ = arc()
    i = torch.arange(1, 8)
    bar = like_image((1 - angular.beta(i, 7)).cumprod(0))
    x = angular.diffuse(x0, eps, HALF_PI / 7 * i.double())
    close(x, bar.sqrt() * x0 + (1 - bar).sqrt() * eps, 1e-7)


def test_angular_velocity_is_the_derivative():
    """Eq. 10 in η, by automatic differentiation. Catches a sign, and a factor η' = π/2T."""
    x0, eps, eta = arc()
    path = functools.partial(angular.diffuse, x0, eps)
    _, slope = torch.autograd.functional.jvp(path, eta, full(1, 7))
    close(angular.velocity(x0, eps, eta), slope)


def test_angular_projection_is_nearest_and_keeps_the_velocity():
    """Outputs move along (cos η, sin η) to the arc through x. Catches a move that Euler sees."""
    R, E, eta = arc()
    x = randn(7, 2, 3, 4)
    pair = angular.project(x, R, E, eta)
    close(angular.diffuse(*pair, eta), x)
    close(angular.velocity(*pair, eta), angular.velocity(R, E, eta))


def test_angular_true_outputs_are_the_true_image_and_noise():
    """One output gives both (Eq. 6, 8), in the loss too. Catches swapped ones, and η told for t."""
    x0, eps, eta = arc()
    x = angular.diffuse(x0, eps, eta)
    named = dict(both=(x0, eps), x0=[x0], eps=[eps])
    for predict, outputs in named.items():
        net, calls = recorded(lambda x, t: outputs)
        model = angular.predictor(net, predict)
        image, noise = model(x, eta / HALF_PI)
        close(image, x0, 1e-9)
        close(noise, eps, 1e-9)
        close(angular.loss(model, x0, eps, eta), 0)
        close(calls, eta[[0, 0]] / HALF_PI)


def test_angular_losses_add_up_on_the_circle():
    """|e_R|² + |e_E|² = |residual|² + |e_v|²; γ weighs e_v alone. Catches a v in units of t."""
    x0, eps, eta = arc()
    R = randn(7, 2, 3, 4, seed=5)
    E = randn(7, 2, 3, 4, seed=6)
    none, one, three = (
        angular.loss(lambda x, t: (R, E), x0, eps, eta, gamma=gamma)
        for gamma in (0, 1, 3))
    residual = angular.diffuse(R - x0, E - eps, eta)
    of_residual = residual.square().mean((1, 2, 3))
    close(one - none, none - of_residual)
    close(three - none, 3 * (one - none))


@pytest.mark.parametrize("predict, norm, by_hand", (
    ("x0", "l2", 4),
    ("eps", "rms", 3),
    ("both", "rms", 2 + 3 + 0.5 * 1.5980762),
    ("both", "l2", 4 + 9 + 0.5 * 1.5980762 ** 2)))
def test_angular_loss_supervises_what_predict_names(predict, norm, by_hand):
    """Eq. 5, 7, 12 for errors of 2 and 3 at π/6, or 0. Catches a term left on, a NaN gradient."""
    x0, eps, _ = arc()
    eta = full(math.pi / 6, 7)
    off = torch.tensor(1.0, requires_grad=True)
    for size in (1, 0):
        outputs = x0 + 2 * size * off, eps + 3 * size * off
        losses = angular.loss(lambda x, t: outputs, x0, eps, eta, predict, 0.5, norm)
        close(losses.detach(), size * by_hand, 1e-6)
        losses.sum().backward()
    assert off.grad.isfinite()


@pytest.mark.parametrize("eta, s", (
    (HALF_PI, 1.4),
    (HALF_PI, 0.1),
    (1.2, 1.1),
    (0.7, 0.0)))
def test_angular_ancestral_step_is_bayes_rule(eta, s):
    """Eq. 3 by conditioning x_s on x, for any step, also from π/2. Catches the ε̂-form's 0/0."""
    x0 = rand(1, 2, 3, 4)
    x = randn(1, 2, 3, 4)
    variance = math.sin(s) ** 2
    covariance = math.cos(eta) / math.cos(s) * variance
    mean, variance = conditioned(
        x, math.cos(s) * x0, variance,
        math.cos(eta) * x0, math.sin(eta) ** 2, covariance)
    step = angular.ancestral_step(x, x0, eta, s, 1j)          # imaginary: what the noise adds
    close(step.real, mean)
    close(step.imag ** 2, variance)


def test_angular_ddim_is_a_rotation_and_forgets_nothing():
    """A step is cos h x - sin h v; raw, x̂₀ alone. Catches a projection of one output, or none."""
    R, E, x = (randn(5, 2, 3, 4, seed=seed) for seed in range(3))
    h = 0.4
    v = angular.velocity(R, E, full(h, 5))

    def step(*rule):
        return angular.sample(lambda x, t: (R, E), x, 1, *rule, start=h / HALF_PI)

    rotated = math.cos(h) * x - math.sin(h) * v
    close(step("ddim", "project"), rotated)
    close(step("ddim", "raw"), R)
    close(step("euler", "project"), x - h * v)
    close(step("euler", "raw"), x - h * v)


@pytest.mark.parametrize("solver", ("ddim2", "ddim3"))
def test_angular_a_slope_in_flow_time_is_followed_to_the_image(solver):
    """If x̂₀ is linear in τ = 1/(1 + cot η), the image is the line's end at 0, however rough the
    steps. Catches a wrong sign, τ of another call, and the first-order step in place of the last.
    """
    x0, slope, _ = arc()
    net = lambda x, t: (x0 + slope / (1 + 1 / like_image(HALF_PI * t).tan()), x)
    for N in (2, 3, 10):
        close(angular.sample(net, x0, N, solver, "raw"), x0)


def test_angular_cold_rule_is_ddim_of_an_image_network():
    """Cold diffusion makes ε̂ of x̂₀ (Eq. 8, Sec. 4), clipped or not. Catches the network's ε̂."""
    net = lambda x, t: (3 * t * torch.tanh(x), 100 * x)
    model = angular.predictor(net, "x0")
    for clip in (False, True):
        cold = angular.sample(net, PIXEL, 7, "cold", clip=clip)
        close(cold, angular.sample(model, PIXEL, 7, "ddim", clip=clip))


@pytest.mark.parametrize("N", (1, 4, 10, 100))
def test_angular_true_outputs_leave_what_quadrature_leaves(N):
    """Sums of sines and cosines; DDIM is exact. Catches any wrong weight or stage of a solver."""
    h = HALF_PI / N
    middle = h / 2 / math.sin(h / 2)
    ends = h / 2 / math.tan(h / 2)
    simpson = (2 * middle + ends) / 3
    shares = dict(midpoint=middle, heun=ends, rk4=simpson, ddim=1, ddim2=1, ddim3=1)
    x0, eps, _ = arc()
    images = {solver: share * x0 + (1 - share) * eps for solver, share in shares.items()}
    images["euler"] = images["heun"] + h / 2 * (x0 + eps)
    for solver, image in images.items():
        for heads in ("project", "raw"):
            got = angular.sample(lambda x, t: (x0, eps), eps, N, solver, heads)
            close(got, image)


def test_angular_clipping_keeps_every_estimate_in_range():
    """And leaves true outputs as they are. Catches a clip that the projection undoes."""
    x0, eps, _ = arc()
    for solver in angular.SOLVERS:
        wild = lambda x, t: (50 * x, x)
        walk = angular.walk(wild, eps, 9, solver, clip=True)
        assert max(estimate.abs().max() for t, _, estimate in walk if t) == 1
    for solver in ("ddim", "ddim2", "ddim3", "cold"):                  # the others leave the arc
        image = angular.sample(lambda x, t: (x0, eps), eps, 5, solver, clip=True)
        close(image, x0)


@pytest.mark.parametrize("solver, last, count", (
    ("ddim", None, 3),
    ("midpoint", None, 6),
    ("rk4", None, 12),
    ("heun", "midpoint", 6),
    ("rk4", "midpoint", 10)))
def test_angular_calls_are_the_number_that_is_printed(solver, last, count):
    """Of 3 steps; Heun and RK4 ask at η = 0, if there is no `last`. Catches a wrong count."""
    net, calls = recorded(oracle(angular))
    angular.sample(net, PIXEL, 3, solver, last=last)
    assert len(calls) == angular.calls(solver, 3, last) == count
    assert (0 in calls) == (count == 12)


@pytest.mark.parametrize("wrong", (
    dict(steps=0),
    dict(steps=1001, schedule="linear"),
    dict(schedule="cosine"),
    dict(start=0),
    dict(start=1.5),
    dict(solver="rk5"),
    dict(heads="both"),
    dict(last="midpoint"),
    dict(solver="heun", last="rk4")))
def test_angular_impossible_walks_are_refused(wrong):
    """A ValueError, before the network is called. Catches a flag that is quietly ignored."""
    with pytest.raises(ValueError):
        angular.sample(None, PIXEL, **dict(steps=9) | wrong)


# ------------------------------------------------------------------------------------- pixel_aware
#
# Forward: ᾱ is the product of α. Noises are those of one chain; what is known of them, Bayes' rule.
# Networks: heads do not mix, see what they should, and are masked. The VAE's KL and its range.
# Loss: what each network is asked for, averaged over the heads that are active.
# Sampler: Algorithm 1 is a sum over its noises. Conditional means reconstruct what heads name. A
#   pass is a call of each network. A jump between passes keeps the noise, if x̂₀ stays.


def pixels(*shape, seed=0):
    """Even draws in the paper's range."""
    return rand(*shape, seed=seed, low=0.004, high=1)


def kept(x0, gamma, t=1):
    """ᾱ at t = i/T."""
    return torch.exp(-gamma * t * x0)


@pytest.mark.parametrize("gamma", (1, 50))
def test_pixel_aware_alphas_multiply_to_alpha_bar(gamma):
    """Eq. 7 to 9, for γ > T too, and 1 - ᾱ_1 in float32. Catches a second /T, and exp for expm1."""
    x0 = pixels(3, 1, 4, 4)
    i = torch.tensor([0, 3, 7])
    scale = pixel_aware.x_delta(x0, gamma)
    alpha = pixel_aware.alpha(scale, 7)
    close(alpha ** 7, kept(x0, gamma))
    close(pixel_aware.alpha_bar(scale, i, 7), alpha ** like_image(i))
    rate = pixel_aware.rate_of(scale.float(), 5000)
    variance = 1 - kept(x0, gamma, 1 / 5000)
    close(pixel_aware.added(rate, 1), variance, 1e-4, 0)


@pytest.mark.parametrize("gamma", (2, 50))
def test_pixel_aware_trajectory_noise_is_the_chains(gamma):
    """Eq. 2, step by step from the same draws, has them in Eq. 9. Catches independent noises."""
    x = x0 = pixels(2, 3, 2, 2)
    eps = pixel_aware.trajectory_noise(x0, gamma, 9, seeded(3))
    alpha = kept(x0, gamma, 1 / 9)
    z = randn(2, 9, 3, 2, 2, seed=3)
    for j in range(9):
        x = alpha.sqrt() * x + (1 - alpha).sqrt() * z[:, j]
        close(pixel_aware.diffuse(x0, eps[:, j], j + 1, gamma, 9), x)


@pytest.mark.parametrize("i", (1, 7, 10))
def test_pixel_aware_noises_have_the_right_correlations(i, monkeypatch):
    """√(u_i/u_j), by unit vectors for white noise; so is E[ε̃_j | ε̃_i]. Catches a second ε̃_i."""
    unit = torch.eye(5, dtype=torch.float64)
    monkeypatch.setattr(data, "randn", lambda like, _: unit.view(like.shape))
    heads = torch.tensor([2, 3, 7, 12])
    x0 = like_image(full(0.3, 5))
    steps = torch.full((5,), i)
    own, others = pixel_aware.draw_trajectory(x0, steps, heads, 20, 12)
    rows = torch.cat([own[:, None], others], 1)
    rows = rows.flatten(1)
    steps = torch.tensor([i, *heads])
    u = torch.expm1(0.5 * steps.double())
    ratio = u / u[:, None]
    correlation = ratio.minimum(1 / ratio).sqrt()
    close(rows.T @ rows, correlation)
    known = heads <= i
    expected = pixel_aware.expected_noise(PIXEL, i, heads[known], 0.5 * PIXEL)
    close(expected.flatten(), correlation[0, 1:][known])


@pytest.mark.parametrize("i, s", ((9, 8), (9, 4), (2, 1), (9, 0)))
def test_pixel_aware_posterior_and_guess_are_bayes_rule(i, s):
    """Eq. 4 of any jump, and x₀ ~ N(x̂₀, .1²) once x_i is seen. Catches noise in the last step."""
    x0 = pixels(2, 1, 3, 3)
    xi = randn(2, 1, 3, 3)
    bar = kept(x0, i)
    bar_s = kept(x0, s)
    covariance = (bar / bar_s).sqrt() * (1 - bar_s)
    seen = bar.sqrt() * x0
    before = bar_s.sqrt() * x0
    law = conditioned(xi, before, 1 - bar_s, seen, 1 - bar, covariance)
    mean, variance = pixel_aware.posterior(xi, x0, x0, i, s)
    close(mean, law[0])
    close(variance, law[1])
    covariance = 0.01 * bar.sqrt()
    law = conditioned(xi, x0, 0.01, seen, 1 - 0.99 * bar, covariance)
    mean, std = pixel_aware.guess(xi, x0, i, x0, 0.1)
    close(mean, law[0])
    close(std ** 2, law[1])


@torch.no_grad()
def test_pixel_aware_heads_are_separate_networks():
    """Grouped layers are T networks, or a few. Catches groups that mix two heads' channels."""
    h = randn(2, 8, 4, 4)
    heads = pixel_aware.Heads(8, 3, 5).double()
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    every = heads(h, torch.arange(1, 6))
    few = heads(h, torch.tensor([2, 5]))
    close(few, every[:, [1, 4]])
    for j in range(5):
        one = pixel_aware.Heads(8, 3, 1).double()
        for own, whole in zip(one.parameters(), heads.parameters()):
            own.copy_(whole.split(3)[j])
        z = one.norm(one.first(h))
        z = one.second(nn.functional.silu(z))
        close(every[:, j], z + one.skip(h))


@pytest.mark.parametrize("grid", pixel_aware.GRIDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_pixel_aware_mask_keeps_the_heads_up_to_i(dtype, grid):
    """Eq. 14: Z^j is 0 for j > i, and Z^i is not. Catches j < i, and a step lost in rounding t."""
    times = pixel_aware.place(torch.arange(1, 778).double(), 777, grid)
    i = 777 * (times / 777).to(dtype)
    raw = torch.ones(777, 777, 1, 1, 1, dtype=dtype)
    active = torch.ones(777, 777).tril() > 0
    xi = raw[0]
    times = times.to(dtype)
    for guess in ((), (xi, xi)):
        Z = pixel_aware.read_heads(raw, xi, xi / 99, i, times, *guess)
        assert (Z.flatten(1) != 0).equal(active)


VAES = pytest.mark.parametrize("vae", ("conditional", "denoising"))


def tiny_model(**changes):
    """A small PixelAware of which no weight is 0, and x_i, t, z, the truth for it."""
    torch.manual_seed(0)
    arguments = dict(
        channels=3, size=8, width=8, mult=(1, 1), blocks=1, attention=(), dropout=0, T=6,
        gamma=20, grid="uniform", code=32, predict="x0")
    net = pixel_aware.PixelAware(**arguments, **changes)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    xi, truth = torch.rand(2, 2, 3, 8, 8)
    return net, xi, torch.tensor([0.5, 1]), torch.randn(2, 32), truth


@VAES
@pytest.mark.parametrize("scale", ("delta", "image"))
def test_pixel_aware_networks_see_what_they_should(vae, scale):
    """R sees x_i, bright x̂_δ and t, and teaches G nothing. Catches a layer that is never used."""
    net, xi, t, z, truth = tiny_model(vae=vae, scale=scale)
    heads = torch.arange(1, 7)
    bright = kept(1 - truth / 20, 20)
    given = []
    net.parallel.H.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1]))
    outputs = net.parallel(xi, bright, t, heads)
    close(given[0], 2 * torch.cat([bright, 1 - truth / 20], 1) - 1, 1e-5)    # both in [-1, 1]
    for others in ((xi.flip(0), bright, t), (xi, bright.flip(0), t), (xi, bright, t.flip(0))):
        assert not outputs.allclose(net.parallel(*others, heads))
    raw, kl, shown, outputs = net(xi, t, z, truth, heads)
    close(shown, pixel_aware.read_scale(raw.detach(), scale, 20))
    outputs.square().sum().backward()
    assert all(weight.grad is None for weight in net.vae.parameters())
    (raw.sum() + kl.sum()).backward()
    assert all(weight.grad.any() for weight in net.parameters())


@VAES
@torch.no_grad()
def test_pixel_aware_kl_is_that_of_two_gaussians(vae):
    """The code is the posterior's in training, the prior's in sampling. Catches them exchanged."""
    net, xi, t, z, truth = tiny_model(vae=vae, scale="image")
    normal = torch.distributions.Normal
    emb = net.vae.time(unet.time_embedding(t, 128))

    def law(encoder, *seen):
        mean, log_variance = encoder(torch.cat(seen, 1), emb)
        return normal(mean, (log_variance / 2).exp())

    def decoded(code):
        return net.vae.decode(code.mean + code.stddev * z, emb)

    prior = law(net.vae.prior, xi)
    pair = prior, normal(0, torch.ones(2, 32))
    if vae == "conditional":
        pair = law(net.vae.posterior, xi, truth), prior
    raw, kl = net.vae(xi, t, z, truth)
    divergence = torch.distributions.kl_divergence(*pair)
    close(kl, divergence.sum(1), 1e-4)
    close(raw, decoded(pair[0]), 1e-4)
    close(net.vae(xi, t, z)[0], decoded(prior), 1e-4)


@pytest.mark.parametrize("kind, logs", (
    ("delta", [-50, -2.302585, -0.2]),
    ("image", [-0.2, -5, -50])))
def test_pixel_aware_scale_stays_in_its_range(kind, logs):
    """Whatever the VAE says, all is finite in float32. Catches an x̂_δ of 0 or 1."""
    raw = torch.tensor([-1e9, 0.1, 1e9])
    scale = pixel_aware.read_scale(raw, kind, 50)
    close(scale.log(), logs, 1e-5)
    Z = torch.ones(1, 500, 3)
    inputs = -Z[:, 0], 500, scale, Z, 500
    close(pixel_aware.reverse(*inputs), 0.004, 1e-6)          # low: all images would be darker
    assert pixel_aware.reverse(*inputs, "literal").isfinite().all()


def test_pixel_aware_head_weights_average_over_what_is_active():
    """By example or by head, over heads j <= i. Catches a mean over all, which starves the last."""
    i = torch.tensor([3, 9, 1, 6])
    times = torch.tensor([1, 3, 7, 10])
    errors = rand(4, 4)
    active = np.where(times <= i[:, None], errors, np.nan)
    means = dict(
        examples=np.nanmean(active, 1),
        heads=np.nanmean(active[:, :3], 0))
    for average, each in means.items():
        weighted = pixel_aware.head_weights(i, times, average) * errors
        close(weighted.sum(1).mean(), each.mean(), 1e-6)


def test_pixel_aware_training_always_has_the_first_head():
    """m different heads, rising, low ones more often; or all. Catches an example without a head."""
    g = seeded()
    drawn = torch.stack([pixel_aware.draw_heads(5, 40, g) for _ in range(500)])
    counts = drawn.flatten().bincount()
    close(counts[:2], [0, 500])
    assert (drawn.diff() > 0).all()
    assert counts[2] > 2 * counts[40] > 0
    assert pixel_aware.draw_heads(40, 40, g).equal(torch.arange(1, 41))


@pytest.mark.parametrize("predict", ("eps", "x0"))
@pytest.mark.parametrize("scale", ("delta", "image"))
def test_pixel_aware_loss_is_of_what_each_network_names(predict, scale):
    """Eq. 15: heads off by .5 in one image, a VAE by .1, a KL of 3. Catches another target."""
    x0 = pixels(3, 2, 4, 4)
    named = pixels(3, 2, 4, 4, seed=3)
    eps = randn(3, 5, 2, 4, 4)
    i = torch.tensor([10, 4, 1])
    xi = pixel_aware.diffuse(x0, eps[:, 0], i, 20, 10)
    answer = kept(x0, 20) if scale == "delta" else x0
    target = eps
    if predict == "x0":
        mean, std = pixel_aware.guess(xi, 2 * named, i, named, pixel_aware.SPREAD[scale])
        target = ((x0 - mean) / std)[:, None] + 0 * eps

    def model(x, t, z, truth, heads):
        close(x, xi)
        close(t, i / 10)
        close(truth, answer)
        off = torch.tensor([0, 0.5, 0])
        outputs = target + off.view(3, 1, 1, 1, 1)
        return answer + 0.1, full(3, 3), kept(named, 20), outputs

    weights = pixel_aware.head_weights(i, torch.arange(1, 6))
    losses = pixel_aware.loss(
        model, x0, i, eps[:, 0], eps, weights, None, None, 10, 20,
        scale, predict, kl=0.2)
    of_vae = 0.01 + 0.2 * 3 / 32
    close(losses - of_vae, [0, 0.25, 0], 1e-6)


def test_pixel_aware_algorithm_1_is_its_linear_closed_form():
    """x_i/√ᾱ_i + Σ √(β̃_j/ᾱ_{j-1}) z_j - (1-α)/√(ᾱ_j (1-ᾱ_j)) Z^j. Catches α for ᾱ, β for β̃."""
    x0 = pixels(2, 1, 4, 4)
    xi = randn(2, 1, 4, 4)
    Z = randn(2, 15, 1, 4, 4, seed=1)
    z = randn(11, 2, 1, 4, 4, seed=2)
    steps = torch.tensor([11, 4])
    images = pixel_aware.reverse(xi, steps, kept(x0, 6), Z, 15, "literal", seeded(2))
    for b, i in enumerate(steps):
        alpha = kept(x0[b], 6 / 15)
        before = alpha ** torch.arange(i).view(i, 1, 1, 1)
        bars = alpha * before
        taken = (1 - alpha) / (bars * (1 - bars)).sqrt()
        fresh = (1 - before) / (1 - bars) * (1 - alpha) / before
        parts = fresh.sqrt() * z[:, b].flip(0)[:i] - taken * Z[b, :i]
        start = xi[b] / bars[-1].sqrt()
        close(images[b], start + parts.sum(0), 1e-10)


@pytest.mark.parametrize("grid", pixel_aware.GRIDS)
def test_pixel_aware_means_reconstruct_the_image_that_heads_name(grid):
    """By E[ε̃_j | x_i, x₀] of any x̂_δ, in both forms, without noise. Catches another schedule."""
    x0 = pixels(3, 1, 4, 4)
    xi = randn(3, 1, 4, 4)
    rate = pixels(3, 1, 4, 4, seed=5) / 2
    j = torch.tensor([40, 17, 1])
    times = pixel_aware.place(torch.arange(41).double(), 40, grid)
    mean, std = pixel_aware.guess(xi, rate, times[j], 0.5, 0.1)
    raw = ((x0 - mean) / std)[:, None]
    Z = pixel_aware.read_heads(raw, xi, rate, times[j], times[1:], mean, std)
    bar = kept(rate, like_image(times[j]))
    eps = Z[range(3), j - 1]
    close(bar.sqrt() * x0 + (1 - bar).sqrt() * eps, xi)
    for b in range(3):
        inputs = xi[b], int(j[b]), kept(rate[b], 40), Z[b:b + 1], 40
        means = pixel_aware.reverse_walk(*inputs, grid=grid)
        literal = pixel_aware.reverse_walk(*inputs, "literal", grid=grid, noise=False)
        for (_, x, _), (_, same, _) in zip(means, literal):
            close(x, same, 1e-8)
        close(x[0], x0[b], 1e-8)


def knowing(T, power=1, image=None):
    """An R that names the noises of this image, or of the one that x̂_δ is of, for γ = 20."""
    even = torch.arange(1, T + 1).double() / T
    times = T * even ** power

    def R(x, scale, t):
        bar = scale ** t[0]
        rate = -scale.log() / T
        x0 = rate * T / 20
        if image is not None:
            x0 = image
        eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
        return pixel_aware.expected_noise(eps, t[0] * T, times, rate)

    return R


@pytest.mark.parametrize("grid, power", (("uniform", 1), ("quadratic", 2)))
@pytest.mark.parametrize("passes", (2, 5, 40))
def test_pixel_aware_a_pass_is_one_call_of_each_network(passes, grid, power):
    """All T steps are yielded, z is one, a jump keeps the noise. Catches hidden calls, a new z."""
    x0 = pixels(2, 3, 4, 4)
    calls = []
    z = torch.randn(2, 7, generator=seeded(9))

    def G(x, t, code):
        calls.append((t[0].item(), x))
        close(code, z, 0)
        return kept(pixels(2, 3, 4, 4, seed=6), 20)

    walk = pixel_aware.walk(
        G, knowing(40, power, x0), randn(2, 3, 4, 4), passes,
        gamma=20, T=40, code=7, grid=grid, generator=seeded(9))
    times, images, _ = zip(*walk)
    close(times, np.linspace(1, 0, 41) ** power)
    close(images[-1], (x0 - 0.502) / 0.498, 1e-9)
    steps = {2: (40, 10), 5: (40, 26, 14, 6, 2), 40: range(40, 0, -1)}[passes]
    close([t for t, _ in calls], [(j / 40) ** power for j in steps])
    bars = [kept(x0, 20, t) for t, _ in calls]
    noises = [(x - bar.sqrt() * x0) / (1 - bar).sqrt() for (_, x), bar in zip(calls, bars)]
    close(torch.stack(noises), noises[0].expand(len(steps), -1, -1, -1, -1), 1e-7)


@pytest.mark.parametrize("wrong", (
    dict(passes=0),
    dict(passes=41),
    dict(grid="cubic")))
def test_pixel_aware_impossible_walks_are_refused(wrong):
    """A ValueError, before the networks are called. Catches a silent default."""
    with pytest.raises(ValueError):
        pixel_aware.sample(None, None, PIXEL, gamma=20, T=40, **wrong)


# -------------------------------------------------------------------------------------------- unet

def small_net(**changes):
    """A small U-Net with all weights random, so that nothing is 0 because it starts so."""
    torch.manual_seed(0)
    arguments = dict(width=8, mult=(1, 2), blocks=1, attention=(4,), dropout=0.0, size=8)
    net = unet.UNet(**arguments | changes)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


@pytest.mark.parametrize("second", ["decoder", "conv"])
def test_unet_gives_a_tensor_for_every_output_and_refuses_odd_sizes(second):
    """A tuple, 0 before training. Catches a bare tensor, and a crash deep inside."""
    for outputs in ((3,), (6, 3), (3, 3, 1)):
        net = unet.UNet(3, outputs, 8, (1, 2), size=16, second=second)
        out = net(torch.randn(2, 3, 12, 20), torch.rand(2))
        assert type(out) is tuple and not any(o.any() for o in out)
        assert [o.shape for o in out] == [(2, c, 12, 20) for c in outputs]
    with pytest.raises(ValueError, match="multiples of 2, not 9x8"):
        net(torch.randn(1, 3, 9, 8), torch.rand(1))
    for wrong in (dict(width=12), dict(size=9), dict(mult=(2, 2)), dict(second="both")):
        with pytest.raises(ValueError):
            small_net(**wrong)


@pytest.mark.parametrize("second", ["decoder", "conv"])
@pytest.mark.parametrize("head", [0, 1])
def test_unet_every_head_teaches_the_trunk_and_depends_on_everything(head, second):
    """Each output has layers of its own, and all of the trunk. Catches a detached branch."""
    net = small_net(second=second)
    out = net(torch.randn(2, 3, 8, 8), torch.rand(2))
    out[head].square().sum().backward(retain_graph=True)
    own = net.decoders if second == "decoder" else net.heads
    assert all(weight.grad is None for weight in own[1 - head].parameters())
    for module in (net.first, net.time, net.middle, own[head]):
        assert all(weight.grad.any() for weight in module.parameters())
    out[1 - head].square().sum().backward()
    assert all(weight.grad is not None for weight in net.parameters())


def test_unet_time_matters_examples_do_not_mix_and_float64_agrees_with_float32():
    """Catches a time that is ignored, a norm over the batch, mixed axes, a constant in float32."""
    net = small_net()
    x, t = randn(3, 3, 8, 8), rand(3, low=0)
    single = net(x.float(), t.float())[0]
    net = net.double()
    out, soon, late = (net(x, t + later)[0] for later in (0, 1e-7, 0.5))
    assert (out - soon).abs().max() < 1e-3 < (out - late).abs().max()
    torch.testing.assert_close(out[:1], net(x[:1], t[:1])[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out, single.double(), rtol=1e-3, atol=1e-3)
    attend, x = net.middle[0].attention, randn(1, 16, 2, 3)
    torch.testing.assert_close(attend(x.flip(-1)), attend(x).flip(-1))       # it knows no places
    angle = 1000 * t[0].item() * math.exp(-math.log(1e4) / 4)
    assert abs(unet.time_embedding(t, 8)[0, 5].item() - math.sin(angle)) < 1e-12


def test_unet_compact_network_is_ddpms():
    """35.7 M weights, 6.06 G multiplications. Catches a wrong layer, attention at a wrong level."""
    work = []
    with torch.device("meta"):
        nets = unet.UNet(outputs=(3,)), unet.UNet(), unet.UNet(second="conv")
        for net in (nets[0], unet.UNet(outputs=(3,), attention=())):
            with FlopCounterMode(display=False) as counter:
                net(torch.ones(1, 3, 32, 32), torch.ones(1))
            work.append(counter.get_total_flops())
    modules = (*nets, nets[1].decoders[1])
    one, two, light, decoder = [sum(map(torch.numel, m.parameters())) for m in modules]
    last = 2 * 128 + 3 * (128 * 9 + 1)
    assert 35.7e6 <= one < 35.8e6 and abs(work[0] / 12.12e9 - 1) < 0.04
    assert two - one == decoder + last
    assert light - one == 128 * 128 * 9 + 128 + last
    attention = 4 * 256 * 256 ** 2 + 2 * 256 ** 2 * 256       # its layers, and its scores
    assert work[0] - work[1] == 2 * 5 * attention
    assert [unet.Attention(c, 64).heads for c in (8, 64, 120, 256)] == [1, 1, 1, 4]


def test_unet_fuses_a_condition_at_every_level():
    """At each level's own size, down and up. Catches a level without it, and weights in others."""
    net, sizes = small_net(mult=(1, 2, 2), size=16, outputs=(), condition=2), []
    x, t, condition = torch.randn(2, 3, 16, 16), torch.rand(2), torch.ones(2, 2, 16, 16)
    for module in net.modules():
        if isinstance(module, unet.Fusion):
            module.register_forward_hook(lambda _, inputs, out: sizes.append(out.shape[-1]))
    seen = net.features(x, t, condition)
    assert sizes == [16, 8, 4, 4, 8, 16]
    assert net(x, t, condition) == ()
    assert not torch.allclose(seen[0], net.features(x, t, 0 * condition)[0])
    assert torch.equal(unet.Fusion(2, 3)(x, condition), x)    # before training it adds nothing


# -------------------------------------------------------------------------------------------- data

def run_of(script, flags):
    """The Run that a command line means."""
    rows = script.FLAGS | unet.FLAGS
    argv = f"--run new {flags} --device cpu".split()          # whatever runs/ here may hold
    return data.open_run(script.__name__, "", rows, script.SAMPLING, script.PRESETS, argv)


def load(dataset, folder, size):
    """A run's training images."""
    place = f"--data-dir {folder} --image-size {size}"
    return data.load(run_of(ddm, f"--train --dataset {dataset} {place}"))


def png(path, pixels, dtype=np.uint8, **more):
    """An image file of these pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(pixels, dtype)).save(path, **more)


def test_data_pixels_come_back_and_a_batch_mirrors_each_image_by_itself():
    """Every image comes, half are mirrored. Catches rounding down, and one coin for a batch."""
    images = torch.arange(256, dtype=torch.uint8).view(16, 2, 2, 4)
    x = data.to_float(images)
    assert x.min() == -1 and x.max() == 1 and torch.equal(data.to_uint8(x), images)
    assert data.to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    batch = data.batch(images, 128, seeded())
    found = (batch[:, None] == torch.cat([x, x.flip(-1)])).flatten(2).all(2)
    straight, mirrored = found.chunk(2, dim=1)                # each [128, 16]: which image it is
    assert (straight | mirrored).any(0).all() and 32 < mirrored.sum() < 96
    assert (found.sum(1) == 1).all()


def test_data_seeds_do_not_collide_and_noise_is_an_images_own():
    """Image 7 has one noise in any batch. Catches seed + step, and a generator for a batch."""
    pairs = [*itertools.product(data.PURPOSES, range(30), range(30))]
    assert len({data.seed(*pair) for pair in pairs}) == len(pairs)
    like = torch.empty(3, 2, 2, 2)
    batch = data.randn(like, data.image_generators(0, [5, 6, 7]))
    assert torch.equal(batch[2:], data.randn(like[:1], data.image_generators(0, [7])))


def test_data_shapes_are_the_same_everywhere_and_all_there():
    """Five kinds in turn, known by their areas. Catches a change of the default dataset."""
    images = data.shapes(50, 16)
    assert images.shape == (50, 3, 16, 16)
    assert np.array_equal(images[:10], data.shapes(10, 16))
    disk, ring, square, triangle, cross = (images.max(1) > 80).reshape(10, 5, -1).mean((0, 2))
    assert square > disk > ring > 0 and disk > triangle > 0 and square > cross > 0


def test_data_folder_of_images_of_any_size_and_kind(tmp_path, monkeypatch):
    """Its subfolders too; kept outside of it. Catches stretched or lying images, a black ground."""
    monkeypatch.chdir(tmp_path)
    mine, turn = tmp_path / "mine", Image.Exif()
    turn[0x0112] = 6                                          # show it turned by 90 degrees
    png(mine / "a.png", [[0] * 2 + [10] * 2 + [0] * 2] * 2)
    png(mine / "b.png", [[10, 10], [20, 20]], exif=turn)
    png(mine / "deep" / "c.png", [[2570, 2570], [5140, 5140]], np.uint16, exif=turn)
    grey = [[[10, 10]] * 2, [[20, 10]] * 2, [[20, 10]] * 2]
    assert load("folder", mine, 2).tolist() == [[image] for image in grey]
    png(mine / "e.png", [[(9, 9, 9, 0), (9, 8, 7, 255)]] * 2)
    *rest, last = load("folder", mine, 2).tolist()            # one with colour makes all so
    assert rest == [[image] * 3 for image in grey]
    assert last == [[[255, value]] * 2 for value in (9, 8, 7)]


def test_data_hidden_names_are_skipped_links_followed_and_other_files_said(tmp_path, capsys):
    """Catches an editor's copies, an endless circle of links, an old cache, and silence."""
    mine = tmp_path / "mine"
    for name in ("mine/a.png", "mine/.b.png", "mine/.c/d.png", "mine/e.JPG", "other/f.png"):
        png(tmp_path / name, [[1]])
    (mine / "notes.txt").write_text("")
    (mine / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(mine)
    files, key = data.image_files(mine)
    assert sorted(file.name for file in files) == ["a.png", "e.JPG", "f.png"]
    assert "1 files" in capsys.readouterr().out
    (mine / "a.png").touch()
    assert data.image_files(mine)[1] != key


def test_data_bad_sources_are_one_sentence(tmp_path, monkeypatch):
    """All bad images at once. Catches a traceback, a stop at the first, and half a file."""
    monkeypatch.chdir(tmp_path)
    png(tmp_path / "bad" / "good.png", [[1]])
    (tmp_path / "bad" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    for name, dtype in (("float", np.float32), ("wide", np.int32)):
        png(tmp_path / "bad" / f"{name}.tiff", [[1]], dtype)
    for folder, words in (("bad", "3 of 4 .*float.*8 bits.*torn.*wide"), ("data", "no images"),
                          ("absent", "no folder")):           # data is where the cache would be
        with pytest.raises(data.Problem, match=words):
            load("folder", folder, 16)
    assert not [*tmp_path.rglob("*partial"), *tmp_path.rglob("*.npy")]
    cache = tmp_path / "cifar10-train-32.npy"
    np.save(cache, np.zeros((0, 3, 32, 32), np.uint8))
    none = cache.read_bytes()                                 # of no image
    np.save(cache, np.zeros((9, 3, 32, 32), np.float32))
    for content in (none, cache.read_bytes(), cache.read_bytes()[:5000], b"", pickle.dumps([1])):
        cache.write_bytes(content)
        with pytest.raises(data.Problem, match="cifar10-train-32.npy"):
            load("cifar10", ".", 32)


def test_data_cifar10_is_converted_once_and_celeba_cut_as_in_ddim(tmp_path, monkeypatch):
    """Rows 57 to 185, columns 25 to 153. Catches a turned axis, a traceback, the largest square."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    source = "torchvision.datasets.CIFAR10"
    monkeypatch.setattr(source, lambda *_, **__: types.SimpleNamespace(data=pixels))
    whole = load("cifar10", tmp_path, 32)
    assert np.array_equal(whole.numpy().transpose(0, 2, 3, 1), pixels)
    monkeypatch.setattr(source, lambda *_, **__: 1 / 0)       # there is no network
    assert torch.equal(load("cifar10", tmp_path, 32), whole)
    half = nn.functional.avg_pool2d(whole.float(), 2)
    assert (load("cifar10", tmp_path, 16) - half).abs().max() <= 1
    with pytest.raises(data.Problem, match="cannot be downloaded"):
        load("cifar10", tmp_path / "elsewhere", 32)
    aligned = np.zeros((218, 178, 3))
    aligned[57:185, 25:153] = 255
    png(tmp_path / "celeba" / "img_align_celeba" / "1.png", aligned)
    png(tmp_path / "celeba" / "img_align_celeba" / "2.png", np.full((150, 150, 3), 255))   # no box
    png(tmp_path / "other.png", [[0]])
    images = load("celeba", tmp_path, 64)
    assert images.shape == (2, 3, 64, 64) and images.min() == 255


# ---------------------------------------------------------------------------------------- promises

FULL_DISK = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left"))
TINY = "--width 8 --mult 1 1 --blocks 1 --attention --image-size 8 --batch-size 4"


def tiny(script, iterations, more="--train"):
    """Flags of a training that takes a moment."""
    own = "--T 12 --code 32 --heads-per-step 5" if script is pixel_aware else ""
    return f"--iterations {iterations} {TINY} {own} {more}"


def weights(run):
    """What a run directory holds."""
    return data.load_checkpoint(pathlib.Path(run, "checkpoint.pt"))


def flat(state):
    """All weights of a state_dict in one row."""
    return torch.cat([weight.flatten() for weight in state.values()])


def assert_same(*runs):
    """Fail unless two runs have come to the same, bit for bit."""
    a, b = (weights(run) for run in runs)
    for part in ("model", "ema", "optimizer", "step"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(script, flags, status) -> what it prints, in an empty folder; if bad, one sentence."""
    monkeypatch.chdir(tmp_path)
    draw = data.shapes
    monkeypatch.setattr(data, "shapes", lambda n, size: draw(min(n, 50), size))

    def call(script, flags, status=0):
        code = 0
        try:
            script.main(f"{flags} --device cpu".split())
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert code == status, (flags, out, err)
        assert bool(err) == (status in (1, 2)) or status == 130
        assert not err or (err.startswith("error: ") and err.count("\n") == 1), err
        return out + err

    before = [signal.signal(number, signal.default_int_handler) for number in data.STOPS]
    yield call
    for number, handler in zip(data.STOPS, before):           # a run leaves them as they are
        assert signal.signal(number, handler) is signal.default_int_handler


@pytest.mark.parametrize("script,number", [
    (ddm, signal.SIGINT), (blurring, signal.SIGTERM), (angular, signal.SIGHUP),
    (pixel_aware, signal.SIGTERM)])
def test_resumed_equals_uninterrupted_bit_for_bit(script, number, cli, monkeypatch):
    """A signal saves first. Catches state outside of the checkpoint, and a nohup that is none."""
    record = data.Run.record
    seen = []

    def stop_after_three(run, *arguments):
        record(run, *arguments)
        seen.append(0)
        if len(seen) % 3 == 0:
            os.kill(os.getpid(), number)

    cli(script, tiny(script, 6, "--train --dropout 0.2 --run whole"))
    monkeypatch.setattr(data.Run, "record", stop_after_three)
    said = cli(script, tiny(script, 6, "--train --dropout 0.2 --run parts"), 128 + number)
    assert "stopped after step 3" in said
    signal.signal(number, signal.SIG_IGN)                     # as under nohup: it is not heard
    cli(script, "--train --run parts")
    signal.signal(number, signal.default_int_handler)
    assert_same("parts", "whole")


def by_hand(script, net, s, x0, g):
    """(losses, times) of a training step, written out once more. x0 [4, C, H, W] in [-1, 1]."""
    if script is pixel_aware:
        x0 = pixel_aware.to_pixels(x0)
        i = torch.randint(1, s.T + 1, (4,), generator=g) ** 2 / s.T
        heads = pixel_aware.draw_heads(s.heads_per_step, s.T, g)
        shares = pixel_aware.head_weights(i, heads ** 2 / s.T)
        eps = torch.randn(x0.shape, generator=g)
        z = torch.randn(4, s.code, generator=g)
        return pixel_aware.loss(net, x0, i, eps, None, shares, z, heads, s.T, s.gamma), i / s.T
    u = torch.rand(4, generator=g)
    eps = torch.randn(x0.shape, generator=g)
    if script is angular:
        return angular.loss(angular.predictor(net), x0, eps, u * HALF_PI), u
    if script is blurring:
        model = blurring.predictor(net, sigma_blur_max=s.sigma_blur_max)
        return blurring.loss(model, x0, eps, u, sigma_blur_max=s.sigma_blur_max), u
    t = 0.001 + 0.999 * u * u * u
    return ddm.loss(ddm.predictor(net, sigma_data=s.sigma_data), x0, -x0, eps, t), t


@pytest.mark.parametrize("script", [ddm, blurring, angular, pixel_aware])       # those of by_hand
def test_training_step_draws_clips_averages_and_records(script, cli, monkeypatch):
    """Done again by hand. Catches other seeds, a late cut, 1 - d for d, angles, a kept graph."""
    seen, made, networks = [], [], data.Run.networks
    monkeypatch.setattr(data.Run, "record", lambda run, *pair: seen.append(pair))
    monkeypatch.setattr(data.Run, "networks", lambda *a: made.extend(networks(*a)) or made)
    cli(script, tiny(script, 3, "--train --ema 0.2 --seed 7 --lr 0.01 --run r"))
    saved = weights("r")
    s = types.SimpleNamespace(**saved["method"])
    torch.manual_seed(data.seed("weights", 7))
    net = (pixel_aware.PixelAware if script is pixel_aware else unet.UNet)(**saved["network"])
    images = torch.from_numpy(data.shapes(50, 8))
    kind = torch.optim.AdamW if script is ddm else torch.optim.Adam
    optimizer = kind(net.parameters(), s.lr)
    mean = flat(net.state_dict())
    for step, decay in enumerate((1 / 10, 2 / 11, 0.2)):      # (1 + k)/(10 + k), at most --ema
        g = seeded(data.seed("batch", 7, step))
        losses, times = by_hand(script, net, s, data.batch(images, 4, g), g)
        torch.testing.assert_close(seen[step], (losses, times), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        losses.mean().backward()
        for part in (net.vae, net.parallel) if script is pixel_aware else (net,):
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        if script is ddm:
            optimizer.param_groups[0]["lr"] = s.lr * (1 - step / 3) ** 0.96
        optimizer.step()
        mean += (1 - decay) * (flat(net.state_dict()) - mean)
    assert (flat(net.state_dict()) - flat(saved["model"])).abs().mean() < 4e-6
    assert (mean - flat(saved["ema"])).abs().mean() < 4e-6
    assert not any(weight.requires_grad for weight in made[1].parameters())


@SCRIPTS
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_networks_predictors_and_losses_have_no_graph_break(script, cli, monkeypatch):
    """For --compile, in training and in sampling. Catches a value that Python asks for, and a
    network that is called as it was before it was compiled.
    """
    called = set()
    torch._dynamo.reset()
    whole = functools.partial(torch.compile, fullgraph=True, backend="eager")

    def compile(net, **_):
        fast = net if getattr(net, "training", True) else whole(net)     # training is in the loss
        if isinstance(net, nn.Module):
            fast.register_forward_hook(lambda *_: called.add(net))
        return fast

    monkeypatch.setattr(torch, "compile", compile)
    cli(script, tiny(script, 1, "--train --sample --n 1 --steps 1 --run eager"))
    assert not called
    monkeypatch.setattr(script, "loss", whole(script.loss))
    cli(script, tiny(script, 1, "--train --sample --n 1 --steps 1 --run fast --compile"))
    assert len(called) == (3 if script is pixel_aware else 2)


def test_a_machine_without_compiler_or_memory_is_told_so(cli, monkeypatch):
    """Eager training and sampling, or a sentence. Catches a traceback of either."""
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no g++\n(a hint)")))
    said = cli(ddm, tiny(ddm, 1, "--train --sample --compile --n 1 --steps 1 --run r"))
    assert said.count("not compiled, and slower: no g++\n") == 2
    for words in ("can't allocate memory", "std::bad_alloc"):
        monkeypatch.setattr(data, "load", mock.Mock(side_effect=RuntimeError(words)))
        assert "--batch-size" in cli(ddm, "--train --run r --iterations 2", 1)


def test_places_and_images_of_a_run_are_its_own(cli, monkeypatch):
    """Catches a run inside its images, others' images in silence, conv2d's error, a lost link."""
    png(pathlib.Path("mine/a.png"), np.zeros((8, 8, 3)))
    train = tiny(ddm, 1, "--train --dataset folder --data-dir mine --run")
    for place in ("mine/r", "r --out mine/o"):
        assert "inside the images" in cli(ddm, f"{train} {place}", 2)
    assert "1 images, colour, from 0 (the darkest) to 0" in cli(ddm, f"{train} r")
    assert "no longer" not in cli(ddm, "--train --run r --iterations 2")
    png(pathlib.Path("mine/b.png"), np.zeros((8, 8, 3)))
    assert "no longer" in cli(ddm, "--train --run r --iterations 3")
    shutil.rmtree("mine")
    png(pathlib.Path("mine/a.png"), np.zeros((8, 8)))
    assert "channels" in cli(ddm, "--train --run r --iterations 4", 1)
    with pytest.raises(data.Problem, match="no flag empty"):
        data.open_run("ddm", "", ddm.FLAGS | unet.FLAGS, {}, {}, ["--train", "--run", ""])
    os.mkdir("linked")
    os.symlink("gone", "linked/checkpoint.pt")
    assert "no checkpoint" in cli(ddm, tiny(ddm, 1, "--train --run linked"), 1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for world, word in (("2", "MASTER_ADDR"), ("x", "torchrun")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert word in cli(ddm, tiny(ddm, 1, "--train --run two"), 2)


def test_run_goes_on_with_its_own_settings_alone(cli):
    """Catches a start anew, a silent overwrite, another script's weights, and old samples."""
    np.save("cifar10-train-8.npy", np.zeros((9, 3, 8, 8), np.uint8))
    cli(ddm, tiny(ddm, 4, "--train --dataset cifar10 --data-dir . --run r"))
    good = pathlib.Path("r/checkpoint.pt").read_bytes()
    assert "had its 4 steps" in cli(ddm, "--train --run r")
    said = cli(ddm, "--train --run r --width 16 --lr 0.5", 2)
    assert "--width 8, not 16" in said and "--lr 0.0002, not 0.5" in said
    assert "--noise sqrt, not linear" in cli(ddm, "--sample --run r --noise linear", 2)
    for other, what in itertools.product((blurring, angular, pixel_aware), ("train", "sample")):
        assert "is no run of" in cli(other, f"--{what} --run r", 1)
    cli(ddm, "--sample --run r --seed 9 --n 1 --steps 1")     # the samples' seed is free
    assert pathlib.Path("r/checkpoint.pt").read_bytes() == good
    cli(ddm, "--train --iterations 5 --sample --n 4 --steps 2 --run r")
    drawn = pathlib.Path("r/samples.png").read_bytes()
    cli(ddm, "--sample --n 4 --steps 2 --run r")
    assert pathlib.Path("r/samples.png").read_bytes() == drawn
    assert [json.loads(line)["step"] for line in open("r/log.jsonl")] == [4, 5]


ROWS = [                        # flags of a paper's variant, and what is said of its sampling
    (ddm, "--no-precondition --weights one --norm l1+l2", "solver ode3, grid flow"),
    (ddm, "--predict eps --noise linear --weights inverse --clip", "clip True, h constant, noise"),
    (ddm, "--predict x0 --second decoder --solver ddm", "solver ddm, grid flow, heads raw"),
    (ddm, "--h sine --no-precondition --norm l1", "solver ode, grid flow, heads project"),
    (ddm, "--h linear --no-precondition --time-power 1 --grid uniform", "grid uniform"),
    (ddm, "--h quadratic --no-precondition --weights exponential", "h quadratic"),
    (ddm, "--h exponential --no-precondition --heads raw", "heads raw"),
    (blurring, "--sigma-blur-max 0 --blur-schedule sin --predict x0", "grid dense, clip True"),
    (blurring, "--predict eps --solver ancestral", "ancestral, grid even, clip False"),
    (blurring, "--predict eps --sigma-blur-max 0 --solver ddim", "ddim, grid even, clip True"),
    (angular, "", "calls 3, steps 3, solver ddim3, heads project"),
    (angular, "--predict eps --schedule linear --solver cold", "linear, clip True, start 1"),
    (angular, "--predict eps --solver ddpm", "clip True, start 0.999"),
    (angular, "--predict x0 --norm rms --solver heun --last midpoint", "calls 6"),
    (angular, "--solver ddim --heads raw --velocity-weight 0 --second decoder", "heads raw"),
    (pixel_aware, "", "calls 6, mode mean"),
    (pixel_aware, "--vae denoising --scale delta --predict eps --average heads "
     "--solver literal --grid uniform", "mode literal")]
PAPERS = [(script, f"--preset {name.replace(' ', ' --dataset ')}", "") for script in FOUR
          for name in script.PRESETS if name.startswith("paper ")]


@pytest.mark.parametrize("script,flags,words", ROWS + PAPERS)
def test_every_row_of_the_papers_tables_is_a_command(script, flags, words, cli):
    """Training logs, sampling needs the checkpoint alone, and says how. Catches a silent choice."""
    for dataset in data.SIZES:
        png(pathlib.Path("data", dataset, "a.png"), np.zeros((9, 9, 3)))
    np.save("data/cifar10-train-8.npy", np.zeros((9, 3, 8, 8), np.uint8))
    small = tiny(script, 3, "--n 5 --steps 3 --run r")
    cli(script, f"--train {flags} {small}")
    saved, (line,) = weights("r"), map(json.loads, open("r/log.jsonl"))
    known = [loss for loss in line["loss_by_time"] if loss is not None]
    assert len(line["loss_by_time"]) == 5
    assert min(known) <= line["loss"] <= max(known)
    assert line["step"] == 3 and min(line["images_per_s"], line["lr"]) > 0
    paper = script.PRESETS.get(flags.replace("--preset paper --dataset", "paper"), {})
    changed = {name for name in paper if saved["method"][name] != paper[name]}
    given = "width mult blocks attention image_size batch_size iterations T heads_per_step"
    assert changed <= {*given.split()}
    shutil.rmtree("data")
    os.unlink("r/log.jsonl")
    said = cli(script, f"--sample {flags} {small}")
    assert words in said and "samples.png" in said.splitlines()[-1]
    looks = 12 if script is pixel_aware else int(re.search(r"calls (\d+)", said)[1])
    assert Image.open("r/samples.png").size == (3 * 66 + 2, 2 * 66 + 2)
    assert Image.open("r/trajectory.png").size == ((min(looks, 10) + 1) * 66 + 2, 8 * 66 + 2)


def test_blurring_has_one_head_of_256_channels_and_its_solvers_steps():
    """Table 5, and the 1000 steps of Algorithm 1. Catches heads of 64, and 10 steps for all."""
    run = run_of(blurring, "--train --preset paper --dataset cifar10")
    with torch.device("meta"):
        assert unet.UNet(**blurring.network(run.settings, 3)).middle[0].attention.heads == 1
    for solver, steps in (("ddim2", 20), ("ddim", 50), ("ancestral", 1000)):
        assert blurring.sampler(run_of(blurring, f"--train --solver {solver}"))[0] == steps


@pytest.mark.parametrize("place,name,happens,status,words", [
    (ddm, "loss", lambda *a, loss=ddm.loss: loss(*a) * math.nan, 1, "loss is not finite"),
    (os, "fsync", FULL_DISK, 1, "No space left"),
    (os, "replace", FULL_DISK, 1, "No space left"),
    (data.Run, "record", lambda *_: [os.kill(os.getpid(), 2) for _ in "12"], 130, "stopped")])
def test_last_good_checkpoint_stays(place, name, happens, status, words, cli, monkeypatch):
    """Whatever happens; Ctrl-C twice stops at once. Catches NaN that is saved, writing in place."""
    cli(ddm, tiny(ddm, 1, "--train --run r"))
    good = pathlib.Path("r/checkpoint.pt").read_bytes()
    monkeypatch.setattr(place, name, happens)
    assert words in cli(ddm, "--train --run r --iterations 3", status)
    assert pathlib.Path("r/checkpoint.pt").read_bytes() == good
    assert len(os.listdir("r")) == 3                          # with the log, and the lock


def test_bad_checkpoints_are_sentences_and_never_executed(cli):
    """Cut, of a changed bit, foreign, of NaN, evil, gone. Catches any code run, black pictures."""
    cli(ddm, tiny(ddm, 1, "--train --run r"))
    path = pathlib.Path("r/checkpoint.pt")
    good = path.read_bytes()
    saved = weights("r")
    evil = type("Evil", (), dict(__reduce__=lambda _: (os.mkdir, ("executed",))))()
    flipped = bytearray(good)
    flipped[good.index(saved["ema"]["first.bias"].numpy().tobytes())] ^= 1
    both = "--train --sample"
    contents = [(both, bad) for bad in (good[:5000], b"", pickle.dumps(evil), bytes(flipped))]
    for what, part, value in (
            (both, "step", evil),
            (both, "step", -5),
            (both, "method", saved["method"] | dict(lr=None)),
            (both, "ema", {name: weight / 0 for name, weight in saved["ema"].items()}),
            ("--sample", "network", saved["network"] | dict(more=1)),
            ("--train", "model", {}),
            ("--train", "optimizer", {}),
            ("--sample", "ema", saved["ema"] | dict(more=torch.zeros(1)))):
        torch.save(saved | {part: value}, path)
        contents.append((what, path.read_bytes()))
    for what, content in contents:
        path.write_bytes(content)
        for each in what.split():
            cli(ddm, f"{each} --run r --iterations 9", 1)
        assert path.read_bytes() == content and not os.path.exists("executed")
    torch.save(saved | dict(method=saved["method"] | dict(dataset="more")), path)
    assert "no folder data/more" in cli(ddm, "--train --run r --iterations 9", 2)
    path.unlink()
    assert "train first" in cli(ddm, "--sample --run r", 1)


WRONG = {
    ddm: "--widht 8 | --wid 8 | --mult | --mult 2 2 | --width 12 | "
         "--batch-size x | --batch-size 0 | --image-size 18 | "
         "--ema 2 | --steps 0 | --lr nan | --lr inf | --sigma-data x | --dropout 1 | --seed -1 | "
         "--h linear | --h x | --h linear --no-precondition --solver ode2 | --sample --n 2000 | "
         "--predict eps --no-precondition | --preset paper | --data-dir photos | "
         "--dataset folder --data-dir nowhere",
    blurring: "--predict mean | --predict both | --solver naive | "
              "--d-min 0 | --d-min 2 | --blur-schedule log | --sigma-blur-max -1",
    angular: "--predict x0 --solver heun | --predict x0 --solver rk4 | --last midpoint | "
             "--solver heun --last heun | --schedule linear --steps 1001 | --velocity-weight -1 | "
             "--schedule jsd | --predict v",
    pixel_aware: "--steps 201 | --gamma 0 | --gamma 81 | --T 0 | --heads-per-step 1 | --kl -1 | "
                 "--image-size 24 | --image-size 2 | --solver euler | --grid even | --width 12"}


@SCRIPTS
def test_help_is_a_page_and_wrong_flags_are_sentences(script, cli, monkeypatch):
    """Before anything starts. Catches a traceback, a training for nothing, and an ignored flag."""
    shown = cli(script, "--help")
    rows = data.ACTIONS | data.COMMON | script.FLAGS | unet.FLAGS | script.SAMPLING | data.MACHINE
    flags = re.findall(r"^  --([\w-]+)", shown, re.M)
    assert flags == [name.replace("_", "-") for name in rows] and len(flags) <= 36
    assert "(0.995)" in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "not finite" in cli(script, tiny(script, 1, "--train --lr 1e300 --run far"), 1)
    assert "checkpoint.pt" not in os.listdir("far")
    monkeypatch.setattr(data, "average", lambda *_: pytest.fail("the training began"))
    wrong = WRONG.get(script, "--widht 8").split(" | ")
    for flags in ["", "--steps 3", f"--train --n {10 ** 400}", *(f"--train {w}" for w in wrong)]:
        cli(script, flags, 2)
    monkeypatch.setattr(data, "__file__", "nowhere/data.py")          # without shipped weights
    assert "train first" in cli(script, "--sample", 1) and os.listdir() == ["far"]
    cli(script, tiny(script, 1, "--train --run far/.lock/run"), 1)


def test_out_resumes_and_refuses_others(cli):
    """Only missing PNGs, each as in samples.png. Catches mixed sets, and noise by the batch."""
    for run, steps in (("r", 1), ("s", 2)):
        cli(ddm, tiny(ddm, steps, f"--train --image-size 128 --mult 1 1 1 1 1 --run {run}"))
    cli(ddm, "--sample --steps 1 --run r --n 5")              # in batches of at most four
    sample = "--sample --steps 1 --run r --out pngs"
    cli(ddm, f"{sample} --n 3")
    os.unlink("pngs/000001.png")
    os.utime("pngs/000000.png", (0, 0))
    cli(ddm, f"{sample} --n 5")
    singles = [np.array(Image.open(f"pngs/{i:06}.png")).transpose(2, 0, 1) for i in range(5)]
    picture = data.grid(torch.from_numpy(np.stack(singles))).permute(1, 2, 0).int().numpy()
    assert abs(picture - np.asarray(Image.open("r/samples.png"))).max() <= 1
    for other in ("--steps 3", "--seed 1", "--solver ddm", "--run s"):
        assert "choose another --out" in cli(ddm, f"{sample} {other}", 1)
    png(pathlib.Path("mine/a.png"), [[9]])
    assert "choose another --out" in cli(ddm, f"{sample} --out mine", 1)
    assert os.stat("pngs/000000.png").st_mtime == 0 and os.listdir("mine") == ["a.png"]


def test_without_a_run_the_projects_weights_are_sampled(cli, monkeypatch):
    """Catches a first command that fails, another's weights, and pictures in the project's tree."""
    cli(ddm, tiny(ddm, 2, "--train --run project/assets/weights/ddm"))
    monkeypatch.setattr(data, "__file__", "project/data.py")
    assert "no run yet" in cli(ddm, "--sample --n 1 --steps 2")
    assert pathlib.Path("runs/ddm-weights/samples.png").exists()
    assert not pathlib.Path("project/assets/weights/ddm/samples.png").exists()
    assert "no run yet" not in cli(ddm, "--sample --n 1 --steps 2")
    cli(angular, "--sample", 1)


def test_newest_run_is_sampled_and_one_run_has_one_owner(cli):
    """Catches the wrong model, in silence, and two trainings that write one checkpoint by turns."""
    for run in ("runs/ddm-shapes", "runs/ddm-other"):
        cli(ddm, tiny(ddm, 1, f"--train --run {run}"))
    assert "runs/ddm-other" in cli(ddm, "--sample --n 1 --steps 1")
    os.utime("runs/ddm-shapes/checkpoint.pt")
    assert "runs/ddm-shapes" in cli(ddm, "--sample --n 1 --steps 1")
    with data.own(pathlib.Path("runs/ddm-shapes/.lock")):
        assert "another process" in cli(ddm, "--train --iterations 2", 1)
        cli(ddm, "--sample --n 1 --steps 1")
    cli(ddm, "--train --iterations 2")


@pytest.mark.parametrize("what", ["--train --iterations 2", "--sample --n 1 --steps 1", "--help"])
def test_progress_never_kills(what, cli, monkeypatch):
    """Catches a lost terminal (`| head -1`) that ends a training, and ASCII that has no x̂₀."""
    cli(ddm, tiny(ddm, 1, "--train --run r"))
    reader, writer = os.pipe()
    os.close(reader)
    for file in (open("ascii.txt", "w", encoding="ascii"), open(writer, "w")):
        monkeypatch.setattr(sys, "stdout", file)
        cli(ddm, f"{what} --run r")
        with contextlib.suppress(BrokenPipeError):            # closing may find it first
            file.close()
    assert os.stat("ascii.txt").st_size > 20


def started(*arguments):
    """What a Python process of these arguments prints on stdout, if it ends well."""
    environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(HERE))
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED = """
import itertools, os, pathlib, signal, sys, time, types
import blurring, data
draw, ticks, old = data.shapes, itertools.count(0, 99), 0     # it saves and reports at every step
data.shapes = lambda n, size: draw(50, size)
for wait in (0, 0.01, 0.02, 0.03, 0.04):
    child = os.fork()
    if child == 0:
        data.time = types.SimpleNamespace(monotonic=lambda: next(ticks))
        blurring.main(sys.argv[1:])
    path = pathlib.Path("killed/checkpoint.pt")
    while not path.exists() or path.stat().st_mtime_ns == old:
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    old = path.stat().st_mtime_ns
"""


def test_killed_at_any_moment_goes_on(cli):
    """To the same end, bit for bit. Catches writing in place, a lock that outlives its owner."""
    started("-c", KILLED, *tiny(blurring, 9999, "--train --device cpu --run killed").split())
    step = weights("killed")["step"]
    for run in ("killed", "whole"):
        cli(blurring, tiny(blurring, step + 2, f"--train --run {run}"))
    assert_same("killed", "whole")
    assert step >= 5 and not [*pathlib.Path("killed").glob("*partial")]


TWO = """
import importlib, sys
import data, unet
scripts = [importlib.import_module(line.split()[0]) for line in sys.argv[1:]]
print("imported\\n", end="")
import torch.distributed as dist
begin, draw = dist.init_process_group, data.shapes
dist.init_process_group = lambda *a, **k: dist.is_initialized() or begin(*a, **k)
dist.destroy_process_group = lambda: None                     # one group for all scripts
data.shapes = lambda n, size: draw(min(n, 50), size)
for script, line in zip(scripts, sys.argv[1:]):
    name, *flags = line.split()
    script.main([*flags, *f"--device cpu --run {name} --out {name}/pngs".split()])
assert not {"extras", "matplotlib", "scipy", "diffusers"} & set(sys.modules), "a program around it"
"""


def test_six_files_are_enough_and_two_processes_train_what_one_does(tmp_path, cli):
    """Catches a need for extras, a print at import, a gradient or an image that is not shared."""
    for module in (*FOUR, unet, data):
        shutil.copy(module.__file__, tmp_path)
    pathlib.Path("two.py").write_text(TWO)
    more = "--train --sample --n 3 --steps 1 --lr 1e-3"
    flags = [f"{script.__name__} {tiny(script, 5, more)}" for script in FOUR]
    launch = "-m torch.distributed.run --nproc_per_node 2 --standalone two.py"
    assert started(*launch.split(), *flags).startswith("imported\nimported\n")
    for script in FOUR:
        cli(script, tiny(script, 5, "--train --lr 1e-3 --run one"))
        one, two = weights("one"), weights(script.__name__)
        assert (flat(one["model"]) - flat(two["model"])).abs().mean() < 1e-6
        assert len([*open(f"{script.__name__}/log.jsonl")]) == 1
        assert len(os.listdir(f"{script.__name__}/pngs")) == 4               # with its note
        shutil.rmtree("one")


def test_printed_commands_and_lines_of_python_run(cli):
    """Those of README.md and of the scripts' first lines. Catches a name that is another by now."""
    readme = (HERE / "README.md").read_text()
    text = "\n".join([readme, *(script.__doc__ for script in FOUR)])
    names = "|".join(script.__name__ for script in FOUR)
    command = rf"^ *python ({names})\.py (.*?)(?:   |  #|$)"
    found = re.findall(command, re.sub(r"\\\n *", "", text), re.M)
    for name, flags in found:
        script = sys.modules[name]
        with contextlib.suppress(SystemExit):                 # of --help
            data.parse(name, "", script.FLAGS | unet.FLAGS, script.SAMPLING, flags.split())
    cli(ddm, tiny(ddm, 1))
    shutil.copytree(HERE / "assets/weights/ddm", "assets/weights/ddm")
    lines = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    for text in (lines, lines.replace("assets/weights/ddm", "runs/ddm-shapes")):
        exec(text, names := {})
        *_, images = names.values()
        assert len(found) > 12 and images.dim() == 4 and images.isfinite().all()


@pytest.mark.parametrize("script,flags", [(script, "") for script in FOUR] + [
    (ddm, f"--no-precondition --h {h}") for h in [*ddm.ATTENUATIONS][1:]])
def test_gpu_is_given_no_tensor_of_the_cpu_and_asked_for_no_value(script, flags, monkeypatch):
    """Training but for its gradient, and all samplers, on fake tensors. Catches .item(), and what
    is drawn or made elsewhere.
    """
    run = run_of(script, tiny(script, 2, f"--train --steps 4 {flags}"))      # for order 3
    nets, gpu = [], torch.device("cuda:0")

    def networks(kind, arguments):
        with gpu:
            nets.extend(kind(**arguments) for _ in range(2))
        return nets

    def backward(loss):
        for weight in nets[0].parameters():
            weight.grad = torch.zeros_like(weight)

    def draw(run, walk, *_, **__):
        for _, x, x0 in walk(torch.zeros(2, 3, 8, 8, device=gpu), data.image_generators(0, [0, 1])):
            assert x.device == x0.device == gpu

    generator = type("Generator", (torch.Generator,), dict(device=gpu))()
    for place, name, value in (
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.Tensor, "backward", backward),
            (torch.Tensor, "cpu", None),
            (data, "load", lambda run: torch.zeros(9, 3, 8, 8, dtype=torch.uint8, device=gpu)),
            (data, "draw", draw)):
        monkeypatch.setattr(place, name, value)
    run.networks, run.averaged = networks, lambda kind: nets[1]
    run.steps = lambda *_: [(step, generator) for step in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True):          # mixed devices and values raise
        run.device, run.bf16, run.sums = gpu, True, torch.zeros(2, 5, device=gpu)
        script.train(run)
        for solver in ("ddm", "ode") if flags else script.SAMPLING["solver"][2]:
            run.args.solver = solver
            script.write_samples(run)
