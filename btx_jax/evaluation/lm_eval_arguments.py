"""Arguments of lm-evaluation-harness's `hf` model, in --model_args, --gen_kwargs and a task's
generation_kwargs: applied, ignored where they change nothing, or refused in one line."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lm_eval.models.utils import normalize_gen_kwargs

from btx_jax.errors import UserError, suggest
from btx_jax.evaluation.generation import Sampling

ROWS = 8  # per batch with --batch_size auto; larger batches are no faster without an accelerator


class Elsewhere(NamedTuple):
    """An unsupported argument. same: values that change nothing. instead: what to do instead."""

    same: tuple[Any, ...]
    instead: str


_SPREAD = Elsewhere((), "weights are spread over all devices that JAX finds; leave it out")
_QUANTISED = Elsewhere((False,), "weights are not quantised here; leave it out")
_ARGUMENTS = {
    "backend": Elsewhere(("default", "causal"), "only decoders are read; leave it out"),
    "revision": Elsewhere(("main",), "append it to the model: checkpoint=org/name@REVISION"),
    "subfolder": Elsewhere(("",), "name the folder itself: checkpoint=DIR/SUBFOLDER"),
    "peft": Elsewhere((), "make a checkpoint of it: btx adapter import, then adapter merge"),
    "delta": Elsewhere((), "add the weights first and name the result as checkpoint"),
    "gguf_file": Elsewhere((), "only safetensors are read; convert it first"),
    "autogptq": _QUANTISED,
    "gptqmodel": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "softmax_dtype": Elsewhere(("float32",), "softmaxes are always float32; leave it out"),
    "mixed_precision_dtype": Elsewhere((), "use dtype=bfloat16"),
    "truncation": Elsewhere((False,), "prompts are truncated at the front only; use max_length"),
    "trust_remote_code": Elsewhere(
        (True, False), "code from checkpoints is never run; leave it out"
    ),
    "use_fast_tokenizer": Elsewhere(
        (True, False), "there is only one tokenizer implementation; leave it out"
    ),
    "logits_cache": Elsewhere((True, False), "leave it out"),
    "parallelize": Elsewhere((True, False), _SPREAD.instead),
    "device_map": Elsewhere(("auto",), _SPREAD.instead),
    "tp_plan": Elsewhere(("auto",), _SPREAD.instead),
    "max_memory_per_gpu": _SPREAD,
    "max_cpu_memory": _SPREAD,
    "offload_folder": _SPREAD,
    "low_cpu_mem_usage": Elsewhere((True, False), _SPREAD.instead),
}

# Settings of transformers' generate, which lm_eval passes on. The first two groups have no effect
# without beam search and without sampling, respectively.
_BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty")
_SAMPLING = ("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_SETTINGS: dict[str, tuple[Any, ...]] = {  # values without effect
    "top_k": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "num_return_sequences": (1,),
    "use_cache": (True, False),
    "renormalize_logits": (True, False),
    "remove_invalid_values": (False,),
    "max_time": (),
    "stop_strings": (),
}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_OURS = ("until", "do_sample", "temperature", "top_p", *_LENGTHS)
_HINTS = {
    "stop": "give them as until",
    "stop_strings": "give them as until",
    "max_length": "use max_gen_toks",
    "seed": "lm_eval's --seed decides what is drawn",
}


class Generation(NamedTuple):
    """Settings of a generation request. new_tokens: maximum number of new tokens. stops: strings
    before which a continuation ends."""

    new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]


def refuse_others(others: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise UserError for an unsupported model argument, unless its value has no effect."""
    for name, value in others.items():
        if name not in _ARGUMENTS:
            raise UserError(f"--model_args: unknown {name!r}: {suggest(name, known)}")
        if value is not None and value not in _ARGUMENTS[name].same:
            raise UserError(f"--model_args {name}={value}: {_ARGUMENTS[name].instead}")


def whole(key: str, value: Any, least: int, most: int | None = None) -> int:
    """Parse an integer in [least, most], or its digits as text. Raises UserError."""
    digits = isinstance(value, str) and value.isdecimal()
    number = int(value) if digits or (isinstance(value, float) and value.is_integer()) else value
    if type(number) is not int or number < least or (most is not None and number > most):
        limits = f"from {least}" + (f" to {most}" if most is not None else "")
        raise UserError(f"{key}={value}: must be a whole number {limits}")
    return number


def flag(key: str, value: Any) -> bool:
    """Parse a boolean, or its name as text. Raises UserError."""
    named = {"true": True, "false": False}.get(str(value).lower())
    if named is None:
        raise UserError(f"{key}={value}: must be True or False")
    return named


def number(key: str, value: Any, least: float, most: float) -> float:
    """Parse a number in [least, most]. Raises UserError."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = float("nan")
    if not least <= result <= most:
        raise UserError(f"{key}={value}: must be a number from {least:g} to {most:g}")
    return result


def batch_rows(batch_size: Any, max_batch_size: Any) -> int:
    """Rows of a batch, from --batch_size: a number, auto or auto:N. Raises UserError."""
    most = None if max_batch_size is None else whole("--max_batch_size", max_batch_size, 1)
    if str(batch_size).split(":")[0] == "auto":
        return min(ROWS, most or ROWS)
    if not str(batch_size).isdecimal():
        raise UserError(f"--batch_size={batch_size}: must be a whole number, auto or auto:N")
    return whole("--batch_size", batch_size, 1)


def generation(options: Mapping[str, Any], new_tokens: int) -> Generation:
    """Settings from the generation_kwargs of a request, as lm_eval's hf model reads them: greedy
    unless do_sample or a temperature is given. new_tokens: the default limit. Raises UserError for
    unsupported settings."""
    for name in options:
        if name not in _OURS and name not in _SETTINGS:
            hint = _HINTS.get(name) or suggest(name, (*_OURS, *_SETTINGS))
            raise UserError(f"generation_kwargs: unknown {name!r}: {hint}")
    given = {name: value for name, value in options.items() if value is not None}
    for name in _LENGTHS:
        if name in given:
            given[name] = whole(f"generation_kwargs {name}", given[name], 1)
    if "do_sample" in given:
        given["do_sample"] = flag("generation_kwargs do_sample", given["do_sample"])
    temperature = number("generation_kwargs temperature", given.get("temperature", 0), 0, 1e6)
    top_p = number("generation_kwargs top_p", given.get("top_p", 1), 0, 1)
    settings = normalize_gen_kwargs({**given, "temperature": temperature}, new_tokens)
    if settings["do_sample"] and not temperature:
        raise UserError("generation_kwargs do_sample=True: needs a temperature above 0")
    if settings["do_sample"] and not top_p:
        raise UserError("generation_kwargs top_p=0: must be above 0")
    if beyond := not_ours(given, settings["do_sample"]):
        name = beyond[0]
        same = _SETTINGS[name]
        cure = _HINTS.get(name) or (
            f"not supported; --gen_kwargs {name}={same[0]} turns it off"
            if same
            else "not supported; leave it out"
        )
        raise UserError(f"generation_kwargs {name}={given[name]}: {cure}")
    stops = settings["until"]
    if not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"generation_kwargs until={stops}: must be a text or a list of texts")
    sampling = Sampling(temperature, top_p) if settings["do_sample"] else Sampling()
    return Generation(settings["max_gen_toks"], sampling, tuple(stop for stop in stops if stop))


def not_ours(settings: Mapping[str, Any], sampled: bool) -> list[str]:
    """Names of transformers' generation settings whose values would change the generated text and
    that are not applied here."""
    idle = () if sampled else _SAMPLING
    if settings.get("num_beams", 1) == 1:
        idle = (*idle, *_BEAMS)
    return [
        name
        for name, same in _SETTINGS.items()
        if settings.get(name) is not None and name not in idle and settings[name] not in same
    ]
