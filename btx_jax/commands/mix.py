"""Mix dense models into one MoE as a recipe describes. Tensors are streamed: one tensor of each
source is in memory at a time."""

import contextlib
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from rich.text import Text

from btx_jax.architectures.folding import Folded
from btx_jax.architectures.registry import family_for
from btx_jax.architectures.tensors import Reader, TensorId, slots
from btx_jax.checkpoints.base import base_digest
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    find_checkpoint,
    find_own_tokenizer,
    off_base,
    open_reader,
    reads_by_leaf,
    write_checkpoint,
)
from btx_jax.checkpoints.huggingface_config import same_function
from btx_jax.checkpoints.merged import Source, find_source, open_source
from btx_jax.checkpoints.router_statistics import FILE, About, Expert, Writer
from btx_jax.checkpoints.training_state import together
from btx_jax.config.merges import REGMEAN
from btx_jax.config.ridge import LOGISTIC, RIDGE
from btx_jax.data.tokenizers import Tokenizer, difference
from btx_jax.errors import Mistakes, UserError
from btx_jax.mixing.closed_form import (
    Fit,
    Hashed,
    Merging,
    by_logistic,
    by_ridge,
    mixture_layers,
    solve_routers,
    solve_shared,
)
from btx_jax.mixing.gates import condition_number
from btx_jax.mixing.limits import limits, within
from btx_jax.mixing.model import choose
from btx_jax.mixing.prompts import Prompt, make_gates, read_prompts
from btx_jax.mixing.recipe import Recipe, reads_text
from btx_jax.mixing.recipe_file import KEPT, read_recipe
from btx_jax.mixing.ridge import Moments
from btx_jax.mixing.states import Read
from btx_jax.mixing.streaming import Mixture, check_shapes, make_tensor
from btx_jax.mixing.text import COUNTED, Rows, expert_texts, token_counts
from btx_jax.mixing.verify import verify as verified
from btx_jax.output import check_free
from btx_jax.paths import to_path
from btx_jax.reporting.mixtures import card, own_table, plan, routing_table
from btx_jax.terminal import Console

CONDITION_LIMIT = 5.0


class Sources(NamedTuple):
    """The base and the distinct models of the experts; the base is readers[0]. source_of[i]: index
    in readers of recipe.sources[i]."""

    checkpoints: list[Checkpoint]
    readers: list[Reader]
    source_of: list[int]
    tokenizer: Tokenizer | None

    @property
    def names(self) -> list[str]:
        return [str(checkpoint.path) for checkpoint in self.checkpoints]


def run(
    recipe_path: str,
    target: str,
    *,
    dry_run: bool = False,
    verify: bool = False,
    output_format: str = "",
) -> None:
    """Mix as a recipe describes, and print progress. output_format: "huggingface", "btx_jax", or ""
    for the format of base_model. Raises UserError for any mistake, and then leaves no output."""
    recipe = read_recipe(to_path(recipe_path, "RECIPE.yml"))
    check_free(to_path(target, "OUT"))
    sources = _open(recipe)
    base = sources.checkpoints[0]
    as_huggingface = base.is_huggingface if not output_format else output_format == "huggingface"
    models = {str(checkpoint.path): checkpoint.metadata.model for checkpoint in sources.checkpoints}
    dense = within(base.metadata.model, *limits(models))
    kinds = [_kind(sources.checkpoints[number]) for number in (0, *sources.source_of)]
    family, model = choose(recipe, dense, kinds, as_huggingface)
    dtype = _dtype(recipe, sources.readers[0])
    if model.norm != dense.norm:
        sources = sources._replace(readers=[Folded(reader) for reader in sources.readers])
    mixture = Mixture(recipe, model, sources.readers, sources.source_of, dtype)
    check_shapes(mixture, sources.names)
    console = Console()
    console.print(plan(recipe, model, dtype, family if as_huggingface else None))
    _warn_of_vocabularies(sources, console)
    for other in off_base(sources.checkpoints):
        told = (
            f"{other.path} was trained on a different base from the branches, so they do"
            " not mix exactly"
        )
        console.print(Text("warning:", "yellow"), told)
    prompts = read_prompts(recipe, sources.tokenizer, model)
    texts = counts = []
    if reads_text(recipe):
        texts = expert_texts(recipe, sources.tokenizer, model, recipe.tokens)
    if recipe.merge == REGMEAN:
        whole = expert_texts(recipe, sources.tokenizer, model, COUNTED)
        counts = [token_counts(rows, model.vocab_size) for rows in whole]
    if dry_run:
        return
    history = together(checkpoint.metadata.history for checkpoint in sources.checkpoints)
    kept = base.metadata.huggingface
    verdict: list[str] = []
    with contextlib.ExitStack() as held:
        # Temporary files without a name, which are deleted however the process ends.
        merging = None
        if recipe.merge == REGMEAN:
            file = held.enter_context(tempfile.TemporaryFile())
            merging = _merging(mixture, texts, counts, file)
            mixture = dataclasses.replace(mixture, solved=merging.solved)
        if recipe.gate_mode == RIDGE:
            statistics = held.enter_context(tempfile.TemporaryFile())
            rows = _by_ridge(mixture, texts, merging, sources.tokenizer, statistics, console)
        elif recipe.gate_mode == LOGISTIC:
            read = functools.partial(make_tensor, _unrouted(mixture))
            rows = _solved(mixture, texts, read, by_logistic, merging, console)
        else:
            if merging:
                unrouted = _unrouted(mixture)
                read = functools.partial(make_tensor, unrouted)
                solve_shared(model, read, _passing(recipe, texts), merging)
            rows = _gates(mixture, prompts, console)
        mixture = dataclasses.replace(mixture, gates=rows)

        def inspect(written: Path) -> None:
            (written / KEPT).write_bytes(to_path(recipe_path, "RECIPE.yml").read_bytes())
            if recipe.gate_mode == RIDGE:
                with (written / FILE).open("wb") as file:
                    shutil.copyfileobj(statistics, file)
            if verify:
                verdict.append(verified(mixture, open_reader(find_checkpoint(written))))

        write_checkpoint(
            to_path(target, "OUT"),
            as_huggingface,
            model,
            dict.fromkeys(slots(model), dtype),
            lambda tensor: make_tensor(mixture, tensor),
            sources.tokenizer,
            history=history,
            # The class it is written as, now or in a later export.
            huggingface={**kept, "model_type": family.model_type} if family else kept,
            card=card(mixture, history),
            check=mixture.check,
            verb="mixing",
            by_leaf=reads_by_leaf(sources.readers),
            inspect=inspect,
        )
    console.print(
        f"wrote {target} ({'Hugging Face' if as_huggingface else 'btx_jax'}, {len(slots(model))}"
        " tensors)"
    )
    for line in verdict:
        console.print(line)


def _kind(checkpoint: Checkpoint) -> str:
    """The model_type that a checkpoint was converted from, or else the one that it would be
    exported as; "" if there is neither."""
    if origin := checkpoint.metadata.huggingface.get("model_type", ""):
        return origin
    try:
        return family_for(checkpoint.metadata.model).model_type
    except UserError:
        return ""


def _dtype(recipe: Recipe, base: Reader) -> np.dtype:
    stored = set(base.dtypes.values())
    if not recipe.dtype and len(stored) > 1:
        names = ", ".join(sorted(dtype.name for dtype in stored))
        raise UserError(
            f"{recipe.base_model} holds {names}; choose one for the mixture with `dtype`"
        )
    return DTYPES[recipe.dtype] if recipe.dtype else stored.pop()


def _gates(mixture: Mixture, prompts: Sequence[Prompt], console: Console) -> np.ndarray:
    """Router rows [layers, rows, D] from prompts, or random. If there are prompts, prints which
    experts they choose."""
    recipe = mixture.recipe
    with np.errstate(all="ignore"):
        rows, shares = make_gates(recipe, mixture.base, mixture.model, prompts)
    mixture.check()
    if not np.isfinite(rows.astype(mixture.dtype)).all():
        raise UserError(
            f"gate_mode {recipe.gate_mode!r} gives non-finite router rows in"
            f" {mixture.dtype.name}; lower gate_scale"
        )
    of_experts = [i for i, prompt in enumerate(prompts) if prompt.source < len(recipe.experts)]
    if of_experts:
        chosen = [prompts[i] for i in of_experts]
        console.print(routing_table(mixture.model, chosen, shares[of_experts]))
    is_drawn = recipe.gate_mode != "normal"  # only then is a shared expert's row comparable
    _warn_of_similar_rows(rows if is_drawn else rows[:, : recipe.expert_count], console)
    return rows


def _unrouted(mixture: Mixture) -> Mixture:
    """The mixture with zero router rows, which make a shared expert's gate one half."""
    assert mixture.model.moe
    rows = mixture.recipe.expert_count + mixture.model.moe.shared_gate
    shape = (mixture.model.layers, rows, mixture.model.d_model)
    return dataclasses.replace(mixture, gates=np.zeros(shape, np.float32))


def _merging(
    mixture: Mixture, texts: Sequence[Rows], counts: Sequence[np.ndarray], file: BinaryIO
) -> Merging:
    models = mixture.averaged()
    sources = [models.index(source) for source in mixture.source_of]

    def make(tensor: TensorId, seen: Sequence[np.ndarray]) -> np.ndarray:
        try:
            return mixture.shared.make(tensor, seen)
        except UserError:
            mixture.check()  # reports NaN in a source as the cause
            raise

    return Merging(make, list(zip(sources, texts, strict=True)), counts, file)


def _passing(recipe: Recipe, texts: Sequence[Rows]) -> list[tuple[int | None, Rows]]:
    """(index of the expert that a text passes through, the text), for each text. A shared expert's
    text, which comes last, passes through no routed expert: None."""
    routed = len(recipe.experts)
    return [(n if n < routed else None, text) for n, text in enumerate(texts)]


def _by_ridge(
    mixture: Mixture,
    texts: Sequence[Rows],
    merging: Merging | None,
    tokenizer: Tokenizer | None,
    statistics: BinaryIO,
    console: Console,
) -> np.ndarray:
    """Router rows solved by ridge regression. statistics: file to which the sums that they are
    solved from are written."""
    recipe, model = mixture.recipe, mixture.model
    assert tokenizer
    experts = tuple(Expert(expert.source_model) for expert in recipe.experts)
    layers = tuple(mixture_layers(model))
    about = About(experts, layers, model.d_model, tokenizer.sha256, recipe.ridge, recipe.tokens)
    writer = Writer(statistics, about)
    read = Hashed(functools.partial(make_tensor, _unrouted(mixture)))

    def keep(layer: int, sums: Moments) -> None:
        mixture.check()  # reports NaN in a source as the cause
        writer.write(layer, *sums)

    gates = _solved(mixture, texts, read, by_ridge(recipe.ridge, keep), merging, console)
    writer.finish(
        base_digest(read.of_expert(None)),
        [base_digest(read.of_expert(number)) for number in range(len(experts))],
    )
    return gates


def _solved(
    mixture: Mixture,
    texts: Sequence[Rows],
    read: Read,
    fit: Fit,
    merging: Merging | None,
    console: Console,
) -> np.ndarray:
    """Router rows [layers, rows, D] solved from text. Prints how well they route."""
    recipe = mixture.recipe
    solved = solve_routers(mixture.model, read, _passing(recipe, texts), fit, merging)
    mixture.check()
    console.print(own_table([expert.source_model for expert in recipe.experts], solved.own))
    gates = _unrouted(mixture).gates
    gates[:, : recipe.expert_count] = solved.rows
    return gates


def _open(recipe: Recipe) -> Sources:
    """Open the sources. Raises UserError when they cannot be read, or differ in settings that
    change what their weights mean."""
    keys = {"base_model": recipe.base_model} | {
        f"{key}[{i}].source_model": expert.source_model
        for key in ("experts", "shared_experts")
        for i, expert in enumerate(getattr(recipe, key))
    }
    first = {path: key for key, path in reversed(keys.items())}
    paths = list(dict.fromkeys(keys.values()))
    mistakes = Mistakes()
    found = {}
    for path in paths:
        with mistakes.gather():
            found[path] = find_source(path, first[path])
    mistakes.tell()
    # A path spelled in two ways is one source.
    by_place: dict[str, Source] = {}
    for source in found.values():
        by_place.setdefault(source.place, source)
    distinct = list(by_place.values())
    checkpoints = [source.checkpoint for source in distinct]
    tokenizers = [find_own_tokenizer(checkpoint) for checkpoint in checkpoints]
    for checkpoint, tokenizer in zip(checkpoints, tokenizers, strict=True):
        with mistakes.gather():
            _require_alike(recipe, checkpoints[0], tokenizers[0], checkpoint, tokenizer)
    mistakes.tell()
    number = {source.place: i for i, source in enumerate(distinct)}
    return Sources(
        checkpoints,
        [open_source(source) for source in distinct],
        [number[found[expert.source_model].place] for expert in recipe.sources],
        tokenizers[0],
    )


def _require_alike(
    recipe: Recipe,
    base: Checkpoint,
    base_tokenizer: Tokenizer | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer | None,
) -> None:
    path, model = checkpoint.path, base.metadata.model
    if checkpoint.metadata.model.moe:
        raise UserError(
            f"{path} is already a mixture; mix dense models, or see `btx expert --help`"
        )
    other = within(checkpoint.metadata.model, model.context, model.window)
    differing = [
        line for line in same_function(model, other) if line.split(":")[0] not in recipe.allow
    ]
    if tokenizer and base_tokenizer and "tokenizer" not in recipe.allow:
        told = difference(base_tokenizer, tokenizer, model.vocab_size)
        differing += [f"tokenizer: {told}"] if told else []
    if differing:
        own, others = _kind(base), _kind(checkpoint)
        kinds = (f" ({others})", f" ({own})") if own != others else ("", "")
        raise UserError(
            f"{path}{kinds[0]} is a different kind of model from {recipe.base_model}{kinds[1]}:"
            f" {'; '.join(differing)} (list harmless differences under `allow`)"
        )


def _warn_of_vocabularies(sources: Sources, console: Console) -> None:
    """Warn where a source's vocabulary differs from base_model's, which the mixture will have."""
    size = sources.checkpoints[0].metadata.model.vocab_size
    for checkpoint in sources.checkpoints[1:]:
        other = checkpoint.metadata.model.vocab_size
        if other > size:
            what = f"{other - size} more tokens than base_model; they are left out"
        elif other < size:
            what = (
                f"{size - other} fewer tokens than base_model; it does not contribute to those rows"
            )
        else:
            continue
        console.print(Text("warning:", "yellow"), f"{checkpoint.path} has {what}")


def _warn_of_similar_rows(gates: np.ndarray, console: Console) -> None:
    numbers = [condition_number(gate) for gate in gates]
    poor = [layer for layer, number in enumerate(numbers) if number > CONDITION_LIMIT]
    if poor:
        where = "all layers" if len(poor) == len(gates) else f"layers {', '.join(map(str, poor))}"
        console.print(
            Text("warning:", "yellow"),
            f"the gate's rows are nearly equal in {where} (condition number up to"
            f" {max(numbers):.3g}, over {CONDITION_LIMIT:g}): some experts will hardly be used;"
            " choose more distinct prompts",
        )
