"""Overrides drawn from the configuration's own tree: wrong ones, each with the reason why, and right ones.

The tree is walked, so a new field takes part by itself: what no field may hold (elite/plan/values.py) is drawn for every field of its type.
"""

import random
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from elite import compose
from elite.plan.values import AT_MOST, LARGEST, MAY_BE_EMPTY, PATHS, RULES


@dataclass(frozen=True)
class Leaf:
    """A field that holds a value."""

    name: str
    kinds: tuple[type, ...]
    """Types it may have; a generic one by its origin."""
    optional: bool
    default: Any


@dataclass(frozen=True)
class Wrong:
    """Overrides that no run can have."""

    overrides: tuple[str, ...]
    why: str


def leaves(node: Any = None, prefix: str = "") -> Iterator[Leaf]:
    """Every field of every group."""
    node = compose.from_overrides("debug=tiny").config if node is None else node
    hints = get_type_hints(type(node))
    for field in fields(node):
        value, hint = getattr(node, field.name), hints[field.name]
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
            continue
        union = get_origin(hint) in (Union, types.UnionType)
        parts = get_args(hint) if union else (hint,)
        kinds = tuple(get_origin(part) or part for part in parts if part is not type(None))
        yield Leaf(f"{prefix}{field.name}", kinds, len(kinds) < len(parts), value)


def numeric(leaf: Leaf) -> bool:
    return leaf.kinds in ((int,), (float,))


def _unknown_key(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    name = draw.choice(all_leaves).name
    spoilt = draw.choice((f"{name}x", name.replace(".", ".x", 1), f"{name}.inner", name.upper(), f"x.{name}"))
    return Wrong((f"{spoilt}=1",), "no such field")


def _unknown_group(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    group = draw.choice(
        sorted({leaf.name.split(".")[0] for leaf in all_leaves} & {"tier", "hardware", "model", "schedule", "executor", "data"})
    )
    return Wrong((f"{group}={draw.choice(('nonsense', '../secret', '7', 'none_', 'Tier1'))}",), "no such option")


def _wrong_type(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    leaf = draw.choice(all_leaves)
    kind, values = leaf.kinds[0], ["{a: 1}", "[[1]]"]
    if leaf.kinds == (int, str):
        values += ["x", "1.5", "0", "-1"]
    elif kind is int:
        values += ["many", "1.5", "1e3x", "[1]"]
    elif kind is float:
        values += ["fast", "[1]", "1,5x"]
    elif kind is bool:
        values += ["maybe", "1.5.2", "[true]"]
    elif issubclass(kind, Enum):
        values += ["nonsense", "[a]", "7"]
    elif kind is str:
        values += ["[a]"]
    elif kind is list:
        values = ["{a: 1}", "7", "text"]
    elif kind is dict:
        values = ["[1]", "7", "text"]
    if not leaf.optional and kind not in (dict, list):
        values.append("null")
    # Fields that every set of these tests states itself come last, and win.
    return Wrong((f"{leaf.name}={draw.choice(values)}",), f"{leaf.name} holds a {kind.__name__}")


def _out_of_range(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    leaf = draw.choice([leaf for leaf in all_leaves if numeric(leaf)])
    most = AT_MOST.get(leaf.name, LARGEST)
    rules = [rule for rule in RULES if leaf.name in rule.fields]
    values: list[float] = [-1, -(10**30), int(most) * 2, 10**30]
    if leaf.kinds == (float,):
        values += [float("nan"), float("inf"), float("-inf"), -1e-9, 1e300]
    candidates = (0, 1, 2, 3, 0.0, 1.0, 1.5, 5.0)
    values += [value for value in candidates if isinstance(value, leaf.kinds[0]) and any(not rule.holds(value) for rule in rules)]
    value = draw.choice(values)
    return Wrong((f"{leaf.name}={value}",), f"{leaf.name}: {rules[0].words if rules else 'no negative, endless or absurd number'}")


def _bad_text(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    leaf = draw.choice([leaf for leaf in all_leaves if leaf.kinds == (str,)])
    values = ["'a\x1b[31mb'", "'a\x07'", "'a\u202eb'", f"'{'x' * 5000}'", "'a\tb\x7f'"]
    if leaf.name not in MAY_BE_EMPTY:
        values += ["''", "' '"]
    if leaf.name in PATHS:
        values += [f"'/{'y' * 300}/z'", "'~nobody_of_this_name/x'"]
    return Wrong((f"{leaf.name}={draw.choice(values)}",), f"{leaf.name}: no such text")


def _group_as_value(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    group = draw.choice(("training", "adapter", "output", "plan", "probe", "calibrate", "lr_range", "ablation", "evaluate"))
    return Wrong((f"{group}={draw.choice(('5', '[1]', 'text', '{nonsense: 1}'))}",), "a group of fields")


def _syntax(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    name = draw.choice(all_leaves).name
    broken = (
        f"{name}=[1",
        f"{name}={{a:",
        f"={name}",
        f"{name}",
        f"{name}='x",
        f"++={name}",
        f"{name}==[",
        f"{name}=a b=c",
        f"~{name}x",
        f"{name}=a:{{",
    )
    return Wrong((draw.choice(broken),), "no override")


def _injection(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    choices = (
        "+_target_=os.system",
        "+model._target_=os.system",
        "++training._target_=os.system",
        "+hydra2.x=1",
        "model.extra={_target_: os.system, _args_: [touch mark]}",
        "+model.extra._target_=os.system",
        "+model.rope_parameters._target_=os.system",
        "+model.extra.auto_map={AutoModelForCausalLM: a/b--c.D}",
        "+model.extra.attn_implementation=a/b",
        "name='${oc.env:NO_SUCH_VARIABLE}'",
        "name='${hydra:runtime.cwd}'",
        "name='${nonsense:1}'",
        "name='${tier}'",
        "seed='${oc.env:HOME}'",
        "name='${'",
        "name=../../elsewhere",
        "+experiment=../../../etc/passwd",
    )
    return Wrong((draw.choice(choices),), "not a value")


def _contradiction(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    choices = (
        ("schedule=wsd", "schedule.warmup_fraction=0.9"),
        ("lr_range.lowest=1", "lr_range.highest=0.1"),
        ("tier.context=256", "tier.target_length=256"),
        ("tier.context=100",),
        ("tier.context=56",),
        ("training.global_batch_tokens=1000",),
        ("hardware=auto", "hardware.cap=memory"),
        ("executor=streamed", "executor.keys_values=disk"),
        ("executor=streamed", "executor.keep=attention", "executor.encoding=int8"),
        ("curriculum=context", "curriculum.shares=[0.5,0.25,1]"),
        ("curriculum=context", "curriculum.shares=[0.3,1]"),
        ("curriculum=context", "curriculum.until=[0.5]"),
        ("curriculum=context", "curriculum.shares=[1e-310,0.5,1]"),
        ("curriculum=context", "training.max_steps=1"),
        ("model.num_attention_heads=5",),
        ("model.num_key_value_heads=3",),
        ("adapter.method=converted",),
        ("optimizations.ema.enabled=true", "optimizations.swa.enabled=true"),
        ("optimizations.fused_kernels.enabled=true", "optimizations.liger_kernels.enabled=true", "ablation.variant=nothing"),
        ("hardware.reserve_gib=1000",),
        ("hardware.compute_capability=x",),
        ("model.rope_parameters={rope_type: nonsense}",),
        ("model.model_type=nonsense",),
        ("model.model_type=bert",),
        ("ablation.variant=without_nonsense",),
    )
    return Wrong(draw.choice(choices), "do not go together")


def _missing(draw: random.Random, all_leaves: list[Leaf]) -> Wrong:
    choices = (
        ("data.repo=/does/not/exist",),
        ("data.repo=/dev/null",),
        ("data=jsonl", "data.path=/does/not/exist.jsonl"),
        ("data=jsonl",),
        ("data=jsonl", "data.path=/dev/zero"),
        ("data=hf", "data.path=/does/not/exist"),
        ("data=hf", "data.path=/dev/null"),
        ("data.source=csv",),
        ("model.path=/does/not/exist", "model.weights=pretrained"),
        ("model.path=/dev/null", "model.weights=pretrained"),
        ("mode=evaluate", "evaluate.run=/does/not/exist"),
        ("mode=train", "hardware=cpu", "resume=/does/not/exist"),
        ("mode=train", "hardware=cpu", "output.root=/proc/none"),
        ("mode=train", "hardware=cpu", "output.folder=/dev/null/x"),
        ("mode=interactive",),
    )
    return Wrong(draw.choice(choices), "not there")


KINDS: tuple[Callable[[random.Random, list[Leaf]], Wrong], ...] = (
    _unknown_key, _unknown_group, _wrong_type, _wrong_type, _wrong_type, _out_of_range, _out_of_range, _out_of_range, _out_of_range,
    _bad_text, _bad_text, _group_as_value, _syntax, _injection, _contradiction, _missing,
)  # fmt: skip


def wrong(count: int, seed: int) -> list[Wrong]:
    """So many different sets, of each kind in turn, after one of each group of fields: no draw may leave a group out."""
    draw, all_leaves = random.Random(seed), list(leaves())
    found: dict[tuple[str, ...], Wrong] = {}
    for group in dict.fromkeys(leaf.name.split(".")[0] for leaf in all_leaves):
        made = _wrong_type(draw, [leaf for leaf in all_leaves if leaf.name.split(".")[0] == group])
        found[made.overrides] = made
    turn = 0
    while len(found) < count:
        made = KINDS[turn % len(KINDS)](draw, all_leaves)
        found.setdefault(made.overrides, made)
        turn += 1
    return list(found.values())


GROUPS = {
    "tier": [f"tier{n}" for n in range(1, 8)],
    "hardware": [name for name in compose.options("hardware") if name != "auto"],
    "optimizations": compose.options("optimizations"),
    "curriculum": compose.options("curriculum"),
    "schedule": compose.options("schedule"),
    "executor": compose.options("executor"),
    "model": compose.options("model"),
    "logger": compose.options("logger"),
}
ELSEWHERE = {
    "mode": "a plan is what is made here",
    "data.max_file_bytes": "with the corpus",
    "tier.name": "of its group", "hardware.name": "of its group", "schedule.name": "of its group", "curriculum.name": "of its group",
    "executor.name": "of its group",
    "tier.context": "with the batch", "training.global_batch_tokens": "with the context", "tier.target_length": "with the context",
    "training.micro_batch": "with the batch", "hardware.gpus": "with the batch",
    "hardware.cap": "needs a preset", "hardware.compute_capability": "of its group", "hardware.reserve_gib": "with the memory",
    "model.path": "a folder", "model.model_type": "of its group", "model.trust_remote_code": "acts on a folder",
    "data.repo": "a folder", "data.path": "a file", "data.source": "of its group", "resume": "a folder",
    "adapter.method": "converted needs a conversion", "training.mid_step_checkpoint": "with the executor",
    "executor.keep": "with the encoding", "executor.encoding": "with the keep", "executor.keys_values": "disk is none",
    "executor.folder": "a folder", "curriculum.shares": "with each other", "curriculum.until": "with each other",
    "schedule.warmup_fraction": "with the decay", "schedule.decay_fraction": "with the warm-up",
    "lr_range.lowest": "with the highest", "lr_range.highest": "with the lowest", "ablation.variant": "names a part",
    "training.max_steps": "a curriculum's stages need steps", "training.epochs": "a curriculum's stages need steps",
}  # fmt: skip
"""Fields whose right values depend on another's, or are choices of a group: drawn as such above or in `PAIRS`."""
PAIRS = (
    ("tier.context=512", "tier.target_length=64", "training.global_batch_tokens=4096", "training.micro_batch=2"),
    ("tier.context=1024", "tier.target_length=2", "training.global_batch_tokens=1024"),
    ("tier.context=2048", "training.micro_batch=auto", "tier.target_length=1024"),
    ("schedule.warmup_fraction=0.5", "schedule.decay_fraction=0.5"),
    ("lr_range.lowest=1e-8", "lr_range.highest=1e-7"),
    ("executor.keep=layers", "executor.encoding=int8"),
    ("executor.keep=multilevel", "executor.slots=3", "executor.keys_values=host"),
    ("training.mid_step_checkpoint=true", "executor.name=streamed", "executor.boundaries=disk"),
    ("adapter.method=full",),
    ("training.max_steps=1000",),
    ("training.epochs=3.5",),
    ("ablation.variant=all",),
    ("ablation.variant=only_qlora",),
)


def right(count: int, seed: int) -> list[tuple[str, ...]]:
    """So many sets of choices and values that a run can have."""
    draw = random.Random(seed)
    free = [leaf for leaf in leaves() if leaf.name not in ELSEWHERE and not leaf.name.startswith(("optimizations.", "model.", "hardware."))]
    switches = [leaf for leaf in leaves() if leaf.name.startswith("optimizations.") and (numeric(leaf) or leaf.kinds == (bool,))]
    switches = [leaf for leaf in switches if not leaf.name.endswith(".enabled")]
    found = []
    for _ in range(count):
        chosen = [f"{group}={draw.choice(options)}" for group, options in GROUPS.items() if draw.random() < 0.5]
        for leaf in draw.sample(free, 6) + draw.sample(switches, 3):
            value = _right_value(draw, leaf)
            if value is not None:
                chosen.append(f"{leaf.name}={value}")
        if draw.random() < 0.5:
            chosen += draw.choice(PAIRS)
        found.append(tuple(chosen))
    return found


def _right_value(draw: random.Random, leaf: Leaf) -> str | None:
    kind = leaf.kinds[0]
    if leaf.optional and draw.random() < 0.2:
        return "null"
    if kind is bool:
        return draw.choice(("true", "false"))
    if issubclass(kind, Enum):
        return str(draw.choice(list(kind)).value)
    if kind is str:
        return draw.choice(("plain", "'with space'", "'ünï'")) if leaf.name not in PATHS else draw.choice(("some/folder", "'~/x'", "'a b'"))
    if not numeric(leaf):
        return None
    rules = [rule for rule in RULES if leaf.name in rule.fields]
    if leaf.name.startswith("optimizations."):
        return str(leaf.default) if leaf.default is not None else None
    candidates = [leaf.default, 1, 2, 7, 100] if kind is int else [leaf.default, 0.25, 0.5, 1e-3, 0.9, 1.5, 3.0]
    allowed = [value for value in candidates if value is not None and all(rule.holds(value) for rule in rules)]
    return str(draw.choice(allowed)) if allowed else None
