"""Pages on a real GPU: the same text as without, in the memory that the plan says."""

import gc

import pytest
import torch

from elite import compose, geometry, hardware
from elite.model import LoadedModel, load
from elite.optimizations import decide
from elite.optimizations.targets import GenerationBuild
from elite.plan import facts_of
from elite.plan.generation import fixed_bytes, token_bytes
from elite.prepared import compute_dtype
from elite.training.generation import Generator

pytestmark = pytest.mark.gpu
TOKENS, NEW, COUNT, PAGE, PIECE = 16384, 32, 8, 256, 1024


@pytest.fixture(scope="module")
def random_model() -> LoadedModel:
    """SmolLM2's geometry with adapters, in bf16."""
    request = ("model=smollm2_135m", "model.weights=random", "tier=tier3", f"tier.context={TOKENS}", "executor=whole")
    config = compose.from_overrides(*request).config
    machine = hardware.device(config.hardware)
    decisions = decide(config.optimizations, facts_of(config, machine, geometry.shape(config.model)))
    torch.manual_seed(0)
    return load(config, decisions, compute_dtype(decisions, machine)[0], torch.device("cuda", 0))


def peak_of(loaded: LoadedModel, build: GenerationBuild, prompt: list[int], count: int) -> tuple[list[list[int]], float]:
    """What was generated, and the bytes it took beside the model."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # No token ends a text of random weights.
    found = Generator(loaded, torch.bfloat16, torch.device("cuda", 0), build, 49151)(prompt, NEW, count, 1.0 if count > 1 else 0.0)
    return found, torch.cuda.max_memory_allocated() - before


def test_pages_hold_what_the_plan_says(random_model: LoadedModel) -> None:
    config = compose.from_overrides("model=smollm2_135m", "model.weights=random", "tier=tier3", f"tier.context={TOKENS}").config
    facts = facts_of(config, hardware.device(config.hardware), geometry.shape(config.model))
    prompt = torch.randint(0, 49000, (TOKENS - NEW,), generator=torch.Generator().manual_seed(1)).tolist()
    for build, active in ((GenerationBuild(PAGE, PIECE), True), (GenerationBuild(), False)):
        kinds = config.optimizations
        decisions = tuple(d for d in decide(kinds, facts) if active or d.name != "paged_attention")
        found, peak = peak_of(random_model, build, prompt, COUNT)
        planned = len(prompt) * token_bytes(facts, decisions, COUNT) + fixed_bytes(facts, decisions, COUNT, NEW)
        print(f"pages {active}: {peak / 2**30:.3f} GiB, planned {planned / 2**30:.3f}")
        assert len(found) == COUNT and 0.4 * planned <= peak <= 1.05 * planned


def test_fp32_text_is_that_without_pages() -> None:
    request = ("model=smollm2_135m", "model.weights=random", "tier=tier1", "executor=whole", "optimizations=none")
    config = compose.from_overrides(*request).config
    torch.manual_seed(0)
    loaded = load(config, (), torch.float32, torch.device("cuda", 0))
    prompt = torch.randint(0, 49000, (1500,), generator=torch.Generator().manual_seed(3)).tolist()
    texts = [
        Generator(loaded, torch.float32, torch.device("cuda", 0), build, 49151)(prompt, NEW)
        for build in (GenerationBuild(PAGE, PIECE), GenerationBuild())
    ]
    assert texts[0] == texts[1]
