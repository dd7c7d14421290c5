"""What the stress test found, as people read it."""

from rich.table import Table

from elite.facts import Device
from elite.hardware.profiles import Profile
from elite.plan.words import gib

NONE = "–"


def render(profile: Profile, device: Device) -> Table:
    """Measured rates beside the data sheet's; a preset's for a GPU, assumptions for a CPU."""
    sheet = "data sheet" if device.kind == "cuda" else "assumed"
    table = Table(
        title=f"{profile.machine.device}, {profile.measured_at}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for head in ("", "measured", sheet):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    table.add_row("largest allocation" if device.kind == "cuda" else "memory available", gib(profile.largest_allocation_bytes), NONE)
    table.add_row(f"matrix products, {profile.compute_dtype}", _flops(profile.matmul_flops), _flops(device.matmul_flops_per_s))
    if profile.compute_dtype != "float32":
        table.add_row("matrix products, float32", _flops(profile.fp32_flops), NONE)
    table.add_row("copy on the device (read and written)", _bytes(profile.copy_bytes), _bytes(device.memory_bytes_per_s))
    if device.kind == "cuda":
        table.add_row("pinned host memory to device", _bytes(profile.to_device_bytes), _bytes(device.host_link_bytes_per_s))
        table.add_row("device to pinned host memory", _bytes(profile.to_host_bytes), NONE)
        both = f"{_bytes(profile.both_to_device_bytes)}, {_bytes(profile.both_to_host_bytes)}"
        table.add_row("both at once", both, NONE)
    for line in profile.attention:
        name = f"{line.kernel} attention, heads of {line.head_dim}"
        table.add_row(f"{name}, forward", _attention(line.long_forward, line.square_forward), NONE)
        table.add_row(f"{name}, backward", _attention(line.long_backward, line.square_backward), NONE)
    table.add_row("host time of a small kernel", f"{profile.launch_s * 1e6:.1f} µs", NONE)
    table.add_row("host time of a model's operation", f"{profile.operation_s * 1e6:.1f} µs", NONE)
    for name, rate in (("disk, written", profile.disk_write_bytes), ("disk, read", profile.disk_read_bytes)):
        table.add_row(name, _bytes(rate) if rate else "no room to measure", NONE)
    notes = [f"{name} attention: {reason}" for name, reason in profile.left_out.items()]
    table.caption = "\n".join([f"In brackets: a causal square of {profile.attention[0].square_tokens:,} tokens.", *notes])
    table.caption_justify = "left"
    return table


def _attention(long: float, square: float) -> str:
    return f"{_flops(long)} ({_flops(square)})"


def _flops(value: float) -> str:
    return f"{value / 1e12:,.1f} TFLOP/s" if value >= 1e12 else f"{value / 1e9:,.1f} GFLOP/s"


def _bytes(value: float) -> str:
    return f"{value / 1e9:,.1f} GB/s"
