"""Mix from a recipe: dense models -> one MoE, streaming: one tensor of each source in memory at a
time."""

import dataclasses
import json
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from btx_jax import __version__
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    Reader,
    cast,
    check_range,
    find_checkpoint,
    find_own_tokenizer,
    open_reader,
    reads_by_leaf,
    shortest_context,
    write_checkpoint,
)
from btx_jax.checkpoints.huggingface import (
    dense_name,
    expert_tensor,
    is_finite,
    router_layer,
    slots,
)
from btx_jax.checkpoints.huggingface_config import experts_per_token, same_function
from btx_jax.checkpoints.training_state import History, together, trained_on
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.data.tokenizers import Tokenizer, check_ids, difference
from btx_jax.errors import Mistakes, UserError
from btx_jax.evaluation.activations import layer_states, token_embeddings
from btx_jax.mixing.gates import condition_number, gate_row, pool, random_gates
from btx_jax.mixing.merge import dare, mean, ties, wide
from btx_jax.mixing.recipe import (
    KEPT,
    PROMPT_MODES,
    ExpertSource,
    Recipe,
    describe,
    read_recipe,
)
from btx_jax.models.llama import parameter_counts
from btx_jax.output import check_free
from btx_jax.paths import expand
from btx_jax.terminal import Console

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each token
CONDITION_LIMIT = 5.0
BANDS = 4  # of layers, in the routing table


class Sources(NamedTuple):
    """base, and the distinct experts' models; source_of[i] is the index in readers of
    recipe.experts[i]. The base is readers[0]."""

    checkpoints: list[Checkpoint]
    readers: list[Reader]
    source_of: list[int]
    tokenizer: Tokenizer | None


def run(
    recipe_path: str,
    target: str,
    *,
    dry_run: bool = False,
    verify: bool = False,
    output_format: str = "",
) -> None:
    """output_format: "huggingface", "btx_jax", or "" for that of base_model. Prints what it does.

    Raises UserError for anything wrong, before anything is written or with nothing left of it.
    """
    recipe = read_recipe(Path(recipe_path))
    check_free(Path(target))
    sources = _open(recipe)
    dense = sources.readers[0].model
    context = shortest_context(sources.checkpoints)
    model = _model(recipe, dataclasses.replace(dense, context=context))
    as_huggingface = (
        sources.checkpoints[0].is_huggingface
        if not output_format
        else output_format == "huggingface"
    )
    if as_huggingface:
        experts_per_token(model)
    stored = set(sources.readers[0].dtypes.values())
    if not recipe.dtype and len(stored) > 1:
        names = ", ".join(sorted(dtype.name for dtype in stored))
        raise UserError(
            f"{recipe.base_model} holds {names}; say with `dtype` which of them the mixture shall"
            " have"
        )
    dtype = DTYPES[recipe.dtype] if recipe.dtype else stored.pop()
    dtypes = dict.fromkeys(slots(model), dtype)
    _check_shapes(recipe, sources, model)
    console = Console()
    console.print(_plan(recipe, model, dtype, as_huggingface))
    _warn_of_vocabularies(sources, console)
    prompts = _prompts(recipe, sources.tokenizer, model) if recipe.gate_mode in PROMPT_MODES else []
    if dry_run:
        return
    with np.errstate(all="ignore"):
        gates, tables = _gates(recipe, sources, model, prompts)
    for reader in sources.readers:
        reader.check()
    if not np.isfinite(gates.astype(dtype)).all():
        raise UserError(
            f"gate_mode {recipe.gate_mode!r} gives rows that are not finite in {dtype.name}; lower"
            " gate_scale"
        )
    for table in tables:
        console.print(table)
    _warn_of_similar_rows(gates, console)

    def tensor(name: str) -> np.ndarray:
        return make_tensor(recipe, sources, gates, name, dtype)

    def check() -> None:
        for reader in sources.readers:
            reader.check()

    history = together(checkpoint.metadata.history for checkpoint in sources.checkpoints)
    card = _card(recipe, sources, model, history)
    verdict: list[str] = []

    def inspect(written: Path) -> None:
        shutil.copyfile(recipe_path, written / KEPT)
        if verify:
            verdict.append(_verify(recipe, sources, gates, written, dtype))

    write_checkpoint(
        Path(target),
        as_huggingface,
        model,
        dtypes,
        tensor,
        sources.tokenizer,
        history=history,
        huggingface=sources.checkpoints[0].metadata.huggingface,
        card=card,
        check=check,
        verb="mixing",
        by_leaf=reads_by_leaf(sources.readers),
        inspect=inspect,
    )
    console.print(
        f"wrote {target} ({'Hugging Face' if as_huggingface else 'btx_jax'}, {len(dtypes)} tensors)"
    )
    for line in verdict:
        console.print(line)


def _open(recipe: Recipe) -> Sources:
    """Raises UserError when sources cannot be read, or differ in what gives weights their
    meaning."""
    paths = list(
        dict.fromkeys([recipe.base_model, *(expert.source_model for expert in recipe.experts)])
    )
    keys = {
        expert.source_model: f"experts[{i}].source_model"
        for i, expert in reversed(list(enumerate(recipe.experts)))
    }
    mistakes = Mistakes()
    found = {}
    for path in paths:
        with mistakes.gather():
            found[path] = _source(path, keys.get(path, "base_model"))
    mistakes.tell()
    checkpoints = list(found.values())
    base = checkpoints[0]
    tokenizers = [find_own_tokenizer(checkpoint) for checkpoint in checkpoints]
    for path, checkpoint, tokenizer in zip(paths, checkpoints, tokenizers, strict=True):
        if checkpoint.metadata.model.moe:
            mistakes.add(
                f"{path} is a mixture already; mix dense models, or see `python -m btx_jax expert"
                " --help`"
            )
            continue
        context = base.metadata.model.context  # how long it may be used, not what its weights mean
        other = dataclasses.replace(checkpoint.metadata.model, context=context)
        differing = [
            line
            for line in same_function(base.metadata.model, other)
            if line.split(":")[0] not in recipe.allow
        ]
        told = ""
        if tokenizer and tokenizers[0] and "tokenizer" not in recipe.allow:
            told = difference(tokenizers[0], tokenizer, base.metadata.model.vocab_size)
        differing += [f"tokenizer: {told}"] if told else []
        if differing:
            mistakes.add(
                f"{path} is another kind of model than {recipe.base_model}: {'; '.join(differing)} "
                "(list under `allow` what should not matter)"
            )
    mistakes.tell()
    readers = [open_reader(checkpoint) for checkpoint in checkpoints]
    number = {
        path: [c.path for c in checkpoints].index(checkpoint.path)
        for path, checkpoint in zip(paths, checkpoints, strict=True)
    }
    return Sources(
        checkpoints,
        readers,
        [number[expert.source_model] for expert in recipe.experts],
        tokenizers[0],
    )


def _source(path: str, key: str) -> Checkpoint:
    """Raises UserError for what is no directory of a model, as mergekit writes it: MODEL+LORA,
    MODEL@REVISION, a name of the Hub."""
    whole = Path(expand(path, key)).exists()
    model, plus, lora = path.partition("+")
    if plus and not whole:
        raise UserError(
            f"{key}={path!r}: a LoRA on a model is not supported yet; merge it first: python -m"
            f" btx_jax adapter import {lora} {model} ADAPTER, then python -m btx_jax adapter merge"
            " ADAPTER MERGED, and name MERGED"
        )
    name, at, revision = path.partition("@")
    if at and not whole:
        raise UserError(
            f"{key}={path!r}: no directory; download that revision and name the directory: hf"
            f" download {name} --revision {revision} --local-dir DIR"
        )
    return find_checkpoint(path, key)


def _model(recipe: Recipe, dense: ModelConfig) -> ModelConfig:
    pieces = {"stack": 1, "split": recipe.chunks, "blend": len(recipe.experts)}[recipe.method]
    if dense.d_ff % pieces:
        raise UserError(
            f"method {recipe.method}: d_ff={dense.d_ff} is not divisible into {pieces} chunks"
        )
    for layer in recipe.layers:
        if not 0 <= layer < dense.layers:
            raise UserError(
                f"layers: there is no layer {layer}; the models have layers 0 to {dense.layers - 1}"
            )
    chosen = set(recipe.layers) or set(range(dense.layers))
    experts = tuple(recipe.expert_count if layer in chosen else 0 for layer in range(dense.layers))
    d_ff = dense.d_ff // recipe.chunks if recipe.method == "split" else dense.d_ff
    return dataclasses.replace(dense, d_ff=d_ff, moe=MoEConfig(experts, recipe.experts_per_token))


def _shared_sources(recipe: Recipe, sources: Sources) -> list[int]:
    """Which readers the non-expert tensors come from: the base, or every distinct expert's model
    once."""
    return [0] if recipe.base == "copy" else list(dict.fromkeys(sources.source_of))


def _check_shapes(recipe: Recipe, sources: Sources, model: ModelConfig) -> None:
    """What `allow` lets through must still have the shapes that are read."""
    base = sources.readers[0].slots
    shared = [
        name for name in slots(model) if expert_tensor(name) is None and router_layer(name) is None
    ]
    for number in _shared_sources(recipe, sources):
        other = sources.readers[number].slots
        for name in shared:
            rows = 1 if name in VOCABULARY else 0  # vocabularies may differ where they are allowed
            if name not in other or other[name].shape[rows:] != base[name].shape[rows:]:
                where = sources.checkpoints[number].path
                raise UserError(
                    f"{where}: {name} has another shape than in {recipe.base_model}; it cannot be"
                    " averaged"
                )


def _warn_of_vocabularies(sources: Sources, console: Console) -> None:
    """base_model's tokenizer and vocabulary are the mixture's."""
    size = sources.checkpoints[0].metadata.model.vocab_size
    for checkpoint in sources.checkpoints[1:]:
        other = checkpoint.metadata.model.vocab_size
        if other > size:
            what = f"{other - size} more tokens than base_model, left out"
        elif other < size:
            what = f"{size - other} tokens fewer than base_model, their rows without it"
        else:
            continue
        console.print(Text("warning:", "yellow"), f"{checkpoint.path} has {what}")


def _rng(recipe: Recipe, name: str) -> np.random.Generator:
    """Of one tensor: the same whatever the order in which tensors are made."""
    return np.random.default_rng([recipe.seed, zlib.crc32(name.encode())])


def make_tensor(
    recipe: Recipe, sources: Sources, gates: np.ndarray, name: str, dtype: np.dtype
) -> np.ndarray:
    """The tensor `name` of the mixture, in dtype, from the sources' tensors."""
    layer = router_layer(name)
    if layer is not None:
        return gates[layer].astype(dtype)
    wanted = expert_tensor(name)
    if wanted is None:
        shared = [sources.readers[number].read(name) for number in _shared_sources(recipe, sources)]
        if len(shared) == 1 and shared[0].shape == sources.readers[0].slots[name].shape:
            return cast(name, shared[0], dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = [
                _merged(recipe, sources, part, name, rows, dtype)
                for rows, part in _by_rows(sources, shared, name)
            ]
            merged = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        if is_finite(merged):
            merged.flags.writeable = False  # as from a reader: looked at once is enough
        elif all(map(is_finite, shared)):
            check_range(name, merged)
        return merged

    dense, axis = (
        dense_name(wanted.layer, wanted.part),
        1 if wanted.part == "down" else 0,
    )  # the axis of d_ff
    if recipe.method == "stack":
        parts = [(wanted.expert, 0, 1)]
    elif recipe.method == "split":
        parts = [(wanted.expert // recipe.chunks, wanted.expert % recipe.chunks, recipe.chunks)]
    else:
        parts = [
            (source, wanted.expert, len(recipe.experts)) for source in range(len(recipe.experts))
        ]
    pieces, rng = [], _rng(recipe, name)
    for source, chunk, chunks in parts:
        tensor = sources.readers[sources.source_of[source]].read(dense)
        width = tensor.shape[axis] // chunks
        piece = (
            tensor if chunks == 1 else tensor.take(range(chunk * width, (chunk + 1) * width), axis)
        )
        pieces.append(_changed(piece, recipe.experts[source], wanted.part, rng))
    return cast(name, pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis), dtype)


def _by_rows(
    sources: Sources, shared: Sequence[np.ndarray], name: str
) -> list[tuple[slice, list[np.ndarray]]]:
    """Blocks of rows of base_model's tensor, and those parts of the sources' that have them: one
    block but where vocabularies differ. Rows that none of them has are base_model's."""
    base = sources.readers[0]
    rows = base.slots[name].shape[0]
    ends = sorted({min(len(tensor), rows) for tensor in shared} | {rows})
    blocks = []
    for start, end in zip([0, *ends], ends, strict=False):
        having = [tensor[start:end] for tensor in shared if len(tensor) >= end]
        blocks.append((slice(start, end), having or [base.read(name)[start:end]]))
    return blocks


def _merged(
    recipe: Recipe,
    sources: Sources,
    shared: Sequence[np.ndarray],
    name: str,
    rows: slice,
    dtype: np.dtype,
) -> np.ndarray:
    if recipe.merge == "mean":
        return mean(shared, dtype)
    base = sources.readers[0].read(name)[rows]
    if recipe.merge == "ties":
        return ties(base, shared, recipe.density, dtype)
    return dare(base, shared, recipe.density, dtype, _rng(recipe, name))


def _changed(
    tensor: np.ndarray, expert: ExpertSource, part: str, rng: np.random.Generator
) -> np.ndarray:
    """noise_scale on every feed-forward weight, then residual_scale on the down projection.
    Untouched bits without either."""
    if expert.noise_scale:
        tensor = wide(tensor) + rng.standard_normal(tensor.shape, np.float32) * np.float32(
            expert.noise_scale
        )
    if part == "down" and expert.residual_scale != 1:
        tensor = wide(tensor) * np.float32(expert.residual_scale)
    return tensor


class Prompt(NamedTuple):
    expert: int
    is_positive: bool
    text: str
    ids: list[int]


def _prompts(recipe: Recipe, tokenizer: Tokenizer | None, model: ModelConfig) -> list[Prompt]:
    """Every prompt of every expert, behind BOS where there is one, as mergekit reads them."""
    prompts = []
    for number, expert in enumerate(recipe.experts):
        for is_positive, texts in (
            (True, expert.positive_prompts),
            (False, expert.negative_prompts),
        ):
            for text in texts:
                if tokenizer is None:
                    raise UserError(
                        f"{recipe.base_model}: no tokenizer, and experts[{number}] has prompts to"
                        " be read"
                    )
                ids = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
                if not ids:
                    raise UserError(f"experts[{number}]: prompt {text!r} has no tokens")
                where = f"experts[{number}]: prompt {text[:40]!r}"
                check_ids(ids, model.vocab_size, where, tokenizer)
                if len(ids) > model.context:
                    raise UserError(
                        f"experts[{number}]: prompt {text[:40]!r}... has {len(ids)} tokens, the"
                        f" context {model.context}; shorten it"
                    )
                prompts.append(Prompt(number, is_positive, text, ids))
    return prompts


def _gates(
    recipe: Recipe, sources: Sources, model: ModelConfig, prompts: Sequence[Prompt]
) -> tuple[np.ndarray, list[Table]]:
    """([layers, E, D] float32, the routing table of a mode that reads prompts: rows of random
    numbers are to be trained)."""
    base = sources.readers[0]
    shape = (model.layers, recipe.expert_count, model.d_model)
    mode = recipe.gate_mode
    if mode not in PROMPT_MODES:
        return random_gates(mode, *shape, recipe.seed), []
    gates = np.zeros(shape, np.float32)

    def rows(states: Sequence[np.ndarray]) -> np.ndarray:
        def pooled(number: int, is_positive: bool) -> np.ndarray | None:
            chosen = [
                s
                for s, p in zip(states, prompts, strict=True)
                if (p.expert, p.is_positive) == (number, is_positive)
            ]
            return pool(chosen, mode, recipe.gate_pooling) if chosen else None

        made = []
        for number in range(len(recipe.experts)):
            positive = pooled(number, True)
            assert positive is not None  # the recipe asks for prompts
            made.append(gate_row(positive, pooled(number, False)))
        return np.stack(made)

    if mode == "cheap_embed":
        gates[:] = rows(token_embeddings(base, [prompt.ids for prompt in prompts]))
    shares = np.zeros((len(prompts), *shape[:2]), np.float32)
    states = layer_states(base, [prompt.ids for prompt in prompts])
    for layer, (inputs, router_inputs) in enumerate(
        tqdm(states, total=model.layers, desc="prompts", unit="layer", disable=None)
    ):
        if mode != "cheap_embed":
            gates[layer] = rows(router_inputs if mode == "router_input" else inputs)
        if mode == "router_input":
            gates[layer] *= recipe.gate_scale
        for number, state in enumerate(router_inputs):
            chosen = (state @ gates[layer].T).argmax(-1)
            shares[number, layer] = np.bincount(chosen, minlength=shape[1]) / len(chosen)
    return gates, [_routing_table(model, prompts, shares)]


def _routing_table(model: ModelConfig, prompts: Sequence[Prompt], shares: np.ndarray) -> Table:
    layers = [layer for layer, spec in enumerate(model.layer_specs()) if spec.experts]
    bands = [
        band for band in np.array_split(np.array(layers), min(BANDS, len(layers))) if len(band)
    ]
    table = Table(title="first choice of the prompts' tokens, share per expert, by layers")
    table.add_column("prompt of")
    table.add_column("text", max_width=24, no_wrap=True)
    for band in bands:
        table.add_column(
            f"{band[0]}-{band[-1]}" if len(band) > 1 else str(band[0]), justify="right"
        )
    for prompt, share in zip(prompts, shares, strict=True):
        cells = []
        for band in bands:
            by_expert = share[band].mean(0)
            best = int(by_expert.argmax())
            colour = "green" if (best == prompt.expert) == prompt.is_positive else "red"
            cells.append(Text(f"{best}: {by_expert[best]:.0%}", colour))
        table.add_row(
            f"{'+' if prompt.is_positive else '-'}{prompt.expert}",
            prompt.text.replace("\n", " "),
            *cells,
        )
    return table


def _warn_of_similar_rows(gates: np.ndarray, console: Console) -> None:
    numbers = [condition_number(gate) for gate in gates]
    poor = [layer for layer, number in enumerate(numbers) if number > CONDITION_LIMIT]
    if poor:
        where = "all layers" if len(poor) == len(gates) else f"layers {', '.join(map(str, poor))}"
        console.print(
            Text("warning:", "yellow"),
            f"the gate's rows are nearly equal in {where} (condition number up"
            f" to {max(numbers):.3g}, over {CONDITION_LIMIT:g}): some experts will hardly be used;"
            " choose prompts that differ more",
        )


def _plan(recipe: Recipe, model: ModelConfig, dtype: np.dtype, as_huggingface: bool) -> Table:
    total, active = parameter_counts(model)
    table = Table(title="plan", show_header=False)
    shared = (
        "copied from base_model"
        if recipe.base == "copy"
        else f"{recipe.merge} over the experts' models"
    )
    cut = {
        "stack": "",
        "split": f", each source cut into {recipe.chunks}",
        "blend": ", each of chunks of all sources",
    }[recipe.method]
    layers = sum(bool(spec.experts) for spec in model.layer_specs())
    for key, value in (
        (
            "experts",
            (
                f"{recipe.expert_count} in {layers} of {model.layers} layers,"
                f" top-{recipe.experts_per_token}{cut}"
            ),
        ),
        *((f"  {i}", expert.source_model) for i, expert in enumerate(recipe.experts)),
        ("other tensors", shared),
        ("routers", recipe.gate_mode),
        ("parameters", f"{total:,} in all, {active:,} active for a token"),
        (
            "output",
            (
                f"{'Hugging Face' if as_huggingface else 'btx_jax'}, {dtype.name},"
                f" {total * dtype.itemsize / 2**30:.2f} GiB"
            ),
        ),
    ):
        table.add_row(key, value)
    return table


def ulp(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Distance between neighbours of dtype at a float64 value."""
    bits, least = {"float32": (23, -126), "bfloat16": (7, -126), "float16": (10, -14)}[dtype.name]
    exponent = np.where(value == 0, least, np.maximum(np.frexp(np.abs(value))[1] - 1, least))
    return np.ldexp(1.0, exponent - bits)


def _verify(
    recipe: Recipe, sources: Sources, gates: np.ndarray, target: Path, dtype: np.dtype
) -> str:
    """Re-read the output and compare every tensor with its sources: bits, or one ulp where a mean
    was rounded. Raises UserError."""
    written = open_reader(find_checkpoint(target))
    wrong, means = [], 0
    shared = _shared_sources(recipe, sources)
    is_mean = recipe.merge == "mean" and len(shared) > 1
    for name in tqdm(written.slots, desc="verifying", unit="tensor", disable=None):
        found = written.read(name)
        if is_mean and expert_tensor(name) is None and router_layer(name) is None:
            means += 1
            tensors = [sources.readers[number].read(name) for number in shared]
            # float32 sums, used for 16-bit tensors, round by themselves where large values cancel
            slack = (
                0.0
                if any(tensor.dtype == np.float32 for tensor in tensors)
                else len(shared) * 2.0**-24
            )
            right = found.shape == written.slots[name].shape
            for rows, part in _by_rows(sources, tensors, name):
                exact_parts = [wide(tensor).astype(np.float64) for tensor in part]
                exact = np.mean(exact_parts, axis=0)
                bound = ulp(exact, dtype) + slack * np.max(np.abs(exact_parts), axis=0)
                apart = np.abs(wide(found[rows]).astype(np.float64) - exact)
                right = right and bool((apart <= bound).all())
        else:
            expected = make_tensor(recipe, sources, gates, name, dtype)
            right = found.dtype == expected.dtype and found.tobytes() == expected.tobytes()
        if not right:
            wrong.append(name)
    if wrong:
        raise UserError(
            f"the output was not kept: {len(wrong)} tensors are not what the recipe says:"
            f" {', '.join(wrong[:5])}"
        )
    count = len(written.slots)
    rest = f"{count - means} equal what the recipe makes of their sources, bit for bit"
    return f"verified {count} tensors: {rest}, {means} means within one ulp of {dtype.name}"


def _card(recipe: Recipe, sources: Sources, model: ModelConfig, history: History) -> str:
    total, active = parameter_counts(model)
    kind = "Branch-Train-MiX" if recipe.base == "average" else "frankenMoE"
    experts, models = recipe.expert_count, len(set(sources.source_of))
    lines = [f"- {expert.source_model}" for expert in recipe.experts]
    trained = (
        "Its routers have not been trained."
        if recipe.gate_mode not in PROMPT_MODES
        else "Its routers come from prompts, untrained."
    )
    return (
        f"# {kind}: {experts} expert{'s' * (experts > 1)} of {models} model{'s' * (models > 1)}\n\n"
        f"Mixed by btx_jax {__version__}: {total:,} parameters, {active:,} active for a token."
        f" {trained}{trained_on(history)}\n\n"
        + "\n".join(lines)
        + f"\n\nRecipe:\n\n```json\n{json.dumps(describe(recipe), indent=2)}\n```\n"
    )
