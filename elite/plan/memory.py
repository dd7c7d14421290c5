"""Peak device memory of one training step, by component, in bytes.

Symbols: T tokens in one forward pass, S tokens in one sequence, L decoder layers, d hidden size, f MLP width, H query heads,
K key/value heads, D head dimension, V vocabulary, r adapter rank. One *value* is 4 bytes here (fp32); mixed precision halves it.

What autograd keeps of one decoder layer, in values a token (checked against saved tensors in tests/plan/test_memory.py):

    norms           each norm keeps its input                                     d a norm (two; one in parallel blocks such as Phi's)
    linear maps     a frozen map keeps nothing, but its adapter A keeps its input: each *distinct* input once, that is
                    the attention norm's output d, the attention's output HD, the MLP norm's output d (shared with the
                    attention's in parallel blocks), the MLP's product f
    adapters        A's output, B's input                                         r a map
    attention       query HD, key and value KD each, and the kernel's own output HD beside the contiguous copy that the
                    output map reads (packed documents and Phi's layout need that copy)
    gated MLP       activation's input, its output, the other factor               3f
    plain MLP       activation's input; GELU written as a formula (Phi) keeps four factors instead of one
    unfused scores  softmax output HS, and key and value expanded to the query heads, 2(H − K)D more
"""

from collections.abc import Iterable
from dataclasses import replace

from elite.facts import Facts
from elite.optimizations.contract import Decision, Estimate, Site
from elite.optimizations.shapes import adapter_rank, mlp_values, mlp_width, value_bytes

FP32 = 4
ADAM_STATE_BYTES = 8
"""Two fp32 moments a trained parameter."""
LOSS_BYTES = 12
"""A logit at the peak of the loss, in fp32 and bf16 alike: three fp32 values, or two and two bf16 ones (tests/plan/test_memory.py)."""
BATCH_BYTES = 24
"""Token ids, positions and labels, int64 each."""
CUDA_WORKSPACE_BYTES = 64 * 1024**2
"""cuBLAS and cuBLASLt workspaces, taken from the same allocator (assumption: 8 MiB before Hopper, 32 MiB and more since)."""
UNFUSED_TRANSIENTS = 3
"""Matrices [H, S, S] alive at once while the backward of one unfused attention runs: gradient of weights, of scores, a copy."""

PARALLEL_BLOCKS = frozenset({"phi", "cohere", "cohere2"})
"""Architectures whose attention and MLP read the same norm."""

NOT_MODELLED = (
    "reserved memory in the verdict: it is judged by what is allocated; what is reserved beyond has the headroom, the context the reserve",
    "loading: weights pass through host memory before they are converted",
    "host memory beyond a CPU run's tensors: libraries and the allocator's slack, which outweigh the tensors of a small run",
    "evaluation, which keeps no activations",
    "masks of a model's own dropout (Phi-2 trains with it)",
)


def layer_values(facts: Facts) -> int:
    """Values a token that one decoder layer keeps for its backward, with fused attention (see the module's docstring)."""
    model = facts.model
    hidden, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    norms = 1 if model.model_type in PARALLEL_BLOCKS else 2
    # Each norm keeps its input; its output is the distinct input of the maps behind it.
    values = norms * 2 * hidden
    values += 2 * heads + heads + 2 * keys
    values += mlp_values(facts)
    if facts.adapter == "lora":
        values += len(model.layer_linears) * adapter_rank(facts)
    else:
        # The weight of an RMS norm is trained and keeps the normalised input.
        values += norms * hidden
    return values


def unoptimized(facts: Facts) -> Estimate:
    """Everything off: fp32 weights, scores formed, every activation kept. Bytes."""
    model, tokens = facts.model, facts.micro_tokens
    layers, hidden = model.num_hidden_layers, model.hidden_size
    scores = facts.micro_batch * model.num_attention_heads * facts.context**2
    expanded = 2 * (model.num_attention_heads - model.num_key_value_heads) * model.head_dim * tokens
    # DDP keeps a second copy of the gradients in its buckets.
    gradients = FP32 * facts.trainable_params * (2 if facts.device.count > 1 else 1)
    return Estimate(
        linear_weights=FP32 * model.linear_params,
        other_weights=FP32 * (model.total_params - model.linear_params),
        trainable_copy=FP32 * facts.trainable_params if facts.adapter == "lora" else 0,
        gradients=gradients,
        optimizer_state=ADAM_STATE_BYTES * facts.trainable_params,
        saved_activations=FP32 * layers * layer_values(facts) * tokens,
        attention_scores=FP32 * layers * (scores + expanded),
        # The layer at work reads one hidden state and writes another.
        layer_workspace=FP32 * 2 * hidden * tokens,
        # Two gradients as wide as the MLP.
        mlp_workspace=FP32 * 2 * mlp_width(facts) * tokens,
        loss_workspace=LOSS_BYTES * tokens * model.vocab_size,
        batch=BATCH_BYTES * tokens,
        runtime=CUDA_WORKSPACE_BYTES if facts.device.kind == "cuda" else 0,
    )


def folded(facts: Facts, decisions: Iterable[Decision]) -> Estimate:
    """`unoptimized` with the effect of every active optimization, in their order: every component at its own highest. Bytes."""
    estimate = unoptimized(facts)
    for decision in decisions:
        if decision.active:
            estimate = decision.optimization.memory(estimate, facts)
    return estimate


def host(facts: Facts, decisions: tuple[Decision, ...]) -> float:
    """Pinned host memory of one rank under the whole executor. Bytes."""
    value = value_bytes(folded(facts, decisions), facts)
    return sum(decision.optimization.host_memory(value, facts) for decision in decisions if decision.active)


def predict(facts: Facts, decisions: tuple[Decision, ...]) -> Estimate:
    """Memory at the step's peak, so that the components sum to it. Bytes.

    Components that never meet don't add up: the logits are gone before a layer's backward starts, and a layer is recomputed only
    after that. The peak is the larger of the two moments; what the smaller one alone would hold is left out
    (`loss_workspace` is 0 where a layer's backward is the peak).
    """
    estimate = folded(facts, decisions)
    recomputed = any(d.active and Site.LAYER_ACTIVATIONS in d.optimization.claims for d in decisions)
    unfused = not any(d.active and Site.ATTENTION in d.optimization.claims for d in decisions)
    scores = UNFUSED_TRANSIENTS * FP32 * facts.micro_batch * facts.model.num_attention_heads * facts.context**2 if unfused else 0
    at_backward = replace(estimate, layer_workspace=estimate.layer_workspace + scores, loss_workspace=0.0)
    at_loss = replace(estimate, mlp_workspace=0.0)
    if recomputed:
        # Between forward and backward only the layers' inputs exist.
        at_loss = replace(at_loss, saved_activations=0.0, attention_scores=0.0)
    return max(at_loss, at_backward, key=lambda moment: moment.total)
