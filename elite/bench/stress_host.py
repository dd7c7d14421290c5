"""Parts of the stress test: what the host's side of a step costs, and how much memory can really be had."""

import time

import torch
from transformers import AutoModelForCausalLM

from elite import geometry, hardware
from elite.config import HardwareConfig, ModelConfig
from elite.facts import Facts
from elite.plan.launches import operations

TINY = ModelConfig(
    name="tiny",
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
    max_position_embeddings=512,
)
"""So small that its steps wait for the host alone."""
TOKENS = 16
STEPS = 60
LAUNCHES = 200
"""Fewer than a device queues, so that the host never waits for it."""
REPEATS = 5
PARTS = 64
"""The largest allocation is found to this part of the memory that is free."""


def launch_s(device: torch.device) -> float:
    """Host seconds of one small kernel without gradient; the fastest of several runs."""
    x, found = torch.zeros(16, device=device), list[float]()
    for _ in range(REPEATS):
        _wait(device)
        began = time.perf_counter()
        for _ in range(LAUNCHES):
            x.add_(1)
        found.append((time.perf_counter() - began) / LAUNCHES)
    return min(found)


def operation_s(device: torch.device, dtype: torch.dtype) -> float:
    """Host seconds of one eager operation of a real model, forward and backward: a step of a tiny one over the operations it has. The
    fastest of several, as others that share the cores only take time."""
    shape = geometry.shape(TINY)
    facts = Facts(shape, hardware.device(HardwareConfig(name="cpu")), TOKENS, 1, shape.total_params, "full")
    counted = operations(facts, (), None)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = AutoModelForCausalLM.from_config(geometry.hf_config(TINY), dtype=torch.float32, attn_implementation="sdpa")
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()

    found, threads = list[float](), torch.get_num_threads()
    # Tiny operations gain nothing from more threads, which wait for each other where others use the cores.
    torch.set_num_threads(1)
    for _ in range(STEPS):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        found.append(time.perf_counter() - began)
    torch.set_num_threads(threads)
    return min(found) / (counted.forward + counted.backward)


def largest_allocation(device: torch.device) -> int:
    """Bytes of the largest tensor that can be made and written; on a CPU the memory available, which a test must not take."""
    if device.type == "cpu":
        return hardware.host_memory()[1]
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    for part in range(PARTS, 0, -1):
        wanted = free * part // PARTS
        try:
            torch.empty(wanted, dtype=torch.uint8, device=device).zero_()
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            continue
        finally:
            torch.cuda.empty_cache()
        return int(wanted)
    return 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
