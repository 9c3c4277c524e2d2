"""A model class for lm-evaluation-harness (`pip install lm_eval`): any of its tasks on any
checkpoint, without torch.

lm_eval finds models by what has been imported, so `python -m btx_jax lm_eval ...` imports this
module and hands over to its command line.
"""

from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_for_inference
from btx_jax.config import ComputeConfig, TaskConfig
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from btx_jax.evaluation.continuation import stop_ids
from btx_jax.evaluation.generation import Generator
from btx_jax.evaluation.likelihood import Scorer, encode_pair
from btx_jax.evaluation.tasks import continuations
from btx_jax.parallel.sharding import inference_mesh


@register_model("btx_jax")
class BtxJaxLM(LM):
    """--model_args checkpoint=DIR[,dtype=bfloat16][,max_gen_toks=256]; --batch_size N.

    checkpoint: a run's directory, one of its checkpoints, or a Hugging Face directory. Spread over
    the process's devices.
    """

    def __init__(
        self,
        checkpoint: str,
        dtype: str = "float32",
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        device: Any = None,  # lm_eval passes it always
        **unknown: Any,
    ):
        super().__init__()
        unknown.pop("max_batch_size", None)
        if unknown:
            raise UserError(
                f"--model_args: unknown {', '.join(sorted(unknown))}; known: checkpoint, dtype,"
                " max_gen_toks"
            )
        found = find_checkpoint(checkpoint, "--model_args checkpoint")
        self._model, self._name = found.about.model, str(found.path)
        self._max_new, self._batch_size = (
            int(max_gen_toks),
            int(batch_size) if str(batch_size).isdigit() else 8,
        )
        self._tokenizer = load_tokenizer(found.tokenizer)
        self._ends = stop_ids(found.about, self._tokenizer)
        self._mesh = inference_mesh(found.about.model)
        self._compute, self._params = (
            ComputeConfig(dtype=dtype),
            load_for_inference(found, self._mesh, dtype),
        )
        self._score = Scorer(self._model, self._params, self._compute, self._mesh, self._batch_size)
        self._generator: Generator | None = None

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [encode_pair(self._tokenizer, *request.args) for request in requests]
        return [(found.log_p, found.is_greedy) for found in self._score(pairs, "loglikelihood")]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, each token seen once, in windows of the model's context. The first token
        follows BOS, or else EOS."""
        pairs, owners = [], []
        start = self._tokenizer.bos if self._tokenizer.bos is not None else self._tokenizer.eos
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self._tokenizer.encode(request.args[0]), start, self._model.context, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, found in zip(owners, self._score(pairs, "loglikelihood_rolling"), strict=True):
            totals[owner] += found.log_p
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        if self._generator is None:
            self._generator = Generator(
                self._model, self._params, self._compute, self._mesh, self._ends
            )
        alike: dict[TaskConfig, list[int]] = {}  # requests with the same settings share batches
        for number, request in enumerate(requests):
            alike.setdefault(self._settings(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for settings, numbers in alike.items():
            prompts = [requests[number].args[0] for number in numbers]
            for number, text in zip(
                numbers,
                continuations(
                    self._tokenizer, self._generator, prompts, settings, self._batch_size
                ),
                strict=True,
            ):
                texts[number] = text
        return texts

    def _settings(self, options: Mapping[str, Any]) -> TaskConfig:
        """lm_eval's generation_kwargs; greedy unless do_sample is asked for."""
        until = options.get("until", [])
        return TaskConfig(
            "exact_match",
            file="",
            prompt="",
            max_tokens=int(options.get("max_gen_toks", self._max_new)),
            temperature=(
                float(options.get("temperature", 0.0)) if options.get("do_sample", False) else 0.0
            ),
            top_p=float(options.get("top_p", 1.0)),
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )
