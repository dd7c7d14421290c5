"""A trained run, or a base model, on held-out files: loss with and without context, loss by position, completions of the next line."""

import difflib
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from elite import checkpoint, hardware, pretrained
from elite.console import console
from elite.data.tokens import TokenStore
from elite.data.validation import Completion, completion_examples, validation_batches
from elite.distributed.ranks import Ranks
from elite.executor.build import build, streams_weights
from elite.mode_options import EvaluateConfig
from elite.model import LoadedModel, load, load_trained
from elite.optimizations import OptimizationsConfig, decide
from elite.optimizations.contract import Decision, Estimate, Stage
from elite.plan.generation import generation_tokens
from elite.prepared import Run, corpus_of, prepared
from elite.report.evaluation import render
from elite.runfolder import RunFolder, environment
from elite.training.generation import Generator, generator, pages_for
from elite.training.positions import by_position
from elite.training.validation import Validator


def evaluate(folder: RunFolder, options: EvaluateConfig, optimizations: OptimizationsConfig, ranks: Ranks) -> dict[str, Any]:
    """Evaluate what the folder holds, write `evaluation.json` there, and print it.

    Args:
        folder: of a run, its configuration and corpus; without weights in it the base model is evaluated.
        optimizations: decide how text is generated; everything else is as the run was trained.

    Raises:
        EliteError: the model or corpus is gone, or does not fit.
    """
    run = prepared(folder, ranks)
    hardware.require_present(run.device, run.config.hardware)
    facts = replace(run.facts, generates=True)
    generation = replace(run.config.optimizations, paged_attention=optimizations.paged_attention)
    decisions = decide(generation, facts)
    loaded = load(run.config, run.decisions, run.dtype, ranks.device, streams_weights(run.layout))
    weights = trained_weights(folder)
    if weights is not None:
        load_trained(loaded, weights)
    store = corpus_of(folder)
    found = {
        "model": run.plan["model"],
        "weights": str(weights.relative_to(folder.path)) if weights else "base",
        "context": run.config.tier.context,
        **_losses(run, loaded, store),
        "completions": _completions(run, loaded, store, options, decisions),
        "environment": environment(),
    }
    folder.evaluation.write_text(json.dumps(found, indent=2))
    console.print(render(found))
    console.print(f"results in {folder.evaluation}", markup=False)
    return found


def trained_weights(folder: RunFolder) -> Path | None:
    """The newest weights of the run: its result, or what its last checkpoint holds; None if it has none."""
    if folder.final.is_dir():
        return folder.final
    newest = checkpoint.latest(folder.checkpoints)
    return newest / "model" if newest else None


def _losses(run: Run, loaded: LoadedModel, store: TokenStore) -> dict[str, Any]:
    config, ranks = run.config, run.ranks
    executor = build(loaded, run.layout, run.dtype, run.device, ranks, Path(config.output.cache).expanduser()).validation
    context, count, seed = config.tier.context, config.data.val_sequences, config.seed
    with_context, alone = (
        validation_batches(store, context, config.tier.target_length, count, seed, with_context=flag) for flag in (True, False)
    )
    # Held-out text alone: what the model was trained on would make far positions look easy.
    whole = validation_batches(store, context, context, count, seed, with_context=False)
    return {
        **Validator(executor, with_context, alone, ranks)(),
        "val_sequences": len(with_context),
        "by_position": [asdict(bucket) for bucket in by_position(executor, whole, context, ranks)],
    }


def _completions(
    run: Run, loaded: LoadedModel, store: TokenStore, options: EvaluateConfig, decisions: tuple[Decision, ...]
) -> dict[str, Any] | None:
    """Samples of the same prompts, and how well they hit the next line; None if there are none."""
    if not options.files:
        return None
    config, count, new = run.config, options.completions, options.tokens
    tokenizer: Any = pretrained.tokenizer(config.model, Path(config.output.cache).expanduser(), download=False)
    # Neither gradients nor an optimizer are there.
    estimate = replace(Estimate(**run.plan["memory"]), gradients=0.0, optimizer_state=0.0)
    usable = run.device.memory_usable_bytes * (1 - config.plan.headroom_fraction)
    room = generation_tokens(run.facts, decisions, estimate, usable, count, new)
    continued, applied = generator(loaded, decisions, run.dtype, run.ranks.device, tokenizer.eos_token_id)
    examples = completion_examples(store, room, new, options.files, config.seed)
    files = [_one(continued, tokenizer, example, options, config.seed) for example in examples]
    scores = [score for file in files for score in file["scores"]]
    return {
        "count": count,
        "tokens": new,
        "temperature": options.temperature if count > 1 else 0.0,
        "applied": {name: f"{act.count} {act.detail}" for name, act in applied.items()},
        "inactive": {d.name: d.reason for d in decisions if d.requested and d.optimization.stage is Stage.generation and not d.active},
        "exact": statistics.mean(score["exact"] for score in scores) if scores else None,
        "exact_any": statistics.mean(any(score["exact"] for score in file["scores"]) for file in files) if files else None,
        "similarity": statistics.mean(score["similarity"] for score in scores) if scores else None,
        "files": files,
    }


def _one(continued: Generator, tokenizer: Any, example: Completion, options: EvaluateConfig, seed: int) -> dict[str, Any]:
    new, count = len(example.reference), options.completions
    texts = [
        tokenizer.decode(tokens, skip_special_tokens=True)
        for tokens in continued(example.prompt, new, count, options.temperature if count > 1 else 0.0, seed)
    ]
    reference = tokenizer.decode(example.reference, skip_special_tokens=True)
    pages = pages_for(len(example.prompt), new, count, continued.build.page) if continued.build.page else None
    return {
        "path": example.path,
        "prompt_tokens": len(example.prompt),
        "pages": None if pages is None else {"tokens": pages.page, "shared": pages.shared, "own": pages.own},
        "reference": reference,
        "texts": texts,
        "scores": [scored(text, reference) for text in texts],
    }


def next_line(text: str) -> str:
    """The first line that is not blank, without space around it."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def scored(text: str, reference: str) -> dict[str, float]:
    """Exact match and edit similarity (0 to 1) of the next line, as code completion is commonly scored.

    Source: Lu et al. 2021, arXiv:2102.04664 (CodeXGLUE); Liu et al. 2023, arXiv:2306.03091 (RepoBench). The similarity is
    difflib's: twice the characters of matching blocks over all characters.
    """
    one, two = next_line(text), next_line(reference)
    return {"exact": float(one == two), "similarity": difflib.SequenceMatcher(None, one, two, autojunk=False).ratio()}
