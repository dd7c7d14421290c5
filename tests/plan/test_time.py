from dataclasses import replace

import pytest

from elite.facts import Facts
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import Decision
from elite.optimizations.zero_3 import ZeRO3
from elite.plan import launches, streamed, traffic
from elite.plan.copies import Copies, parts
from elite.plan.rates import HOST_UPDATE_BYTES_PER_S, products_share, rates_of
from elite.plan.time import StepTime, model_flops_per_token, recomputed, step_flops, step_time
from elite.streaming import Keep, Place, Streaming, WeightPlace
from tests.plan.helpers import device, phi2, switches


def facts(context: int = 4096, adapter: str = "lora") -> Facts:
    shape = phi2()
    trainable = shape.lora_params(16) if adapter == "lora" else shape.total_params
    return Facts(shape, device("rtx3090"), context, 1, trainable, adapter)


def test_short_context_costs_six_operations_a_weight() -> None:
    short = facts(64, "full")
    weights = short.model.linear_params + short.model.hidden_size * short.model.vocab_size
    assert model_flops_per_token(short) == pytest.approx(6 * weights, rel=0.01)


def test_lora_needs_no_weight_gradients() -> None:
    assert model_flops_per_token(facts(64)) == pytest.approx(model_flops_per_token(facts(64, "full")) * 2 / 3, rel=0.02)


def test_attention_takes_over_with_the_context() -> None:
    # 7 operations a step for every 4 model ones of the forward pass: (1 + 2.5) and one recomputation.
    long = facts(1 << 20)
    attention = 4 * 32 * 80 * long.context**2 / 2 * 32
    done = step_flops(long, recomputed(decide(switches("gradient_checkpointing"), long)), 1)
    assert done == pytest.approx(attention * 4.5, rel=0.05)


def test_checkpointing_costs_one_forward_of_the_layers() -> None:
    short = facts(64)
    plain, checkpointed = (step_flops(short, recomputed(decide(switches(*on), short)), 1) for on in ((), ("gradient_checkpointing",)))
    assert checkpointed - plain == pytest.approx(2 * short.model.linear_params * 64, rel=0.02)


def test_time_follows_work_and_rate() -> None:
    one = facts()
    decisions = decide(switches("mixed_precision", "flash_attention"), one)
    once, often = (step_time(one, decisions, (0, 0), accumulation) for accumulation in (1, 4))
    assert often.total - often.optimizer == pytest.approx(4 * (once.total - once.optimizer))
    faster = replace(one, device=replace(one.device, matmul_flops_per_s=2 * one.device.matmul_flops_per_s))
    assert step_time(faster, decisions, (0, 0), 1).linear_maps < 0.6 * once.linear_maps
    assert step_time(one, decide(switches(), one), (0, 0), 1).total > once.total


def test_linear_maps_take_their_operations_over_the_rate() -> None:
    one = facts(64)
    decisions = decide(switches("mixed_precision", "flash_attention"), one)
    expected = 2 * 2 * one.model.linear_params * 64 / rates_of(one.device).matmul_flops_per_s
    found = step_time(one, decisions, (0, 0), 1).linear_maps
    assert found == pytest.approx(expected / products_share(one.model.hidden_size, streamed=False))


def test_wide_layers_reach_more_and_chunks_less() -> None:
    narrow, wide, wider = ([products_share(width, streamed=on) for on in (False, True)] for width in (1536, 2560, 4096))
    assert min(wide[0], wider[0]) > narrow[0] > 1 and wider[1] > max(narrow[1], wide[1])
    assert all(streamed < whole for whole, streamed in (narrow, wide, wider))


def test_fused_kernels_spare_traffic_and_nothing_else() -> None:
    one = facts(16384)
    plain, fused = (
        step_time(one, decide(switches("mixed_precision", "flash_attention", *more), one), (0, 0), 1) for more in ((), ("fused_kernels",))
    )
    assert fused.elementwise < plain.elementwise / 4
    assert (fused.linear_maps, fused.attention) == (plain.linear_maps, plain.attention)


def test_short_steps_wait_for_the_host_and_long_ones_do_not() -> None:
    on = switches("mixed_precision", "flash_attention")
    shorter, short, middle, long = (step_time(one, decide(on, one), (0, 0), 1) for one in map(facts, (64, 128, 256, 65536)))
    one = facts(128)
    handed = launches.operations(one, decide(on, one), None)
    host_s = (handed.forward + handed.backward) * rates_of(one.device).operation_s
    # The host takes most of it, and cannot be outrun; nor do both take longer than one after the other.
    assert host_s > 0.7 * short.total and short.waiting_for_host > 0.5 * short.total
    assert host_s < short.total - short.optimizer < host_s + (short.total - short.optimizer - short.waiting_for_host)
    assert long.waiting_for_host < 0.01 * long.total
    # Its floor is the host's: half the tokens take as long.
    assert shorter.total > 0.9 * short.total and middle.total > 1.02 * short.total


def test_copies_count_where_the_link_is_too_slow() -> None:
    one = replace(facts(65536), executor="streamed")
    decisions, layout = decide(switches("mixed_precision", "fused_lora"), one), Streaming(keep=Keep.attention)
    again = streamed.recomputed(one, layout)
    fast = step_time(one, decisions, again, 1, layout)
    slow_link = replace(one, device=replace(one.device, host_link_bytes_per_s=1e8))
    slow = step_time(slow_link, decisions, again, 1, layout)
    assert fast.exposed_copies == 0
    moved = one.model.num_hidden_layers * one.context * 2 * 2560
    # A boundary goes forward, its gradient backward, at the very least.
    assert slow.total > 2 * moved / 1e8
    assert slow.total - slow.exposed_copies == pytest.approx(fast.total)


def test_copies_of_the_only_chunk_hide_behind_nothing() -> None:
    found, decisions = replace(facts(8192), executor="streamed"), decide(switches("mixed_precision"), facts(8192))
    several, one = (
        step_time(found, decisions, streamed.recomputed(found, layout), 1, layout)
        for layout in (Streaming(keep=Keep.layers, chunk=chunk) for chunk in (4096, 8192))
    )
    # A layer's input comes, its output goes, at the same time; backward another row comes.
    row = 2 * 2560 * 8192 * 32
    assert several.exposed_copies == 0
    assert one.exposed_copies == pytest.approx(3 * row / rates_of(found.device).to_device_bytes_per_s, rel=0.1)


def test_streamed_weights_come_behind_another_layer() -> None:
    """Even where a micro-batch is one chunk, as a layer's weights are on their way while the one before it is computed."""
    found, decisions = replace(facts(8192), executor="streamed"), decide(switches("mixed_precision"), facts(8192))

    def exposed(weights: WeightPlace, link: float) -> float:
        layout = Streaming(keep=Keep.layers, chunk=8192, boundaries=Place.device, weights=weights)
        linked = replace(found, device=replace(found.device, host_link_bytes_per_s=link))
        return step_time(linked, decisions, streamed.recomputed(linked, layout), 1, layout).exposed_copies

    assert exposed(WeightPlace.resident, 1e9) == exposed(WeightPlace.streamed, 25e9) == 0
    # A link that takes longer than the computation is seen for what it takes longer.
    copied = 2 * 2 * found.model.linear_params / rates_of(replace(found.device, host_link_bytes_per_s=1e9)).to_device_bytes_per_s
    assert 0.3 * copied < exposed(WeightPlace.streamed, 1e9) < copied


def test_an_update_in_8_bits_computes_rather_than_moves() -> None:
    full = facts(512, "full")
    wide = replace(full, device=replace(full.device, memory_bytes_per_s=2 * full.device.memory_bytes_per_s))

    def update(of: Facts, *more: str) -> float:
        return step_time(of, decide(switches("mixed_precision", *more), of), (0, 0), 1).optimizer

    assert update(wide) == pytest.approx(update(full) / 2)
    assert update(wide, "adamw_8bit") == update(full, "adamw_8bit") > 0


def test_every_chunk_dequantises_weights_anew() -> None:
    """On the device, which reads and writes them, and for the host, which asks for each map."""
    found = replace(facts(16384), executor="streamed")
    plain, packed = (decide(switches("mixed_precision", *more), found) for more in ((), ("qlora",)))

    def seconds(chunk: int, decisions: tuple[Decision, ...]) -> float:
        layout = Streaming(keep=Keep.layers, chunk=chunk)
        return step_time(found, decisions, streamed.recomputed(found, layout), 1, layout).linear_maps

    more = [seconds(chunk, packed) - seconds(chunk, plain) for chunk in (16384, 4096)]
    assert more[0] > 0 and more[1] == pytest.approx(4 * more[0])
    layouts = [Streaming(keep=Keep.layers, chunk=chunk) for chunk in (16384, 4096)]
    asked = [[launches.operations(found, decisions, layout).forward for decisions in (plain, packed)] for layout in layouts]
    maps = 32 * len(found.model.layer_linears)
    each = [besides - without for without, besides in asked]
    assert each == pytest.approx([maps * launches.DEQUANTISED.forward * chunks for chunks in (1, 4)])


def test_a_disk_is_slower_than_a_link() -> None:
    one = replace(facts(65536), executor="streamed")
    one = replace(one, device=replace(one.device, matmul_flops_per_s=1e16))
    decisions = decide(switches("mixed_precision", "fused_lora"), one)
    times = [
        step_time(one, decisions, streamed.recomputed(one, layout), 1, layout).exposed_copies
        for layout in (Streaming(boundaries=place) for place in (Place.device, Place.host, Place.disk))
    ]
    assert times[0] == 0
    assert times[1] <= times[2]
    assert times[2] > 0


def test_measured_rates_take_the_place_of_the_data_sheet() -> None:
    one = facts()
    decisions = decide(switches("mixed_precision", "flash_attention"), one)
    sheet = rates_of(one.device)
    half = replace(sheet, matmul_flops_per_s=sheet.matmul_flops_per_s / 2, origin="here")
    measured = replace(one, device=replace(one.device, measured=half))
    assert step_time(measured, decisions, (0, 0), 1).linear_maps == pytest.approx(2 * step_time(one, decisions, (0, 0), 1).linear_maps)


def test_the_host_takes_the_step_of_a_rank_s_part() -> None:
    """At the host's rate; what lies there comes over the link."""
    full = replace(facts(4096, "full"), device=replace(device("h200"), count=2))

    def timed(**options: bool) -> StepTime:
        config = OptimizationsConfig(zero_3=ZeRO3.Config(enabled=True, **options))
        return step_time(full, decide(config, full), (0, 0), 1)

    near, far, all_far = timed(), timed(offload_optimizer=True), timed(offload_optimizer=True, offload_parameters=True)
    rates, own = rates_of(full.device), full.trainable_params / 2
    assert near.optimizer == pytest.approx(traffic.OPTIMIZER * own / rates.memory_bytes_per_s)
    on_host = traffic.OPTIMIZER * own / HOST_UPDATE_BYTES_PER_S
    assert far.optimizer == pytest.approx(on_host + 4 * own / rates.to_device_bytes_per_s)
    # Weights that wait there come when they are needed, not after the step.
    assert all_far.optimizer == pytest.approx(on_host)
    short = replace(full, context=64)
    bare, brought = (Copies(*pair) for pair in ((0.0, 0.0), (4 * own / rates.to_device_bytes_per_s,) * 2))
    assert parts(short, decide(OptimizationsConfig(), short), rates, 1.0) == bare
    made = parts(short, decide(OptimizationsConfig(zero_3=ZeRO3.Config(enabled=True, offload_parameters=True)), short), rates, 1.0)
    assert (made.forward, made.backward) == pytest.approx((brought.forward, brought.backward))
