"""Parts of the stress test: what the host's side of a step costs, and how much memory can really be had."""

import time

import torch
from transformers import AutoModelForCausalLM

from elite import geometry, hardware
from elite.bench.calm import CalmCores
from elite.config import ModelConfig

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
OPERATIONS = 1275
"""Of its step under autocast, by torch's dispatcher: a unit that no fitted figure of the planner's moves."""
STEPS = 60
TOGETHER = 5
"""Steps on a core before another look at it, which what is at hand there does not outlive."""
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


class Operations:
    """Eager operations of a real model, forward and backward: steps of a tiny one.

    Args:
        dtype: of matrix products.
        cores: which of them the host works on; unset: found out.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cores: CalmCores | None = None) -> None:
        self._cores = cores or CalmCores()
        self._device, self._dtype = device, dtype
        with torch.random.fork_rng(devices=[]), torch.device(device):
            self._model = AutoModelForCausalLM.from_config(geometry.hf_config(TINY), dtype=torch.float32, attn_implementation="sdpa")
            self._ids = torch.zeros(1, TOKENS, dtype=torch.int64)

    def seconds(self, steps: int = STEPS) -> float:
        """Host seconds of one. The fastest step of several on calm cores, as others that share them only take time."""
        found, threads = list[float](), torch.get_num_threads()
        # Tiny operations gain nothing from more threads, which wait for each other where others use the cores.
        torch.set_num_threads(1)
        with self._cores.chosen():
            for number in range(steps):
                if number % TOGETHER == 0:
                    self._cores.settle()
                _wait(self._device)
                began = time.perf_counter()
                self._step()
                _wait(self._device)
                found.append(time.perf_counter() - began)
        torch.set_num_threads(threads)
        self._model.zero_grad(set_to_none=True)
        return min(found) / OPERATIONS

    def _step(self) -> None:
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype != torch.float32):
            loss = self._model(input_ids=self._ids, labels=self._ids, use_cache=False).loss
        loss.backward()


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
