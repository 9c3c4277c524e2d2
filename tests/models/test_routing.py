import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.model_config import LayerSpec
from btx_jax.models import routing
from btx_jax.models.routing import Choice, capacity, gumbel_temperature, route, statistics

STEP = np.int32(0)
place = jax.jit(routing.place, static_argnums=(1, 2))


def logits_of(shape=(2, 16, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def routed(spec, logits, valid=None, noise=None):
    valid = jnp.ones(logits.shape[:2], bool) if valid is None else valid

    @jax.jit
    def run(logits, valid, noise):
        choice = route(logits, valid, spec, noise, STEP)
        return choice, statistics(logits, choice, valid, jnp.zeros(()))

    return run(logits, valid, noise)


def test_top_k_is_softmax_of_the_kept_logits_and_equals_renormalised_probabilities():
    logits = logits_of()
    choice, _ = routed(LayerSpec(4, 2, "top_k"), logits)
    probs = np.array(jax.nn.softmax(logits))
    kept = np.take_along_axis(probs, np.array(choice.index_GSK), axis=-1)
    np.testing.assert_allclose(choice.gate_GSK, kept / kept.sum(-1, keepdims=True), rtol=1e-5)
    assert (np.sort(probs, axis=-1)[..., -2:].sum(-1) == kept.sum(-1)).all(), "not the two largest"


def test_switch_weights_the_best_expert_by_its_full_softmax_probability():
    logits = logits_of()
    choice, _ = routed(LayerSpec(4, 1, "switch"), logits)
    np.testing.assert_allclose(choice.gate_GSK[..., 0], jax.nn.softmax(logits).max(-1), rtol=1e-6)


def test_soft_uses_all_experts_with_the_full_softmax():
    logits = logits_of()
    choice, _ = routed(LayerSpec(4, 4, "soft"), logits)
    back = np.zeros(logits.shape)
    np.put_along_axis(back, np.array(choice.index_GSK), np.array(choice.gate_GSK), axis=-1)
    np.testing.assert_allclose(back, jax.nn.softmax(logits), rtol=1e-6)


def test_sample_top1_samples_in_training_and_is_argmax_with_weight_one_at_inference():
    logits = jnp.array(np.log(np.tile(np.array([0.6, 0.3, 0.1, 1e-9], np.float32), (1, 20_000, 1))))
    spec = LayerSpec(4, 1, "sample_top1")
    sampled, _ = routed(spec, logits, noise=jax.random.gumbel(jax.random.key(1), logits.shape))
    shares = np.bincount(np.array(sampled.index_GSK).ravel(), minlength=4) / 20_000
    np.testing.assert_allclose(
        shares, [0.6, 0.3, 0.1, 0], atol=0.015
    )  # the argmax of logits + Gumbel is a sample from the softmax
    assert ((sampled.gate_GSK > 0.25) & (sampled.gate_GSK <= 1)).all()
    assert np.std(sampled.gate_GSK) > 0.01, "the weight is the largest Gumbel-softmax value, not 1"
    inferred, _ = routed(spec, logits)
    assert (inferred.index_GSK == 0).all()
    assert (inferred.gate_GSK == 1).all()


def test_gumbel_temperature_falls_from_1_to_a_floor_of_one_half():
    tau = [float(gumbel_temperature(jnp.int32(t))) for t in (0, 5000, 6931, 6932, 100_000)]
    assert tau[0] == 1.0
    assert tau[1] == pytest.approx(np.exp(-0.5))
    assert tau[2] > 0.5
    assert tau[3:] == [0.5, 0.5]


@pytest.mark.parametrize(("routing", "k"), [("top_k", 2), ("top_k", 1), ("soft", 4)])
def test_mean_gates_and_mean_probabilities_sum_to_one(routing, k):
    logits = logits_of((3, 32, 4))
    choice, stats = routed(LayerSpec(4, k, routing), logits)
    u = jnp.einsum("gsk,gske->e", choice.gate_GSK, jax.nn.one_hot(choice.index_GSK, 4)) / 96
    p = choice.probs_GSE.mean((0, 1))
    assert float(u.sum()) == pytest.approx(1, abs=1e-6)
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert float(stats.load_E.sum()) == pytest.approx(1, abs=1e-6)
    assert float(stats.balance_loss) == pytest.approx(4 * float((u * p).sum()), rel=1e-6)


def test_balance_loss_is_1_at_uniform_and_n_at_collapse():
    """alpha times this is the paper's L: alpha when uniform, alpha N at collapse. Another value
    means another convention (Switch, HF)."""
    uniform = 1e-4 * jnp.stack([jnp.roll(jnp.arange(4.0), i) for i in range(4)])[None]
    _, stats = routed(LayerSpec(4, 1, "top_k"), uniform)
    assert float(stats.balance_loss) == pytest.approx(1, abs=1e-3)
    assert float(stats.entropy) == pytest.approx(np.log(4), abs=1e-3)
    _, stats = routed(LayerSpec(4, 1, "top_k"), jnp.tile(jnp.array([50.0, 0, 0, 0]), (1, 8, 1)))
    assert float(stats.balance_loss) == pytest.approx(4, abs=1e-4)
    assert stats.load_E.tolist() == [1, 0, 0, 0]


def test_z_loss_is_the_mean_squared_log_partition():
    logits = logits_of()
    _, stats = routed(LayerSpec(4, 2, "top_k"), logits)
    assert float(stats.z_loss) == pytest.approx(
        float((jax.nn.logsumexp(logits, -1) ** 2).mean()), rel=1e-6
    )


def test_padding_is_neither_routed_nor_counted():
    logits = logits_of((1, 8, 4))
    valid = jnp.arange(8)[None] < 5
    choice, stats = routed(LayerSpec(4, 2, "top_k"), logits, valid)
    _, alone = routed(LayerSpec(4, 2, "top_k"), logits[:, :5])
    for name in stats._fields[:-1]:
        np.testing.assert_allclose(
            getattr(stats, name), getattr(alone, name), rtol=1e-5, err_msg=name
        )
    dispatch, gates, _ = place(choice, 4, 8)
    assert dispatch[0, 5:].sum() == 0
    assert (gates[0] > 0).sum() == dispatch[0, :5].sum() == 10, (
        "a slot has a gate where it has a token"
    )


def test_first_choices_are_placed_before_second_choices_and_overflow_is_dropped():
    # Two tokens, one slot. Token 0 wants experts 0 then 1, token 1 wants 1 then 3.
    logits = jnp.array([[[9.0, 8, 0, 0], [0, 9, 0, 8]]])
    choice, _ = routed(LayerSpec(4, 2, "top_k"), logits)
    dispatch, gates, dropped = place(choice, 4, 1)
    assert dispatch[0, :, :, 0].tolist() == [[1, 0, 0, 0], [0, 1, 0, 1]], (
        "token 0's second choice lost to token 1's first"
    )
    best, second = jax.nn.softmax(jnp.array([9.0, 8.0])).tolist()
    np.testing.assert_allclose(
        (dispatch * gates[:, None])[0, :, :, 0], [[best, 0, 0, 0], [0, best, 0, second]], rtol=1e-6
    )
    assert float(dropped) == pytest.approx(1 / 4)


def test_hand_written_masks_with_drops_and_padding():
    # Five tokens, top-1, two experts, two slots; token 2 is padding. Expert 0 is wanted by tokens
    # 0, 1, 3 (dropped), 1 by token 4.
    choice = Choice(
        jnp.array([[[0.9], [0.8], [0.0], [0.7], [0.6]]]),
        jnp.array([[[0], [0], [2], [0], [1]]]),
        jnp.zeros((1, 5, 2)),
    )
    dispatch, gates, dropped = place(choice, 2, 2)
    want = np.zeros((5, 2, 2))
    want[0, 0, 0] = want[1, 0, 1] = want[4, 1, 0] = 1
    np.testing.assert_array_equal(dispatch[0], want)
    np.testing.assert_allclose(
        (dispatch * gates[:, None])[0],
        want * np.array([0.9, 0.8, 0, 0.7, 0.6])[:, None, None],
        rtol=1e-6,
    )
    assert float(dropped) == pytest.approx(1 / 4)


def test_groups_do_not_share_slots():
    logits = jnp.tile(jnp.array([9.0, 0]), (3, 2, 1))
    choice, _ = routed(LayerSpec(2, 1, "top_k"), logits)
    dispatch, _, dropped = place(choice, 2, 1)
    assert dispatch.sum((1, 3)).tolist() == [[1, 0]] * 3
    assert float(dropped) == pytest.approx(0.5)


def test_capacity_never_drops_at_experts_over_k():
    assert capacity(512, 4, 2, 2.0) == 512
    assert capacity(512, 4, 2, 1.25) == 320
    assert capacity(8, 64, 1, 1.0) == 4, "small groups keep a few slots"
