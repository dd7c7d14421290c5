"""What benches on real text share: the pretrained SmolLM2, one row of a repository's tokens a step, the command's options."""

import argparse
from dataclasses import replace
from pathlib import Path

from elite import geometry, pretrained
from elite.compose import from_overrides
from elite.config import CONF_DIR, RunConfig
from elite.data.harvest import harvest
from elite.data.tokens import TokenStore, tokenise
from elite.errors import ModelError
from elite.plan.batch import with_context

PRETRAINED = ("model=smollm2_135m", "tier=tier1", "adapter.rank=8", "logger=none", "data.order=shuffled")
TARGET_SHARE = 8
"""Of the context, one part in so many would be scored by validation; a plan wants it to be less than the context."""


def options(description: str) -> argparse.ArgumentParser:
    """What every such bench can be asked."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("file", type=Path, help="JSON file for the result")
    parser.add_argument("--context", type=int, default=16384, help="tokens of a row")
    parser.add_argument("--model-path", help="folder with the model's GGUF or safetensors; else its package or the hub")
    parser.add_argument("--repo", default=str(CONF_DIR.parent), help="git repository whose text is read")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    return parser


def request(arguments: argparse.Namespace, *overrides: str) -> RunConfig:
    """The configuration of what was asked for. Paths are set directly: as overrides they would need quotes."""
    config = from_overrides(*PRETRAINED, *overrides).config
    config = replace(config, model=replace(config.model, path=arguments.model_path), data=replace(config.data, repo=arguments.repo))
    return at_context(config, arguments.context)


def at_context(config: RunConfig, context: int) -> RunConfig:
    """The same run with rows of so many tokens, one a step."""
    longer = with_context(config, context)
    return replace(longer, tier=replace(longer.tier, target_length=context // TARGET_SHARE))


def tokens(config: RunConfig) -> TokenStore:
    """The tokens of the configured repository.

    Raises:
        DataError: there is no text.
        ModelError: there is no tokenizer for it.
    """
    cache = Path(config.output.cache).expanduser()
    tokenizer = pretrained.tokenizer(config.model, cache, download=True)
    if tokenizer is None or len(tokenizer) > geometry.shape(config.model).vocab_size:
        raise ModelError(f"model={config.model.name} has no tokenizer that fits it", "model.path=FOLDER")
    return tokenise(harvest(config.data, config.seed), tokenizer, cache)
