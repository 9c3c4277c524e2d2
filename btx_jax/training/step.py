"""One optimizer step, compiled under a mesh. Shape legend: models/layers.py."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
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
from btx_jax.training.memory import chosen
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


class Sums(NamedTuple):
    """Over the micro-batches of a step so far. grads: float32, of what is trained. targets: of the
    whole step, known from the start. The others as in Metrics, not yet divided by `accumulate`."""

    grads: Params
    loss: jax.Array
    lm_loss: jax.Array
    balance: jax.Array
    z: jax.Array
    routing: dict[str, RoutingStats]
    targets: jax.Array


def gradients(
    params: Params,
    batch: Batch,
    model: Llama,
    train: TrainConfig,
    targets: jax.Array,
    step: jax.Array,
    key: jax.Array,
) -> Sums:
    """Of one micro-batch. Summed over a step's, they equal those of one big batch for the LM loss;
    the auxiliary losses are means over micro-batches: a balance loss is not linear in its batch."""
    trained, frozen = split(matmul_copies(params, model.compute.dtype), train.frozen)
    grad = jax.value_and_grad(loss_function, has_aux=True)
    (loss, (lm_loss, balance, z, routing)), grads = grad(
        trained, frozen, batch, model, train, targets, step, key
    )
    grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
    return Sums(grads, loss, lm_loss, balance, z, routing, targets)


def count_targets(batch: Batch) -> jax.Array:
    return jnp.maximum(next_token_targets(batch["tokens"], batch["segments"])[3].sum(), 1)


def micro_batch(batch: Batch, index: jax.Array, count: int) -> Batch:
    """Number `index` of `count`: every count-th row, so that each is spread over all devices."""
    return {
        name: jax.lax.dynamic_index_in_dim(
            x.reshape(-1, count, *x.shape[1:]), index, axis=1, keepdims=False
        )
        for name, x in batch.items()
    }


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


class Part(NamedTuple):
    """A program of a step. times: how often a step runs it. beside: what devices hold of the state
    while it runs, and it does not see."""

    program: Any
    times: int = 1
    beside: Any = ()

    @property
    def bytes(self) -> int:
        """Of memory that one device needs; of a compiled program."""
        used = self.program.memory_analysis()
        own = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
        return int(own - used.alias_size_in_bytes + shard_bytes(self.beside))


def shard_bytes(abstract: Any) -> int:
    """What one device holds of these arrays."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )


class TrainStep:
    """(state, batch, key) -> (state, Metrics), compiled. The state is donated to what changes it:
    to the whole step, or, with several micro-batches, to the update behind the last of them.

    Between two micro-batches a step can be dropped, and then the state is as it was."""

    LONG = 2.0  # seconds of a micro-batch behind which the next one does not queue

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._took = 0.0  # seconds, the last micro-batch

    @property
    def bytes(self) -> int:
        """Of memory that one device needs."""
        return max(part.bytes for part in self.parts)

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        key: jax.Array,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[TrainState, Metrics]:
        """check: called before every micro-batch and the update; what it raises drops the step.

        A micro-batch is started while the one before it runs, so that devices never wait, and no
        earlier, so that nobody waits for more than two of them; for one only where they are long
        and the pause between two, some milliseconds, is nothing.
        """
        if len(self.parts) == 1:
            check()
            return self.parts[0].program(state, batch, key)
        start, add, update = self.parts
        sums, before = start.program(batch), state.step
        for index in range(add.times):
            check()
            began = time.perf_counter()
            sums, loss = add.program(sums, state.params, state.step, batch, np.int32(index), key)
            jax.block_until_ready(loss if self._took > self.LONG else before)
            before, self._took = loss, time.perf_counter() - began
        check()
        return update.program(state, sums)


def decided(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
) -> tuple[ComputeConfig, TrainConfig]:
    """The settings with everything that they leave open decided for this mesh."""
    platform = mesh.devices.flat[0].platform
    compute = dataclasses.replace(
        compute,
        kernels=platform_kernels(compute.kernels, platform),
        dispatch=platform_dispatch(compute.dispatch, platform, mesh.shape["expert"]),
    )
    if compute.remat != "auto" and train.accumulate:
        return compute, train
    state = state_shardings(model, train, mesh)[0]
    trained = split(state.params, train.frozen)[0]
    sizes = shard_bytes(state), shard_bytes(trained)
    remat, count = chosen(model, compute, train, mesh, sequence_length, *sizes)
    return dataclasses.replace(compute, remat=remat), dataclasses.replace(train, accumulate=count)


@functools.lru_cache(maxsize=8)
def make_train_step(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
) -> TrainStep:
    """Compiled here, under the mesh: a jitted function called outside it would silently lose every
    activation constraint. Equal arguments return the same programs, so that branches of a pipeline
    compile once.
    """
    parts = lower_train_step(model, compute, train, mesh, sequence_length)
    return TrainStep([part._replace(program=compiled(part.program)) for part in parts])


def lower_train_step(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
) -> list[Part]:
    """The whole step; with several micro-batches its start, one micro-batch, and the update."""
    compute, train = decided(model, compute, train, mesh, sequence_length)
    llama, optimizer, rate = Llama(model, compute), make_optimizer(train), schedule(train)
    count = train.accumulate

    def update(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        trained, frozen = split(state.params, train.frozen)
        updates, opt_state = optimizer.update(sums.grads, state.opt_state, trained)
        means = sums.balance, sums.z, sums.routing
        balance, z, routing = jax.tree.map(lambda x: x / count, means) if count > 1 else means
        metrics = Metrics(
            sums.loss,
            sums.lm_loss,
            balance,
            z,
            optax.global_norm(sums.grads),
            rate(state.step),
            sums.targets,
            routing,
        )
        return TrainState(
            state.step + 1, join(optax.apply_updates(trained, updates), frozen), opt_state
        ), metrics

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(key, state.step), 0)
        return update(
            state,
            gradients(state.params, batch, llama, train, count_targets(batch), state.step, key),
        )

    def one(params: Params, step: Any, batch: Batch, targets: Any, index: Any, key: Any) -> Sums:
        """Of a micro-batch; all numbers as they are summed."""
        key = jax.random.fold_in(jax.random.fold_in(key, step), index)
        batch = micro_batch(batch, index, count)
        found = gradients(params, batch, llama, train, targets, step, key)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)._replace(targets=targets)

    def add(
        sums: Sums, params: Params, step: Any, batch: Batch, index: Any, key: Any
    ) -> tuple[Sums, jax.Array]:
        found = one(params, step, batch, sums.targets, index, key)
        added = jax.tree.map(jnp.add, sums, found)._replace(targets=sums.targets)
        return added, found.loss

    abstract, shardings = state_shardings(model, train, mesh)
    rows = jax.ShapeDtypeStruct(
        (train.batch_size, sequence_length + 1), jnp.int32, sharding=batch_sharding(mesh)
    )
    batch, whole = {"tokens": rows, "segments": rows}, replicated(mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    options = compiler_options(mesh.devices.flat[0], compute.compiler_options)
    jit = functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    with on_mesh(mesh, compute.dtype):
        if count == 1:
            step = jit(train_step, out_shardings=(shardings, whole))
            return [Part(step.lower(abstract, batch, key))]
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        params = abstract.params
        shapes = jax.eval_shape(one, params, number, batch, number, number, key)
        where = jax.tree.map(lambda _: whole, shapes)
        where = where._replace(grads=split(shardings.params, train.frozen)[0])
        sums = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where
        )

        def start(batch: Batch) -> Sums:
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            return zeros._replace(targets=count_targets(batch))

        beside = abstract.opt_state
        add_one = jit(add, out_shardings=(where, whole))
        index = jax.ShapeDtypeStruct((), jnp.int32)
        return [
            Part(
                jax.jit(start, out_shardings=where, compiler_options=options).lower(batch),
                beside=(params, beside),
            ),
            Part(add_one.lower(sums, params, number, batch, index, key), count, beside),
            Part(jit(update, out_shardings=(shardings, whole)).lower(abstract, sums)),
        ]
