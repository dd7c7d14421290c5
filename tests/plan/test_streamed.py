"""The streamed executor's arithmetic against what its rows really take, and the choice of executor and layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from elite import geometry, hardware, losses
from elite.config import AdapterMethod, Executor, ExecutorConfig
from elite.data.batches import random_batch
from elite.errors import ConfigError, PlanError
from elite.executor.streamed.attach import attach
from elite.executor.streamed.executor import StreamedExecutor
from elite.executor.streamed.kernels import KERNELS
from elite.executor.streamed.math_kernel import Math
from elite.executor.streamed.mid_step import MidStep
from elite.facts import GIB, Facts
from elite.optimizations import decide
from elite.plan import make_plan
from elite.plan.copies import HASH_BYTES_PER_S
from elite.plan.executors import NEARLY, choose_executor
from elite.plan.rates import DISK_WRITE_BYTES_PER_S
from elite.plan.streamed import StreamedMemory, layouts, recomputed
from elite.revolve import layer_forwards, slots_for
from elite.streaming import VALUE_BITS, BoundaryEncoding, Keep, Place, Streaming, WeightPlace
from tests.models import tiny
from tests.plan.helpers import CORPUS, STANDARD, device, phi2, run_config, switches
from tests.plan.live_bytes import LiveBytes
from tests.plan.steps import Case, as_on_cuda, built, decisions_of, facts_of, small, tensors
from tests.training.rig import ALONE

TOKENS = 256
GEOMETRY = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
BASE = Streaming(chunk=64, block=64, slots=2)


def facts(config: object, tokens: int = TOKENS) -> Facts:
    shape = geometry.shape(config)  # type: ignore[arg-type]
    # On a GPU: there, host rows are not the device's memory.
    return Facts(shape, replace(device("rtx3090"), supports_bf16=True), tokens, 1, shape.lora_params(4), "lora", "streamed")


@pytest.mark.parametrize("keep", Keep, ids=lambda keep: keep.value)
@pytest.mark.parametrize("place", [Place.host, Place.disk], ids=lambda place: place.value)
def test_rows_take_what_is_planned(keep: Keep, place: Place, tmp_path: Path) -> None:
    layout = replace(BASE, keep=keep, boundaries=place, keys_values=Place.host, folder=str(tmp_path))
    config = small("llama", 64)
    found = facts(config)
    model = tiny("llama", **{name: getattr(config, name) for name in GEOMETRY})
    attached = attach(model, layout, choice=lambda _shape: KERNELS["math"])
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    model(input_ids=ids, labels=ids).loss.backward()
    rows = attached.runner.allocator._rows.values()
    in_host, on_disk = (sum(r.storage.nbytes for r in rows if r.place is where) for where in (Place.host, Place.disk))
    memory = StreamedMemory(found, decide(switches(), found))
    attached.undo()
    assert in_host == memory.host(layout)
    assert on_disk == memory.disk(layout)


@pytest.mark.parametrize("keep", [Keep.attention, Keep.layers], ids=lambda keep: keep.value)
def test_rows_are_wide_where_embeddings_are_trained(keep: Keep) -> None:
    layout = replace(BASE, keep=keep, keys_values=Place.device)
    config = small("llama", 64)
    found = replace(facts(config), adapter="full")
    model = tiny("llama", **{name: getattr(config, name) for name in GEOMETRY})
    attached = attach(model, layout, choice=lambda _shape: KERNELS["math"])
    ids = torch.randint(0, config.vocab_size, (1, TOKENS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    in_host = sum(r.storage.nbytes for r in attached.runner.allocator._rows.values() if r.place is Place.host)
    attached.undo()
    assert in_host == StreamedMemory(found, decide(switches("mixed_precision"), found)).host(layout)


@pytest.mark.parametrize("mlp", [3, 0.5])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_a_chunk_holds_what_is_planned(kind: str, mlp: float) -> None:
    """A layer's backward over a chunk, rows and batch aside; the attention's own block may be larger in a library's kernel."""
    case = Case(kind, ("mixed_precision", "fused_lora"), cuda=True, mlp=mlp, tokens=512, vocab=64)
    found = replace(facts_of(case), executor="streamed")
    decisions, layout = decisions_of(case, found), Streaming(chunk=128, block=128, boundaries=Place.device)
    model = built(case, decisions)
    attached = attach(model, layout, choice=lambda _shape: Math(tile_elements=2**11))
    ids = torch.randint(0, case.vocab, (1, case.tokens))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids).loss
        out.backward()

    with as_on_cuda():
        step()
        model.zero_grad(set_to_none=True)
        live = LiveBytes()
        live.ignore([ids, *tensors(model)])
        with live:
            step()
    attached.undo()
    work = StreamedMemory(found, decisions).device(layout)
    planned = work.gradients + work.saved_activations + work.layer_workspace + work.mlp_workspace + work.attention_workspace
    if work.attention_workspace:
        # Gradients of plain torch are fp32 where a kernel's are in the compute dtype, and sums of keys' are made beside them, with and
        # without what is there already.
        heads, keys = (n * found.model.head_dim for n in (found.model.num_attention_heads, found.model.num_key_value_heads))
        planned += layout.block * (2 * heads * 2 + keys * 8) + layout.chunk * heads * 2
    assert planned == pytest.approx(live.peak, rel=0.05)


def test_lossy_boundaries_take_their_bits() -> None:
    found = facts(small("llama", 64))
    memory = StreamedMemory(found, decide(switches(), found))
    exact, lossy = (memory.host(replace(BASE, encoding=encoding)) for encoding in (BoundaryEncoding.exact, BoundaryEncoding.int4))
    kept = slots_for(BASE.keep, found.model.num_hidden_layers, BASE.slots) * TOKENS * found.model.hidden_size
    assert exact - lossy == kept * (4 - VALUE_BITS[BoundaryEncoding.int4] / 8)


def test_streamed_weights_leave_two_layers_on_the_device() -> None:
    found = facts(small("llama", 64))
    memory = StreamedMemory(found, decide(switches(), found))
    resident, streamed = (replace(BASE, weights=place) for place in (WeightPlace.resident, WeightPlace.streamed))
    weights = memory.device(resident).linear_weights
    assert memory.device(streamed).linear_weights == 2 * weights / found.model.num_hidden_layers
    assert memory.host(streamed) - memory.host(resident) == weights


def test_depth_costs_no_device_memory_beside_weights() -> None:
    totals = []
    for layers in (6, 12):
        config = replace(run_config(131072, executor=Executor.streamed), executor=ExecutorConfig(name=Executor.streamed, chunk=4096))
        shape = replace(phi2(), num_hidden_layers=layers)
        found = replace(facts(small("llama", 64)), model=shape, context=131072, trainable_params=0)
        layout = next(layouts(config.executor, 131072, ""))
        totals.append(StreamedMemory(found, decide(switches(*STANDARD), found)).device(replace(layout, weights=WeightPlace.streamed)))
    assert totals[0].total - totals[0].other_weights == pytest.approx(totals[1].total - totals[1].other_weights)


def test_what_is_passed_forward_again() -> None:
    found = facts(small("llama", 64))
    layers = found.model.num_hidden_layers
    assert recomputed(found, replace(BASE, keep=Keep.attention)) == (1, 0)
    assert recomputed(found, replace(BASE, keep=Keep.layers)) == (1, 1)
    again = layer_forwards(layers, 1) / layers
    assert recomputed(found, replace(BASE, keep=Keep.multilevel, slots=1)) == (again, again)


def test_the_least_recomputation_that_fits_is_chosen() -> None:
    machine = device("rtx3090")
    config = run_config(131072, executor=Executor.streamed)
    kept = []
    for ram in (512, 48, 32, 12):
        made = choose_executor(config, replace(machine, host_ram_bytes=ram * GIB), phi2(), 1)
        assert made.fits and made.layout is not None
        kept.append(made.layout.keep)
    assert kept == sorted(kept, key=list(Keep).index) and kept[0] is Keep.attention and kept[-1] is Keep.multilevel


@pytest.mark.parametrize("context", [3840, 8192, 30_464])
def test_no_chunk_would_be_faster(context: int) -> None:
    """Short contexts are bound by the host, which has less to do for fewer chunks; copies of an only chunk hide behind nothing."""
    config = run_config(context, (*STANDARD, "qlora"), executor=Executor.streamed)
    found = choose_executor(config, device("h100"), phi2(), 1)
    assert found.layout is not None and found.fits
    times = {
        chunk: choose_executor(replace(config, executor=replace(config.executor, chunk=chunk)), device("h100"), phi2(), 1).step_s
        for chunk in (1024, 2048, 4096, 8192, 16384, 32768)
    }
    assert found.step_s <= NEARLY * min(times.values()), times
    # Rows where they were: with one chunk alone to choose, another place may be nearly as fast and take less.
    same = replace(config.executor, chunk=found.layout.chunk, boundaries=found.layout.boundaries)
    assert choose_executor(replace(config, executor=same), device("h100"), phi2(), 1).step_s == pytest.approx(found.step_s)


def test_rows_stay_on_the_device_where_their_copies_would_hold_it_up() -> None:
    """And only where there is room; then they are the device's memory, not the host's."""
    short, long = (run_config(context, (*STANDARD, "fused_kernels"), executor=Executor.streamed) for context in (4096, 131_072))
    near, far = choose_executor(short, device("h100"), phi2(), 1), choose_executor(long, device("h100"), phi2(), 1)
    assert near.layout is not None and near.layout.boundaries is Place.device and near.host_bytes == 0
    assert far.layout is not None and far.layout.boundaries is Place.host and far.host_bytes > 0
    there = replace(short, executor=replace(short.executor, boundaries=Place.host, chunk=near.layout.chunk))
    asked = choose_executor(there, device("h100"), phi2(), 1)
    assert asked.host_bytes > 0 and asked.step_s > near.step_s
    assert near.estimate.staging == pytest.approx(asked.host_bytes), "the same rows, elsewhere"
    tight = replace(device("h100"), memory_usable_bytes=int(1.02 * asked.estimate.total / (1 - short.plan.headroom_fraction)))
    assert asked.estimate.total < near.estimate.total
    kept = choose_executor(short, tight, phi2(), 1)
    assert kept.fits and kept.layout is not None and kept.layout.boundaries is Place.host


def test_what_is_asked_for_is_kept() -> None:
    asked = ExecutorConfig(
        Executor.streamed, 2048, 4096, Keep.sqrt, 4, Place.disk, BoundaryEncoding.int8, Place.host, WeightPlace.streamed, "here"
    )
    expected = Streaming(2048, 4096, Keep.sqrt, 4, Place.disk, BoundaryEncoding.int8, Place.host, WeightPlace.streamed, "here")
    assert list(layouts(asked, 131072, "here")) == [expected]
    assert Streaming.from_dict(expected.to_dict()) == expected


def test_auto_is_the_fastest_that_fits() -> None:
    machine = device("rtx3090")
    short, long = (make_plan(run_config(n, executor=Executor.auto), machine, phi2(), CORPUS) for n in (4096, 1 << 20))
    assert (short.executor, short.fits, short.layout) == ("whole", True, None)
    assert (long.executor, long.fits) == ("streamed", True) and long.layout is not None
    assert make_plan(run_config(4096, executor=Executor.auto), hardware.device(run_config().hardware), phi2(), CORPUS).executor == "whole"


def test_parts_of_the_whole_executor_do_not_clash_in_a_streamed_plan() -> None:
    both = (*STANDARD, "checkpoint_offload")
    made = make_plan(run_config(on=both, executor=Executor.streamed), device("rtx3090"), phi2(), CORPUS)
    assert {switch.name for switch in made.decisions if switch.requested and not switch.active} >= {"checkpoint_offload", "flash_attention"}
    with pytest.raises(PlanError, match="both decide"):
        make_plan(run_config(on=both, executor=Executor.whole), device("rtx3090"), phi2(), CORPUS)


def test_a_host_without_room_is_said() -> None:
    small_host = replace(device("rtx2060s"), host_ram_bytes=8 * GIB)
    made = make_plan(run_config(1 << 20, executor=Executor.streamed), small_host, phi2(), CORPUS)
    assert not made.fits
    assert "of host memory, 4.00 GiB can be used" in made.shortage
    assert "tier.context=" in made.fix


def test_what_cannot_be_streamed_is_said_before_anything_is_loaded() -> None:
    shape = replace(phi2(), unstreamable="it caps its logits")
    with pytest.raises(PlanError, match="phi2 cannot be streamed: it caps its logits"):
        make_plan(run_config(executor=Executor.streamed), device("rtx3090"), shape, CORPUS)
    assert make_plan(run_config(executor=Executor.auto), device("rtx3090"), shape, CORPUS).executor == "whole"


def test_windowed_keys_stay_on_the_device() -> None:
    config, windowed = run_config(1 << 20, executor=Executor.streamed), replace(phi2(), sliding_window=4096)
    assert choose_executor(config, device("rtx2060s"), phi2(), 1).layout.keys_values is Place.host  # type: ignore[union-attr]
    assert choose_executor(config, device("rtx2060s"), windowed, 1).layout.keys_values is Place.device  # type: ignore[union-attr]
    asked = replace(config, executor=replace(config.executor, keys_values=Place.host))
    with pytest.raises(PlanError, match="sliding window"):
        choose_executor(asked, device("rtx2060s"), windowed, 1)


@pytest.mark.parametrize(("kind", "why"), [("gemma2", "caps its logits"), ("lfm2", "no attention"), ("llama", "")])
def test_shapes_know_whether_they_can_be_streamed(kind: str, why: str) -> None:
    shape = geometry._shape(kind, tiny(kind, attention="eager").config.to_json_string(use_diff=False))
    assert why in shape.unstreamable and bool(why) == bool(shape.unstreamable)


@pytest.mark.parametrize(
    "asked",
    [{"keys_values": Place.disk}, {"keep": Keep.attention, "encoding": BoundaryEncoding.int8}],
    ids=["keys on disk", "outputs of rounded boundaries"],
)
def test_contradictions_are_refused_by_the_plan(asked: dict[str, Any]) -> None:
    config = run_config(131072, executor=Executor.streamed)
    contradictory = replace(config, executor=replace(config.executor, **asked))
    with pytest.raises(PlanError, match="executor."):
        make_plan(contradictory, device("rtx3090"), phi2(), CORPUS)


def test_weights_that_are_trained_stay_on_the_device() -> None:
    config = run_config(1 << 16, executor=Executor.streamed)
    config = replace(config, adapter=replace(config.adapter, method=AdapterMethod.full))
    layout = choose_executor(config, device("rtx3060"), phi2(), 1).layout
    assert layout is not None and layout.weights is WeightPlace.resident
    asked = replace(config, executor=replace(config.executor, weights=WeightPlace.streamed))
    with pytest.raises(PlanError, match="trained stay on the device"):
        choose_executor(asked, device("rtx3060"), phi2(), 1)


@pytest.mark.parametrize("full", [True, False], ids=["full", "lora"])
@pytest.mark.parametrize(("kind", "chunk"), [("llama", 256), ("phi", 256), ("llama", 1024)])
def test_the_loss_holds_what_is_said(kind: str, chunk: int, full: bool) -> None:
    """Where the vocabulary is large: tiles of logits, a trained head's gradients, and what stands around them."""
    case = Case(kind, ("mixed_precision", "flash_attention"), cuda=True, full=full, tokens=1024, width=64, vocab=8192)
    facts = replace(facts_of(case), executor="streamed")
    decisions = decisions_of(case, facts)
    model = built(case, decisions)
    core: Any = model if full else model.get_base_model()
    layout = Streaming(chunk=chunk, block=chunk, keep=Keep.layers)
    attached = attach(core, layout, choice=lambda _shape: Math(tile_elements=2**15))
    ids = torch.randint(0, case.vocab, (1, case.tokens))
    # The kernel adds in place.
    with as_on_cuda(), patch.object(losses, "_add_product", lambda *_: None), torch.autocast("cpu", torch.bfloat16):
        core(input_ids=ids, labels=ids).loss.backward()
        core.zero_grad(set_to_none=True)
        live = LiveBytes()
        # Rows, keys and values are there by now.
        live.ignore([ids, *core.parameters(), *core.buffers()])
        with live:
            core(input_ids=ids, labels=ids)
    attached.undo()
    arguments = 2 * (4 if full else 2) * facts.model.rotary_dim * case.tokens
    predicted = StreamedMemory(facts, decisions).device(layout).loss_workspace
    assert predicted > 0 and predicted + arguments == pytest.approx(live.peak, rel=0.03)


JOURNALED = replace(BASE, keep=Keep.layers, boundaries=Place.disk, journal=True)


@pytest.mark.parametrize("keep", [Keep.attention, Keep.layers], ids=lambda keep: keep.value)
def test_a_journal_takes_what_is_planned(keep: Keep, tmp_path: Path) -> None:
    config = small("llama", 64)
    model = tiny("llama", **{name: getattr(config, name) for name in GEOMETRY})
    found = replace(facts(config), adapter="full", trainable_params=sum(p.numel() for p in model.parameters()), accumulation=2)
    layout = replace(JOURNALED, keep=keep, folder=str(tmp_path / "others"))
    attached = attach(model, layout, choice=lambda _shape: KERNELS["math"])
    journal, executor = MidStep(attached.runner, model, tmp_path / "mid_step", ALONE), StreamedExecutor(model, torch.float32)
    window = [random_batch(1, TOKENS, config.vocab_size) for _ in range(2)]
    journal.begin(1, window, 1.0, lambda: False)
    for batch in window:
        executor.loss_sum(batch).backward()
    kept = list((tmp_path / "mid_step" / "rank0").iterdir())
    results = [tensor for path in kept if path.suffix == ".safetensors" for tensor in load_file(path).values()]
    rows = [path.stat().st_size for path in kept if not path.suffix]
    losses_kept = 2 * 4
    planned = StreamedMemory(found, decide(switches(), found)).disk(layout)
    assert sum(rows) + sum(tensor.nbytes for tensor in results) - losses_kept == planned
    journal.end()


def test_a_journal_costs_the_time_of_its_writing() -> None:
    config = run_config(131072, executor=Executor.streamed)
    asked = replace(
        config, executor=replace(config.executor, boundaries=Place.disk), training=replace(config.training, mid_step_checkpoint=True)
    )
    plain = replace(asked, training=config.training)
    tight = replace(device("rtx3090"), host_ram_bytes=12 * GIB)
    made, other = (choose_executor(run, tight, phi2(), 1) for run in (asked, plain))
    assert made.layout is not None and other.layout is not None and made.layout == replace(other.layout, journal=True)
    assert made.layout.keep is Keep.attention
    # A layer's boundary, its gradient and its attention output are on the disk, and hashed, before anything else begins.
    written = 3 * phi2().num_hidden_layers * 131072 * phi2().hidden_size * 2
    assert made.step_s - other.step_s == pytest.approx(written / DISK_WRITE_BYTES_PER_S + written / HASH_BYTES_PER_S, rel=0.05)


def test_a_journal_leaves_layouts_whose_layers_find_their_input() -> None:
    asked = ExecutorConfig(Executor.streamed, boundaries=Place.disk)
    kept, all_kept = ({layout.keep for layout in layouts(asked, 131072, "here", journal)} for journal in (True, False))
    assert kept == {Keep.attention, Keep.layers} and all_kept == set(Keep)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": Executor.auto}, "executor=auto"),
        ({"name": Executor.whole}, "executor=whole"),
        ({"boundaries": Place.host}, "must lie in files"),
        ({"boundaries": None}, "must lie in files"),
        ({"keep": Keep.sqrt}, "executor.keep=sqrt"),
        ({"keep": Keep.multilevel}, "executor.keep=multilevel"),
        ({"encoding": BoundaryEncoding.int8}, "executor.encoding=int8"),
    ],
)
def test_what_cannot_be_kept_within_a_step_is_refused(changes: dict[str, Any], words: str) -> None:
    config = run_config(131072, executor=Executor.streamed)
    executor = replace(config.executor, **{"boundaries": Place.disk, **changes})
    asked = replace(config, executor=executor, training=replace(config.training, mid_step_checkpoint=True))
    with pytest.raises((ConfigError, PlanError), match=words) as raised:
        make_plan(asked, device("rtx3090"), phi2(), CORPUS)
    assert "training.mid_step_checkpoint=true" in raised.value.problem and "executor" in raised.value.remedy
