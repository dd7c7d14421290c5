"""ZeRO-3 under the streamed executor, and with ranks that share each sequence: loss, gradients and gathered bytes against one rank."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from elite.attention import DOCUMENT_SDPA
from elite.config import Executor, ExecutorConfig
from elite.data.batches import IGNORE, Batch, random_batch
from elite.distributed.exchange import Exchange
from elite.distributed.gradients import gradient_exchange
from elite.distributed.ranks import Ranks
from elite.distributed.ring import Ring
from elite.distributed.zero import Sharded, divide
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.kernels import KERNELS
from elite.executor.whole import WholeExecutor
from elite.facts import GIB
from elite.model import LoadedModel, apply_stage
from elite.optimizations import decide
from elite.optimizations.contract import Estimate, Stage
from elite.optimizations.zero_2 import active_zero
from elite.optimizations.zero_3 import divides_weights
from elite.plan.exchange import exchanges
from elite.plan.executors import choose_executor
from elite.plan.streamed import StreamedMemory, recomputed
from elite.streaming import Keep, Place, Streaming, WeightPlace
from elite.training.live_bytes import LiveBytes
from elite.training.step import accumulate, make_scaler
from tests.distributed.forked import assert_one_ranks, together
from tests.distributed.test_ddp import window
from tests.distributed.test_sharing import WINDOWS
from tests.distributed.test_streamed_sharing import Hollow
from tests.distributed.test_tensor_parallel import shape_of
from tests.distributed.test_zero import THREE, THREE_OFFLOADED, settings, switched, whole_gradient
from tests.models import tiny
from tests.optimizations.test_all import FACTS, only
from tests.plan.helpers import device, phi2, run_config
from tests.plan.steps import Case as Run
from tests.plan.steps import built, facts_of, tensors
from tests.test_attention import row
from tests.training.rig import ALONE

pytestmark = pytest.mark.usefixtures("engine")
SEQUENCES = 4
"""Of a step that ranks do not share."""
SMALL = Streaming(chunk=8, block=16, keep=Keep.layers)


@dataclass(frozen=True)
class Case:
    """A step of a model, divided among ranks in a layout."""

    kind: str
    lora: bool = False
    layout: Streaming | None = SMALL
    """None: the whole executor."""
    shared: list[Batch] | None = None
    """Sequences that ranks share; unset: each has its own."""
    options: Any = THREE
    packed: bool = False
    """Frozen weights are four-bit ones."""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Any]:
        return {"num_hidden_layers": 3, **self.changes}

    def loaded(self) -> LoadedModel:
        core: Any = tiny(self.kind, DOCUMENT_SDPA, **self.sizes)
        if not self.lora:
            return LoadedModel(core, core, {})
        if self.packed:
            apply_stage(Stage.model, only("qlora"), core)
            core.to("cpu")
        core.requires_grad_(False)
        torch.manual_seed(1)
        model: Any = get_peft_model(core, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
        return LoadedModel(model.train(), core, {})

    def window(self, ranks: Ranks) -> list[Batch]:
        if self.shared is None:
            return window(ranks.rank, ranks.world)[: SEQUENCES // ranks.world]
        return [batch.shared(ranks.rank, ranks.world) for batch in self.shared]


def scored_at_its_end(batch: Batch) -> Batch:
    """Of the last tokens alone, which one rank holds: others have no gradient of the head."""
    batch.labels[:, :-4] = IGNORE
    return batch


CASES = {
    "llama, tied": Case("llama", layout=replace(SMALL, keep=Keep.attention), changes={"tie_word_embeddings": True}),
    "phi, adapters": Case("phi", lora=True, layout=replace(SMALL, keys_values=Place.host), options=THREE_OFFLOADED),
    "llama, adapters on four bits": Case("llama", lora=True, packed=True, changes={"hidden_size": 64}),
    "llama, adapters shared": Case("llama", lora=True, layout=replace(SMALL, keep=Keep.attention), shared=WINDOWS["packed"]),
    "phi shared": Case("phi", layout=replace(SMALL, keep=Keep.multilevel, slots=1), shared=[scored_at_its_end(row(37))]),
    "llama shared, whole": Case("llama", layout=None, shared=WINDOWS["packed"]),
}
OF_FOUR = ("llama, adapters shared",)
OF_TWO = tuple(name for name in CASES if name not in OF_FOUR)


@dataclass
class Gathered:
    """What ranks have gathered."""

    bytes: int = 0


@contextmanager
def counted() -> Iterator[Gathered]:
    """What is gathered within, by DeepSpeed."""
    from deepspeed import comm

    found, plain = Gathered(), comm.all_gather_into_tensor

    def gathering(whole: Tensor, *others: Any, **more: Any) -> Any:
        found.bytes += whole.nbytes
        return plain(whole, *others, **more)

    comm.all_gather_into_tensor = gathering
    try:
        yield found
    finally:
        comm.all_gather_into_tensor = plain


def step(ranks: Ranks, case: Case) -> dict[str, Any]:
    """Loss and gradients: of one rank by an ordinary pass."""
    loaded = case.loaded()
    optimizer, scaler = torch.optim.AdamW(loaded.trainable, lr=1e-2), make_scaler(ranks.device, torch.float32)
    if ranks.world == 1:
        loss = accumulate(WholeExecutor(loaded.model, torch.float32), case.window(ranks), scaler, ranks)
        return {"loss": loss, "gradients": {name: p.grad for name, p in loaded.model.named_parameters() if p.grad is not None}}
    made = settings(case.options, ranks.world)
    divide(loaded, made, ranks)
    if case.layout is not None:
        attach(loaded.model, case.layout, choice=lambda shape: KERNELS["math"])
    model = Sharded(loaded, optimizer, made, ranks, gathers=case.layout is None)
    executor: Any
    if case.layout is None:
        executor = WholeExecutor(model, torch.float32, sharing=Ring(ranks, lambda shape: KERNELS["math"]))
    else:
        executor = StreamedExecutor(model, torch.float32, Exchange(ranks))
    with counted() as gathered:
        loss = accumulate(executor, case.window(ranks), scaler, ranks)
    found = {name: whole_gradient(p) for name, p in loaded.model.named_parameters() if p.requires_grad}
    norm = torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in found.values()])).item()
    assert model.clipped(loaded.trainable, 1e3) == pytest.approx(norm, rel=1e-5)
    assert all(p.numel() == 0 for p in loaded.model.parameters()), "all is let go"
    return {"loss": loss, "gradients": found, "gathered": gathered.bytes}


def steps(cases: Collection[str]) -> Callable[[Ranks, Path], dict[str, Any]]:
    def work(ranks: Ranks, folder: Path) -> dict[str, Any]:
        found = {name: step(ranks, CASES[name]) for name in cases}
        ranks.barrier()
        return found

    return work


def planned_bytes(case: Case, layout: Streaming, count: int) -> float:
    """Weights that ranks gather in a step, as a plan counts them."""
    passes, trained = len(case.window(replace(ALONE, world=count))), sum(p.numel() for p in case.loaded().trainable)
    facts = replace(FACTS, device=replace(FACTS.device, count=count), adapter="lora" if case.lora else "full", executor="streamed")
    facts = replace(facts, model=shape_of(tiny(case.kind, **case.sizes)), trainable_params=trained)
    decisions = decide(switched(THREE, *(["qlora"] if case.packed else [])), facts)
    again = recomputed(facts, layout)
    (found,) = exchanges(facts, decisions, 1 + again[1], passes, 1 + again[0])
    return found.handed_bytes - 4 * trained * passes


def tried_bytes(case: Case, layout: Streaming) -> int:
    """Once, what may be left out is tried: on embedded tokens, in the last layer, whose turn it is unless one before it is first."""
    core: Any = tiny(case.kind, **case.sizes)
    layer = list(core.get_decoder().layers[-1].parameters()) if layout.keep is Keep.multilevel else []
    return sum(p.nbytes for p in [core.get_input_embeddings().weight, *layer])


@pytest.mark.parametrize(("count", "cases"), [(2, OF_TWO), (4, OF_FOUR)])
def test_loss_and_gradients_are_one_ranks(count: int, cases: Collection[str], tmp_path: Path) -> None:
    """A layer is gathered once for each pass over it, whatever its chunks: by bytes, which are those planned."""
    expected = steps(cases)(ALONE, tmp_path)
    for rank, found in enumerate(together(tmp_path, count, steps(cases))):
        for name, one in expected.items():
            assert found[name]["loss"] == pytest.approx(one["loss"], rel=1e-5), (rank, name)
            assert_one_ranks(found[name]["gradients"], one["gradients"], rank, name)
            case = CASES[name]
            if case.layout is not None:
                planned = planned_bytes(case, case.layout, count)
                assert found[name]["gathered"] - tried_bytes(case, case.layout) == pytest.approx(planned, rel=0.01), name


def test_weights_are_divided_or_streamed() -> None:
    """A card too small for anything takes what needs least: of the layouts that divide weights, or where none is divided, of all."""
    card = replace(device("rtx3090"), count=2, memory_usable_bytes=GIB)
    config = replace(run_config(8192), optimizations=switched(THREE))
    for place in (None, WeightPlace.streamed):
        made = choose_executor(replace(config, executor=ExecutorConfig(name=Executor.streamed, weights=place)), card, phi2(), 1)
        assert made.layout is not None and not made.fits
        assert divides_weights(made.decisions) == (place is None) == (made.layout.weights is WeightPlace.resident)


MEASURED = {"a layer": Run("llama", tokens=128, vocab=64), "the head": Run("phi", tokens=128, vocab=4096, mlp=1)}


def planned(run: Run, count: int) -> tuple[Estimate, Any]:
    """Of a rank, and what divides its weights, if there are others."""
    facts = facts_of(run)
    facts = replace(facts, executor="streamed", accumulation=2, device=replace(facts.device, count=count))
    decisions = decide(switched(THREE), facts)
    return StreamedMemory(facts, decisions).device(SMALL), active_zero(decisions)


def held(ranks: Ranks, folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes of a rank's own weights, and those that come into being in a pass at once."""
    found = {}
    for name, run in MEASURED.items():
        model, zero = built(run, ()), planned(run, ranks.world)[1]
        loaded, layout = LoadedModel(model, model.get_base_model(), {}), replace(SMALL, chunk=64, block=64, boundaries=Place.device)
        wrapped, batch = model, random_batch(1, run.tokens, run.vocab, torch.Generator().manual_seed(0))
        own = [*model.parameters()]
        if zero is not None:
            made = zero.settings(facts_of(run), "float32")
            made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            divide(loaded, made, ranks)
            own = [p.ds_tensor for p in own]
        attach(model, layout, choice=lambda shape: Hollow())
        if zero is not None:
            wrapped = Sharded(loaded, torch.optim.AdamW(loaded.trainable), made, ranks, gathers=False)
        executor, live = StreamedExecutor(wrapped, torch.float32), LiveBytes()
        # What is tried but once, and buckets of gradients.
        gradient_exchange(wrapped).backward(executor.loss_sum(batch))
        live.ignore([*own, *tensors(model), *(p.grad for p in loaded.trainable if p.grad is not None)])
        with live:
            gradient_exchange(wrapped).backward(executor.loss_sum(batch))
        found[name] = sum(p.nbytes for p in own), live.peak
    ranks.barrier()
    return found


def test_a_rank_holds_its_part_and_what_is_at_work(tmp_path: Path) -> None:
    """Beside what one rank's pass takes, a layer with its adapters or the head, whichever is more, as planned."""
    alone = held(ALONE, tmp_path)
    for found in together(tmp_path, 2, held):
        for name, run in MEASURED.items():
            estimate, _ = planned(run, 2)
            parts = estimate.linear_weights + estimate.other_weights + 4 * facts_of(run).trainable_params / 2
            assert found[name][0] == pytest.approx(parts, rel=0.01) == alone[name][0] / 2, name
            assert found[name][1] - alone[name][1] == pytest.approx(estimate.runtime, rel=0.01), name
