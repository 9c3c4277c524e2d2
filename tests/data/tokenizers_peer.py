"""Tokenizers of published shapes, and transformers' results for them.

    python tests/data/tokenizers_peer.py make     # needs transformers 5.23, sentencepiece, protobuf

writes golden/tokenizers/NAME.tar.xz (a directory's files) and golden/tokenizers.json.xz: for every
directory the ids of some 200 strings, alone and as prompts, rendered chats with their ids and
assistant masks, and the texts of continuations, token by token. The tests compare with that file
and do not need transformers.

    python tests/data/tokenizers_peer.py check FOLDER   # any transformers

compares the results for FOLDER/NAME, tokenizers saved again by our code, with the same file.
"""

import json
import lzma
import random
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.data.tokenizer_shapes import Shapes

HERE = Path(__file__).parent / "golden"
CHATS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "four"}],
    [
        {"role": "system", "content": "You are 漢字."},
        {"role": "user", "content": " numbers 12 \n"},
        {"role": "assistant", "content": "def f():\n    return 'é'"},
        {"role": "user", "content": "and </s> <|im_end|>?"},
        {"role": "assistant", "content": "yes 😀"},
    ],
]


def strings(special: list[str]) -> list[str]:
    """200 strings: spaces, code, emoji, other scripts, and special tokens within text."""
    fixed = [
        "", " ", "  ", "\n", "\t", "a", " a", "a ", "hello world", " hello  world ", "Hello world",
        "a  b   c", "\n\n  x\r\n", "def add(a, b):\n    return a + b\n", "1 12 345 6789", "don't we'll",
        "漢字かな", "한국어", "👩‍👩‍👧 😀", "e\u0301 é", "ﬁ", "\u00a0x\u200b", "\x00\x07", "▁a▁ b", "<0x0A>",
        "INST", "[INST] x [/INST]", "Ġhello", "##ing", "http://a.b/c?d=e", "x" * 50, "The quick brown fox",
    ]  # fmt: skip
    around = [
        f"{a}{t}{b}"
        for t in special
        for a in ("", "x", "x ", " ", "\n")
        for b in ("", "y", " y", " ", "\n")
    ]
    draw = random.Random(0)
    draw.shuffle(around)
    pool = [*"abc  \n\t.,'12é漢😀_(){}", *special, "hello", " world", "return", "    "]
    made = ["".join(draw.choices(pool, k=draw.randrange(1, 14))) for _ in range(200)]
    return (fixed + around[:80] + made)[:200]


def write(files: dict, directory: Path) -> Path:
    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
    return directory


def answers(directory: Path, expected: dict | None = None) -> dict:
    """transformers' results, for the same texts and ids as in `expected` if given."""
    from transformers import AutoTokenizer, __version__

    peer = AutoTokenizer.from_pretrained(directory)
    texts = (
        expected["texts"] if expected else strings([t for t in peer.all_special_tokens if t][:6])
    )
    ids = [peer(t, add_special_tokens=False).input_ids for t in texts]
    prompts = [peer(t).input_ids for t in texts]
    found = {
        "class": type(peer).__name__,
        "texts": texts,
        "ids": ids,
        "prompts": prompts,
        "chats": [],
    }
    found |= {"bos": peer.bos_token_id, "eos": peer.eos_token_id}
    names = (
        peer.chat_template
        if isinstance(peer.chat_template, dict)
        else {"default": peer.chat_template}
    )
    renders = peer.chat_template and int(__version__.split(".")[0]) >= 5
    for name in sorted(names) if renders else ():
        for chat in CHATS:
            shown = {"chat": chat, "name": name}
            for prompted in (False, True):
                shown[f"text_{prompted}"] = peer.apply_chat_template(
                    chat, chat_template=names[name], tokenize=False, add_generation_prompt=prompted
                )
            told = peer.apply_chat_template(
                chat, chat_template=names[name], tokenize=True, return_dict=True,
                return_assistant_tokens_mask="{% generation %}" in names[name],
            )  # fmt: skip
            shown |= {"ids": told["input_ids"], "mask": told.get("assistant_masks")}
            found["chats"].append(shown)
    draw = random.Random(1)
    usable = [i for i in range(len(peer)) if peer.convert_ids_to_tokens(i) is not None]
    found["continuations"] = []
    for text in ("hello", "def add(a, b):\n", "漢"):
        prompt = peer(text).input_ids
        whole = prompt + peer(" world\n    return é漢😀 now", add_special_tokens=False).input_ids
        whole += draw.choices(usable, k=24)
        if expected:
            before, new, *_ = expected["continuations"][len(found["continuations"])]
            whole = before + new
        before = peer.decode(prompt, skip_special_tokens=True)
        steps = [
            peer.decode(whole[:end], skip_special_tokens=True)
            for end in range(len(prompt), len(whole) + 1)
        ]
        found["continuations"].append([prompt, whole[len(prompt) :], before, steps])
    return found


def make() -> None:
    shutil.rmtree(HERE / "tokenizers", ignore_errors=True)
    (HERE / "tokenizers").mkdir(parents=True)
    found = {}
    for name, files in Shapes().all.items():
        with tempfile.TemporaryDirectory() as folder:
            directory = write(files, Path(folder) / name)
            found[name] = answers(directory)
            with tarfile.open(HERE / "tokenizers" / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(directory, name)
        print(name, found[name]["class"])
    text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    (HERE / "tokenizers.json.xz").write_bytes(
        lzma.compress(text.encode("utf-8", "surrogatepass"), preset=9)
    )


def check(folder: Path) -> None:
    told = json.loads(lzma.decompress((HERE / "tokenizers.json.xz").read_bytes()))
    for directory in sorted(folder.iterdir()):
        expected = told[directory.name]
        try:
            found = answers(directory, expected)
        except Exception as error:  # old versions do not support every format
            print(f"{directory.name}: not read: {str(error).splitlines()[0]}")
            continue
        parts = ("ids", "prompts", "chats", "continuations")
        wrong = [
            f"{part} {i}"
            for part in parts
            for i, (a, b) in enumerate(zip(found[part], expected[part], strict=False))
            if a != b and not (part == "chats" and {**a, "mask": b["mask"]} == b)
        ]
        print(f"{directory.name}: {'equal' if not wrong else wrong[:8]}")


if __name__ == "__main__":
    if sys.argv[1:] == ["make"]:
        make()
    elif sys.argv[1:2] == ["check"] and sys.argv[2:]:
        check(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
