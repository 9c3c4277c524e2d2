"""Prepare: build demo corpora and tokenizer if configured, tokenise and pack all text of the
config, and log the counts."""

import logging
import time
from pathlib import Path
from typing import Any

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config import Config
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.prepare import DEMO, check_text, prepare_by_all, resolve_tokenizer
from btx_jax.data.prepared import none_heldout
from btx_jax.errors import Mistakes
from btx_jax.parallel.hosts import first_then_others
from btx_jax.rundir import claim, finish, look_up
from btx_jax.stages import Coming, require_right
from btx_jax.terminal import counted

log = logging.getLogger(__name__)


def run(config: Config, workdir: Path) -> None:
    assert config.data
    start = time.monotonic()
    if look_up(workdir, config) is not None:
        log.info("%s: already finished", workdir)
        return
    require_right(config)
    init = find_checkpoint(config.init, "config.init") if config.init else None
    tokenizer = first_then_others(resolve_tokenizer, config.data, init.tokenizer if init else None)
    manifests, files = {}, dict[str, tuple[Any, ...]]()
    for domain in prepare_by_all(config.data.train, config.data, tokenizer, "config.data.train"):
        manifests[domain.name] = [source.manifest for source in domain.sources]
        for source in domain.sources:
            files |= source.files
            train, heldout = (source.manifest["splits"][split] for split in ("train", "heldout"))
            log.info(
                "%s: %s: %s, %d tokens to train on; %s, %d tokens held out",
                domain.name,
                source.manifest["source"],
                counted(train["documents"], "document"),
                train["tokens"],
                counted(heldout["documents"], "document"),
                heldout["tokens"],
            )
        held_out = sum(source.rows("heldout") for source in domain.sources)
        if config.data.heldout_fraction and not held_out:
            log.warning("%s", none_heldout(domain))
    claim(workdir, config)
    finish(workdir, seconds=time.monotonic() - start, domains=manifests, files=files)


def check(config: Config, coming: Coming, mistakes: Mistakes) -> ModelConfig | None:
    assert config.data
    with mistakes.gather():
        check_text(config.data, [("config.data.train", config.data.train)])
    with mistakes.gather():
        is_here = config.init and config.init not in coming
        init = find_checkpoint(config.init, "config.init") if is_here else None
        if config.data.tokenizer != DEMO and (init or config.data.tokenizer or not config.init):
            resolve_tokenizer(config.data, init.tokenizer if init else None)
    return None
