"""Every calibration constant of the time model, with the measurement it comes from, and the rates that a device is planned with.

Files named here lie in docs/measurements/. `H100` in a name: measured on that card alone, and taken for others as a share of their data
sheets until `mode=profile` has measured them.
"""

from elite.facts import AttentionRates, Device, Rates
from elite.hardware.detect import DISK_READ_BYTES_PER_S, DISK_WRITE_BYTES_PER_S
from elite.hardware.resolve import CPU_FLOPS_PER_CORE_S

MATMUL_SHARE = 0.65
"""Sustained over data-sheet rate of matrix products: 647 of 989 TFLOP/s (streamed_peers.json, `rates`)."""
COPY_SHARE = 0.9
"""Of the data sheet's bandwidth, in a copy: 3,015 of 3,350 GB/s (kernels_h100.json, `copy_gb_s`)."""
FP32_SHARES = (((12, 0), 1 / 2), ((9, 0), 1 / 13.2), ((8, 6), 1 / 2), ((8, 0), 1 / 16), ((0, 0), 1 / 4))
"""fp32 over half-precision matrix products, from a compute capability on: CUDA cores against tensor cores. Hopper as measured, of maps and
attention alike (ablation_phi2.json without mixed precision, ablation_smollm2_16k.json); the others as data sheets have it."""

# Share of the data sheet's half-precision rate, by head dimension: long rows forward, backward; half-rate tokens of a causal square, which
# come from the attention's seconds in the profiles of fused_steps.json.
ATTENTION_SHARES_HOPPER = {
    # streamed_training.json, 32,768 and 131,072 tokens, less what is not attention.
    64: (0.43, 0.44, 1000.0, 1000.0),
    # probe_phi2_24gb_2m_one_layer.json and probe_phi2_8gb_1m_one_layer.json: the whole steps, nearly all attention; long rows of Phi-2 in
    # calibration_fourth.json and calibration_third.json, on an H200, agree.
    80: (0.41, 0.35, 1000.0, 1000.0),
    # streamed_peers.json, `rates`: 604 and 513 of 989 TFLOP/s on a prefix.
    128: (0.61, 0.52, 1000.0, 1000.0),
}
ATTENTION_SHARES_AMPERE = {64: (0.55, 0.45, 1000.0, 1000.0), 128: (0.65, 0.55, 1000.0, 1000.0)}
"""FlashAttention-2 (assumption, somewhat below Dao 2023, arXiv:2307.08691: up to 0.73 and 0.63 of an A100's rate)."""
ATTENTION_SHARES_TURING = {64: (0.35, 0.25, 1000.0, 1000.0), 128: (0.35, 0.25, 1000.0, 1000.0)}
"""The memory-efficient kernel (assumption)."""
ATTENTION_SHARES_EMULATED = {64: (0.09, 0.085, 1000.0, 1000.0), 128: (0.09, 0.085, 1000.0, 1000.0)}
"""The memory-efficient kernel on a Hopper card that stands in for an older one (probe_phi2_emulated_32k.json)."""
ATTENTION_SHARE_CPU = (0.5, 0.5, 1.0, 1.0)
"""Of a CPU's matrix rate (assumption)."""
PRODUCTS = {
    False: {3072: 1.09, 2048: 1.12, 0: 1.02},
    True: {3072: 1.01, 2048: 0.92, 0: 0.94},
}
"""Whether streamed, a hidden size, and from there on the rate of matrix products in steps over the planned one: whole micro-batches are
more rows than the stress test's, and chunks have copies and sums beside them (fitted to the device-bound steps of the grids of the seeds 10
to 12, Qwen's at 1,536, Phi's at 2,560 and Llama's at 4,096)."""
OPERATION_S = 19.3e-6
"""Host time of an operation of a run, where nothing was measured (fused_steps.json, extreme_phi2.json and first_gpu.json: what steps of few
tokens, which wait for the host, take over the operations of `launches.py`)."""
CPU_OPERATION_S = 5e-6
"""The same where the host computes, too: dispatch alone (assumption)."""
HOST_UPDATE_BYTES_PER_S = 37e9
"""Of host memory, by a rank's optimizer there, with 16 threads and another rank beside it (ranks.json, zero3_llama8b, less the rest of its
step)."""
UPDATE_8BIT_FLOPS = 1500.0
"""Operations in fp32 that take as long as the update of a parameter with moments in 8 bits, whose kernel searches the nearest of 256 values
rather than wait for memory: 31 ps on an H100 and on an H200 alike (calibration_second.json, no. 22; calibration_fourth.json, no. 16)."""
LINK_DUPLEX_SHARE = 0.8
"""Of a host link's rate in each direction, with both at work (assumption)."""


def rates_of(device: Device) -> Rates:
    """What the stress test measured here, else shares of the data sheet."""
    return device.measured or (_cpu(device) if device.kind == "cpu" else _cuda(device))


def _cuda(device: Device) -> Rates:
    capability = device.compute_capability or (0, 0)
    if device.capped and capability < (8, 0):
        shares = ATTENTION_SHARES_EMULATED
    elif capability < (8, 0):
        shares = ATTENTION_SHARES_TURING
    else:
        shares = ATTENTION_SHARES_AMPERE if capability < (9, 0) or capability >= (12, 0) else ATTENTION_SHARES_HOPPER
    sheet, link = device.matmul_flops_per_s, LINK_DUPLEX_SHARE * device.host_link_bytes_per_s
    return Rates(
        matmul_flops_per_s=MATMUL_SHARE * sheet,
        fp32_flops_per_s=MATMUL_SHARE * next(share for least, share in FP32_SHARES if capability >= least) * sheet,
        attention={dim: AttentionRates(f * sheet, b * sheet, *halves) for dim, (f, b, *halves) in shares.items()},
        memory_bytes_per_s=COPY_SHARE * device.memory_bytes_per_s,
        to_device_bytes_per_s=link,
        to_host_bytes_per_s=link,
        disk_read_bytes_per_s=DISK_READ_BYTES_PER_S,
        disk_write_bytes_per_s=DISK_WRITE_BYTES_PER_S,
        operation_s=OPERATION_S,
        origin="the data sheet (mode=profile measures this machine's own)" if device.present else "the data sheet",
    )


def _cpu(device: Device) -> Rates:
    sheet = device.matmul_flops_per_s
    forward, backward, *halves = ATTENTION_SHARE_CPU
    return Rates(
        matmul_flops_per_s=sheet,
        fp32_flops_per_s=min(sheet, CPU_FLOPS_PER_CORE_S * device.cores),
        attention={64: AttentionRates(forward * sheet, backward * sheet, *halves)},
        memory_bytes_per_s=device.memory_bytes_per_s,
        to_device_bytes_per_s=device.memory_bytes_per_s,
        to_host_bytes_per_s=device.memory_bytes_per_s,
        disk_read_bytes_per_s=DISK_READ_BYTES_PER_S,
        disk_write_bytes_per_s=DISK_WRITE_BYTES_PER_S,
        operation_s=CPU_OPERATION_S,
        origin="an assumed core (mode=profile measures this machine's own)",
    )


def products_share(hidden_size: int, *, streamed: bool) -> float:
    """Rate of a step's matrix products over that of the stress test's or the data sheet's share."""
    return next(share for least, share in PRODUCTS[streamed].items() if hidden_size >= least)


def attention_of(rates: Rates, head_dim: int) -> AttentionRates:
    """Rates of the nearest head dimension that is known."""
    return rates.attention[min(rates.attention, key=lambda dim: abs(dim - head_dim))]
