"""What ranks exchange in a step, and how long nothing hides it.

Each part says what it exchanges (`Optimization.exchange`); without one that decides otherwise, DDP adds up the gradients once a step. An
exchange takes its bytes over the rate of the link between GPUs. What goes on meanwhile: beside DDP's, the last micro-batch's backward, in
which gradients are sent as they come; beside the ring's, attention, which works on one block while the next one comes; beside a sum that
the next operation reads, nothing.

    gradients           4 bytes a trained parameter, or PowerSGD's factors; each rank sends 2(R − 1)/R of that; ZeRO-2 in every backward,
                        and (R − 1)/R for stepped weights. ZeRO-3: (R − 1)/R in every backward, and of weights, a layer's for each pass over
                        it (the whole executor's engine keeps what is trained from a pass that computes it again to its backward); under
                        the streamed executor those before and after the layers forward, and backward if they are trained
    keys and values     of one rank's tokens, key/value heads alone (elite/distributed/ring.py)
    partial results     a hidden state for each map divided by inputs (forward) and by outputs (backward), of which a rank sends 2(R − 1)/R

Source: Patarasuk & Yuan 2009 (an all-reduce's bytes); Shoeybi et al. 2019 (tensor parallelism); Liu et al. 2023 (ring attention).
"""

from collections.abc import Iterable

from elite.facts import Device, Facts
from elite.optimizations.contract import Behind, Decision, Exchange, Passes, Site, summed
from elite.optimizations.parts import FP32
from elite.optimizations.zero_3 import ZeRO3
from elite.plan.memory import folded
from elite.plan.traffic import active

LINK_SHARE = 0.8
"""Of the data sheet's rate between GPUs that exchanges reach (assumption)."""


def exchanges(facts: Facts, decisions: tuple[Decision, ...], forwards: float, passes: int, sweeps: float) -> tuple[Exchange, ...]:
    """What one rank exchanges in a step.

    Args:
        forwards: through the layers' attention in one micro-batch, repeated ones included.
        passes: micro-batches.
        sweeps: over each layer in one micro-batch, forward and backward.
    """
    if facts.device.count == 1:
        return ()
    step = Passes(passes, forwards, 2 if active(decisions, Site.COMPUTE_DTYPE) else FP32, _weights(facts, decisions, sweeps))
    found = [decision.optimization.exchange(step, facts) for decision in decisions if decision.active]
    if facts.dividing == 1 and not active(decisions, Site.GRADIENT_EXCHANGE):
        found.append(summed("gradients", FP32 * facts.trainable_params, facts.device.count, Behind.last_backward))
    return tuple(one for one in found if one is not None)


def _weights(facts: Facts, decisions: tuple[Decision, ...], sweeps: float) -> float:
    """Bytes of weights that one micro-batch needs whole, each time that it does."""
    model, streamed, full = facts.model, facts.executor == "streamed", facts.adapter == "full"
    # As they would stand on one device.
    standing = folded(facts, (decision for decision in decisions if not isinstance(decision.optimization, ZeRO3))).standing
    width = standing.other_weights / (model.total_params - model.linear_params)
    inner = model.num_hidden_layers * model.layer_params
    frozen, trained = standing.linear_weights + width * (inner - model.linear_params), 0.0 if full else FP32 * facts.trainable_params
    if not streamed:
        frozen += width * (model.total_params - inner)
        return 2 * frozen if full else sweeps * frozen + 2 * trained
    return sweeps * (frozen + trained) + (2 if full else 1) * width * 2 * model.embedding_params


def exposed_s(found: Iterable[Exchange], device: Device, behind: dict[Behind, float]) -> float:
    """Seconds of a step in which exchanges are under way and nothing else.

    Args:
        behind: seconds of a step that each kind of work takes.
    """
    rate = LINK_SHARE * device.link_bytes_per_s if device.link_bytes_per_s else device.host_link_bytes_per_s
    return sum(max(0.0, one.link_bytes / rate - behind.get(one.behind, 0.0)) for one in found)
