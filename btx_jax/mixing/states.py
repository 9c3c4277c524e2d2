"""Hidden states of a dense model, or of a mixture in which each text passes through a chosen
expert. Computed layer by layer, with the parameters of only one layer in memory. Shape legend:
models/layers.py."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from btx_jax.architectures.tensors import EMBEDDING, HEAD, Reader, TensorId, slots
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.mixing.text import Rows
from btx_jax.models.attention import Attention
from btx_jax.models.layers import After, Before, FeedForward, Norm, exact_matmuls, times
from btx_jax.models.llama import Params

TOKENS_PER_BATCH = 4096  # prompt tokens per batch
# Number of tokens for which intermediate values within a layer, such as attention scores, are held
# at a time.
TOKENS_AT_ONCE = 512

Read = Callable[[TensorId], np.ndarray]


# Called before the weights of linear layers are read, with the layers that share an input and with
# that input: for each text [rows, length, width], float32.
Inputs = Callable[[Sequence[TensorId], Sequence[np.ndarray]], None]

_INTO_HEADS = ("attention/query", "attention/key", "attention/value")


def _by_rows(function: Callable[[Any], jax.Array], rows: Any) -> jax.Array:
    """Apply function to arrays [B, T, ...] in blocks of rows with about TOKENS_AT_ONCE tokens."""
    length = jax.tree.leaves(rows)[0].shape[1]
    return jax.lax.map(function, rows, batch_size=max(1, TOKENS_AT_ONCE // length))


@functools.partial(jax.jit, static_argnums=0)
def _into_attention(model: ModelConfig, params, x_BTD: jax.Array) -> jax.Array:
    return _applied(Before(model), params, "attention_norm", x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _into_head(model: ModelConfig, params, x_BTD: jax.Array) -> jax.Array:
    return _applied(Norm(model), params, "final_norm", x_BTD)


def _applied(module: Any, params: Params, name: str, *x_BTD: jax.Array) -> jax.Array:
    """Apply the module with its parameters of that name, if there are any."""
    with exact_matmuls("float32"):
        return cast(jax.Array, module.apply({"params": params.get(name, {})}, *x_BTD))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _heads(
    model: ModelConfig, spec: LayerSpec, attention, h_BTD: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Input of attention's output projection, [B, T, heads * head_dim]. `attention` may lack the
    parameters of the output projection."""
    out = jnp.zeros((model.heads, model.head_dim, model.d_model))
    params = {"params": {"out": out} | attention}

    def heads(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        h_TD, segments_T = row
        y = Attention(model, spec).apply(params, h_TD[None], segments_T[None], method="heads")
        return cast(jax.Array, y)[0]

    with exact_matmuls("float32"):
        return _by_rows(heads, (h_BTD, segments_BT))


@functools.partial(jax.jit, static_argnums=0)
def _after_heads(
    model: ModelConfig, params, x_BTD: jax.Array, y_BTX: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x plus the attention's output, input of the feed-forward block or router)."""
    attention = params["attention"]
    with exact_matmuls("float32"):
        y_BTD = y_BTX @ attention["out"].reshape(y_BTX.shape[-1], -1)
        y_BTD += attention.get("out_bias", 0)
    x_BTD = _applied(After(model), params, "attention_post_norm", x_BTD, y_BTD)
    return x_BTD, _applied(Before(model), params, "ffn_norm", x_BTD)


@functools.partial(jax.jit, static_argnums=0)
def _after_ffn(model: ModelConfig, params, x_BTD: jax.Array, h_BTD: jax.Array) -> jax.Array:
    """x plus the output of one feed-forward, and of a shared expert if params contain one."""

    def answer(h_TD: jax.Array) -> jax.Array:
        y_TD = jnp.zeros_like(h_TD)
        for name in (part for part in ("ffn", "shared_expert") if part in params):
            own = params[name]
            biases = tuple(bias for bias in model.biases if f"{bias}_bias" in own)
            ffn = FeedForward(
                own["gate"].shape[1], biases, gated="router" in own, activation=model.activation
            )
            y_TD += cast(Any, ffn.apply({"params": own}, h_TD[None]))[0][0]
        return y_TD

    with exact_matmuls("float32"):
        y_BTD = _by_rows(answer, h_BTD)
    return _applied(After(model), params, "ffn_post_norm", x_BTD, y_BTD)


def token_embeddings(reader: Reader, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Embeddings of each prompt, [tokens, D], float32."""
    table = reader.read(EMBEDDING)
    return [table[np.asarray(prompt)].astype(np.float32) for prompt in prompts]


def layer_states(
    reader: Reader, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Yield for each layer: the input of the layer, and the input of its feed-forward block, each a
    list with [tokens, D] float32 for every prompt."""
    model = reader.model
    length = max(map(len, prompts))
    rows = min(len(prompts), max(1, TOKENS_PER_BATCH // length))
    embedded = token_embeddings(reader, prompts)
    batches = []
    for start in range(0, len(prompts), rows):
        x_BTD = np.zeros((rows, length, model.d_model), np.float32)
        segments_BT = np.zeros((rows, length), np.int32)
        for row, states in enumerate(embedded[start : start + rows]):
            x_BTD[row, : len(states)] = states * np.float32(model.embed_scale)
            segments_BT[row, : len(states)] = 1
        batches.append((jnp.asarray(x_BTD), jnp.asarray(segments_BT)))

    def unpadded(arrays: Sequence[jax.Array]) -> list[np.ndarray]:
        flat = [row for array in arrays for row in np.asarray(array)]
        return [row[: len(prompt)] for row, prompt in zip(flat, prompts, strict=False)]

    for layer in range(model.layers):
        params = _params(model, reader.read, (t for t in reader.slots if t.layer == layer))
        outputs = []
        for x, segments in batches:
            h = _into_attention(model, params, x)
            y = _heads(model, model.layer_specs()[layer], params["attention"], h, segments)
            x, h = _after_heads(model, params, x, y)
            outputs.append((_after_ffn(model, params, x, h), h))
        yield unpadded([x for x, _ in batches]), unpadded([h for _, h in outputs])
        batches = [
            (output, segments) for (output, _), (_, segments) in zip(outputs, batches, strict=True)
        ]


def forced_states(
    model: ModelConfig,
    read: Read,
    texts: Sequence[tuple[int | None, Rows]],
    inputs: Inputs | None = None,
) -> Iterator[list[np.ndarray]]:
    """Yield, for each layer of a mixture, a list with one array per text: the input of the router,
    or of a dense layer's feed-forward, [rows, length, D], float32. In MoE layers every token of a
    text passes through the text's expert, with weight 1.

    read: returns a tensor of the mixture. texts: (expert, its text); for expert None the routed
    experts are bypassed. inputs: receives the inputs of attention's projections and of the head.
    Memory holds the states of one layer, its parameters outside the experts, and those of one
    expert. A yielded list is valid until the next one.
    """
    dense, table = model.dense(), read(EMBEDDING)
    segments = [jnp.asarray(rows.segments_RT) for _, rows in texts]
    states = [
        times(jnp.asarray(table[rows.tokens_RT], jnp.float32), model.embed_scale)
        for _, rows in texts
    ]
    del table

    def tell(tensors: Sequence[TensorId], states: Sequence[jax.Array]) -> None:
        if inputs:
            inputs(tensors, [np.asarray(state) for state in states])

    for layer, spec in enumerate(dense.layer_specs()):
        own = [t for t in slots(model) if t.layer == layer and not t.is_router]
        into = [TensorId(part, layer) for part in _INTO_HEADS]
        out = TensorId("attention/out", layer)
        common = (t for t in own if t.expert is None and t not in (*into, out))
        params = _params(model, read, common)
        attention = params.pop("attention", {})
        h = [_into_attention(dense, params, x) for x in states]
        tell(into, h)
        attention |= _params(model, read, into)["attention"]
        y = []
        for number, segments_RT in enumerate(segments):
            y.append(_heads(dense, spec, attention, h[0], segments_RT))
            del h[0]
            jax.block_until_ready(y[number])
        tell([out], y)
        params["attention"] = attention | _params(model, read, [out])["attention"]
        seen = []
        for number, (expert, _) in enumerate(texts):
            of_expert = (t for t in own if t.expert is not None and t.expert == expert)
            ffn = params | _params(model, read, of_expert)
            x, h_RTD = _after_heads(dense, params, states[number], y.pop(0))
            states[number] = _after_ffn(dense, ffn, x, h_RTD)
            seen.append(np.asarray(h_RTD))
            jax.block_until_ready(states[number])
            del ffn, x, h_RTD  # free memory before the next expert's parameters are read
        yield seen
        seen.clear()  # progress bars keep a reference to the last item
    if inputs and HEAD in slots(model):
        norm = _params(model, read, [t for t in slots(model) if t.part == "final_norm/scale"])
        for number, x in enumerate(states):
            states[number] = _into_head(dense, norm, x)
            del x
        tell([HEAD], states)


def _params(model: ModelConfig, read: Read, tensors: Iterable[TensorId]) -> dict[str, Any]:
    """Parameters of one layer in the form its modules take, float32."""
    leaves = {
        tuple(tensor.part.split("/")): jnp.asarray(
            slots(model)[tensor].to_ours(read(tensor)), jnp.float32
        )
        for tensor in tensors
    }
    return dict(unflatten_dict(leaves))
