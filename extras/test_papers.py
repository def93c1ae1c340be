"""Further claims of papers and docs: what exact networks draw, what in print fails, and sizes."""

import math
import types

import numpy as np
import pytest
import torch

import angular
import blurring
import data
import ddm
import pixel_aware
import unet
from extras import bench
from test_all import (
    BLUR, EPS, HALF_PI, MIXTURE, NODES, NOISES, PIXEL, SCRIPTS, WEIGHTS, X0, Mixture,
    close, ddpm, full, kept, knowing, like_image, oracle, rand, randn, seeded)

# ----------------------------------------------------------------- ddm and blurring, further claims
#
# ddm: the multistep rule; the law of training times; the sine's bound; float32. Algorithm 2 draws
#   the data by many steps, and by few too narrow.
# Blurring: Eq. 24 as printed; float32; ddim2's term; clip. First order costs more with blur.
#   Algorithm 1 draws the data. ε̂ must not be clipped; v may be.


@pytest.mark.parametrize("script", [ddm, angular])
@pytest.mark.parametrize("calls", [2, 3])
@pytest.mark.parametrize("s", [0.4, 0.01, 0])
def test_multistep_is_the_integral_of_the_history(script, calls, s):
    """y/τ has the derivative -x̂₀/τ². So a step lacks -s ∫ (x̂₀(τ) - x̂₀(t0))/τ² of the polynomial
    that x̂₀ is, by quadrature; on the last step, to s = 0, of a line. Catches wrong algebra, a
    swapped history, and a last step of third order, which asks for more than is known.
    """
    places = [0.5, 0.7, 0.9][:calls]
    history = [(tau, randn(4, seed=k)) for k, tau in enumerate(places)]
    used = history if s else history[:2]
    x, y = zip(*used)
    polynomial = np.polynomial.polynomial.polyfit(x, torch.stack(y).numpy(), len(used) - 1)
    middle = (0.5 + s) / 2 + (s - 0.5) / 2 * NODES
    change = np.polynomial.polynomial.polyval(middle, polynomial) - y[0].numpy()[:, None]
    lacks = -(max(s, 1e-9)) * (s - 0.5) / 2 * (change / middle ** 2) @ WEIGHTS
    if s == 0:                                                # the limit of s ∫ (τ - t0)/τ² dτ
        lacks = -0.5 * polynomial[1]
    close(script.multistep(history, s), lacks, 1e-8)


@pytest.mark.parametrize("noise, steps, gain", [("sqrt", 50, 1.5), ("linear", 20, 4)])
def test_ddm_third_order_is_nearer_to_the_mixture(noise, steps, gain):
    """Than the second. Catches a bend that is not used, or used at other times."""
    x1 = MIXTURE.quantiles(100, 0, 1)
    net = oracle(ddm, noise=noise)

    def error(solver):
        image = ddm.sample(net, x1, steps, solver, noise=noise, delta=1e-9)
        return (image - MIXTURE.quantiles(100)).norm()

    assert error("ode2") > gain * error("ode3")


@NOISES
@pytest.mark.parametrize("solver", ["ode2", "ode3"])
def test_ddm_a_slope_in_flow_time_is_followed_to_the_image(solver, noise):
    """If x̂₀ is linear in τ = n/(1 - t + n), the image is the line's end at 0, however rough the
    steps. Catches a gain of y that is not scaled to x, and τ of another call.
    """

    def net(x, t):
        n = like_image(t.sqrt() if noise == "sqrt" else t)
        phi = -X0 - EPS * n / (1 - like_image(t) + n)
        return phi, ddm.noise_of(x, phi, t, noise=noise)

    for steps in (2, 3, 10):
        close(ddm.sample(net, EPS, steps, solver, noise=noise), X0)


@pytest.mark.parametrize("power, share, noisy", [(1, 0.125, 0.923), (3, 0.5, 0.575)])
def test_ddm_training_times_are_of_their_law(power, share, noisy):
    """P(t < 1/8) is P(u < 1/2) for t = u³. `noisy` have a noise of more than .3 of the image, which
    is at t > .0767. All are in [δ, 1]. Catches a root for a power, a t below δ, and docs that say
    more.
    """
    t = ddm.draw_times(40_000, power, seeded())
    close((t < 0.125).double().mean(), share, 0, 0.01)
    assert t.min() >= 1e-3 and t.max() <= 1
    close((t.sqrt() > 0.3 * (1 - t)).double().mean(), noisy, 0, 0.01)


def test_ddm_sine_reaches_its_bound_and_refuses_images_beyond():
    """(1 - cos a)/a is largest, .7246, where its derivative is 0: up to there φ is found, beyond
    it there is none. Catches a wrong bound, and an image that never goes.
    """
    a = ddm.SINE_RANGE
    close(a * math.sin(a), 1 - math.cos(a), 1e-5)
    close(a * ddm.SINE_BOUND, 1 - math.cos(a), 1e-6)
    most = X0 / X0.abs().max() * 0.7246
    phi = ddm.draw_phi(most, "sine")
    close(ddm.image_of(phi, "sine"), most, 1e-9)
    with pytest.raises(ValueError, match="scale"):
        ddm.draw_phi(most * 1.0001, "sine")


def test_ddm_attenuations_keep_their_digits_near_zero():
    """e^{at} - 1 and 1 - cos at, over a, lose all digits of float32 for small a, and at 0 are 0/0.
    Catches exp - 1 for expm1, and a missing half-angle.
    """
    a = like_image(torch.tensor([0.0, 1e-38, 1e-12, 1e-6, -1e-4, 1e-2]))
    t = torch.full((6,), 0.7)
    grown = ddm.H(torch.cat([a, 0 * a], 1), t, "exponential")
    close(grown, 0.7 + 0.245 * a + 0.0572 * a ** 2, 1e-6)
    close(ddm.H(a, t, "sine"), 0.245 * a, 3e-5, 1e-44)


def test_ddm_algorithm_2_draws_the_data_by_many_steps_and_by_few_too_narrow():
    """By exact means and 200 even steps it has the mixture's moments. But 5 steps make N(0, .5²)
    a deviation of .301, by x_r = slope x_t + noise: "arbitrary step size" needs the true x₀.
    Catches a variance that is not s (t - s)/t, and docs that say more.
    """

    def draw(known, n, steps):
        net = oracle(ddm, known)
        x1 = randn(n, 1, 1, 1)
        return ddm.sample(net, x1, steps, "ddm", "uniform", generator=seeded(1))

    many = draw(MIXTURE, 8000, 200)
    close(many.mean(), MIXTURE.mean, 0, 0.04)
    close(many.std(), MIXTURE.std, 0, 0.04)
    variance = 1.0
    for t in (1, 0.8, 0.6, 0.4, 0.2):
        V = (1 - t) ** 2 / 4 + t
        slope = 1 + 0.2 * ((1 - t) / 4 - 1) / V
        variance = slope ** 2 * variance + 0.2 * (t - 0.2) / t
    few = draw(Mixture([1], [0], [0.5]), 60000, 5)
    close(few.std(), 0.301, 0, 0.004)
    close(math.sqrt(variance), 0.301, 0, 0.001)


@BLUR
def test_blurring_equation_24_as_printed_has_the_mean_of_equation_19(blur):
    """From u_ε, with the variance of Eq. 18. Catches an erratum that is none."""
    s, t = torch.triu_indices(9, 9, 1).double() / 8
    alpha_t, sigma_t = blurring.alpha_sigma(t, (8, 12), **blur)
    _, sigma_s = blurring.alpha_sigma(s, (8, 12), **blur)
    alpha_ts, sigma2_ts = blurring.transition(t, s, (8, 12), **blur)
    ux, u_eps = randn(2, 36, 1, 8, 12)
    ut = alpha_t * ux + sigma_t * u_eps
    mean, variance = blurring.posterior(ut, ux, t, s, **blur)
    image = (ut - sigma_t * u_eps) / (alpha_ts * sigma_s ** 2)
    close(variance * (alpha_ts / sigma2_ts * ut + image), mean, 1e-8)


@BLUR
@pytest.mark.parametrize("t, s", [
    (1.0, 0.95),
    (0.6, 0.5),
    (0.3, 0.0)])
def test_blurring_second_order_term_is_the_integral_of_the_slope(t, s, blur):
    """σ_s ∫ₜˢ (r - t) d(α/σ), by 20,000 trapezia. Catches the integration by parts."""
    r = torch.linspace(t, s, 20001).double()
    alpha, sigma = blurring.alpha_sigma(r, (4, 6), **blur)
    middle = like_image((r[1:] + r[:-1]) / 2 - t)
    grown = (alpha / sigma).diff(dim=0)
    integral = sigma[-1] * (middle * grown).sum(0)
    got = blurring.second_order(t, s, (4, 6), **blur)
    close(got[0], integral, 2e-5, 1e-11)


@pytest.mark.parametrize("solver", blurring.SOLVERS)
@pytest.mark.parametrize("outputs", [slice(0, 2), slice(1, 2)])
def test_blurring_clip_keeps_every_estimate_in_range(outputs, solver):
    """Whatever the network says, x̂₀ is in [-1, 1] in pixels, and so is the image, but for ddim2's,
    which goes on along a slope. Catches a clip in frequencies, and a mean that goes round it.
    """
    net = lambda z, t: (9 * z, z)[outputs]
    *looks, (_, image, _) = blurring.walk(net, EPS, 3, solver, clip=True)
    assert all(x0.abs().max() < 1 + 1e-9 for _, _, x0 in looks)
    assert solver == "ddim2" or image.abs().max() < 1.1


@BLUR
def test_blurring_transitions_are_distributions_in_float32(blur):
    """Eq. 16: σ²_t|s > 0 in every frequency for times as near as .001, to 3e-4 of itself. Catches
    Appendix A's sigma2_ts, and lost digits.
    """
    t = torch.linspace(0, 1, 1001)
    _, variance = blurring.transition(t[1:], t[:-1], 32, **blur)
    t = t.double()
    _, precise = blurring.transition(t[1:], t[:-1], 32, **blur)
    assert variance.dtype == torch.float32 and variance.min() > 0
    close(variance, precise, 3e-4, 0)


BOTH = slice(0, 2)                                            # of a network's outputs
NOISE = slice(1, 2)


def spectrum(size):
    """[H, W]: variances as natural images', 1/frequency², for pixels of variance 1/4."""
    k = torch.arange(size).double()
    c = 1 / (k[:, None] ** 2 + k ** 2).clamp(min=1)
    return c * size ** 2 / 4 / c.sum()


def spectral(c, outputs=BOTH, error=0.0, **blur):
    """The exact network for images of independent Gaussian coefficients of variances c [H, W]."""
    known = Mixture([1], [0], c.sqrt()[..., None])

    def net(z, t):
        alpha, sigma = blurring.alpha_sigma(t, c.shape, **blur)
        heads = known.heads(blurring.dct(z), alpha, sigma)
        first, *rest = [blurring.idct(u) for u in heads][outputs]
        wrong = error * randn(*z.shape, seed=int(1e6 * t[0]))
        return [first + wrong, *rest]

    return net


@pytest.mark.parametrize("solver, order, with_blur, without", [
    ("ddim", 1, 0.70, 0.90),
    ("ddim2", 2, 1.06, 1.03)])
def test_blurring_few_steps_cost_more_with_blur(solver, order, with_blur, without):
    """The (linear) flow of a natural spectrum scales by the ratio of deviations: so errors of 200
    and 400 steps are known. Of 50, first order keeps less power of the highest band with blur, and
    second order mends it. Catches a step wrong for some frequency, and docs that say more.
    """

    def gains(c, steps, **blur):
        z1 = blurring.idct(torch.ones(1, 1, *c.shape).double())
        image = blurring.sample(spectral(c, **blur), z1, steps, solver, **blur)
        return blurring.dct(image)[0, 0]

    c = spectrum(8)
    blur = dict(sigma_blur_max=10.0, schedule="sin", d_min=0.01)
    t = torch.tensor([0.0, 1.0]).double()
    alpha, sigma = blurring.alpha_sigma(t, 8, **blur)
    variances = alpha ** 2 * c + sigma ** 2
    late, early = variances[:, 0]
    exact = (late / early).sqrt()
    coarse, fine = ((gains(c, steps, **blur) - exact).norm() for steps in (200, 400))
    assert abs(math.log2(coarse / fine) - order) < 0.15
    c = spectrum(32)
    high = c < c[0, 0] / 16 ** 2
    for width, kept in ((20.0, with_blur), (0.0, without)):
        power = gains(c, 50, sigma_blur_max=width) ** 2
        share = power[high].sum() / c[high].sum()
        close(share, kept, 0, 0.02)


def test_blurring_ancestral_sampling_draws_the_data():
    """1000 steps of Algorithm 1 with exact means have the data's spectrum, in low and in high
    frequencies. Catches a wrong variance in any.
    """
    c = spectrum(8)
    blur = dict(sigma_blur_max=10.0, schedule="sin", d_min=0.01)
    z1 = randn(300, 1, 8, 8)
    images = blurring.sample(spectral(c, **blur), z1, 1000, generator=seeded(1), **blur)
    power = blurring.dct(images).square().mean(0)
    ratio = power[0] / c
    for band in (ratio[:4], ratio[4:]):
        close(band.mean(), 1, 0.06)


def test_blurring_an_eps_network_must_not_be_clipped():
    """At t = 1 an error of ε̂ is 148 (mean) to 148,000 (finest detail) times as large in x̂₀, and
    one of v at most 4.6 times at any t. So clipping ruins samples by ε̂, and by x̂₀ it does not.
    Catches docstrings that say other figures.
    """
    t = torch.linspace(0, 1, 1001).double()
    alpha, sigma = blurring.alpha_sigma(t, 32)
    grown = (sigma / alpha)[-1, 0]
    close(grown[0, 0], 148.4, 1e-3)
    close(grown.max(), 148_400, 1e-3)
    a, _ = blurring.noise_schedule(t)
    of_v = sigma / (a * alpha + sigma ** 2)
    assert 4.5 < of_v.max() < 4.6
    c = spectrum(32)
    z1 = randn(4, 1, 32, 32)
    for outputs, ruined in ((NOISE, True), (BOTH, False)):
        wrong = spectral(c, outputs, 0.03)
        right = spectral(c, outputs)
        exact = blurring.sample(right, z1, 50, "ddim")
        free = blurring.sample(wrong, z1, 50, "ddim")
        clipped = blurring.sample(wrong, z1, 50, "ddim", clip=True)
        assert (free - exact).std() < 0.15
        assert ((clipped - exact).std() > 0.2) == ruined


# ------------------------------------------ angular and pixel_aware: what the papers and docs say
#
# Angular: older samplers are special cases; which solver is best depends on the data; Heun and RK4
#   leave noise.
# Pixel-aware: the SNR's slope, and both propositions as far as they hold. Dark pixels do not end at
#   white noise, so x_T must be a forwarded image. Algorithm 1 does not reconstruct.


def test_angular_ddim_of_a_noise_network_is_songs():
    """Eq. 6 as Song et al. wrote it, in ᾱ, on DDPM's schedule. Catches the other schedule."""
    net = lambda x, t: [torch.tanh(x) * like_image(1 + t)]
    x = randn(3, 1, 4, 4)
    model = angular.predictor(net, "eps")
    image = angular.sample(model, x, 10, "ddim", schedule="linear")
    bars = ddpm()[::100].flip(0)
    for a, b in zip(bars, bars[1:]):
        t = a.sqrt().acos() / HALF_PI
        e, = net(x, full(t, 3))
        x = (x - (1 - a).sqrt() * e) * (b / a).sqrt()
        x = x + (1 - b).sqrt() * e
    close(image, x, 1e-6)


def test_angular_ancestral_sampling_draws_the_mixture():
    """200 steps by exact means end at the mixture's moments. Catches the variance β for β̃."""
    x1 = randn(8000, 1, 1, 1)
    x0 = angular.sample(oracle(angular), x1, 200, "ddpm", generator=seeded(1))
    close(x0.mean(), MIXTURE.mean, 0.03)
    close(x0.std(), MIXTURE.std, 0.03)


def test_angular_solvers_rank_otherwise_on_a_smooth_mixture():
    """Midpoint, Euler, ddim2, DDIM, by 10 calls. Catches docs that generalise from images."""
    x1 = MIXTURE.quantiles(100, 0, 1)
    truth = MIXTURE.quantiles(100)

    def error(*rule, **options):
        image = angular.sample(oracle(angular), x1, *rule, **options)
        return (image - truth).norm()

    errors = [
        error(5, "midpoint"),
        error(10, "euler"),
        error(10, "ddim2"),
        error(10, "ddim")]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * errors[1]
    assert error(100, "midpoint", schedule="linear") < 0.2    # the same ODE on DDPM's angles


def ends_at(s, N, *rule, **options):
    """Where the exact network of N(0, s²) takes the noise 1."""
    net = oracle(angular, Mixture([1.0], [0.0], [s]))
    return angular.sample(net, PIXEL, N, *rule, **options).item()


def test_angular_euler_is_no_worse_than_ddim_on_gaussian_data():
    """But for s < .01 in 5 steps; for s = 1 Euler stands still. Catches docs that say more."""

    def worse(s, N):
        euler = abs(ends_at(s, N)) - s
        ddim = ends_at(s, N, "ddim") - s
        return abs(euler) > abs(ddim) + 1e-12

    for N, least in ((5, 0.01), (10, 0.001), (50, 0.001)):
        deviations = np.geomspace(least, 100, 12)
        assert not any(worse(s, N) for s in deviations)
        close(ends_at(1, N), 1)
        close(ends_at(1, N, "ddim"), math.cos(HALF_PI / N) ** N)
    assert worse(0.005, 5)
    assert worse(1e-5, 10)
    close(ends_at(1e-9, 10), 0.0015, 0, 1e-4)                 # .15 % of the noise, in docs


@pytest.mark.parametrize("N", (20, 40))
def test_angular_heun_and_rk4_leave_noise_and_midpoint_does_not(N):
    """h/2 and h/6 of it, of data at a point, by a call at η = 0. Catches a `last` not used."""
    h = HALF_PI / N
    for solver, left in (("heun", h / 2), ("rk4", h / 6)):
        close(ends_at(1e-9, N, solver), left, 0.1, 0)
        close(ends_at(1e-9, N, solver, last="midpoint"), 0, 0.02 / N)
    close(ends_at(1e-9, N, "midpoint"), 0, 0.02 / N)
    in_20_calls = [
        ends_at(1e-9, 10, "heun"),
        ends_at(1e-9, 5, "rk4"),
        ends_at(1e-9, 10, "midpoint")]
    close(in_20_calls, [0.078, 0.054, -0.001], 0, 5e-4)       # as in docs


@pytest.mark.parametrize("t, velocity", ((1.0, -MIXTURE.mean), (0.0, 0.0)))
def test_angular_mean_velocity_at_the_ends_ignores_x(t, velocity):
    """It is -E[x₀] at π/2, and 0 at 0, where Heun and RK4 ask. Catches a call beside the end."""
    x = randn(5, 1, 2, 2)
    eta = full(t * HALF_PI, 5)
    outputs = oracle(angular)(x, full(t, 5))
    close(angular.velocity(*outputs, eta), velocity)


def slope(x0, t):
    """The derivative of the SNR in t, for γ = 20, by automatic differentiation."""
    t = t.clone().requires_grad_()
    total = pixel_aware.snr(x0, t, 20).sum()
    return torch.autograd.grad(total, t)[0]


def test_angular_betas_keep_their_digits_at_both_ends():
    """β_1 is an angle's sin²; the last are 5/9, 3/4, 1. Catches 1 - ᾱ_i/ᾱ_{i-1}, and an ᾱ_T > 0."""
    T = 10 ** 6
    i = torch.tensor([1, T - 2, T - 1, T])
    first = (HALF_PI / T) ** 2
    by_hand = [first, 5 / 9, 3 / 4, 1]
    close(angular.beta(i, T), by_hand, 1e-10, 0)
    assert angular.alpha_bar(i, T)[-1] == 0


def test_pixel_aware_snr_is_eq_11_and_its_slope_eq_17_corrected():
    """With the e^y that Eq. 17 lost; x₀/(γt) as t → 0, not t⁻². Catches Eq. 10's second /T."""
    x0 = rand(50, low=0.004)
    t = rand(50, seed=1, low=0.01)
    bar = kept(x0, 20, t)
    y = 20 * t * x0
    close(pixel_aware.snr(x0, t, 20), bar * x0 ** 2 / (1 - bar), 1e-9)
    corrected = -20 * x0 ** 3 * y.exp() / torch.expm1(y) ** 2
    close(slope(x0, t), corrected, 1e-9)
    close(pixel_aware.snr(x0, 1e-7, 20), x0 / 20e-7, 1e-5)


@pytest.mark.parametrize("dark, bright", (
    (0.05, 0.1),
    (0.1, 0.5),
    (0.1, 1.0),
    (0.5, 1.0),
    (0.9999, 1.0)))
def test_pixel_aware_proposition_1_holds_until_t_delta_and_reverses(dark, bright):
    """The brighter pixel loses SNR faster until t_δ, from y/(γ bright) to y/(γ dark), y = 2.5757 of
    y coth(y/2) = 3; then the darker does. Catches the claim that it holds throughout.
    """
    close(2.5757 / math.tanh(2.5757 / 2), 3, 1e-4)
    t = torch.logspace(-4, 0.5, 5001).double()
    faster = slope(bright, t) < slope(dark, t)
    t_delta = t[faster].max()
    assert faster.equal(t <= t_delta)
    assert 2.572 < 20 * bright * t_delta
    assert 20 * dark * t_delta < 2.579


def test_pixel_aware_proposition_2_needs_more_than_its_condition():
    """γ x₀ = 20 exceeds a t = 5 t always, but after t = .28 the mean falls more slowly than DDPM's
    e^{-a t²/4} (in print /2), being near 0. Catches docs that repeat the proposition.
    """
    t = torch.linspace(0, 1, 20001).double()
    mean = pixel_aware.diffuse(PIXEL, 0, 200 * t, 20, 200).flatten()
    theirs = torch.exp(-5 / 4 * t ** 2)
    slower = mean.diff() > theirs.diff()
    close(t[1:][slower].min(), 0.28, 0.01)
    assert slower[t[1:] > 0.29].all()


def test_pixel_aware_dark_pixels_do_not_end_at_white_noise():
    """At γ = 20; and .09 at γ = 50 keeps more than DDPM. Catches a law of x_T taken for granted."""
    x0 = torch.tensor([0.004, 0.05, 0.1, 0.25]).view(4, 1, 1, 1)
    xT = pixel_aware.diffuse(x0, 1j, 200, 20, 200)
    close(xT.imag.flatten(), [0.277, 0.795, 0.930, 0.9966], 1e-3)
    bar = pixel_aware.kept(50 / 500 * 0.09 * PIXEL, 500)
    assert bar > ddpm(500)[-1]


@pytest.mark.parametrize("value, gamma, T", (
    (0.05, 20, 200),
    (0.25, 20, 200),
    (0.5, 20, 200),
    (1, 50, 500)))
def test_pixel_aware_algorithm_1_diverges_as_its_formula(value, gamma, T):
    """From the true ε̃_j, the paper's own check. They correlate, so it ends √(2(e^{γx₀} - 1)) away;
    with line 9 as printed, α for ᾱ, farther. Catches a literal mode that quietly reconstructs.
    """
    j = np.arange(1, T + 1)
    bars = np.exp(-gamma * value / T * j)
    alpha = bars[0]
    u = 1 / bars - 1
    ratio = np.divide.outer(u, u)
    correlation = np.sqrt(np.minimum(ratio, 1 / ratio))

    def error(taken):
        """The error's variance, if line 9 takes this part of each Z^j out of x_j, without noise."""
        parts = -taken / np.sqrt(bars)
        parts[-1] += math.sqrt(u[-1])
        return parts @ correlation @ parts

    variance = 2 * error((1 - alpha) / np.sqrt(1 - bars))     # the fresh noise adds as much
    close(variance, 2 * math.expm1(gamma * value), 0.12)
    assert error(math.sqrt(1 - alpha)) > 8 * variance
    x0 = torch.full((1, 1, 32, 32), value).double()
    eps = pixel_aware.trajectory_noise(x0, gamma, T, seeded(1))
    xT = pixel_aware.diffuse(x0, eps[:, -1], T, gamma, T)
    for noise, part in ((False, 2), (True, 1)):
        image = pixel_aware.reverse(
            xT, T, kept(x0, gamma), eps, T,
            "literal", seeded(2), noise=noise)
        squares = (image - x0).square()
        close(squares.mean(), variance / part, 0.1)


@pytest.mark.parametrize("value", (0.05, 0.25, 1))
def test_pixel_aware_own_noises_reconstruct_by_line_9_as_printed(value):
    """√(1-α) belongs to the z_j of the steps themselves, without fresh noise. By E[ε̃_j | x_T, x₀]
    a silent way ends at the image, and fresh noise ruins it. Catches docs that say more, or less.
    """
    x0 = torch.full((1, 1, 32, 32), value).double()
    scale = kept(x0, 20)
    alpha = kept(x0, 20, 1 / 200)
    eps = pixel_aware.trajectory_noise(x0, 20, 200, seeded(1))
    xT = pixel_aware.diffuse(x0, eps[:, -1], 200, 20, 200)
    own = randn(1, 200, 1, 32, 32, seed=1)                    # of which these ε̃_j are made
    x = xT
    for j in range(199, -1, -1):
        x = (x - (1 - alpha).sqrt() * own[:, j]) / alpha.sqrt()
    close(x, x0, 0, 1e-9)
    times = torch.arange(1, 201).double()
    known = pixel_aware.expected_noise(eps[:, -1], 200, times, x0 / 10)
    silent = pixel_aware.reverse(xT, 200, scale, known, 200, "literal", noise=False)
    close(silent, x0, 0, 1e-9)
    noisy = pixel_aware.reverse(xT, 200, scale, known, 200, "literal", seeded())
    assert (noisy - x0).std() > 1


@pytest.mark.parametrize("scale", ("image", "delta"))
@pytest.mark.parametrize("predict", ("x0", "eps"))
def test_pixel_aware_heads_mean_in_sampling_what_training_taught(predict, scale):
    """Eq. 15 is least, in every head, for outputs that the sampler reads as the true noises. Its
    slope at outputs of 0 says which they are. Catches a `guess` that differs between the two.
    """
    x0 = 0.3 + 0.2 * rand(1, 3, 4, 4)
    shown = kept(0.3 + 0.2 * rand(1, 3, 4, 4, seed=8), 20)    # x̂_δ, of another image
    times = torch.arange(1, 6)
    i = torch.tensor([5.0], dtype=torch.float64)
    eps_i, eps = pixel_aware.draw_trajectory(x0, i, times.double(), 20, 5, seeded(2))
    zero = torch.zeros_like(eps, requires_grad=True)

    def model(*_):
        return x0, full(0, 1), shown, zero

    weights = torch.full((1, 5), 0.5)
    error = pixel_aware.loss(model, x0, i, eps_i, eps, weights, None, None, 5, 20, scale, predict)
    slope, = torch.autograd.grad(error.sum(), zero)           # - 2 times 0.5/48 times the target
    of = types.SimpleNamespace(T=5, gamma=20, grid="uniform", scale=scale, predict=predict)
    net = types.SimpleNamespace(of=of, vae=None, parallel=lambda *_: -48 * slope)
    run = types.SimpleNamespace(
        device=torch.device("cpu"), averaged=lambda kind: net, ready=lambda part: part)
    _, R = pixel_aware.trained(run)
    xi = pixel_aware.diffuse(x0, eps_i, i, 20, 5)
    Z = R(xi, shown, i / 5)
    if predict == "eps":
        close(Z, eps, 1e-6)
    else:                                                     # x_5's noise, if it fades by x̂_δ
        bar = shown ** (i / 5)
        close(Z[:, 4], (xi - bar.sqrt() * x0) / (1 - bar).sqrt(), 1e-6)


@pytest.mark.parametrize("passes, share", ((1, 0.391), (2, 0.395), (10, 0.451)))
def test_pixel_aware_exact_networks_draw_the_data_from_a_forwarded_start(passes, share):
    """Half of the pixels are dark. From N(0, I), as in the paper, they come too rarely: .391 is by
    quadrature. Jumps of first order mend little of it. Catches a biased jump, and x_T taken for
    white noise.
    """
    two = torch.tensor([0.01, 0.6], dtype=torch.float64)
    g = seeded(7)

    def dark(x, t):
        """The odds of the dark value."""
        bar = kept(two, 20, t)
        law = torch.distributions.Normal(two * bar.sqrt(), (1 - bar).sqrt())
        odds = law.log_prob(x[..., None]).softmax(-1)
        return odds[..., 0]

    def drawn(x, t):
        """x₀ given x_t, at random."""
        odds = torch.rand(x.shape, generator=g, dtype=x.dtype)
        return two[(odds > dark(x, t)).long()]

    noise = randn(1, 1, 200, 200)
    bright = rand(1, 1, 200, 200, seed=1) > 0
    forwarded = pixel_aware.diffuse(two[bright.long()], noise, 1, 20, 1)
    for x, part in ((forwarded, 0.5), (noise, share)):
        stops = pixel_aware.pass_stops(passes, 200, "uniform")
        times = [(j / 200) ** 2 for j in stops]
        for t, s in zip(times, times[1:]):
            x0 = drawn(x, t)
            x = pixel_aware.jump(x, x0, t, s, 20 * x0)
        close(x, x0)
        close((x < 0.3).double().mean(), part, 0, 0.01)
    x = torch.linspace(-6, 6, 20001).double()
    density = (-x ** 2 / 2).softmax(0)
    close(dark(x, 1) @ density, 0.391, 1e-3)


@pytest.mark.parametrize("s", (15, 2, 1e-9))
def test_pixel_aware_jumps_are_exact_if_x0_is_linear_in_flow_time(s):
    """x/σ grows by x̂₀ d(√ᾱ/σ), here in 5,000 steps. Catches a slope of another sign or scale, and a
    last step to s = 0 that is not the limit of steps to s > 0.
    """
    rate = rand(2, 1, 3, 3, low=0.004) / 4
    x = xi = randn(2, 1, 3, 3)

    def image(i):
        return kept(rate, 1, i).sqrt()

    def noise(i):
        return (1 - kept(rate, 1, i)).sqrt()

    def x0(i):
        return 0.5 + 0.3 * noise(i) / (image(i) + noise(i))

    path = (20 - s) * np.linspace(1, 0, 5001) ** 3 + s
    for a, b in zip(path, path[1:]):
        x = x * noise(b) / noise(a)
        grown = image(b) / noise(b) - image(a) / noise(a)
        x = x + noise(b) * grown * (x0(a) + x0(b)) / 2
    to = s if s > 1e-6 else 0
    last = 24, x0(24)
    close(pixel_aware.jump(xi, x0(20), 20, to, rate, last), x, 1e-4)
    assert (pixel_aware.jump(xi, x0(20), 20, to, rate) - x).abs().max() > 1e-3


def test_pixel_aware_each_jump_knows_the_pass_before(monkeypatch):
    """Its i and x̂₀, and the rate by its own x̂₀. Catches a memory of the wrong pass, or of none."""
    jumps = []

    def record(xi, x0, i, s, rate, last):
        jumps.append((x0, i, s, rate, last))
        return xi / 2

    monkeypatch.setattr(pixel_aware, "jump", record)
    G = lambda x, t, z: torch.exp(-20 * (x.abs() / 9 + 0.01))
    image = pixel_aware.sample(G, knowing(40), randn(2, 1, 4, 4), 5, gamma=20, T=40)
    close(image.min(), -1)                                    # no pixel below LOW
    before = None
    for (x0, i, s, rate, last), (at, to) in zip(jumps, ((40, 26), (26, 14), (14, 6), (6, 2), (2, 0))):
        assert (i, s) == (at, to)
        close(rate, x0 / 2)
        assert last == before or (last[0] == before[0] and torch.equal(last[1], before[1]))
        before = i, x0


# -------------------------------------------------------------------------------- sizes of networks
#
# The presets have the papers' networks, or those that docs names. The demos are short.


def settings(script, dataset):
    """A run's settings, by the defaults, or by --preset paper ("paper DATASET")."""
    rows = data.COMMON | script.FLAGS | unet.FLAGS
    values = {name: row[0] for name, row in rows.items()}
    values |= data.SIZES[dataset.split()[-1]] | script.PRESETS[dataset]
    return types.SimpleNamespace(**values)


def built(script, s):
    """The network of these settings, without memory for its weights."""
    kind = pixel_aware.PixelAware if script is pixel_aware else unet.UNet
    with torch.device("meta"):
        return kind(**script.network(s, 3))


def millions(net):
    """Its weights."""
    return sum(weight.numel() for weight in net.parameters()) / 1e6


@pytest.mark.parametrize("dataset, size, by_hand", (
    ("paper cifar10", 32, 35.7),
    ("paper celeba", 64, 78.7),
    ("paper lsun-church", 256, 113.7)))
def test_angular_presets_are_ddims(dataset, size, by_hand):
    """DDIM's published networks have one output. Catches another network in the paper's name."""
    s = settings(angular, dataset)
    s.predict = "eps"
    assert s.image_size == size
    close(millions(built(angular, s)), by_hand, 0.01)


def test_blurring_presets_are_table_5():
    """CIFAR-10: three levels of 256 channels, attention at 16 and 8 with one head, 2 M steps.
    Churches: 64 to 512 channels from 128 to 8. Catches a head's size, and attention elsewhere.
    """
    s = settings(blurring, "paper cifar10")
    net = built(blurring, s)
    attend = [layer for layer in net.modules() if isinstance(layer, unet.Attention)]
    assert len(attend) == 2 * 3 + 2 * 4 + 1                   # down, up, and the middle
    for layer in attend:
        assert layer.heads == 1
        assert layer.qkv.in_channels == 256
    assert (s.iterations, s.batch_size, s.predict) == (2_000_000, 128, "eps")
    s = settings(blurring, "paper lsun-church")
    widths = [level[-1].conv2.out_channels for level in built(blurring, s).encoder]
    assert widths == [64, 128, 256, 384, 512] and s.image_size == 128


@pytest.mark.parametrize("dataset, T, gamma, by_hand", (
    ("paper cifar10", 200, 20, (14.3, 37.2)),
    ("paper celeba", 500, 50, (21.9, 74.6))))
def test_pixel_aware_presets_are_the_papers(dataset, T, gamma, by_hand):
    """The scale, the noises, one encoder, all heads; and the sizes in docs. Catches our defaults in
    the paper's name.
    """
    s = settings(pixel_aware, dataset)
    net = built(pixel_aware, s)
    assert (s.T, s.gamma, s.vae, s.scale, s.predict) == (T, gamma, "denoising", "delta", "eps")
    assert s.heads_per_step >= T
    close([millions(net.vae), millions(net.parallel)], by_hand, 0, 0.1)


@pytest.mark.parametrize("dataset, by_hand", (("paper cifar10", 124.0), ("paper celebahq", 73.6)))
def test_ddm_presets_have_the_size_that_docs_names(dataset, by_hand):
    """It is not the paper's 90 M and 130 M. Catches docs that say so."""
    close(millions(built(ddm, settings(ddm, dataset))), by_hand, 0, 0.1)


@SCRIPTS
def test_demo_fits_its_time_budget(script):
    """Under 25 TFLOPs, which two cores at .1 TFLOP/s make in about four minutes. Catches defaults
    that grow: counted, not timed, so that a busy machine does not decide it.
    """
    s = settings(script, "shapes")
    net = built(script, s)
    more = ()
    with torch.device("meta"):
        x = torch.rand(1, 3, s.image_size, s.image_size)
        t = torch.rand(1)
        if script is pixel_aware:
            z = torch.rand(1, s.code)
            heads = torch.arange(s.heads_per_step)
            more = z, x, heads
        call = bench.flops(lambda x, t: net(x, t, *more), x, t)
    step = 3 * call * s.batch_size
    assert step * s.iterations < 25e12
