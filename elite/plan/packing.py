"""What a layer's parts hold where what they save is packed (elite/optimizations/activation_quantization.py). Bytes."""

from dataclasses import replace

from elite.facts import Facts
from elite.optimizations.activation_quantization import TILE_VALUES
from elite.optimizations.contract import Step
from elite.optimizations.parts import FP32, Part
from elite.optimizations.shapes import is_gated, mlp_width


def packed_bytes(part: Part, step: Step) -> float:
    """Bytes of what a part leaves once that is packed."""
    if step.packed_bits is None:
        return part.saved
    left = part.small + part.weights
    narrow = max(0.0, part.saved - left - part.wide_values)
    return left + step.packed_bits / 8 * (narrow / step.value + part.wide_values / FP32)


def packing(step: Step, facts: Facts, parts: tuple[Part, ...], forward: bool) -> tuple[Part, ...]:
    """A layer's parts at work where what they save is packed."""
    if step.packed_bits is None:
        return parts
    if step.recomputed:
        # What is computed again is not packed. The layer's input is a copy of the packed one.
        bare = [replace(part, whole_input=0.0) for part in parts]
        return (replace(bare[0], forward=max(bare[0].forward, _scratch(step, facts, parts[0]))), *bare[1:])
    return tuple((_packed_ahead if forward else _packed_behind)(step, facts, part) for part in parts)


def _scratch(step: Step, facts: Facts, part: Part) -> float:
    """Bytes at work while one of a part's tensors is packed or unpacked."""
    width = mlp_width(facts) if part.wide else facts.model.hidden_size
    return step.packing * min(TILE_VALUES, width * facts.micro_tokens)


def _packed_ahead(step: Step, facts: Facts, part: Part) -> Part:
    """While a part works, what its functions read is there beside the packed copies of it."""
    forward = _read_at_once(step, facts, part) + max(part.forward, _scratch(step, facts, part))
    return replace(part, saved=packed_bytes(part, step), scores=0.0, forward=forward)


def _packed_behind(step: Step, facts: Facts, part: Part) -> Part:
    """What a function reads is there again while it goes back."""
    work = max(part.work + _read_at_once(step, facts, part), _scratch(step, facts, part) - part.leaves)
    return replace(part, saved=packed_bytes(part, step), scores=0.0, work=work)


def _read_at_once(step: Step, facts: Facts, part: Part) -> float:
    """Of what a part saves and packs, what is there unpacked at once; of an MLP's elementwise functions two factors, and the input of a
    formula."""
    read, tensors = part.saved - part.small - part.weights, 2 if is_gated(facts) else 3
    return min(read, tensors * step.value * mlp_width(facts) * facts.micro_tokens) if part.wide else read
