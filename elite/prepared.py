"""A process made ready for a run: what the run folder describes, the dtype, the memory cap, the seed."""

import os
import random
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from elite import geometry, hardware
from elite.config import AUTO, Cap, Executor, RunConfig
from elite.data.tokens import TokenStore, open_store
from elite.distributed.ranks import Ranks
from elite.errors import CheckpointError, DataError
from elite.facts import Corpus, Device, Facts
from elite.jsonfile import read_object
from elite.model import apply_stage
from elite.optimizations import decide
from elite.optimizations.contract import Applied, Decision, Stage
from elite.optimizations.targets import BatchLayout, Runtime
from elite.optimizations.zero_3 import divides_weights
from elite.plan import Plan, facts_of, make_plan
from elite.plan.batch import with_micro_batch
from elite.runfolder import ANOTHER, RunFolder
from elite.schema import from_yaml
from elite.streaming import Streaming


@dataclass(frozen=True)
class Run:
    """What every part of a run needs to know."""

    config: RunConfig
    """With a number as micro-batch."""
    plan: dict[str, Any]
    searches: bool
    """The micro-batch is the plan's guess, and the largest is still to be found."""
    device: Device
    facts: Facts
    decisions: tuple[Decision, ...]
    dtype: torch.dtype
    """Of matrix products and frozen weights."""
    packed: bool
    mapped: bool
    """The corpus is read where it lies on disk."""
    applied: dict[str, Applied]
    """What the optimizations of batch layout and dtype touched."""
    folder: RunFolder
    ranks: Ranks

    @property
    def carriers(self) -> Ranks:
        """This process among those that carry other sequences."""
        return carriers_of(self.ranks, self.facts)

    @property
    def layout(self) -> Streaming | None:
        """Of the streamed executor; None under the whole one."""
        plain = self.plan["layout"]
        try:
            return Streaming.from_dict(plain) if plain else None
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{self.folder.plan} is damaged: its layout is {plain!r}", ANOTHER) from error


def prepared(folder: RunFolder, ranks: Ranks) -> Run:
    """What the folder describes, with this process made ready for it."""
    config, plan = from_yaml(folder.config), read_plan(folder)
    # Found once: a run that continues deals its batches as before.
    wanted = config.training.micro_batch == AUTO and plan.get("layout") is None and not folder.micro_batch.is_file()
    config = with_micro_batch(config, plan["micro_batch"])
    # One process evaluates what several have trained.
    device = replace(hardware.device(config.hardware), count=ranks.world)
    if device.kind == "cuda":
        # As it was before this process took its own part of the device.
        device = replace(device, memory_usable_bytes=plan["usable_bytes"])
    plan = completed(plan, config, device)
    facts = facts_of(config, device, geometry.shape(config.model), plan["executor"])
    decisions = decide(config.optimizations, facts)
    # A pass that takes all ranks cannot fail on one: the plan's guess stands.
    searches = wanted and not divides_weights(decisions)
    prepare_process(config, ranks, device)
    batches = BatchLayout()
    applied = apply_stage(Stage.data, decisions, batches)
    dtype, of_dtype = compute_dtype(decisions, device)
    applied |= of_dtype
    # Where ranks divide layers, one that fails alone leaves the others waiting: the plan's answer stands.
    searches = searches and facts.dividing == 1
    return Run(config, plan, searches, device, facts, decisions, dtype, batches.packed, batches.mapped, applied, folder, ranks)


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """Contents of `plan.json`; of an older version it may lack fields.

    Raises:
        CheckpointError: it is damaged.
    """
    plan = read_object(folder.plan, CheckpointError, ANOTHER)
    kinds: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
    for name, kind in get_type_hints(Plan).items():
        if name in plan and kind in kinds and not isinstance(plan[name], kinds[kind]):
            raise CheckpointError(f"{folder.plan} is damaged: {name} is {plan[name]!r}", ANOTHER)
    if "micro_batch" not in plan:
        raise CheckpointError(f"{folder.plan} is damaged: micro_batch is missing", ANOTHER)
    return plan


def corpus_of(folder: RunFolder, mapped: bool = True) -> TokenStore:
    """The tokenised corpus that the folder names.

    Args:
        mapped: read it from the disk as it is needed, not into memory at once.

    Raises:
        DataError: it is not there any more.
    """
    path = Path(folder.read_identity()["tokens"])
    store = open_store(path)
    if store is None:
        raise DataError(f"the tokenised corpus {path} is gone or damaged", "resume=never tokenises anew and starts another run")
    return store if mapped else store.resident()


def completed(plan: dict[str, Any], config: RunConfig, device: Device) -> dict[str, Any]:
    """A plan that an older version wrote, with what that did not say yet planned now; what a run was begun with stays."""
    if all(field.name in plan for field in fields(Plan)):
        return plan
    # The first version had the whole executor alone.
    begun = replace(config, executor=replace(config.executor, name=Executor(plan.get("executor", Executor.whole.value))))
    return make_plan(begun, device, geometry.shape(config.model), Corpus(**plan["corpus"])).to_dict() | plan


def carriers_of(ranks: Ranks, facts: Facts) -> Ranks:
    """This process among those that carry other sequences: it is alone where ranks divide each layer, who carry the same."""
    return replace(ranks, rank=0, world=1) if facts.dividing > 1 else ranks


def compute_dtype(decisions: tuple[Decision, ...], device: Device) -> tuple[torch.dtype, dict[str, Applied]]:
    """Dtype of matrix products and frozen weights, and which optimization decided it."""
    runtime = Runtime(device.supports_bf16)
    applied = apply_stage(Stage.runtime, decisions, runtime)
    return getattr(torch, runtime.compute_dtype), applied


def prepare_process(config: RunConfig, ranks: Ranks, device: Device) -> None:
    """Determinism, the memory cap and the kernels of an emulated card, the seed."""
    if config.training.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    if config.hardware.cap is not Cap.none and ranks.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(device.memory_usable_bytes / torch.cuda.get_device_properties(ranks.device).total_memory)
    if config.hardware.cap is Cap.emulate and device.compute_capability is not None and device.compute_capability < (8, 0):
        # What is left to torch's own attention is the memory-efficient kernel.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    # Nothing of ours draws from the first two; what a library draws is then the same each time, too.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
