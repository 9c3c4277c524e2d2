"""Generate: sample text from a checkpoint."""

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_for_inference
from btx_jax.config import ComputeConfig
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from btx_jax.evaluation.generation import Generator, Sampling
from btx_jax.parallel.sharding import inference_mesh


def text(
    checkpoint: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str,
) -> str:
    """The prompt's continuation. Raises UserError when prompt and continuation do not fit the
    model's context."""
    found = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(found.tokenizer)
    try:
        ids = tokenizer.encode_prompt(prompt)
    except (UnicodeError, TypeError) as error:  # bytes of a terminal that are not UTF-8
        raise UserError(f"--prompt: not valid Unicode: {str(error).splitlines()[0]}") from error
    if not ids:
        raise UserError("--prompt: empty, and the tokenizer has no BOS to start from")
    if max(ids) >= found.about.model.vocab_size:
        raise UserError(
            f"--prompt: has token {max(ids)}, the model only {found.about.model.vocab_size}"
            " embeddings"
        )
    if max_tokens < 1:
        raise UserError(f"--max_tokens={max_tokens}: must be at least 1")
    context = found.about.model.context
    if len(ids) + max_tokens > context:
        raise UserError(
            f"--max_tokens: {len(ids)} prompt tokens and {max_tokens} new ones exceed the context"
            f" of {context}; lower it"
        )
    mesh = inference_mesh(found.about.model)
    generator = Generator(
        found.about.model,
        load_for_inference(found, mesh, dtype),
        ComputeConfig(dtype=dtype),
        mesh,
        tokenizer.eos,
    )
    (new,) = generator.generate([ids], max_tokens, Sampling(temperature, top_p), seed)
    return tokenizer.decode(new)
