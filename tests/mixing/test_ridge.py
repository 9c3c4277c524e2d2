"""Closed-form routers compared with a twin in numpy float64 that shares no code."""

import dataclasses

import numpy as np
import pytest

from btx_jax.config.ridge import RidgeConfig
from btx_jax.errors import UserError
from btx_jax.mixing.closed_form import joined
from btx_jax.mixing.ridge import Moments, moments, own_share, solve
from btx_jax.mixing.text import pack

D = 12


def clouds(counts=(900, 300, 500), seed=0, offset=0.7):
    """States of domains that differ in mean and spread, far from zero, where a bias helps."""
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(n, D)) @ rng.normal(size=(D, D)) / 3 + rng.normal(size=D) + offset)
        for n in counts
    ]


def twin(states, penalty, weights):
    """DUME's equations, one token at a time."""
    a, b = np.zeros((len(states[0][0]),) * 2), []
    mean = np.mean([len(domain) for domain in states])
    for domain in states:
        weight = mean / len(domain) if weights == "equal" else 1.0
        a += weight * sum(np.outer(x, x) for x in domain)
        b.append(weight * sum(domain))
    w = np.linalg.inv(a + penalty * np.eye(len(a))) @ np.stack(b, axis=1)
    return w.T


@pytest.mark.parametrize("weights", ["equal", "share"])
@pytest.mark.parametrize("penalty", [1e-2, 30.0])
def test_rows_are_those_of_the_twin(weights, penalty):
    states = clouds()
    sums = joined([moments(np.array_split(domain, 7)) for domain in states])
    expected = twin(states, penalty, weights)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    rows = solve(sums, RidgeConfig(penalty=penalty, weights=weights, temperature=1.0))
    np.testing.assert_allclose(rows, expected, atol=1e-10)
    (others,) = {"equal", "share"} - {weights}
    other = solve(sums, RidgeConfig(penalty=penalty, weights=others))
    assert np.abs(other - rows).max() > 1e-3, "the domains are of other sizes: weights must matter"


def test_equal_domains_do_not_depend_on_how_much_text_each_has():
    """Whether a domain's text is read once or nine times; with `share` it matters."""
    states = clouds((200, 200, 200))
    once = joined([moments([domain]) for domain in states])
    more = once._replace(
        gram_EDD=once.gram_EDD * [[[9.0]], [[1.0]], [[1.0]]],
        total_ED=once.total_ED * [[9.0], [1.0], [1.0]],
        count_E=once.count_E * [9.0, 1.0, 1.0],
    )
    for weights, agrees in (("equal", True), ("share", False)):
        ridge = RidgeConfig(penalty=1e-9, weights=weights)
        assert np.allclose(solve(once, ridge), solve(more, ridge), atol=1e-8) is agrees


def test_the_sums_give_dumes_rows_with_its_constant_and_little_is_lost_without_it():
    """A constant 1 appended to x makes a row and a column of A from what is stored: totals and
    counts."""
    states, held_out = clouds(seed=1), clouds((400, 400, 400), seed=1)
    sums = joined([moments([domain]) for domain in states])
    a = np.zeros((D + 1, D + 1))
    a[:D, :D] = sums.gram_EDD.sum(0)
    a[D, :D] = a[:D, D] = sums.total_ED.sum(0)
    a[D, D] = sums.count_E.sum()
    b = np.concatenate([sums.total_ED, sums.count_E[:, None]], axis=1)
    with_constant = np.linalg.solve(a + 1e-2 * np.eye(D + 1), b.T).T
    behind_one = [np.concatenate([s, np.ones((len(s), 1))], axis=1) for s in states]
    np.testing.assert_allclose(with_constant, twin(behind_one, 1e-2, "share"), atol=1e-10)

    rows = solve(sums, RidgeConfig(weights="share"))
    unscaled = twin(states, 1e-2, "share")
    for expert, domain in enumerate(held_out):
        theirs = np.mean(
            (domain @ with_constant[:, :D].T + with_constant[:, D]).argmax(1) == expert
        )
        assert own_share([domain], rows, expert) > theirs - 0.1
        assert np.mean((domain @ unscaled.T).argmax(1) == expert) > theirs - 0.1


def test_temperature_is_in_the_rows_length():
    sums = joined([moments([domain]) for domain in clouds()])
    rows = solve(sums, RidgeConfig(temperature=0.25))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 4.0)
    np.testing.assert_allclose(rows, solve(sums, RidgeConfig(temperature=1.0)) * 4)


def test_sums_of_parts_are_those_of_the_whole():
    a, b, c = clouds()
    one, other = moments([c[:123]]), moments([c[123:]])
    whole = joined([moments([a]), moments([b]), moments([c])])
    together = Moments(*(x + y for x, y in zip(one, other, strict=True)))
    parts = joined([moments([a]), moments([b]), together])
    np.testing.assert_allclose(solve(parts, RidgeConfig()), solve(whole, RidgeConfig()), atol=1e-10)
    without_b = solve(whole.without(1), RidgeConfig())
    np.testing.assert_allclose(
        without_b, solve(joined([moments([a]), moments([c])]), RidgeConfig()), atol=1e-10
    )


@pytest.mark.parametrize("penalty", [0.0, 1e-14])
def test_too_few_tokens_without_a_penalty_are_told(penalty):
    sums = joined([moments([domain[:4]]) for domain in clouds()[:2]])
    with pytest.raises(UserError, match=r"8 tokens do not determine.*raise it, or give more"):
        solve(sums, RidgeConfig(penalty=penalty))
    assert np.isfinite(solve(sums, RidgeConfig())).all()


def test_a_domain_without_any_state_is_told():
    states = clouds((50, 50))
    with pytest.raises(UserError, match="text of expert 1 sum to zero"):
        solve(joined([moments([states[0]]), moments([states[1] * 0])]), RidgeConfig())


def test_float32_states_are_summed_in_float64():
    x = np.full((100_000, 1), np.float32(1.0000001))
    sums = moments(np.array_split(x, 50))
    assert sums.gram_EDD[0, 0, 0] == pytest.approx(100_000 * float(x[0, 0]) ** 2, rel=1e-13)


def test_packing_keeps_documents_apart_and_holds_out_the_last_eighth():
    texts = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11, 12], [13] * 99]
    rows = pack(texts, 5, 16)
    assert rows.tokens_RT.tolist() == [
        [1, 2, 3, 4, 5],
        [6, 7, 8, 9, 10],
        [11, 12, 13, 13, 13],
        [13, 0, 0, 0, 0],
    ]
    assert rows.segments_RT.tolist() == [
        [1, 1, 1, 2, 2],
        [1, 1, 1, 1, 1],
        [1, 1, 2, 2, 2],
        [1, 0, 0, 0, 0],
    ]
    assert np.argwhere(rows.is_heldout_RT).tolist() == [[2, 4], [3, 0]]


def test_settings_are_checked():
    with pytest.raises(UserError, match=r"temperature=0.*at least 0.0001"):
        RidgeConfig(temperature=0.0)
    with pytest.raises(UserError, match="weights='both'"):
        dataclasses.replace(RidgeConfig(), weights="both")
