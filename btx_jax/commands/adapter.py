"""Export, import and merge LoRA experts."""

import numpy as np

from btx_jax import __version__
from btx_jax.architectures.tensors import TensorId
from btx_jax.checkpoints import adapter, peft, peft_export
from btx_jax.checkpoints.base import base_digest, tensor_digest
from btx_jax.checkpoints.checkpoint import (
    DTYPES,
    Checkpoint,
    adapter_tensors,
    base_of,
    find_checkpoint,
    find_own_tokenizer,
    open_reader,
    reads_by_leaf,
    write_checkpoint,
)
from btx_jax.checkpoints.checksums import write_sums
from btx_jax.checkpoints.merged import left_out
from btx_jax.checkpoints.training_state import CheckpointMetadata, elsewhere, together, trained_on
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import copy_tokenizer
from btx_jax.errors import UserError
from btx_jax.hub import resolve
from btx_jax.output import check_free, new_directory
from btx_jax.paths import to_path
from btx_jax.terminal import counted

FORMATS = ("btx_jax", "peft")


def find_adapter(path: str, key: str) -> Checkpoint:
    """The checkpoint at a path. Raises UserError when it has no LoRA experts."""
    found = find_checkpoint(path, key)
    if not found.metadata.model.lora:
        raise UserError(f"{key}: {found.path} is a whole model, not LoRA experts")
    return found


def export(source: str, target: str, output_format: str = "btx_jax") -> str:
    """Write a run's LoRA experts to an adapter directory, in btx_jax's format or peft's. Returns a
    line that reports the result."""
    found = find_adapter(source, "SRC")
    metadata, tensors = found.metadata, adapter_tensors(found)
    assert metadata.base
    with new_directory(to_path(target, "DST")) as partial:
        if output_format == "peft":
            origin = metadata.huggingface.get("model_type", "")
            peft_export.write(partial, metadata.model, tensors, metadata.base.path, origin)
        else:
            adapter.write_directory(partial, metadata, tensors)
        if (tokenizer := find_own_tokenizer(found)) is not None and output_format != "peft":
            copy_tokenizer(tokenizer, partial)
        write_sums(partial)
    return f"wrote {target} ({output_format}, {counted(len(tensors), 'tensor')})"


def import_peft(source: str, base: str, target: str) -> str:
    """Convert a LoRA saved by peft, for the model at `base`, to a btx_jax adapter directory.
    Returns a line that reports the result."""
    check_free(to_path(target, "DST"))
    under = find_checkpoint(base, "BASE")
    if under.metadata.model.lora:
        raise UserError(f"BASE: {under.path} holds LoRA experts; name the model that they adapt")
    directory = resolve(source, "PEFT_DIR")
    origin = under.metadata.huggingface.get("model_type", "")
    lora = peft.read(directory, under.metadata.model, origin)
    notes = [*left_out(lora.carried, open_reader(under), directory), *lora.notes]
    history = together([under.metadata.history, elsewhere(directory.resolve())])
    with new_directory(to_path(target, "DST")) as partial:
        adapter.write_directory(
            partial,
            CheckpointMetadata(lora.model, 0, history, base_of(under), under.metadata.huggingface),
            lora.tensors,
        )
        if (tokenizer := find_own_tokenizer(under)) is not None:
            copy_tokenizer(tokenizer, partial)
        write_sums(partial)
    assert lora.model.lora
    ranks = "/".join(map(str, sorted(set(lora.model.lora.rank))))
    return "; ".join(
        [f"wrote {target} ({counted(len(lora.tensors), 'tensor')}, rank {ranks})", *notes]
    )


def merge(
    source: str, target: str, base: str = "", expert: int | None = None, gates: str = ""
) -> str:
    """Merge LoRA experts into the weights of their base, and write a Hugging Face directory.

    base: where the base is now, if it has moved; its digest must still be the one recorded in
    training. expert: merge only this one. gates: `mean`, or one weight per expert, comma-separated;
    required where a layer has several experts, as a router's choices cannot be merged. Raises
    UserError, and leaves no target, when gates are missing or do not fit, or the base's weights
    differ.
    """
    found = find_adapter(source, "ADAPTER")
    metadata = found.metadata
    assert metadata.base and metadata.model.lora
    fixed = fixed_gates(metadata.model, expert, gates)
    under = find_checkpoint(base or metadata.base.path, "BASE")
    reader = open_reader(under)
    if reader.model != metadata.model.base():
        raise UserError(
            f"BASE: {under.path} is a different model from the one that {found.path} was trained on"
        )
    deltas = adapter.merged_delta(
        metadata.model, adapter_tensors(found), lambda experts: fixed[experts]
    )
    hashes: dict[TensorId, str] = {}

    def make_tensor(tensor: TensorId) -> np.ndarray:
        array = reader.read(tensor)
        hashes[tensor] = tensor_digest(array)
        return (
            (array.astype(np.float32) + deltas[tensor]).astype(array.dtype)
            if tensor in deltas
            else array
        )

    def check() -> None:
        reader.check()
        if base_digest(hashes) != metadata.base.digest:  # type: ignore[union-attr]
            raise UserError(
                f"BASE: {under.path} has different weights from the model that {found.path} was"
                " trained on"
            )

    write_checkpoint(
        to_path(target, "DST"),
        True,
        metadata.model.base(),
        {tensor: DTYPES[own.name] for tensor, own in reader.dtypes.items()},
        make_tensor,
        find_own_tokenizer(found) or find_own_tokenizer(under),
        history=metadata.history,
        huggingface=metadata.huggingface or under.metadata.huggingface,
        card=(
            f"# {to_path(target, 'DST').name}\n\n{found.name} merged into {under.name} by btx_jax"
            f" {__version__}.{trained_on(metadata.history)}\n"
        ),
        check=check,
        verb="merging",
        by_leaf=reads_by_leaf([reader]),
    )
    return f"wrote {target} (Hugging Face, {len(deltas)} of {len(reader.slots)} tensors changed)"


def fixed_gates(model: ModelConfig, expert: int | None, gates: str) -> dict[int, np.ndarray]:
    """{number of experts in a layer: their weights}. Raises UserError for values that do not fit
    some layer."""
    counts = sorted({spec.lora.experts for spec in model.layer_specs() if spec.lora})
    if expert is not None and gates:
        raise UserError("--expert and --gates: give only one of them")
    result = {}
    for experts in counts:
        if expert is not None:
            if not 0 <= expert < experts:
                raise UserError(
                    f"--expert={expert}: some layers have only {counted(experts, 'expert')},"
                    " numbered from 0"
                )
            result[experts] = np.eye(experts)[expert]
        elif gates == "mean":
            result[experts] = np.full(experts, 1 / experts)
        elif gates:
            try:
                result[experts] = np.array([float(gate) for gate in gates.split(",")])
            except ValueError as error:
                raise UserError(
                    f"--gates={gates}: must be `mean` or comma-separated numbers"
                ) from error
            if not (abs(result[experts]) <= np.finfo(np.float32).max).all():
                raise UserError(f"--gates={gates}: must be finite")
            if len(result[experts]) != experts:
                raise UserError(
                    f"--gates={gates}: {len(result[experts])} numbers, but some layers have"
                    f" {counted(experts, 'expert')}"
                )
        elif experts > 1 or (model.lora and model.lora.gating == "sigmoid"):
            raise UserError(
                "the choices of a router cannot be merged into weights; fix them with"
                " --expert=NUMBER or --gates=mean"
            )
        else:
            result[experts] = np.ones(1)
    return result
