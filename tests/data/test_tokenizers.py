import json
import lzma
import tarfile
from pathlib import Path

import pytest

from btx_jax.data.chat_template import chat_template
from btx_jax.data.instructions import Piece, encode_pieces
from btx_jax.data.tokenizers import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
PEER = json.loads(lzma.decompress((GOLDEN / "tokenizers.json.xz").read_bytes()))


@pytest.fixture(params=sorted(PEER))
def shape(request, tmp_path):
    """(a tokenizer of a published shape, transformers 5.23's results for it)."""
    with tarfile.open(GOLDEN / "tokenizers" / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return load_tokenizer(tmp_path / request.param), PEER[request.param]


def unequal(tokenizer, told):
    """Yield all differences between the tokenizer and transformers' results."""
    for text, ids, prompt in zip(told["texts"], told["ids"], told["prompts"], strict=True):
        if tokenizer.encode(text) != ids:
            yield f"ids of {text!r}: {tokenizer.encode(text)}, not {ids}"
        if tokenizer.encode_prompt(text) + tokenizer.suffix != prompt:
            yield f"prompt {text!r}: {tokenizer.encode_prompt(text)}, not {prompt}"
    for chat in told["chats"]:
        template = chat_template(tokenizer, "cure", chat["name"])
        for prompted in (False, True):
            text = template.render(chat["chat"], add_generation_prompt=prompted).text
            if text != chat[f"text_{prompted}"]:
                yield f"chat {text!r}, not {chat[f'text_{prompted}']!r}"
        text, spans = template.render(chat["chat"])
        if tokenizer.encode(text) != chat["ids"]:
            yield f"ids of chat {text!r}: {tokenizer.encode(text)}, not {chat['ids']}"
        if chat["mask"] is not None:
            pieces, done = [], 0
            for start, stop in spans:
                pieces += [Piece(text[done:start], False), Piece(text[start:stop], True)]
                done = stop
            learnt = encode_pieces([*pieces, Piece(text[done:], False)], tokenizer)[1]
            if learnt != [bool(i) for i in chat["mask"]]:
                yield f"mask of chat {text!r}: {learnt}, not {chat['mask']}"
    for prompt, new, before, steps in told["continuations"]:
        for count, whole in enumerate(steps):
            text = tokenizer.decode(new[:count], prompt)
            if whole.startswith(before) and text != whole[len(before) :]:
                yield f"text of {new[:count]} behind {before!r}: {text!r}, not that of {whole!r}"


def test_ids_chats_masks_and_continuations_are_those_of_transformers(shape):
    tokenizer, told = shape
    assert list(unequal(tokenizer, told)) == []
    assert told["bos"] is None or tokenizer.bos == told["bos"]
    assert told["eos"] is None or tokenizer.eos == told["eos"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_saved_tokenizer_means_the_same_beside_any_model(shape, family, tmp_path):
    tokenizer, told = shape
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text(json.dumps({"model_type": family}))
    saved = load_tokenizer(tmp_path / "saved")
    assert list(unequal(saved, told)) == []
    assert (saved.bos, saved.eos) == (tokenizer.bos, tokenizer.eos)
    assert saved.sha256 == tokenizer.sha256
