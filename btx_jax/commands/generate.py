"""Generate: sample text from a checkpoint."""

import contextlib
from collections.abc import Callable, Sequence

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_for_inference
from btx_jax.config.config import ComputeConfig
from btx_jax.data.chat_template import chat_template
from btx_jax.data.tokenizers import NotUnicode, check_ids, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.evaluation.continuation import Stream, stop_ids
from btx_jax.evaluation.generation import Generator, Sampling
from btx_jax.parallel.sharding import inference_mesh
from btx_jax.progress import clock

NOT_CHATTY = (
    "a model not trained on chats has none: leave --chat out, name its chat version, or add"
    " the template"
)


def generate(
    checkpoint: str,
    prompt: str,
    show: Callable[[str], None],
    *,
    is_chat: bool = False,
    max_tokens: int = 64,
    stop: Sequence[str] = (),
    sampling: Sampling = Sampling(),
    seed: int = 0,
    dtype: str = "float32",
) -> None:
    """Sample a continuation and pass it to `show` piece by piece. is_chat: render the prompt as a
    user's message with the tokenizer's chat template. Raises UserError when prompt and continuation
    do not fit the model's context."""
    found = find_checkpoint(checkpoint)
    tokenizer = load_tokenizer(found.tokenizer)
    ends: list[int | None] = []
    try:
        if is_chat:
            template = chat_template(tokenizer, NOT_CHATTY)
            asked = [{"role": "user", "content": prompt}]
            ids = tokenizer.encode(template.render(asked, add_generation_prompt=True).text)
            ends.append(template.end_of_turn(tokenizer))
        else:
            ids = tokenizer.encode_prompt(prompt)
    except NotUnicode as error:  # terminal input that is not UTF-8
        raise UserError(f"--prompt: {error}") from error
    if not ids:
        raise UserError(
            "--prompt: empty, and the tokenizer has no BOS token to start from; give some text"
        )
    check_ids(ids, found.metadata.model.vocab_size, "--prompt", tokenizer)
    if "" in stop:
        raise UserError("--stop: an empty string would end every text at once; leave it out")
    if max_tokens < 1:
        raise UserError(f"--max-tokens={max_tokens}: must be at least 1")
    context = found.metadata.model.context
    if len(ids) + max_tokens > context:
        raise UserError(
            f"--max-tokens: {len(ids)} prompt tokens and {max_tokens} new ones exceed the context"
            f" of {context}; lower it"
        )
    mesh = inference_mesh(found.metadata.model)
    stream = Stream(tokenizer, ids, stop)

    waiting = contextlib.ExitStack()

    def shown(_: int, new: list[int]) -> bool:
        waiting.close()
        show(stream.more(new))
        return stream.is_finished

    generator = Generator(
        found.metadata.model,
        load_for_inference(found, mesh, dtype),
        ComputeConfig(dtype=dtype),
        mesh,
        stop_ids(found.metadata, tokenizer, ends),
    )
    with waiting:
        waiting.enter_context(clock("compiling"))
        (new,) = generator.generate([ids], max_tokens, sampling, seed, shown)
    show(stream.more(new, is_last=True))
