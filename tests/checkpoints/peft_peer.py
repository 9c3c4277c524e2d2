"""peft's own results: a LoRA trained by peft gives the same logits here, ours do in peft, and both
when merged.

    python -m tests.checkpoints.peft_peer [HF_DIRECTORY]  # default: golden models of all families
    python -m tests.checkpoints.peft_peer make            # the golden LoRAs of the tests

Needs torch, transformers and peft (`pip install -e '.[bench]' peft`). Fails when logits differ by
more than 1e-4; also prints the distance of both from float64, since float32 itself may be further
off than that for a large model.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from btx_jax.architectures.registry import known_families
from btx_jax.checkpoints.checkpoint import adapter_tensors, find_checkpoint
from btx_jax.commands import adapter
from tests.architectures import goldens
from tests.checkpoints.adapters import logits_of, mola_directory

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def theirs(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def same(name: str, a: np.ndarray, b: np.ndarray, exact: np.ndarray) -> None:
    """Compare logits. b: peft's own; exact: the same in float64."""
    distance = lambda x, y: float(np.abs(x - y).max())  # noqa: E731
    apart, ours, theirs = distance(a, b), distance(a, exact), distance(b, exact)
    print(
        f"{name}: at most {apart:.1e} apart (logits up to {np.abs(b).max():.1f}); from float64"
        f" {ours:.1e}, peft itself {theirs:.1e}"
    )
    assert apart <= 1e-4, name


def load(path):
    """Load with separate experts, as torch's grouped matmul does not support float64."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, experts_implementation="eager"
    )


def trained_lora(base: Path, modules: str | list[str], **options):
    """(a LoRA trained by peft for a few steps, tokens, its logits on them)."""
    torch.manual_seed(0)
    vocabulary = load(base).config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 48)).astype(np.int32)
    trained = get_peft_model(
        load(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **options),
    )
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        trained(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
        optimizer.step()
    expected = theirs(trained, tokens)
    assert np.abs(expected - theirs(load(base), tokens)).max() > 1e-2, "the training did nothing"
    return trained, tokens, expected


# Golden LoRAs that differ between layers and maps: options of LoraConfig.
VARIANTS = {
    "uneven": {"target_modules": r".*(layers\.0\.self_attn\.[qv]_proj|layers\.2\.mlp\.up_proj)"},
    "exclude": {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\.(mlp|\w+\.q).*"},
    "patterns": {
        "target_modules": MODULES,
        "rank_pattern": {"v_proj": 8, r"layers\.1\.mlp\.down_proj": 2},
        "alpha_pattern": {"q_proj": 32, "^model.layers.0.self_attn.k_proj": -8},
    },
    "rslora_patterns": {
        "target_modules": MODULES,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 6},
        "alpha_pattern": {"gate_proj": 3},
    },
    "some_layers": {
        "target_modules": ["q_proj", "mlp.up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": ["h", "layers"],
    },
    "carried": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "norm"]},
}
# The same for golden models of other families: base's name -> options.
FAMILIES = {
    "llama_bias": {"target_modules": MODULES, "bias": "all"},
    "qwen2": {"target_modules": None, "bias": "lora_only"},
    "qwen3": {"target_modules": "all-linear", "rank_pattern": {"k_proj": 6}},
    "phi3": {
        "target_modules": "all-linear",
        "rank_pattern": {r"layers\.1\.self_attn\.qkv_proj": 2},
        "alpha_pattern": {"gate_up_proj": 16},
    },
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Golden model -> the maps that our own LoRAs adapt.
OURS = {
    "qwen3": ("q", "k", "v", "o", "gate", "up", "down"),
    "phi3": ("q", "k", "v", "o", "gate", "up", "down"),
    "phi35": ("q", "v", "up"),
    "qwen2_moe": ("q", "k", "v", "o"),
    "qwen3_moe": ("q", "v"),
    "mixtral_plain": ("k", "o"),
}


def make(folder: Path) -> None:
    trained, tokens, expected = trained_lora(folder / "llama", ["q_proj", "o_proj", "down_proj"])
    save(trained, folder / "peft", "llama", tokens, expected)
    for name, options in VARIANTS.items():
        make_random(folder / "llama", folder / f"peft_{name}", tokens, options)
    for name, options in FAMILIES.items():
        tokens = np.random.default_rng(0).integers(0, 80, (2, 24)).astype(np.int32)
        make_random(goldens.FOLDER / name, folder / f"peft_{name}", tokens, options)


def make_random(base: Path, target: Path, tokens: np.ndarray, options: dict) -> None:
    torch.manual_seed(0)
    lora = get_peft_model(
        load(base), LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options))
    )
    for key, weight in lora.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(weight, std=0.1)
    save(lora, target, base.name, tokens, theirs(lora, tokens))


def save(lora, folder: Path, base: str, tokens: np.ndarray, expected: np.ndarray) -> None:
    lora.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = folder / "adapter_config.json"
    told = json.loads(config.read_text()) | {"base_model_name_or_path": base}
    for key, value in told.items():  # sets have no order
        if key in ("target_modules", "exclude_modules") and isinstance(value, list):
            told[key] = sorted(value)
    config.write_text(json.dumps(told, indent=2) + "\n")
    np.savez(folder / "expected.npz", tokens=tokens, logits=expected)


def check(base: Path, modules: str | list[str], **options) -> None:
    trained, tokens, expected = trained_lora(base, modules, **options)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        trained.save_pretrained(home / "peft")
        print(adapter.import_peft(str(home / "peft"), str(base), str(home / "imported")))
        exact = theirs(trained.double(), tokens)
        same("peft's LoRA here", logits_of(home / "imported", tokens), expected, exact)
        adapter.export(str(home / "imported"), str(home / "back"), "peft")
        same(
            "ours in peft",
            theirs(PeftModel.from_pretrained(load(base), home / "back"), tokens),
            expected,
            exact,
        )
        adapter.import_peft(str(home / "back"), str(base), str(home / "again"))
        a = adapter_tensors(find_checkpoint(home / "imported"))
        b = adapter_tensors(find_checkpoint(home / "again"))
        assert all(np.array_equal(a[name], b[name]) for name in a | b), "a round trip changed bits"
        adapter.merge(str(home / "imported"), str(home / "merged"))
        same("merged, in transformers", theirs(load(home / "merged"), tokens), expected, exact)
        same("merged, here", logits_of(home / "merged", tokens), expected, exact)


def check_ours(base: Path, targets: tuple[str, ...]) -> None:
    """A LoRA of ours, with a different rank in every layer, computes the same in peft as here."""
    vocabulary = load(base).config.vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 48)).astype(np.int32)
    layers = find_checkpoint(base).metadata.model.layers
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        lora = mola_directory(
            home / "ours",
            base=base,
            allocation=",".join("1" * layers),
            k=(1,),
            rank=tuple(range(2, 2 + layers)),
            targets=targets,
        )
        print(adapter.export(str(lora), str(home / "peft"), "peft"))
        loaded = PeftModel.from_pretrained(load(base), home / "peft")
        expected = theirs(loaded, tokens)
        assert np.abs(expected - theirs(load(base), tokens)).max() > 1e-2, "it does nothing"
        exact = theirs(loaded.double(), tokens)
        same("ours in peft", logits_of(lora, tokens), expected, exact)
        adapter.import_peft(str(home / "peft"), str(base), str(home / "again"))
        a, b = (adapter_tensors(find_checkpoint(path)) for path in (lora, home / "again"))
        assert all(np.array_equal(a[name], b[name]) for name in a | b), "a round trip changed bits"


def check_families() -> None:
    """Check golden models in float32, so that merging does not round."""
    defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for model_type, family in known_families().items():
        assert list(family.peft_default) == defaults.get(model_type, []), model_type
    with tempfile.TemporaryDirectory() as folder:
        bases = {}
        for name in goldens.names():
            bases[name] = Path(folder) / name
            load(goldens.FOLDER / name).save_pretrained(bases[name])
        for name, base in bases.items():
            print(f"-- {name}")
            if find_checkpoint(base).metadata.model.moe:
                check(base, ATTENTION, rank_pattern={"v_proj": 6}, alpha_pattern={"q_proj": 3})
            else:
                check(
                    base, "all-linear", rank_pattern={"o_proj": 6}, alpha_pattern={"down_proj": 3}
                )
        for name, targets in OURS.items():
            print(f"-- ours on {name}")
            check_ours(bases[name], targets)


def main() -> None:
    golden = Path(__file__).parent / "golden"
    if sys.argv[1:] == ["make"]:
        make(golden)
        return
    bases = [Path(path) for path in sys.argv[1:]] or [golden / "llama", golden / "llama_gqa_llama3"]
    for base in bases:
        check(base, MODULES)
        check(base, ["q_proj", "v_proj"], use_rslora=True)
        check(base, ["o_proj", "down_proj"], layers_to_transform=[1])
        check(base, MODULES, exclude_modules=r".*layers\.1\.mlp.*", rank_pattern={"v_proj": 8})
        check(base, MODULES, rank_pattern={"v_proj": 6}, alpha_pattern={"q_proj": 3})
    if not sys.argv[1:]:
        check_families()
    print("all equal")


if __name__ == "__main__":
    main()
