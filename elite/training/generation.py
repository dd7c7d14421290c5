"""Continuations of a prompt, with ordinary keys and values or with pages that several continuations share.

How: transformers' own generation, and its continuous batching.
Both ways take the same tokens greedily; sampled ones are drawn from the same distributions, but by other numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import is_flash_attn_2_available

from elite.attention import generating
from elite.model import LoadedModel, apply_stage
from elite.optimizations.contract import Applied, Decision, Stage
from elite.optimizations.targets import GenerationBuild

KNOWN = frozenset(field.name for field in fields(ContinuousBatchingConfig))
"""Options of this transformers' continuous batching."""


@dataclass(frozen=True)
class Pages:
    """Pages of keys and values, counted by the request."""

    page: int
    """Tokens of one."""
    shared: int
    """Full pages of the prompt, to which every continuation refers."""
    own: int
    """All others: the unfinished page of the prompt and what follows it, for each continuation."""

    @property
    def total(self) -> int:
        """What the cache is made of."""
        return self.shared + self.own


def pages_for(prompt: int, new: int, count: int, page: int) -> Pages:
    """Pages of `count` continuations of `new` tokens after `prompt` tokens.

    The prompt's last token is read by each continuation for itself, so its page is full only without it.
    """
    shared = (prompt - 1) // page if count > 1 else 0
    return Pages(page, shared, count * (-(-(prompt + new) // page) - shared))


@dataclass(frozen=True)
class Generator:
    """Continues prompts.

    Args:
        compute_dtype: of matrix products; float32 runs without autocast.
        end_token: ends a continuation before its time.
    """

    loaded: LoadedModel
    compute_dtype: torch.dtype
    device: torch.device
    build: GenerationBuild
    end_token: int

    @torch.no_grad()
    def __call__(self, prompt: list[int], new: int, count: int = 1, temperature: float = 0.0, seed: int = 0) -> list[list[int]]:
        """`count` continuations of at most `new` tokens, without the prompt.

        Args:
            prompt: at least two tokens.
            temperature: of the samples; 0 takes the likeliest token each time, which only one continuation can.
            seed: of the draw.
        """
        assert temperature > 0 or count == 1
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "num_return_sequences": count}
        config = GenerationConfig(
            max_new_tokens=new,
            eos_token_id=self.end_token,
            pad_token_id=self.end_token,
            use_cache=True,
            **(sampled if temperature else {"do_sample": False}),
        )
        core: Any = self.loaded.core
        own, core.generation_config = core.generation_config, config
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            # Both ways seed torch's own generator; the run's dropout must not notice.
            with generating(core), torch.random.fork_rng(devices):
                if self.build.page is None:
                    return self._dense(prompt, config, seed)
                return self._paged(prompt, config, seed, pages_for(len(prompt), new, count, self.build.page))
        finally:
            core.generation_config = own

    def _dense(self, prompt: list[int], config: GenerationConfig, seed: int) -> list[list[int]]:
        core: Any = self.loaded.core
        ids = torch.tensor([prompt], device=self.device)
        with self._autocast():
            torch.manual_seed(seed)
            out = core.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return [_ended(row[len(prompt) :], self.end_token) for row in out.tolist()]

    def _paged(self, prompt: list[int], config: GenerationConfig, seed: int, pages: Pages) -> list[list[int]]:
        core: Any = self.loaded.core
        kind, count = _attention(core, self.device), config.num_return_sequences or 1
        options: dict[str, Any] = {
            "page_size" if "page_size" in KNOWN else "block_size": pages.page,
            "num_blocks": pages.total,
            "max_requests_per_batch": count,
            "max_batch_tokens": self.build.piece,
            "safety_margin": 0.0,  # the cache is exactly as large as the one request
            "max_memory_percent": 1.0,  # the plan has left headroom
            "seed": seed,
            "use_cuda_graph": False,
            "use_async_batching": False,
            "disable_nccl_graph_mixing": False,  # it would set an environment variable
        }
        if kind != "sdpa":
            # Pages of one continuation: with so many the kernel reads them where they lie.
            options["max_blocks_per_request"] = pages.shared + pages.own // count
        if "auto_switch_to_flash" in KNOWN:
            options["auto_switch_to_flash"] = False
        else:
            kind = f"paged|{kind}"
        core.set_attn_implementation(kind)
        results: dict[str, Any] = {}
        pool = ContinuousBatchingConfig(**options)
        session = core.continuous_batching_context_manager(config, continuous_batching_config=pool, warmup=False)
        with self._forward_in_autocast(), session as manager:
            manager.add_request(prompt, max_new_tokens=config.max_new_tokens, eos_token_id=self.end_token)
            while len(results) < count:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    results[result.request_id] = result
                elif result is None and not manager.is_running():
                    break
        failed = next((result.error for result in results.values() if result.error), None)
        if failed or len(results) < count:
            # The library keeps the error's text alone; what ran out of memory is known by it.
            raise RuntimeError(f"generation with paged keys and values ended early: {failed or 'no reason given'}")
        return [_ended(results[name].generated_tokens, self.end_token) for name in sorted(results)]

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    @contextmanager
    def _forward_in_autocast(self) -> Iterator[None]:
        """Continuous batching calls the model from a thread of its own, where this one's autocast does not reach.

        Pages have the dtype of the weights, so fp32 weights are used as they are.
        """
        core: Any = self.loaded.core
        if core.dtype != self.compute_dtype:
            yield
            return
        plain, instance = core.forward, vars(core).get("forward")

        @wraps(plain)  # the library reads the signature
        def forward(*args: Any, **arguments: Any) -> Any:
            with self._autocast():
                return plain(*args, **arguments)

        core.forward = forward
        try:
            yield
        finally:
            if instance is None:
                del core.forward
            else:
                core.forward = instance


def generator(
    loaded: LoadedModel, decisions: tuple[Decision, ...], compute_dtype: torch.dtype, device: torch.device, end_token: int
) -> tuple[Generator, dict[str, Applied]]:
    """A generator as the active optimizations would have it, and what they touched."""
    build = GenerationBuild()
    applied = apply_stage(Stage.generation, decisions, build)
    return Generator(loaded, compute_dtype, device, build, end_token), applied


def _attention(core: Any, device: torch.device) -> str:
    """The library's own attention that reads pages: a flash kernel where one is installed and can."""
    half = core.dtype in (torch.float16, torch.bfloat16)
    return "flash_attention_2" if device.type == "cuda" and half and is_flash_attn_2_available() else "sdpa"


def _ended(tokens: list[int], end: int) -> list[int]:
    """Up to the end token, without it and the padding behind it."""
    return tokens[: tokens.index(end)] if end in tokens else tokens
