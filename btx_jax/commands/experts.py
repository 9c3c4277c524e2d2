"""Add an expert to a finished mixture, or drop one: all other tensors keep their bits."""

import dataclasses
from collections.abc import Callable

import numpy as np

from btx_jax import __version__
from btx_jax.architectures.tensors import Reader, TensorId, slots
from btx_jax.checkpoints.checkpoint import (
    find_checkpoint,
    find_own_tokenizer,
    open_reader,
    write_checkpoint,
)
from btx_jax.checkpoints.huggingface_config import same_function
from btx_jax.checkpoints.training_state import CheckpointMetadata, together, trained_on
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.schema import Range
from btx_jax.data.tokenizers import Tokenizer, difference
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.mixing.gates import random_gates
from btx_jax.mixing.limits import limits, within
from btx_jax.paths import to_path


def add(mixture: str, source: str, target: str, *, router_std: float = 0.02, seed: int = 0) -> str:
    """A dense model's feed-forwards become the last expert of every MoE layer; its router rows are
    normal(router_std).

    Only the feed-forwards are taken: attention, norms and embeddings stay the mixture's. Raises
    UserError when the models do not fit.
    """
    mistakes = Mistakes()
    for option, value, bound in (
        ("--router-std", router_std, Range(0, 1e3)),
        ("--seed", seed, Range(0, 2**63 - 1)),
    ):
        if problem := bound.problem(value):
            mistakes.add(f"{option}={value}: {problem}")
    mistakes.tell()
    found, extra = find_checkpoint(mixture, "MIXTURE"), find_checkpoint(source, "SOURCE")
    model = _moe(found.metadata.model, mixture)
    if extra.metadata.model.moe:
        raise UserError(f"SOURCE: {source} is a mixture itself; name a dense model")
    other = within(extra.metadata.model, model.context, model.window)
    # Biases of the attention are the mixture's: a Qwen2-MoE made of Llamas has some, of zeros.
    other = dataclasses.replace(other, biases=model.biases)
    assert model.moe
    dense_model = dataclasses.replace(model.dense(), d_ff=model.moe.d_ff or model.d_ff)
    differing = same_function(dense_model, other)
    tokenizers = find_own_tokenizer(found), find_own_tokenizer(extra)
    own, others = tokenizers
    told = difference(own, others, model.vocab_size) if own and others else ""
    differing += [f"tokenizer: {told}"] if told else []
    if differing:
        raise UserError(
            f"SOURCE: {source} is another kind of model than {mixture}: {'; '.join(differing)}"
        )
    reader, dense = open_reader(found), open_reader(extra)
    named = {str(found.path): model, str(extra.path): extra.metadata.model}
    larger = _with_experts(within(model, *limits(named)), +1)
    rows = random_gates("normal", model.layers, 1, model.d_model, seed) * np.float32(
        router_std / 0.02
    )

    def make_tensor(tensor: TensorId) -> np.ndarray:
        if tensor.is_router:
            assert tensor.layer is not None
            old = reader.read(tensor)
            return np.concatenate([old, rows[tensor.layer].astype(old.dtype)])
        if tensor not in reader.slots:
            return dense.read(tensor.of_dense())
        return reader.read(tensor)

    def like(tensor: TensorId) -> np.dtype:
        return reader.dtypes[tensor if tensor.expert is None else tensor._replace(expert=0)]

    history = together([found.metadata.history, extra.metadata.history])
    card = (
        f"Expert {max(larger.moe.experts) - 1 if larger.moe else 0} is {source}, added to"
        f" {mixture}; its router rows are not trained."
    )
    _write(
        target,
        found.is_huggingface,
        larger,
        like,
        make_tensor,
        tokenizers[0],
        dataclasses.replace(found.metadata, history=history),
        card,
        [reader, dense],
    )
    return (
        f"wrote {target}: {_count(larger)} experts; the new one's router rows are"
        f" normal({router_std:g}) and want training"
    )


def drop(mixture: str, expert: int, target: str) -> str:
    """Remove an expert and its router rows from every MoE layer; experts after it move down by one.
    Raises UserError."""
    found = find_checkpoint(mixture, "MIXTURE")
    model = _moe(found.metadata.model, mixture)
    for layer, spec in enumerate(model.layer_specs()):
        if spec.experts and not 0 <= expert < spec.experts:
            raise UserError(
                f"INDEX: there is no expert {expert} in layer {layer}, which has experts 0 to"
                f" {spec.experts - 1}"
            )
        if spec.experts == 1:
            raise UserError(
                f"cannot drop the only expert of layer {layer}: nothing would be left of its"
                " feed-forward"
            )
    reader = open_reader(found)
    smaller = _with_experts(model, -1)

    def before(tensor: TensorId) -> TensorId:
        number = tensor.expert
        return tensor if number is None else tensor._replace(expert=number + (number >= expert))

    def make_tensor(tensor: TensorId) -> np.ndarray:
        if tensor.is_router:
            return np.delete(reader.read(tensor), expert, axis=0)
        return reader.read(before(tensor))

    def like(tensor: TensorId) -> np.dtype:
        return reader.dtypes[before(tensor)]

    card = f"{mixture} without its expert {expert}."
    _write(
        target,
        found.is_huggingface,
        smaller,
        like,
        make_tensor,
        find_own_tokenizer(found),
        found.metadata,
        card,
        [reader],
    )
    return f"wrote {target}: {_count(smaller)} experts"


def _moe(model: ModelConfig, path: str) -> ModelConfig:
    if model.moe is None:
        raise UserError(f"MIXTURE: {path} is a dense model; make a mixture with `btx mix`")
    return model


def _with_experts(model: ModelConfig, change: int) -> ModelConfig:
    assert model.moe
    experts = tuple(count + change if count else 0 for count in model.moe.experts)
    try:
        return dataclasses.replace(model, moe=dataclasses.replace(model.moe, experts=experts))
    except ConfigError as error:
        raise UserError(f"cannot drop an expert: {error}") from error


def _count(model: ModelConfig) -> int:
    assert model.moe
    return max(model.moe.experts)


def _write(
    target: str,
    as_huggingface: bool,
    model: ModelConfig,
    like: Callable[[TensorId], np.dtype],
    make_tensor: Callable[[TensorId], np.ndarray],
    tokenizer: Tokenizer | None,
    metadata: CheckpointMetadata,
    card: str,
    readers: list[Reader],
) -> None:
    def check() -> None:
        for reader in readers:
            reader.check()

    write_checkpoint(
        to_path(target, "OUT"),
        as_huggingface,
        model,
        {tensor: like(tensor) for tensor in slots(model)},
        make_tensor,
        tokenizer,
        history=metadata.history,
        huggingface=metadata.huggingface,
        card=f"# {to_path(target, 'OUT').name}\n\n{card} Made by btx_jax {__version__}."
        f"{trained_on(metadata.history)}\n",
        check=check,
        verb="writing",
    )
