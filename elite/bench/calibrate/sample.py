"""A seeded draw of configurations that fit a device and whose steps are short enough to measure many.

Models come in turn, and contexts from equal shares of the logarithm between shortest and longest; everything else is drawn freely, and
drawn again where the plan does not fit, two switches exclude each other, or a step would take too many operations. These are counted here,
at one rate for every card, so that a better model of time changes no draw. The same seed, space and card draw the same on any machine.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from elite import geometry, hardware
from elite.compose import from_overrides
from elite.config import AdapterMethod, ModelConfig, RunConfig
from elite.errors import ConfigError, EliteError
from elite.facts import GIB, Device, ModelShape
from elite.plan.executors import choose_executor

SETS = {"fit": 1, "held_out": 2}
"""Seeds of the two grids: one to fit constants to, one to hold what was fitted against."""
TRIES = 400
"""Draws for one configuration before its share of contexts is given up for any context."""
RATE_FLOPS_PER_S = 4e14
"""At which `reference_seconds` counts: about what large steps reach on one H100."""
HOST_BYTES = 8 * GIB
"""Pinned host memory of a configuration, at most: locking pages takes time too."""
WHOLE_SHARE = 0.6
"""Of the draws short enough for the whole executor."""
LOADING_SHARE = 0.9
"""Random weights are made on the device in full before they are packed or moved away; they may take this share of it."""
ADAPTERS = (
    ("adapter.method=lora",),
    ("adapter.method=lora", "optimizations.qlora.enabled=true"),
    ("adapter.method=full",),
)
RECOMPUTATIONS = ("none", "gradient_checkpointing", "gradient_checkpointing", "checkpoint_offload")
KERNELS = ("none", "fused_kernels", "fused_kernels", "liger_kernels")
TOGGLES = ("memory_pool", "fused_loss", "fused_lora", "tiled_mlp", "adamw_8bit")


@dataclass(frozen=True)
class Space:
    """What is drawn from."""

    name: str
    models: tuple[str, ...]
    depths: tuple[int, ...]
    """Decoder layers, at most the model's own."""
    hardware: tuple[tuple[str, ...], ...]
    contexts: tuple[int, int]
    """Shortest and longest, in tokens."""
    multiple: int
    """Of which every context is one."""
    whole_most: int
    """Longest context under the whole executor."""
    chunks: tuple[int, ...]
    step_s: float
    """Longest step of short contexts, by `reference_seconds`."""
    longest_step_s: float
    """Of the longest context; those between in proportion."""
    geometry: tuple[str, ...] = ()
    """Overrides of every model."""
    switches: dict[str, bool] = field(default_factory=dict)
    """Optimizations that are not drawn."""

    def limit_s(self, context: int) -> float:
        """Longest step at this context."""
        return max(self.step_s, self.longest_step_s * context / self.contexts[1])


ANY_CARD = ("hardware=auto",)
CAPS = tuple((f"hardware={card}", "hardware.cap=memory") for card in ("rtx2060s", "rtx3060", "rtx3090", "rtx4090"))
GPU = Space(
    name="gpu",
    models=("phi2", "llama31_8b", "qwen25_coder_1_5b"),
    depths=(1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    hardware=(ANY_CARD, ANY_CARD, ANY_CARD, *CAPS),
    contexts=(2048, 524_288),
    multiple=256,
    whole_most=131_072,
    chunks=(4096, 8192, 16384),
    step_s=2.0,
    longest_step_s=10.0,
    # Without flash attention no more than a few thousand tokens would fit; rows of random tokens have no documents to pack.
    switches={"flash_attention": True, "sequence_packing": False},
)
# What is taken ahead no cap takes back.
AS_NEEDED = (*ANY_CARD, "plan.take_ahead=false")
PAGED = replace(
    GPU, name="paged", switches=GPU.switches | {"memory_pool": True}, hardware=(AS_NEEDED,), contexts=(2048, 65_536), longest_step_s=2.0
)
"""Without caps of cards, in pages: for caps of its own."""
CPU = Space(
    name="cpu",
    models=GPU.models,
    depths=(1, 2),
    hardware=(("hardware=cpu",),),
    contexts=(128, 1024),
    multiple=64,
    whole_most=512,
    chunks=(64, 128),
    step_s=1e-4,
    longest_step_s=1e-4,
    geometry=(
        "model.hidden_size=64",
        "model.intermediate_size=128",
        "model.num_attention_heads=4",
        "model.num_key_value_heads=2",
        "model.vocab_size=512",
    ),
    # So tiny adapters are below what the 8-bit optimizer quantises.
    switches=GPU.switches | {"mixed_precision": False, "adamw_8bit": False},
)
"""Tiny models, for machines without a GPU."""
SPACES = {space.name: space for space in (GPU, PAGED, CPU)}


@dataclass(frozen=True)
class Drawn:
    """One configuration."""

    name: str
    overrides: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self) | {"overrides": list(self.overrides)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Drawn":
        """What `to_dict` made plain."""
        return cls(plain["name"], tuple(plain["overrides"]))


def draw(seed: int, count: int, space: Space = GPU, card: str = "h100") -> list[Drawn]:
    """`count` configurations.

    Args:
        card: hardware preset on which configurations without a cap, and with one, are planned; present or not.

    Raises:
        ConfigError: unknown card.
    """
    if space is not CPU and card not in hardware.presets():
        raise ConfigError(f"{card} is no hardware preset", f"one of {', '.join(hardware.presets())}")
    generator = random.Random(f"{space.name} {seed} {count}")
    low, high = space.contexts
    shares, models = list(range(count)), [space.models[i % len(space.models)] for i in range(count)]
    generator.shuffle(shares)
    generator.shuffle(models)
    made = []
    for i, (share, model) in enumerate(zip(shares, models, strict=True)):
        bounds = [low * (high / low) ** (edge / count) for edge in (share, share + 1)]
        made.append(Drawn(f"{i:02}", next(_fitting(generator, space, card, model, bounds))))
    return made


def _fitting(generator: random.Random, space: Space, card: str, model: str, bounds: list[float]) -> Iterator[tuple[str, ...]]:
    tries = 0
    while True:
        tries += 1
        context = _log_uniform(generator, *(bounds if tries <= TRIES else space.contexts))
        size = _sized(generator, space, model, max(space.multiple, round(context / space.multiple) * space.multiple))
        overrides = _chosen(generator, space, size)
        if reference_seconds(_shape(size.model, size.depth, space.geometry), size.context, size.batch) <= space.limit_s(size.context):
            config = from_overrides(*overrides).config
            if _fits(config, card):
                yield overrides


@dataclass(frozen=True)
class _Size:
    model: str
    depth: int
    context: int
    batch: int


def _sized(generator: random.Random, space: Space, model: str, context: int) -> _Size:
    most = _preset(model).num_hidden_layers
    return _Size(model, generator.choice([depth for depth in space.depths if depth <= most]), context, generator.choice((1, 2, 3, 4)))


@cache
def _preset(model: str) -> ModelConfig:
    """A preset as it stands."""
    return from_overrides(f"model={model}").config.model


@cache
def _shape(model: str, depth: int, changes: tuple[str, ...]) -> ModelShape:
    return geometry.shape(from_overrides(f"model={model}", f"model.num_hidden_layers={depth}", *changes).config.model)


def _chosen(generator: random.Random, space: Space, size: _Size) -> tuple[str, ...]:
    """Overrides at this size, whether they go together or not."""
    whole = size.context <= space.whole_most and generator.random() < WHOLE_SHARE
    words = [
        f"model={size.model}",
        "model.weights=random",
        f"model.num_hidden_layers={size.depth}",
        *space.geometry,
        "tier=tier1",
        f"tier.context={size.context}",
        "tier.target_length=64",
        "training.max_steps=1",
        f"training.micro_batch={size.batch}",
        f"training.global_batch_tokens={size.batch * size.context}",
        *generator.choice(space.hardware),
        *generator.choice(ADAPTERS),
        f"adapter.rank={generator.choice((4, 8, 16, 64))}",
        f"executor={'whole' if whole else 'streamed'}",
    ]
    switches = dict.fromkeys((*RECOMPUTATIONS, *KERNELS), False) | {name: generator.random() < 0.5 for name in TOGGLES} | space.switches
    for chosen in (generator.choice(RECOMPUTATIONS), generator.choice(KERNELS)):
        switches[chosen] = True
    words += [f"optimizations.{name}.enabled={str(on).lower()}" for name, on in switches.items() if name != "none"]
    if not whole:
        options = {"keep": ("attention", "layers", "sqrt"), "weights": ("resident", "streamed"), "chunk": space.chunks}
        words += [f"executor.{name}={generator.choice(values)}" for name, values in options.items() if generator.random() < 0.5]
    # Weights that are trained stay on the device.
    refused = {"executor.weights=streamed"} if "adapter.method=full" in words else set()
    return tuple(word for word in words if word not in refused)


def _log_uniform(generator: random.Random, low: float, high: float) -> float:
    return float(low * (high / low) ** generator.random())


def reference_seconds(shape: ModelShape, context: int, batch: int) -> float:
    """Operations of one step, everything computed twice and every weight trained, at `RATE_FLOPS_PER_S`."""
    matrices = 8.0 * (shape.linear_params + shape.hidden_size * shape.vocab_size)
    # Causal: half of S²; two products forward, twice, and five backward.
    attention = 9.0 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * context
    return context * batch * (matrices + attention) / RATE_FLOPS_PER_S


def stand_in(config: RunConfig, card: str) -> Device:
    """The device of this configuration on a machine with one such card, whether it is here or not."""
    if config.hardware.name == "cpu":
        return replace(hardware.device(config.hardware), memory_usable_bytes=4 * GIB)
    preset = hardware.presets()[card]
    total, (major, _, minor) = int(preset.memory_gib * GIB), preset.compute_capability.partition(".")
    gpu = hardware.Gpu(preset.name.upper(), total, total, (int(major), int(minor)))
    return replace(hardware.device(config.hardware, lambda: [gpu]), host_ram_bytes=int(preset.host_ram_gib * GIB))


def _fits(config: RunConfig, card: str) -> bool:
    shape = geometry.shape(config.model)
    try:
        device = stand_in(config, card)
        made = choose_executor(config, device, shape, 1)
    except EliteError:
        # Switches that exclude each other.
        return False
    # A cap beyond the card is no cap.
    possible = device.present and made.fits and made.executor is config.executor.name
    return possible and _loads(config, device, shape) and made.host_bytes <= HOST_BYTES


def _loads(config: RunConfig, device: Device, shape: ModelShape) -> bool:
    width = 4 if config.adapter.method is AdapterMethod.full or not config.optimizations.mixed_precision.enabled else 2
    return width * shape.total_params <= LOADING_SHARE * device.memory_usable_bytes
