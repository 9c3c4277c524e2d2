"""One optimizer step, compiled under a mesh. Shape legend: models/layers.py."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.models.layers import Readout, on_mesh, platform_dispatch, platform_kernels
from btx_jax.models.leaves import computes_in_float32, stays_float32
from btx_jax.models.llama import Llama, Params, abstract_params, head_kernel, init_params
from btx_jax.models.lora import join
from btx_jax.models.routing import RoutingStats, feed_forward_routing
from btx_jax.parallel.compiler_options import compiled, compiler_options
from btx_jax.parallel.hosts import put
from btx_jax.parallel.sharding import batch_sharding, param_shardings, replicated
from btx_jax.training.losses import cross_entropy, next_token_targets
from btx_jax.training.optimizer import make_optimizer, schedule, split

Batch = Mapping[
    str, jax.Array
]  # tokens, segments: [batch, sequence + 1] int32; segment 0 is padding


class TrainState(NamedTuple):
    """opt_state: of what is trained alone (`optimizer.split`)."""

    # [], int32: optimizer steps done; Any, since shardings and shapes travel in the same structure
    step: Any
    params: Params
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, over the global batch. Losses in nats; balance and z are unweighted sums over
    layers.

    routing: run name -> RoutingStats with a leading layer axis, averaged over micro-batches.
    """

    loss: jax.Array
    lm_loss: jax.Array
    balance_loss: jax.Array
    z_loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    routing: dict[str, RoutingStats]


def loss_function(
    trained: Params,
    frozen: Params,
    batch: Batch,
    model: Llama,
    train: TrainConfig,
    targets: jax.Array,
    step: jax.Array,
    key: jax.Array | None,
):
    """LM loss of one micro-batch as its share of `targets` (all targets of the step), plus the
    auxiliary losses."""
    params = join(trained, frozen)
    inputs, segments, labels, mask = next_token_targets(batch["tokens"], batch["segments"])
    rngs = {} if key is None else {"routing": key, "dropout": jax.random.fold_in(key, 1)}
    hidden, routing = model.apply({"params": params}, inputs, segments, step, rngs=rngs)
    chunk, readout = model.compute.loss_chunk, Readout.of(model.config)
    nll = cross_entropy(hidden, head_kernel(params), labels, mask, chunk, readout)
    lm_loss = nll / targets
    balance = sum((stats.balance_loss.sum() for stats in routing.values()), jnp.zeros(()))
    z = sum((stats.z_loss.sum() for stats in routing.values()), jnp.zeros(()))
    loss = lm_loss + (train.balance_weight * balance + train.z_loss_weight * z) / train.accumulate
    return loss, (lm_loss, balance, z, feed_forward_routing(routing))


def matmul_copies(params: Params, dtype: str) -> Params:
    """The parameters as matmuls see them. A gradient with respect to these is half the size of one
    with respect to the float32 parameters and what the cast's own derivative would make of it; the
    head's, summed in float32, is rounded once."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if stays_float32(path) else x.astype(dtype), params
    )


def gradients(
    params: Params, batch: Batch, model: Llama, train: TrainConfig, step: jax.Array, key: jax.Array
):
    """(float32 grads of what is trained, loss, lm_loss, balance, z, routing) over `accumulate`
    micro-batches, equal to one big batch for the LM loss.

    The auxiliary losses are means over micro-batches: a balance loss is not linear in its batch.
    """
    trained, frozen = split(matmul_copies(params, model.compute.dtype), train.frozen)
    float32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)  # noqa: E731
    targets = jnp.maximum(next_token_targets(batch["tokens"], batch["segments"])[3].sum(), 1)
    grad = jax.value_and_grad(loss_function, has_aux=True)
    n = train.accumulate

    def one(micro_batch, index):
        (loss, aux), grads = grad(
            trained,
            frozen,
            micro_batch,
            model,
            train,
            targets,
            step,
            jax.random.fold_in(key, index),
        )
        return grads, loss, *aux

    if n == 1:
        grads, *rest = one(batch, 0)
        return (float32(grads), *rest, targets)
    # [n, B / n, T]: micro-batch i takes every n-th row, so that each is spread over all devices
    micro = jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), dict(batch))
    first = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32),
        jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro), 0),
    )

    def body(total, xs):
        return jax.tree.map(jnp.add, total, float32(one(*xs))), None

    (grads, loss, lm_loss, *means), _ = jax.lax.scan(body, first, (micro, jnp.arange(n)))
    balance, z, routing = jax.tree.map(lambda x: x / n, means)
    return grads, loss, lm_loss, balance, z, routing, targets


def state_shardings(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> tuple[Any, Any]:
    """(abstract TrainState, its shardings): moments lie where their parameters lie, what is frozen
    has its own dtype and no moments."""
    boxed = abstract_params(model)
    shapes, params = nn.unbox(boxed), param_shardings(boxed, mesh)
    trained, frozen = split(shapes, train.frozen)
    shapes = join(trained, jax.eval_shape(lambda tree: in_frozen_dtype(tree, train), frozen))
    optimizer = make_optimizer(train)
    abstract_opt = jax.eval_shape(optimizer.init, trained)
    opt = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, abstract_opt, split(params, train.frozen)[0],
        transform_non_params=lambda _: replicated(mesh),
    )  # fmt: skip
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, abstract_opt)
    shardings = TrainState(replicated(mesh), params, opt)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    ), shardings


def in_frozen_dtype(frozen: Params, train: TrainConfig) -> Params:
    """What is frozen as it is kept. A frozen embedding gets no gradient and need not stay in
    float32."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if computes_in_float32(path) else x.astype(train.frozen_dtype), frozen
    )


def init_state(
    model: ModelConfig,
    train: TrainConfig,
    mesh: Mesh,
    key: jax.Array | None = None,
    params: Params | None = None,
) -> TrainState:
    """Step 0: random parameters from `key`, or the given ones; zero moments. Laid out on the mesh
    from the start."""
    _, shardings = state_shardings(model, train, mesh)
    optimizer = make_optimizer(train)
    if params is None:
        assert key is not None
        params = jax.jit(functools.partial(init_params, model), out_shardings=shardings.params)(key)
    with jax.set_mesh(mesh):
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(
            split(params, train.frozen)[0]
        )
        return TrainState(put(np.int32(0), replicated(mesh)), params, opt_state)


@functools.lru_cache(maxsize=8)
def make_train_step(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """(state, batch, key) -> (state, Metrics), compiled. The state is donated.

    Compiled here, under the mesh: a jitted function called outside it would silently lose every
    activation constraint. Equal arguments return the same program, so that branches of a pipeline
    compile once.
    """
    return compiled(lower_train_step(model, compute, train, mesh, sequence_length))


def lower_train_step(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
):
    platform = mesh.devices.flat[0].platform
    compute = dataclasses.replace(
        compute,
        kernels=platform_kernels(compute.kernels, platform),
        dispatch=platform_dispatch(compute.dispatch, platform, mesh.shape["expert"]),
    )
    llama, optimizer, rate = Llama(model, compute), make_optimizer(train), schedule(train)

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        grads, loss, lm_loss, balance, z, routing, targets = gradients(
            state.params, batch, llama, train, state.step, key
        )
        trained, frozen = split(state.params, train.frozen)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        metrics = Metrics(
            loss, lm_loss, balance, z, optax.global_norm(grads), rate(state.step), targets, routing
        )
        return TrainState(
            state.step + 1, join(optax.apply_updates(trained, updates), frozen), opt_state
        ), metrics

    abstract, shardings = state_shardings(model, train, mesh)
    rows = jax.ShapeDtypeStruct(
        (train.batch_size, sequence_length + 1), jnp.int32, sharding=batch_sharding(mesh)
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    with on_mesh(mesh, compute.dtype):
        step = jax.jit(
            train_step,
            donate_argnums=0,
            out_shardings=(shardings, replicated(mesh)),
            compiler_options=compiler_options(mesh.devices.flat[0], compute.compiler_options),
        )
        return step.lower(abstract, {"tokens": rows, "segments": rows}, key)
