"""A model class for lm-evaluation-harness (`pip install lm_eval`): all of its tasks on any
checkpoint, without torch. Arguments behave as those of its `hf` model.

lm_eval up to 0.4.13 finds models among imported modules, so `btx lm-eval ...` imports this module
and calls its command line; in Python, import it before `lm_eval.simple_evaluate`. Later versions
find it by its entry point.
"""

import bisect
import collections
import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from btx_jax.checkpoints.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_for_inference,
    open_reader,
)
from btx_jax.config.config import ComputeConfig
from btx_jax.data.chat_template import ChatTemplate, TemplateError
from btx_jax.data.chat_template import chat_template as find_chat_template
from btx_jax.data.tokenizers import Tokenizer, check_ids, load_tokenizer, named_tokenizer
from btx_jax.errors import UserError, one_of
from btx_jax.evaluation.continuation import stop_ids
from btx_jax.evaluation.generation import Generator
from btx_jax.evaluation.likelihood import Scorer
from btx_jax.evaluation.lm_eval_arguments import (
    ROWS,
    Generation,
    batch_rows,
    flag,
    generation,
    not_ours,
    refuse_others,
    whole,
)
from btx_jax.parallel.hosts import is_first
from btx_jax.parallel.sharding import inference_mesh
from btx_jax.progress import bar

log = logging.getLogger(__name__)

CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # marks where a rendered chat is cut, as in transformers
DEFAULT = "default"  # name of an unnamed template
NO_TEMPLATE = "leave --apply_chat_template out"
OWNER = "btx_jax"  # key in a cache of answers that identifies the model


@register_model("btx_jax")
class BtxJaxLM(TemplateLM):
    """--model_args checkpoint=DIR[,NAME=VALUE...]; --batch_size N or auto.

    checkpoint, or pretrained: a run's directory, one of its checkpoints, or a Hugging Face
        directory. Spread over the process's devices.
    tokenizer: a directory or file, if it is not the checkpoint's own.
    dtype: float32, bfloat16, or auto for the dtype that most of the checkpoint is stored in.
    max_length: maximum tokens of prompt and continuation together; by default the model's context.
    max_gen_toks: maximum new tokens where a task does not set them.
    add_bos_token: whether BOS precedes every text; by default as the tokenizer itself does it.
    prefix_token_id: the id before a text that is scored from its first token; by default BOS, or
        else EOS.
    think_end_token: an id or a text; everything up to its last occurrence is left out of the
        answer.
    chat_template_args, enable_thinking: variables of the chat template.

    All other arguments of lm_eval's hf model are refused, unless their values have no effect.
    """

    def __init__(
        self,
        /,
        checkpoint: Any = None,
        pretrained: Any = None,
        tokenizer: Any = None,
        dtype: str = "float32",
        max_length: Any = None,
        max_gen_toks: Any = 256,
        add_bos_token: Any = None,
        prefix_token_id: Any = None,
        think_end_token: Any = None,
        enable_thinking: Any = None,
        chat_template_args: Any = None,
        batch_size: Any = ROWS,
        max_batch_size: Any = None,
        device: Any = None,
        **others: Any,
    ):
        super().__init__()
        refuse_others(others, list(inspect.signature(type(self)).parameters)[:-1])
        if (checkpoint is None) == (pretrained is None):
            raise UserError(
                "--model_args: give the model exactly once, as checkpoint=DIR (or pretrained=DIR)"
            )
        named = str(pretrained if checkpoint is None else checkpoint)
        found = find_checkpoint(named, "--model_args checkpoint")
        self._checkpoint, self._model = found, found.metadata.model
        self._tokenizer = (
            load_tokenizer(found.tokenizer)
            if tokenizer is None
            else named_tokenizer(str(tokenizer), "--model_args tokenizer")
        )
        self._batch_size = batch_rows(batch_size, max_batch_size)
        is_auto = str(batch_size).startswith("auto")
        self.batch_sizes = {0: self._batch_size} if is_auto else {}  # what lm_eval reports for auto
        _check_device(device)
        key, context = "--model_args {}".format, self._model.context
        self._max_length = (
            context if max_length is None else whole(key("max_length"), max_length, 1, context)
        )
        self._new_tokens = whole(key("max_gen_toks"), max_gen_toks, 1)
        if add_bos_token is not None:
            self._tokenizer = _with_bos(self._tokenizer, flag(key("add_bos_token"), add_bos_token))
        self._prefix = (
            None
            if prefix_token_id is None
            else whole(key("prefix_token_id"), prefix_token_id, 0, self._model.vocab_size - 1)
        )
        is_id = isinstance(think_end_token, str) and think_end_token.isdecimal()
        self._think_end = int(think_end_token) if is_id else think_end_token
        self._thinks = (
            None if enable_thinking is None else flag(key("enable_thinking"), enable_thinking)
        )
        if self._thinks and self._think_end is None:
            raise UserError("--model_args enable_thinking=True: needs think_end_token")
        if not isinstance(chat_template_args, Mapping | None):
            raise UserError(
                f"--model_args chat_template_args={chat_template_args}: must be a dictionary"
            )
        self._template_args = dict(chat_template_args or {})
        if self._thinks is not None:
            self._template_args["enable_thinking"] = self._thinks
        self._template: ChatTemplate | None = None
        self._told: set[str] = set()
        self._settings = found.metadata.huggingface.get("generation_config", {})

        one_of(key("dtype"), str(dtype), ("auto", "float32", "bfloat16"))
        self._dtype = _stored_dtype(found) if dtype == "auto" else str(dtype)
        self._mesh = inference_mesh(self._model)
        self._compute = ComputeConfig(dtype=self._dtype)
        self._params = load_for_inference(found, self._mesh, self._dtype)
        self._score = Scorer(self._model, self._params, self._compute, self._mesh, self._batch_size)

    @functools.cached_property
    def _generator(self) -> Generator:
        """Created on first use, as it keeps a second copy of the parameters."""
        ends = stop_ids(self._checkpoint.metadata, self._tokenizer)
        return Generator(self._model, self._params, self._compute, self._mesh, ends)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict | None = None
    ) -> "BtxJaxLM":
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict, additional_config: dict | None = None
    ) -> "BtxJaxLM":
        """additional_config: from lm_eval's own arguments. Raises UserError for an argument given
        in both."""
        own = {
            name: value for name, value in (additional_config or {}).items() if value is not None
        }
        for name in own.keys() & arg_dict.keys():
            raise UserError(f"--model_args {name}: give it as --{name}")
        return cls(**arg_dict, **own)

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """The id before a text that is scored from its first token. Raises UserError when there is
        none."""
        for found in (self._prefix, self._tokenizer.bos, self._tokenizer.eos):
            if found is not None:
                return found
        raise UserError(
            f"{self._tokenizer.path} has neither a BOS nor an EOS token to prepend to a text;"
            " give --model_args prefix_token_id=ID"
        )

    @property
    def max_length(self) -> int:
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        return self._new_tokens

    @property
    def batch_size(self) -> int:
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """Part of the file name of lm_eval's cache of requests; differs by tokenizer and
        template."""
        template = self._chat_template().source
        told = hashlib.sha256((self._tokenizer.sha256 + template).encode()).hexdigest()
        return f"{self._checkpoint.path.name}__{told[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Information that lm_eval stores with its results."""
        return {
            "model_num_parameters": sum(leaf.size for leaf in jax.tree.leaves(self._params)),
            "model_dtype": self._dtype,
            "model_path": str(self._checkpoint.path),
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Set the cache of lm_eval's --use_cache, which looks up answers by the request alone.
        Raises UserError if its file holds another model's answers."""
        super().set_cache_hook(cache_hook)
        answers = cache_hook.dbdict
        if answers is None:
            return
        settings = [self._dtype, self._max_length, self._new_tokens, self._prefix]
        settings += [self._think_end, self._tokenizer.sha256]
        mine = json.dumps([self._checkpoint.identity(), *settings])
        if len(answers) and answers.get(OWNER) != mine:
            raise UserError(
                f"--use_cache: {answers.filename} holds answers of another model or other"
                " --model_args; choose another file"
            )
        answers[OWNER] = mine

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text. add_special_tokens: whether to include the tokenizer's prefix; by
        default it is included unless the text begins with BOS. Raises UserError for an id without
        an embedding."""
        if add_special_tokens is None:
            bos = self._tokenizer.bos
            first = None if bos is None else self._tokenizer.token_of(bos)
            add_special_tokens = not has_bos_prefix(string, first)
        encode = self._tokenizer.encode_prompt if add_special_tokens else self._tokenizer.encode
        ids = encode(string)
        check_ids(ids, self._model.vocab_size, f"{string[:60]!r}", self._tokenizer)
        return ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        if self._thinks:
            raise UserError(
                "--model_args enable_thinking=True: tasks that score given answers leave no"
                " room for thinking; choose generative tasks"
            )
        for request in requests:
            if not request.args[1]:
                raise UserError(f"nothing to score after {request.args[0][-60:]!r}")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of (texts, context ids, continuation ids); the beginning is truncated
        where both exceed max_length."""
        pairs = []
        for texts, front, behind in requests:
            if not front or not behind or len(behind) > self._max_length:
                raise UserError(
                    f"{texts}: {len(front)} tokens and {len(behind)} to be scored after them;"
                    f" needs at least one of each, and at most {self._max_length} to be scored"
                )
            whole = [*front, *behind][-(self._max_length + 1) :]
            pairs.append((whole[: -len(behind)], behind))
        cut = sum(
            len(pair[0]) < len(front) for pair, (_, front, _) in zip(pairs, requests, strict=True)
        )
        self._tell_cut(cut, len(pairs), self._max_length + 1)
        return [(found.log_p, found.is_greedy) for found in self._score(pairs, "loglikelihood")]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows of max_length that contain each token once. As
        in lm_eval's hf model, the tokenizer's prefix counts as a text's first token."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            found = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                self.prefix_token_id,
                self._max_length,
                context_len=1,
            )
            for front, behind in map(make_disjoint_window, found):
                windows.append((None, front, behind))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[Generation, list[int]] = {}  # requests with the same settings share batches
        for number, request in enumerate(requests):
            options = {"top_p": self._settings.get("top_p"), **request.args[1]}
            settings = generation(options, self._new_tokens)
            alike.setdefault(settings, []).append(number)
        texts = [""] * len(requests)
        with bar(
            total=len(requests),
            desc="generate_until",
            shown=is_first() and not disable_tqdm,
        ) as progress:
            for settings, numbers in alike.items():
                prompts = [requests[number].args[0] for number in numbers]
                for place, text in self._continued(prompts, settings):
                    texts[numbers[place]] = text
                    self.cache_hook.add_partial(
                        "generate_until", requests[numbers[place]].args, text
                    )
                    progress.update()
        return texts

    def _continued(self, prompts: Sequence[str], settings: Generation) -> Iterator[tuple[int, str]]:
        """Yield (index of a prompt, the text generated after it), in batches of similar length."""
        room = self._max_length - settings.new_tokens
        if room < 1:
            raise UserError(
                f"generation_kwargs max_gen_toks={settings.new_tokens}: leaves no room for a"
                f" prompt within {self._max_length} tokens; lower it"
            )
        ids = [self.tok_encode(prompt) for prompt in prompts]
        if not all(ids):
            raise UserError("an empty prompt, and the tokenizer has no BOS to start from")
        self._tell_cut(sum(len(row) > room for row in ids), len(ids), room)
        if beyond := not_ours(self._settings, sampled=settings.sampling.temperature > 0):
            told = ", ".join(f"{name}={self._settings[name]}" for name in beyond)
            self._tell(f"{self._checkpoint.path}: its generation_config's {told}: not applied here")
        eos = self._tokenizer.eos
        written = None if eos is None else self._tokenizer.token_of(eos)
        stops = (*settings.stops, written) if written else settings.stops
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            rows = [ids[i][-room:] for i in chosen]
            rows += rows[-1:] * (self._batch_size - len(rows))
            new = self._generator.generate(
                rows,
                settings.new_tokens,
                settings.sampling,
                seed=int(np.random.randint(2**32, dtype=np.uint32)),  # set by lm_eval's --seed
                is_finished=lambda row, ids: self._has_ended(rows[row], ids, stops),  # noqa: B023
            )
            for i, front, ids_new in zip(chosen, rows, new, strict=False):
                yield i, self._answer(front, ids_new, stops)

    def _has_ended(self, prompt: list[int], new: list[int], stops: Sequence[str]) -> bool:
        """Whether a stop string has been generated. Special tokens count as their text here,
        although answers do not show them."""
        shown = self._tokenizer.decode(new, behind=prompt, special=True)
        return any(stop in shown for stop in stops)

    def _answer(self, prompt: list[int], new: list[int], stops: Sequence[str]) -> str:
        """The generated text up to the first stop."""
        end = bisect.bisect_left(
            range(len(new) + 1), True, key=lambda n: self._has_ended(prompt, new[:n], stops)
        )
        kept, thought = new[:end], 0
        if isinstance(self._think_end, int) and self._think_end in kept:
            thought = len(kept) - kept[::-1].index(self._think_end)
        text = self._tokenizer.decode(kept[thought:], behind=[*prompt, *kept[:thought]])
        if isinstance(self._think_end, int):
            return postprocess_generated_text(text.lstrip(), list(stops), None)
        return postprocess_generated_text(text, list(stops), self._think_end)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Select the template that apply_chat_template renders, the default one or by name, and
        return its source. None for False. Raises UserError when there is none."""
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else DEFAULT
        if list(self._tokenizer.templates) == [DEFAULT] and name != DEFAULT:
            self._tell(
                f"--apply_chat_template {name}: there is only one template, which is"
                " used; leave the name out"
            )
            name = DEFAULT
        self._template = find_chat_template(self._tokenizer, NO_TEMPLATE, name)
        return self._template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat up to the next answer or, without add_generation_prompt, up to the
        continuation of the last message. A system message that the template refuses is left out
        with a warning, as in lm_eval's hf model. Raises UserError when the template refuses other
        messages."""
        try:
            return self._rendered(chat_history, add_generation_prompt)
        except TemplateError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            self._tell(f"{error}: rendered without the system message instead")
        return self._rendered(others, add_generation_prompt)

    def _rendered(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        template = self._chat_template()
        if add_generation_prompt:
            return template.render(messages, True, **self._template_args).text
        *before, last = messages
        marked = [*before, {**last, "content": last["content"] + CONTINUE}]
        text = template.render(marked, False, **self._template_args).text
        if CONTINUE.strip() not in text or last["content"].strip() not in text:
            raise UserError(
                "--apply_chat_template: the template changes the beginning of an answer that"
                f" the task prescribes: {last['content']!r}"
            )
        place = text.rindex(CONTINUE.strip())
        if text[place:].startswith(CONTINUE):
            return text[:place]
        return text[:place].rstrip()

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = find_chat_template(self._tokenizer, NO_TEMPLATE)
        return self._template

    def _tell(self, message: str) -> None:
        """Warn, once per message."""
        if message not in self._told:
            self._told.add(message)
            log.warning(message)

    def _tell_cut(self, cut: int, count: int, room: int) -> None:
        if cut:
            log.warning(
                "%d of %d texts are longer than %d tokens and were truncated at the front",
                cut,
                count,
                room,
            )


def _stored_dtype(found: Checkpoint) -> str:
    """bfloat16 if most tensors are stored so, else float32, which represents float16 exactly."""
    if found.metadata.model.lora:
        return "float32"
    ((commonest, _),) = collections.Counter(open_reader(found).dtypes.values()).most_common(1)
    return "bfloat16" if commonest.name == "bfloat16" else "float32"


def _with_bos(tokenizer: Tokenizer, added: bool) -> Tokenizer:
    if added and tokenizer.bos is None:
        raise UserError(
            f"--model_args add_bos_token=True: {tokenizer.path} has no BOS token; leave it out"
        )
    return tokenizer.with_bos(added)


def _check_device(device: Any) -> None:
    """Check --device. Accepts lm_eval's default, cuda:0."""
    here = jax.default_backend()
    if device not in (None, "cuda", "cuda:0", here, f"{here}:0"):
        raise UserError(
            f"--device {device}: JAX runs on all devices of the platform {here}; choose them"
            " with JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
        )
