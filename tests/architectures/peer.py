"""transformers 5.23's own results for every supported family: makes the golden checkpoints of
test_families.py, and reads our exports of them. From the project's root, as `python -m
tests.architectures.peer` and:

    make tests/architectures/golden [NAME ...]     a NAME that is not listed here is a model_type
    keys tests/architectures/config_keys.json      the keys that every config class declares
    decode tests/architectures/decoding.json [NAME ...]     long greedy continuations
    check EXPORT LOGITS.npy     EXPORT is named like its golden directory
    table FOLDER                a markdown table of all exports in FOLDER, made by exports.py
    mixtures FOLDER             and of all mixtures

Needs torch and transformers (`pip install -e '.[bench]'`). All but `make` fail on any missing,
unexpected or mismatched key; `check` and `mixtures` also when logits differ by more than 1e-4.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    InternLM3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.architectures import goldens

LENGTH = 512
FIRST = 4  # lower ids are special, such as padding, whose embedding gets no gradient in torch
SHAPE = {
    "vocab_size": 90, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
# The first factors are exact in float32: otherwise, at 512 positions, the last bit of the first
# frequency would change logits by 1e-4.
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.125, 1.15, 1.4], "long_factor": [1.25, 2.5, 7.25],
}  # fmt: skip
WINDOW = {"sliding_window": 100}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": goldens.SHORT,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": goldens.SHORT,
}  # fmt: skip
# Tensors that a class trains and our models hold as constants.
CONSTANTS = {"sinks": -1e30, "e_score_correction_bias": 0.0}


class Kind(NamedTuple):
    """A kind of golden checkpoint. config: the model's config. written: additional config.json
    values, as in published directories where transformers writes others. matters: changes of
    config.json, each of which must change the logits; a nested dict updates that key."""

    config: Any
    written: dict[str, Any] = {}  # noqa: RUF012
    matters: tuple[dict[str, Any], ...] = ()
    without: tuple[str, ...] = ()


def of(kind: str, **settings: Any) -> Any:
    return AutoConfig.for_model(kind, **SHAPE | settings)


def theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


def kinds() -> dict[str, Kind]:
    no_window = {"sliding_window": None}
    qwen_window = {"use_sliding_window": True, **WINDOW}
    other_theta = {"rope_parameters": {"rope_theta": 1e6}}
    no_longrope = (
        {"rope_parameters": {"short_factor": [1.0] * 3}},
        {"rope_parameters": {"long_factor": LONGROPE["short_factor"]}},
        {"max_position_embeddings": 512},
    )
    small = {"moe_intermediate_size": 12}
    granite = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.3,
        "logits_scaling": 0.75,
    }
    gemma3_layers = [
        "sliding_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
    ]
    windows = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]
    half = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    all_of_it = {"rope_parameters": {"partial_rotary_factor": 1.0}}
    hunyuan_rope = {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 1e4}
    return {
        "llama_plain": Kind(LlamaConfig(**SHAPE, **theta(5e4))),
        "mixtral_plain": Kind(
            MixtralConfig(
                **SHAPE | {"intermediate_size": 20}, num_local_experts=4, num_experts_per_tok=2
            )
        ),
        "llama_bias": Kind(
            LlamaConfig(**SHAPE, head_dim=12, attention_bias=True, mlp_bias=True),
            matters=(other_theta,),
        ),
        "mistral_window": Kind(
            MistralConfig(**SHAPE, head_dim=8, **WINDOW),
            matters=(no_window, {"sliding_window": 99}),
        ),
        "mixtral_window": Kind(
            MixtralConfig(
                **SHAPE | {"intermediate_size": 20, "vocab_size": 84},
                **WINDOW,
                num_local_experts=3,
                num_experts_per_tok=2,
                rms_norm_eps=1e-4,
            ),
            matters=(no_window, {"sliding_window": 101}, {"num_experts_per_tok": 1}),
        ),
        "qwen2": Kind(
            Qwen2Config(**SHAPE | {"num_attention_heads": 6}, tie_word_embeddings=True),
            written={"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
            matters=(other_theta, {"use_sliding_window": True, "layer_types": None}),
        ),
        "qwen2_window": Kind(
            Qwen2Config(**SHAPE, **qwen_window, max_window_layers=0),
            matters=({"use_sliding_window": False, "layer_types": None}, {"sliding_window": 99}),
        ),
        "qwen3": Kind(
            Qwen3Config(**SHAPE, head_dim=16, **theta(1e6)),
            matters=({"rope_parameters": {"rope_theta": 1e4}},),
        ),
        "qwen3_bias": Kind(
            Qwen3Config(**SHAPE, head_dim=8, attention_bias=True, tie_word_embeddings=True)
        ),
        "phi3": Kind(Phi3Config(**SHAPE, **WINDOW), matters=(no_window, {"sliding_window": 101})),
        "phi35": Kind(
            Phi3Config(
                **SHAPE,
                original_max_position_embeddings=goldens.SHORT,
                rope_parameters=dict(LONGROPE),
            ),
            matters=no_longrope,
        ),
        "phi4_mini": Kind(
            Phi3Config(
                **SHAPE | {"hidden_size": 32, "intermediate_size": 36, "vocab_size": 80},
                original_max_position_embeddings=goldens.SHORT,
                rope_parameters=LONGROPE | {"partial_rotary_factor": 0.75},
                tie_word_embeddings=True,
            ),
            matters=no_longrope,
        ),
        "internlm3": Kind(
            InternLM3Config(
                **SHAPE,
                qkv_bias=True,
                bias=True,
                head_dim=8,
                rope_parameters={"rope_type": "dynamic", "factor": 6.0, "rope_theta": 5e4},
            ),
            written={"qkv_bias": True, "bias": True},
            without=("attention_bias", "mlp_bias"),
            matters=({"max_position_embeddings": 256},),
        ),
        "qwen2_moe": Kind(
            Qwen2MoeConfig(
                **SHAPE | {"num_hidden_layers": 3, "intermediate_size": 28},
                **small,
                shared_expert_intermediate_size=16,
                mlp_only_layers=[0],
                num_experts=5,
                num_experts_per_tok=3,
                norm_topk_prob=False,
            ),
            matters=({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
        ),
        "qwen2_moe_norm": Kind(
            Qwen2MoeConfig(
                **SHAPE,
                **small,
                shared_expert_intermediate_size=20,
                decoder_sparse_step=1,
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=True,
                qkv_bias=False,
            ),
            matters=({"norm_topk_prob": False},),
        ),
        "qwen3_moe": Kind(
            Qwen3MoeConfig(
                **SHAPE | {"num_hidden_layers": 3, "intermediate_size": 28},
                **small,
                head_dim=8,
                mlp_only_layers=[1],
                num_experts=4,
                num_experts_per_tok=2,
                norm_topk_prob=False,
            ),
            matters=({"norm_topk_prob": True},),
        ),
        "qwen3_moe_norm": Kind(
            Qwen3MoeConfig(
                **SHAPE,
                **small,
                **qwen_window,
                head_dim=8,
                num_experts=6,
                num_experts_per_tok=2,
                norm_topk_prob=True,
            ),
            written={"num_experts": 6},
            without=("num_local_experts",),
            matters=({"norm_topk_prob": False}, no_window, {"sliding_window": 99}),
        ),
        "olmo": Kind(of("olmo", **theta(5e4)), matters=(other_theta,)),
        "olmo2": Kind(
            of("olmo2", num_hidden_layers=3, **theta(5e5)),
            matters=({"rope_parameters": {"rope_theta": 1e4}},),
        ),
        "flex_olmo": Kind(
            of(
                "flex_olmo",
                intermediate_size=12,
                num_experts=7,
                num_experts_per_tok=5,
                rms_norm_eps=0.05,  # hides the gates' common factor from norms
            ),
            written={"num_experts": 7},
            without=("num_local_experts",),
            matters=({"norm_topk_prob": True}, {"num_experts_per_tok": 4}),
        ),
        "olmoe": Kind(
            of("olmoe", intermediate_size=12, num_experts=6, num_experts_per_tok=3),
            written={"num_experts": 6},
            without=("num_local_experts",),
            matters=({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
        ),
        "ernie": Kind(
            of("ernie4_5", head_dim=10, use_bias=True, tie_word_embeddings=False, **theta(5e5)),
            matters=(other_theta,),
        ),
        "hunyuan": Kind(
            of(
                "hunyuan_v1_dense",
                head_dim=8,
                rope_parameters=hunyuan_rope,
            ),
            matters=({"rope_parameters": {"alpha": 10.0}},),
        ),
        "gemma": Kind(
            of("gemma", head_dim=8, hidden_act="gelu", num_key_value_heads=4),
            written={"hidden_act": "gelu"},
            matters=({"rms_norm_eps": 0.1},),
        ),
        "gemma2": Kind(
            of(
                "gemma2",
                num_hidden_layers=3,
                head_dim=8,
                query_pre_attn_scalar=6,
                tie_word_embeddings=False,  # tied, such small models repeat themselves
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                **WINDOW,
            ),
            matters=(
                {"sliding_window": 99},
                {"layer_types": ["full_attention"] * 3},
                {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
                {"query_pre_attn_scalar": 7},
                {"attn_logit_softcapping": None},
                {"final_logit_softcapping": 4.0},
            ),
        ),
        "gemma3": Kind(
            of(
                "gemma3_text",
                num_hidden_layers=4,
                head_dim=16,
                query_pre_attn_scalar=24,
                layer_types=gemma3_layers,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                },
                tie_word_embeddings=False,
                **WINDOW,
            ),
            matters=(
                {"sliding_window": 99},
                {"layer_types": gemma3_layers[::-1]},
                {"query_pre_attn_scalar": 30},
                {
                    "rope_parameters": {
                        "full_attention": {"rope_type": "default", "rope_theta": 1e6}
                    }
                },
                {
                    "rope_parameters": {
                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e6}
                    }
                },
            ),
        ),
        "granite": Kind(
            of("granite", **granite),
            matters=tuple({key: value * 1.5} for key, value in granite.items()),
        ),
        "granitemoe": Kind(
            of(
                "granitemoe",
                **granite,
                intermediate_size=20,
                num_local_experts=5,
                num_experts_per_tok=2,
            ),
            written={"num_local_experts": 5},
            matters=({"num_experts_per_tok": 3}, {"residual_multiplier": 0.5}),
        ),
        "smollm3": Kind(
            of(
                "smollm3",
                num_hidden_layers=5,
                no_rope_layer_interval=2,
                tie_word_embeddings=False,
                **theta(5e5),
            ),
            matters=({"no_rope_layers": [1] * 5}, {"no_rope_layers": [0, 1, 0, 1, 1]}),
        ),
        "olmo3": Kind(
            of(
                "olmo3",
                num_hidden_layers=5,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                    "full_attention": YARN | {"rope_theta": 5e5},
                },
                **WINDOW,
            ),
            matters=(
                {"sliding_window": 99},
                {
                    "rope_parameters": {
                        "full_attention": {"rope_type": "default", "rope_theta": 5e5}
                    }
                },
                {"layer_types": ["full_attention"] * 5},
            ),
        ),
        "olmo3_plain": Kind(
            of(
                "olmo3",
                num_hidden_layers=5,
                rope_parameters={
                    kind: {"rope_type": "default", "rope_theta": 5e5} for kind in set(windows)
                },
                **WINDOW,
            ),
            matters=({"sliding_window": 99}, {"layer_types": ["full_attention"] * 5}),
        ),
        "granitemoe_swa": Kind(
            of(
                "granitemoe_swa",
                **granite,
                **WINDOW,
                num_hidden_layers=5,
                intermediate_size=20,
                num_local_experts=4,
                num_experts_per_tok=2,
                layer_types=windows,
                layer_rope_theta=[5e4, 5e4, 0, 5e4, 0],
            ),
            matters=(
                {"sliding_window": 99},
                {"layer_types": windows[::-1]},
                {"layer_rope_theta": [5e4, 5e4, 5e4, 5e4, 0]},
                {"num_experts_per_tok": 1},
            ),
        ),
        "ernie_moe": Kind(
            of(
                "ernie4_5_moe",
                num_hidden_layers=3,
                moe_intermediate_size=12,
                moe_num_experts=5,
                moe_k=2,
                moe_num_shared_experts=2,
                tie_word_embeddings=False,
                **theta(5e5),
            ),
            matters=({"moe_k": 3}, other_theta),
        ),
        "hunyuan_moe": Kind(
            of(
                "hunyuan_v1_moe",
                intermediate_size=20,
                head_dim=8,
                num_experts=4,
                moe_topk=2,
                rope_parameters=hunyuan_rope,
            ),
            matters=({"moe_topk": 1}, {"rope_parameters": {"alpha": 10.0}}),
        ),
        "exaone4": Kind(
            of(
                "exaone4",
                num_hidden_layers=5,
                layer_types=windows,
                rope_parameters=LLAMA3,
                **WINDOW,
            ),
            matters=(
                {"sliding_window": 99},
                {"layer_types": windows[::-1]},
                {"rope_parameters": {"factor": 2.0}},
            ),
        ),
        "exaone4_full": Kind(
            of(
                "exaone4",
                sliding_window=None,
                layer_types=["full_attention"] * 2,
                head_dim=8,
                **theta(1e6),
            )
        ),
        "glm": Kind(of("glm", head_dim=8, **half), matters=(all_of_it,)),
        "glm4": Kind(of("glm4", head_dim=12, attention_bias=False, **half), matters=(all_of_it,)),
        "helium": Kind(of("helium", head_dim=6, **theta(1e5)), matters=(other_theta,)),
        "vaultgemma": Kind(
            of(
                "vaultgemma",
                num_hidden_layers=3,
                head_dim=8,
                query_pre_attn_scalar=6,
                tie_word_embeddings=False,
                attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
                **WINDOW,
            ),
            matters=(
                {"sliding_window": 99},
                {"query_pre_attn_scalar": 7},
                {"attn_logit_softcapping": None},
                {"final_logit_softcapping": 4.0},
            ),
        ),
        "cwm": Kind(
            of(
                "cwm",
                num_hidden_layers=5,
                head_dim=8,
                layer_types=windows,
                rope_parameters=LLAMA3,
                **WINDOW,
            ),
            matters=({"sliding_window": 99}, {"rope_parameters": {"factor": 2.0}}),
        ),
        "ministral": Kind(
            of("ministral", num_hidden_layers=5, head_dim=8, layer_types=windows, **WINDOW),
            matters=({"sliding_window": 99}, {"layer_types": windows[::-1]}),
        ),
        "iquestcoder": Kind(
            of("iquestcoder", head_dim=12, **theta(5e5)),
            matters=(other_theta,),
        ),
        "qwen3_yarn": Kind(
            of("qwen3", head_dim=8, rope_parameters=YARN | {"rope_theta": 1e6}),
            matters=(
                {"rope_parameters": YARN | {"rope_theta": 1e6, "factor": 8.0}},
                {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            ),
        ),
        "llama_dynamic": Kind(
            of(
                "llama",
                max_position_embeddings=goldens.SHORT,
                rope_parameters={"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
            ),
            matters=({"max_position_embeddings": 512}, {"rope_parameters": {"factor": 4.0}}),
        ),
        "ministral3": Kind(
            of(
                "ministral3",
                head_dim=8,
                rope_parameters=YARN
                | {"rope_theta": 1e6, "llama_4_scaling_beta": 0.5, "mscale": 1.0}
                | {"mscale_all_dim": 1.0},
            ),
            matters=(
                {"rope_parameters": {"llama_4_scaling_beta": 0.25}},
                {"rope_parameters": {"original_max_position_embeddings": 256}},
            ),
        ),
    }


def load(directory: Path) -> transformers.PreTrainedModel:
    """Load strictly, in float32."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    assert not wrong, f"{directory}: {wrong}"
    return model.eval()


@torch.no_grad()
def logits_of(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits of the first row, [T, V]."""
    return model(torch.from_numpy(tokens).long()).logits[0].numpy()


def generate(
    model: transformers.PreTrainedModel, prompt: list[int], new_tokens: int = goldens.NEW_TOKENS
) -> tuple[list[int], float]:
    """Generate with the cache: (greedy tokens, smallest margin of a chosen token over the next)."""
    ids = torch.tensor([prompt])
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    result = model.generate(ids, attention_mask=torch.ones_like(ids))
    best = torch.stack(result.logits)[:, 0].topk(2).values
    return result.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def randomise(model: transformers.PreTrainedModel) -> None:
    """Randomise parameters: no bias is zero and no norm is one; router logits are spread enough to
    choose, but not so much that renormalisation has no effect. Queries and keys are smaller, as a
    sharp softmax would amplify rounding of the rotation."""
    ones = 0 if "Gemma" in type(model).__name__ else 1  # Gemma's norms multiply by 1 + weight
    for name, parameter in model.named_parameters():
        small = any(part in name for part in ("q_proj.weight", "k_proj.weight", "qkv_proj.weight"))
        parameter.data.normal_(ones if "norm" in name else 0, 0.15 if small else 0.3)
        if (kind := name.rpartition(".")[2]) in CONSTANTS:
            parameter.data.fill_(CONSTANTS[kind])


def packed(rng: np.random.Generator, vocab_size: int, window: bool) -> dict[str, np.ndarray]:
    """Packed rows of documents for one step; longer than the window, if there is one."""
    rows = [[65], [20, 30, 15], [40, 15], [1, 50, 7]]
    if window:
        rows = [[129], [110, 19], [40, 60, 20], [5, 120]]
    shape = (len(rows), sum(rows[0]))
    tokens, segments = np.full(shape, SHAPE["pad_token_id"], np.int32), np.zeros(shape, np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, 1):
            tokens[row, start : start + length] = rng.integers(FIRST, vocab_size, length)
            segments[row, start : start + length] = number
            start += length
    return {"batch_tokens": tokens, "batch_segments": segments}


def step(
    model: transformers.PreTrainedModel, batch: dict[str, np.ndarray], window: int | None
) -> dict[str, np.ndarray]:
    """Loss, gradient norm, and one step of AdamW, which decays matrices but not norms and
    biases."""
    tokens = torch.from_numpy(batch["batch_tokens"]).long()
    segments = torch.from_numpy(batch["batch_segments"])
    inputs, own = tokens[:, :-1], segments[:, :-1]
    place = torch.arange(inputs.shape[1])
    distance = place[:, None] - place[None, :]

    def mask_of(window):
        seen = (distance >= 0) & (distance < (window or inputs.shape[1]))
        seen = seen & (own[:, :, None] == own[:, None, :])
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]

    mask: Any = mask_of(window)
    if len(set(getattr(model.config, "layer_types", None) or ())) > 1:
        mask = {"full_attention": mask_of(None), "sliding_attention": mask}
    starts = torch.ones_like(own, dtype=torch.bool)
    starts[:, 1:] = own[:, 1:] != own[:, :-1]
    positions = place - torch.where(starts, place, 0).cummax(1).values
    logits = model(
        inputs, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits.flatten(0, 1)
    learnt = (segments[:, 1:] == own) & (segments[:, 1:] > 0)
    nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    loss = nll[learnt.flatten()].mean()
    loss.backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters]))
    groups = [
        {
            "params": [p for p in parameters if p.dim() > 1],
            "weight_decay": goldens.WEIGHT_DECAY,
        },
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(
        groups, goldens.LEARNING_RATE, (goldens.BETA1, goldens.BETA2), goldens.EPS
    ).step()
    with tempfile.TemporaryDirectory() as folder:  # saved, to get the tensor names of a directory
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
        after = goldens.sampled(goldens.tensors(Path(folder)))
    return {"loss": loss.detach().numpy(), "grad_norm": norm.numpy(), "after": after}


def window_of(model: transformers.PreTrainedModel) -> int | None:
    """The window of all layers."""
    return getattr(model.config, "sliding_window", None) or None


def watch_routers(model: transformers.PreTrainedModel) -> list[float]:
    """Returns a list to which every forward pass appends the smallest margin of a router's last
    chosen expert over the next one."""
    leads: list[float] = []

    def look(module, _, output):
        best = output[0].detach().topk(module.top_k + 1).values
        leads.append(float((best[:, -2] - best[:, -1]).min()))

    for module in model.modules():
        if type(module).__name__.endswith(("TopKRouter", "MoEV1Gate")):
            module.register_forward_hook(look)
    return leads


def changed(directory: Path, change: dict[str, Any]) -> transformers.PreTrainedModel:
    """Load the same weights with a changed config.json."""
    with tempfile.TemporaryDirectory() as home:
        copy = Path(home) / "changed"
        shutil.copytree(directory, copy)
        config = json.loads((copy / "config.json").read_text())
        for key, value in change.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        (copy / "config.json").write_text(json.dumps(config))
        return load(copy)


def write(directory: Path, kind: Kind, seed: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """Write a golden checkpoint: (transformers' results, reasons to reject this seed)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_config(kind.config, dtype=torch.float32)
    randomise(model)
    model = model.bfloat16()
    model.generation_config = GenerationConfig(
        bos_token_id=1,
        eos_token_id=[2, 5],
        pad_token_id=3,
        do_sample=True,
        temperature=0.65,
        top_p=0.85,
        repetition_penalty=1.05,
    )
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config = {key: x for key, x in config.items() if key not in kind.without} | kind.written
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    model = load(directory)
    leads = watch_routers(model)
    vocabulary, window = model.config.vocab_size, window_of(model)
    rope = model.config.rope_parameters
    longrope = rope.get("rope_type") == "longrope"
    is_stretched = longrope or rope.get("rope_type") in ("yarn", "dynamic")
    tokens = rng.integers(FIRST, vocabulary, (1, LENGTH)).astype(np.int32)
    kept = goldens.positions(LENGTH)
    expected = {"tokens": tokens, "logits": logits_of(model, tokens)[kept]}
    problems = []
    if expected["logits"].std() < 1:
        problems.append("flat logits")
    for change in kind.matters:
        other = changed(directory, change)
        off = max(
            np.abs(
                logits_of(other, tokens[:, :length]) - logits_of(model, tokens[:, :length])
            ).max()
            for length in (goldens.SHORT, LENGTH)
        )
        if off < 0.05:
            problems.append(f"{change} changes logits by {off:.1e}")
    if longrope:
        first = tokens[:, : goldens.SHORT]
        short = logits_of(model, first)
        expected["short_logits"] = short[goldens.positions(goldens.SHORT)]
    lengths = [120, 90] if window else [20, 120] if is_stretched else [40]
    for number, length in enumerate(lengths):
        prompt = rng.integers(FIRST, vocabulary, length).astype(np.int32)
        generated, lead = generate(model, prompt.tolist())
        if len(generated) != goldens.NEW_TOKENS or len(set(generated)) < 6:
            problems.append(f"a dull continuation: {generated}")
        if lead < 2e-3:
            problems.append(f"two tokens within {lead:.1e}")
        expected[f"prompt_{number}"] = prompt
        expected[f"generated_{number}"] = np.array(generated, np.int32)
    expected |= packed(rng, vocabulary, window is not None)
    expected |= step(model, expected, window)
    if min(leads, default=1) < 5e-5:
        problems.append(f"two experts within {min(leads):.1e}")
    return expected, problems


def make(folder: Path, names: list[str]) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    listed = kinds()
    for name in names or listed:
        kind = listed.get(name) or Kind(AutoConfig.for_model(name, **SHAPE, head_dim=8))
        for seed in range(20):
            expected, problems = write(folder / name, kind, seed)
            if not problems:
                break
            print(f"{name}: seed {seed} will not do: {'; '.join(problems)}")
        else:
            raise SystemExit(f"{name}: no seed will do")
        np.savez_compressed(folder / name / "expected.npz", **expected)
        size = sum(path.stat().st_size for path in (folder / name).iterdir())
        print(
            f"{name}: seed {seed}, {size / 1000:.0f} KB, loss {expected['loss']:.3f}, gradient norm"
            f" {expected['grad_norm']:.3f}, logits' spread {expected['logits'].std():.2f}"
        )


def decode(path: Path, names: list[str]) -> None:
    """Each prompt separately: in a batch, transformers lets the longest row choose the RoPE of
    every row. Without names, all models; other entries are kept."""
    made = json.loads(path.read_text()) if names else {}
    for name in names or goldens.BEYOND:
        model = load(goldens.FOLDER / name)
        rng, rows = np.random.default_rng(0), []
        for length in (31, 90, 117):
            lead = 0.0
            while lead < 2e-3:  # smallest margin over the next token
                prompt = rng.integers(FIRST, model.config.vocab_size, length).tolist()
                ids, lead = generate(model, prompt, goldens.MANY_TOKENS)
            assert len(ids) == goldens.MANY_TOKENS
            rows.append([prompt, ids])
        made[name] = rows
    lines = (f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in made.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def keys(path: Path) -> None:
    """The keys that each class adds to those of every config."""
    declared = {
        config.model_type: sorted(key for key in config.__annotations__ if key[0] != "_")
        for config in (type(kind.config) for kind in kinds().values())
    }
    path.write_text(json.dumps(declared, indent=1, sort_keys=True) + "\n")


def difference(
    model: transformers.PreTrainedModel, saved: dict[str, np.ndarray], ours: np.ndarray
) -> float:
    """Largest difference of logits over the kept positions of the golden tokens."""
    theirs = logits_of(model, saved["tokens"])[goldens.positions(LENGTH)]
    return float(np.abs(theirs - ours).max())


def check(export: Path, logits: Path) -> None:
    model = load(export)
    largest = difference(model, goldens.expected(export.name), np.load(logits))
    print(
        f"transformers {transformers.__version__}: {type(model).__name__} loads with no missing or"
        f" unexpected keys, logits within {largest:.1e}"
    )
    assert largest < goldens.TOLERANCE


def table(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| model | class | largest logit difference | equal greedy tokens |")
    print("| --- | --- | --- | --- |")
    for export in sorted(path for path in folder.iterdir() if path.is_dir()):
        model, saved = load(export), goldens.expected(export.name)
        largest = difference(model, saved, np.load(export / "logits.npy"))
        equal = []
        for (prompt, _), ours in zip(
            goldens.prompts(saved), np.load(export / "generated.npy"), strict=True
        ):
            theirs, _ = generate(model, prompt)
            same = sum(x == y for x, y in zip(theirs, ours.tolist(), strict=True))
            equal.append(f"{same}/{goldens.NEW_TOKENS}")
        print(f"| {export.name} | {type(model).__name__} | {largest:.1e} | {' and '.join(equal)} |")


def mixtures(folder: Path) -> None:
    """Four equal experts must equal their dense model within its context; other mixtures must give
    our logits."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kept = goldens.positions(LENGTH)
    kinds = {
        "equal": "four equal experts against ours",
        "different": "three different experts against ours",
        "shared": "with a shared expert, as Qwen2-MoE, against ours",
    }
    print(f"| model | class | equal experts against dense | {' | '.join(kinds.values())} |")
    print("| --- | --- | --- | --- | --- | --- |")
    too_large = []
    for home in sorted(path for path in folder.iterdir() if (path / "different").is_dir()):
        tokens = goldens.expected(home.name)["tokens"]
        there = [kind for kind in kinds if (home / kind).is_dir()]
        models = {kind: load(home / kind) for kind in ("dense", *there)}
        theirs = {kind: logits_of(model, tokens)[kept] for kind, model in models.items()}
        within = kept < models["equal"].config.max_position_embeddings
        off = {"dense": float(np.abs(theirs["equal"] - theirs["dense"])[within].max())}
        for kind in there:
            ours = np.load(home / kind / "logits.npy")
            off[kind] = float(np.abs(theirs[kind] - ours).max())
        told = [f"{off[kind]:.1e}" if kind in off else "-" for kind in ("dense", *kinds)]
        print(f"| {home.name} | {type(models['equal']).__name__} | {' | '.join(told)} |")
        if max(off.values()) >= goldens.TOLERANCE:
            too_large.append(home.name)
    assert not too_large, f"logits differ: {', '.join(too_large)}"


if __name__ == "__main__":
    {
        "make": lambda: make(Path(sys.argv[2]), sys.argv[3:]),
        "check": lambda: check(Path(sys.argv[2]), Path(sys.argv[3])),
        "decode": lambda: decode(Path(sys.argv[2]), sys.argv[3:]),
        "keys": lambda: keys(Path(sys.argv[2])),
        "table": lambda: table(Path(sys.argv[2])),
        "mixtures": lambda: mixtures(Path(sys.argv[2])),
    }[sys.argv[1]]()
