"""Add an expert to a finished mixture, or drop one; all other tensors stay bit-identical."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from btx_jax import __version__, hub, hub_names
from btx_jax.architectures.tensors import Reader, TensorId, slots
from btx_jax.architectures.values import cast
from btx_jax.checkpoints.base import base_digest
from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    find_checkpoint,
    find_own_tokenizer,
    off_anchor,
    off_base,
    open_reader,
    write_checkpoint,
)
from btx_jax.checkpoints.huggingface_config import same_function
from btx_jax.checkpoints.router_statistics import (
    FILE,
    About,
    Expert,
    RouterStatistics,
    Writer,
    find_statistics,
)
from btx_jax.checkpoints.training_state import CheckpointMetadata, together, trained_on
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.schema import Range
from btx_jax.data.tokenizers import Tokenizer, difference
from btx_jax.errors import ConfigError, Mistakes, UserError
from btx_jax.mixing.closed_form import (
    Hashed,
    by_ridge,
    joined,
    mixture_layers,
    seen_tensors,
    solve_routers,
    solved,
)
from btx_jax.mixing.gates import random_gates
from btx_jax.mixing.limits import limits, within
from btx_jax.mixing.ridge import Moments
from btx_jax.mixing.states import Read
from btx_jax.mixing.text import read_text
from btx_jax.output import check_free
from btx_jax.paths import to_path
from btx_jax.reporting.mixtures import own_table
from btx_jax.terminal import Console, counted


def add(
    mixture: str,
    source: str,
    target: str,
    *,
    router_std: float = 0.02,
    seed: int = 0,
    text: str = "",
    statistics: str = "",
) -> str:
    """Add a dense model's feed-forwards as the last expert of every MoE layer, with
    normal(router_std) router rows.

    If the mixture's routers were solved and their statistics are stored with it, all rows are
    instead solved again, with the new expert's domain included. That domain is given by its `text`
    (`WHAT[#FIELD][:WEIGHT]`), or by `statistics`, a file computed where the text is.

    If the mixture has an anchor, the new expert must be a branch trained with the same anchor; the
    branch's router rows and biases are used.

    Only the feed-forwards are taken: attention, norms and embeddings remain the mixture's. Raises
    UserError when the models, or the statistics, do not match.
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
    if model.has_anchor:
        _require_branch(found, extra, source)
    elif extra.metadata.model.moe:
        raise UserError(f"SOURCE: {source} is already a mixture; name a dense model")
    other = within(extra.metadata.model.dense(), model.context, model.window)
    # Attention biases are the mixture's: a Qwen2-MoE made from Llamas has zero biases.
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
            f"SOURCE: {source} is a different kind of model from {mixture}: {'; '.join(differing)}"
        )
    reader, dense = open_reader(found), open_reader(extra)
    named = {str(found.path): model, str(extra.path): extra.metadata.model}
    larger = _with_experts(within(model, *limits(named)), +1)
    own_tokenizer = tokenizers[0]
    history = together([found.metadata.history, extra.metadata.history])

    def like(tensor: TensorId) -> np.dtype:
        return reader.dtypes[tensor if tensor.expert is None else tensor._replace(expert=0)]

    def unrouted(tensor: TensorId) -> np.ndarray:
        if tensor in reader.slots:
            return reader.read(tensor)
        theirs = tensor._replace(expert=0) if model.has_anchor else tensor.of_dense()
        return cast(tensor, dense.read(theirs), like(tensor))

    stored = _statistics(found.path, model, mixture)
    _check_told(mixture, stored, text, statistics)
    number = _count(larger) - 1
    with contextlib.ExitStack() as held:
        rows, file = np.zeros((0, 0, 0), np.float32), None
        if model.has_anchor:
            told = "the new expert keeps the router rows and biases that it was trained with"
        elif stored is None:
            fresh = random_gates("normal", model.layers, 1, model.d_model, seed)
            rows = fresh * np.float32(router_std / 0.02)
            told = (
                "the new expert's router rows are random (standard deviation"
                f" {router_std:g}) and need training"
            )
        else:
            check_free(to_path(target, "OUT"))
            file = held.enter_context(tempfile.TemporaryFile())
            readers = [reader, dense]
            solver = _Solver(stored, larger, unrouted, readers, own_tokenizer, mixture)
            if text:
                rows = solver.with_text(source, text, file)
            else:
                rows = solver.with_statistics(source, statistics, file)
            told = "all router rows were recomputed"
        if off_base([extra, found]):
            told += "; it was trained on a different base from the mixture's"

        def make_tensor(tensor: TensorId) -> np.ndarray:
            if not tensor.is_router:
                return unrouted(tensor)
            assert tensor.layer is not None
            dtype = reader.dtypes[tensor]
            if file:
                return rows[tensor.layer].astype(dtype)
            new = dense.read(tensor) if model.has_anchor else rows[tensor.layer]
            return np.concatenate([reader.read(tensor), new.astype(dtype)])

        _write(
            target,
            found.is_huggingface,
            larger,
            like,
            make_tensor,
            own_tokenizer,
            dataclasses.replace(found.metadata, history=history),
            f"Expert {number} is {source}, added to {mixture}; {told}.",
            [reader, dense],
            file,
        )
    return f"wrote {target}: {counted(number + 1, 'expert')}; {told}"


def _require_branch(mixture: Checkpoint, source: Checkpoint, named: str) -> None:
    if not source.metadata.model.is_branch:
        raise UserError(
            f"SOURCE: {named} is not a branch with an anchor, as the experts of {mixture.path} are;"
            " train one from their base with train.anchor=True"
        )
    if off_anchor([mixture, source]):
        raise UserError(
            f"SOURCE: {named} was trained with a different anchor from the experts of"
            f" {mixture.path}"
        )


def drop(mixture: str, expert: int, target: str) -> str:
    """Remove an expert and its router rows from every MoE layer; the following experts move down by
    one. If the routers were solved and their statistics are stored with the mixture, all rows are
    solved again without it. Raises UserError."""
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
                f"cannot drop the only expert of layer {layer}: it would have no feed-forward"
            )
    reader = open_reader(found)
    smaller = _with_experts(model, -1)
    tokenizer = find_own_tokenizer(found)

    def before(tensor: TensorId) -> TensorId:
        number = tensor.expert
        return tensor if number is None else tensor._replace(expert=number + (number >= expert))

    def like(tensor: TensorId) -> np.dtype:
        return reader.dtypes[before(tensor)]

    stored = _statistics(found.path, model, mixture)
    with contextlib.ExitStack() as held:
        file, rows, told = None, None, ""
        if stored is not None:
            check_free(to_path(target, "OUT"))
            file = held.enter_context(tempfile.TemporaryFile())
            solver = _Solver(stored, model, reader.read, [reader], tokenizer, mixture)
            rows = solver.without(expert, file)
            told = "; all router rows were recomputed"

        def make_tensor(tensor: TensorId) -> np.ndarray:
            if not tensor.is_router:
                return reader.read(before(tensor))
            assert tensor.layer is not None
            if rows is not None:
                return rows[tensor.layer].astype(reader.dtypes[tensor])
            return np.delete(reader.read(tensor), expert, axis=0)

        _write(
            target,
            found.is_huggingface,
            smaller,
            like,
            make_tensor,
            tokenizer,
            found.metadata,
            f"{mixture} without its expert {expert}{told}.",
            [reader],
            file,
        )
    return f"wrote {target}: {counted(_count(smaller), 'expert')}{told}"


class _Solver:
    """Solves a mixture's routers again from its stored statistics, with an expert added or dropped.

    model: the mixture's, including any new expert. read: returns its tensors, which come from
    `readers`, in the dtypes to be written; it is never called for routers. Raises UserError when
    the statistics do not belong to the mixture.
    """

    def __init__(
        self,
        stored: RouterStatistics,
        model: ModelConfig,
        read: Read,
        readers: Sequence[Reader],
        tokenizer: Tokenizer | None,
        mixture: str,
    ):
        self._stored, self._model, self._read = stored, model, Hashed(read)
        self._readers, self._tokenizer, self._mixture = readers, tokenizer, mixture
        self._check(stored, stored.about.base)

    def with_text(self, source: str, text: str, file: BinaryIO) -> np.ndarray:
        """Router rows [layers, experts, D] including a new expert, from its text. Prints how that
        text is routed."""
        about = self._stored.about
        number = len(about.experts)
        rows = read_text(text, "--text", self._tokenizer, self._model, about.tokens)
        writer = self._writer(file, (*about.experts, Expert(source)))

        def keep(layer: int, sums: Moments) -> None:
            _check_values(self._readers)  # reports NaN in a model as the cause
            writer.write(layer, *sums)

        routers = solve_routers(
            self._model,
            self._read,
            [(number, rows)],
            by_ridge(about.ridge, keep, lambda layer: Moments(*self._stored.read(layer))),
        )
        self._check(self._stored, base_digest(self._read.of_expert(None)))
        writer.finish(about.base, [*self._digests(), base_digest(self._read.of_expert(number))])
        Console().print(own_table([source], routers.own))
        return routers.rows

    def with_statistics(self, source: str, path: str, file: BinaryIO) -> np.ndarray:
        """Router rows [layers, experts, D] including a new expert. path: a statistics file that
        lists the new expert, alone or among others."""
        given = RouterStatistics(to_path(path, "--statistics"))
        self._check(given, self._base())
        about = self._stored.about
        number = len(about.experts)
        for tensor in slots(self._model):
            if tensor.expert == number:
                self._read(tensor)
        digest = base_digest(self._read.of_expert(number))
        digests = [expert.digest for expert in given.about.experts]
        if digest not in digests:
            raise UserError(
                f"--statistics: {path} does not cover {source}: none of its experts has the"
                " same feed-forwards; make it with that model"
            )
        at = digests.index(digest)

        def parts(layer: int) -> Moments:
            theirs = Moments(*given.read(layer))
            new = Moments(*(part[at : at + 1] for part in theirs))
            return joined([Moments(*self._stored.read(layer)), new])

        return self._solve(file, (*about.experts, Expert(source, digest)), parts)

    def without(self, expert: int, file: BinaryIO) -> np.ndarray:
        """Router rows [layers, experts, D] after dropping an expert."""
        self._base()
        experts = self._stored.about.experts
        return self._solve(
            file,
            (*experts[:expert], *experts[expert + 1 :]),
            lambda layer: Moments(*self._stored.read(layer)).without(expert),
        )

    def _solve(
        self, file: BinaryIO, experts: tuple[Expert, ...], parts: Callable[[int], Moments]
    ) -> np.ndarray:
        about = self._stored.about
        rows = np.zeros((self._model.layers, len(experts), about.width), np.float32)
        writer = self._writer(file, experts)
        for layer in about.layers:
            whole = parts(layer)
            writer.write(layer, *whole)
            rows[layer] = solved(layer, whole, about.ridge)
        writer.finish(about.base, [expert.digest for expert in experts])
        return rows

    def _writer(self, file: BinaryIO, experts: tuple[Expert, ...]) -> Writer:
        return Writer(file, dataclasses.replace(self._stored.about, experts=experts))

    def _digests(self) -> list[str]:
        return [expert.digest for expert in self._stored.about.experts]

    def _base(self) -> str:
        """Digest of the mixture's weights outside the experts, after checking it against the stored
        statistics."""
        for tensor in seen_tensors(self._model):
            self._read(tensor)
        base = base_digest(self._read.of_expert(None))
        self._check(self._stored, base)
        return base

    def _check(self, statistics: RouterStatistics, base: str) -> None:
        own = About(
            (),
            tuple(mixture_layers(self._model)),
            self._model.d_model,
            self._tokenizer.sha256 if self._tokenizer else "",
            statistics.about.ridge,
            statistics.about.tokens,
            base,
        )
        if differing := own.differences(statistics.about):
            raise UserError(
                f"{statistics.path} does not belong to {self._mixture}: {', '.join(differing)};"
                " restore the right file, or delete it"
            )


def _statistics(path: Path, model: ModelConfig, mixture: str) -> RouterStatistics | None:
    """The statistics stored with a mixture; None if there are none. Raises UserError when they are
    for a different number of experts."""
    if name := hub_names.named(mixture, "MIXTURE"):  # so far only the model has been downloaded
        file = name._replace(path=f"{name.path}/{FILE}".lstrip("/"))
        if file.path in hub.listing(name, "MIXTURE"):
            hub.download_file(file, "MIXTURE")
    stored = find_statistics(path)
    counts = {spec.experts for spec in model.layer_specs() if spec.experts}
    if stored is not None and counts != {len(stored.about.experts)}:
        raise UserError(
            f"{stored.path} is for {counted(len(stored.about.experts), 'expert')}, but"
            f" {mixture} has {' and '.join(map(str, sorted(counts)))}; restore the right file,"
            " or delete it"
        )
    return stored


def _check_values(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.check()


def _check_told(mixture: str, stored: RouterStatistics | None, text: str, statistics: str) -> None:
    """Check that the new expert's domain is given in the form that its router rows require."""
    if stored is None and (text or statistics):
        option = "--text" if text else "--statistics"
        raise UserError(
            f"{option}: not used, as {mixture} has no {FILE} to recompute its routers from;"
            " leave it out"
        )
    if stored is not None and bool(text) == bool(statistics):
        raise UserError(
            f"the routers of {mixture} were solved from text: give either --text or"
            f" --statistics of the new expert's domain, or delete {stored.path} for random rows"
        )


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
    statistics: BinaryIO | None,
) -> None:
    """Write the changed mixture. statistics: the sums from which the routers were solved, to be
    stored with the weights."""

    def inspect(written: Path) -> None:
        if statistics:
            with (written / FILE).open("wb") as file:
                shutil.copyfileobj(statistics, file)

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
        check=lambda: _check_values(readers),
        verb="writing",
        inspect=inspect,
    )
