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
    """State of training. opt_state covers only the trained parameters (`optimizer.split`)."""

    # Optimizer steps done, [] int32. Typed Any because the same structure also holds shardings and
    # shapes.
    step: Any
    params: Params
    opt_state: Any


class Metrics(NamedTuple):
    """Metrics of one step over the global batch. Losses are in nats; balance_loss and z_loss are
    unweighted sums over layers, averaged over micro-batches.

    routing: name of a run of layers -> RoutingStats with a leading layer axis, averaged over
    micro-batches.
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
    """Return (loss of one micro-batch, (LM loss, balance loss, z loss, routing)). The LM loss is
    summed over the micro-batch and divided by `targets`, the number of targets in the whole step;
    the loss adds the weighted auxiliary losses, divided by train.accumulate."""
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
    """Parameters cast to the matmul dtype, except those that stay float32. Gradients are taken with
    respect to these copies: in bfloat16 they are half the size of the float32 gradients that
    differentiating through the cast would yield. The head's gradient, which is summed in float32,
    is rounded once."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if stays_float32(path) else x.astype(dtype), params
    )


class Sums(NamedTuple):
    """Running sums over the micro-batches of a step. grads: float32, for the trained parameters.
    targets: number of targets in the whole step, known from the start. The other fields are as in
    Metrics, not yet divided by `accumulate`."""

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
    """Gradients, losses and routing of one micro-batch. For the LM loss, gradients summed over a
    step's micro-batches equal those of one big batch. The auxiliary losses are averaged over
    micro-batches instead: a balance loss is not linear in its batch."""
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
    """Micro-batch number `index` of `count`: every count-th row, so that each micro-batch is spread
    over all devices."""
    return {
        name: jax.lax.dynamic_index_in_dim(
            x.reshape(-1, count, *x.shape[1:]), index, axis=1, keepdims=False
        )
        for name, x in batch.items()
    }


def state_shardings(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> tuple[Any, Any]:
    """Return (abstract TrainState, its shardings). Moments are sharded like their parameters;
    frozen parameters are in `frozen_dtype` and have no moments. Raises for a dimension that does
    not divide over the mesh."""
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
    """Frozen parameters in `frozen_dtype`, except those whose computation is in float32. A frozen
    embedding gets no gradient, so it is cast too."""
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
    """The state at step 0: random parameters from `key`, or the given ones, and zero moments. It is
    created sharded over the mesh."""
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
    """One of the programs that make up a step. times: how often a step runs it. beside: state that
    the devices hold while it runs but that is not among its arguments."""

    program: Any
    times: int = 1
    beside: Any = ()

    @property
    def bytes(self) -> int:
        """Bytes of memory that one device needs. The program must be compiled."""
        used = self.program.memory_analysis()
        own = used.argument_size_in_bytes + used.temp_size_in_bytes + used.output_size_in_bytes
        return int(own - used.alias_size_in_bytes + shard_bytes(self.beside))


def shard_bytes(abstract: Any) -> int:
    """Bytes of these arrays that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )


class TrainStep:
    """A compiled step: (state, batch, key) -> (state, Metrics). The state is donated to the program
    that changes it: the whole step, or, with several micro-batches, the update after the last one.

    A step can be abandoned between two micro-batches; the state is then unchanged."""

    LONG = 2.0  # seconds; after a micro-batch longer than this, the next is not queued behind it

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._took = 0.0  # seconds that the last micro-batch took

    @property
    def bytes(self) -> int:
        """Bytes of memory that one device needs: the largest of the step's programs."""
        return max(part.bytes for part in self.parts)

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        key: jax.Array,
        check: Callable[[], None] = lambda: None,
    ) -> tuple[TrainState, Metrics]:
        """Run one step. check: called before every micro-batch and before the update; an exception
        from it abandons the step.

        Each micro-batch is launched while the previous one runs, so that devices never idle, but
        not earlier, so that a stop waits for at most two micro-batches. If micro-batches take
        longer than LONG, the next is launched only when the previous one has finished: a stop then
        waits for one, and the gap of some milliseconds is negligible.
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
    """The settings with their automatic values (kernels, dispatch, remat, accumulate) chosen for
    this mesh."""
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
    """Compile a training step. This happens here, under the mesh, because a jitted function called
    outside it would silently lose every activation constraint. Results are cached by their
    arguments, so that the branches of a pipeline compile once.
    """
    parts = lower_train_step(model, compute, train, mesh, sequence_length)
    return TrainStep([part._replace(program=compiled(part.program)) for part in parts])


def lower_train_step(
    model: ModelConfig, compute: ComputeConfig, train: TrainConfig, mesh: Mesh, sequence_length: int
) -> list[Part]:
    """Lower the programs of a step: the whole step in one, or, with several micro-batches, its
    start (which zeroes the sums), one micro-batch, and the update."""
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
        """Sums of one micro-batch, in float32."""
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
