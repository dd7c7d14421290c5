"""Peak device memory of one training step, by component, in bytes.

A layer is a row of parts (elite/optimizations/parts.py). While one of them goes back, alive are what the parts before it have left, the
gradients that arrive and leave, what it needs meanwhile, and gradients that wait for parts further down. A step's moments are

    forward     the last layer's parts, beside what the layers before it keep
    loss        logits and their gradients, beside what all layers keep
    backward    of the last layer, when most is kept, and of the first, when most gradients of weights exist; if layers are
                recomputed, that comes first
    update      weights, gradients, the optimizer's state and what it needs meanwhile

and the peak is the moment that holds most: its components sum to it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from elite.facts import Facts
from elite.optimizations.contract import Decision, Estimate, Site, Step
from elite.optimizations.parts import FP32, Part, Sizes
from elite.optimizations.shapes import PARALLEL_BLOCKS, adapter_rank, layer_maps
from elite.plan.moments import passing, plus
from elite.plan.packing import packed_bytes, packing
from elite.plan.tiled import Whole, tiled

ADAM_STATE_BYTES = 8
"""Two fp32 moments a trained parameter."""
LOSS_BYTES = 12
"""A logit when the loss goes back: its log-probability, the gradient of that and its own, in fp32 also where logits are bf16."""
BATCH_BYTES = 24
"""Token ids, positions and labels, int64 each."""
OUTPUT_MAP = 4
"""The attention's output map among a layer's parts."""
CUDA_WORKSPACE_BYTES = 32 * 1024**2
"""cuBLAS's, of the one thread and stream that multiply (calibration_fourth.json, on Hopper; torch's default for older cards is 8 MiB)."""

NOT_MODELLED = (
    "reserved memory in the verdict: it is judged by what is allocated; what is reserved beyond has the headroom, the context the reserve",
    "loading: weights pass through host memory before they are converted",
    "host memory beyond a CPU run's tensors: libraries and the allocator's slack, which outweigh the tensors of a small run",
    "evaluation, which keeps no activations",
    "a checkpoint's copy in host memory while it is written, but for a warning where it exceeds what a GPU's host has",
)


def unoptimized(facts: Facts) -> Step:
    """Everything off: fp32 weights, scores formed, every activation kept."""
    model = facts.model
    # DDP's buckets are there all the time. A gradient made in a step's last backward lies in them at once, what earlier ones have added up
    # stands beside them until then.
    buckets = facts.device.count > facts.dividing
    gradients = FP32 * facts.trainable_params * (2 if buckets and facts.accumulation > 1 else 1)
    standing = Estimate(
        linear_weights=FP32 * model.linear_params,
        other_weights=FP32 * (model.total_params - model.linear_params),
        trainable_copy=FP32 * facts.trainable_params if facts.adapter == "lora" else 0,
        gradients=gradients,
        optimizer_state=ADAM_STATE_BYTES * facts.trainable_params,
        batch=BATCH_BYTES * facts.micro_tokens,
        runtime=CUDA_WORKSPACE_BYTES if facts.device.kind == "cuda" else 0,
    )
    # AdamW on CUDA takes the square roots of all second moments at once; on a CPU one tensor's after another's.
    together = facts.trainable_params if facts.device.kind == "cuda" else _one_by_one(facts)
    return Step(standing, optimizer_workspace=FP32 * together, gradients_stand=buckets and facts.accumulation == 1)


def folded(facts: Facts, decisions: Iterable[Decision]) -> Step:
    """`unoptimized` with the effect of every active optimization, in their order."""
    step = unoptimized(facts)
    for decision in decisions:
        if decision.active:
            step = decision.optimization.memory(step, facts)
    return step


def host(facts: Facts, decisions: tuple[Decision, ...]) -> float:
    """Pinned host memory of one rank under the whole executor. Bytes."""
    step = folded(facts, decisions)
    return sum(decision.optimization.host_memory(step, facts) for decision in decisions if decision.active)


def averages(decisions: Iterable[Decision]) -> int:
    """How often all that is trained stands there once more: an average of it, or what it returns to."""
    claims = [decision.optimization.claims for decision in decisions if decision.active]
    return sum(bool(sites & {Site.EVALUATED_WEIGHTS, Site.SLOW_WEIGHTS}) for sites in claims)


def predict(facts: Facts, decisions: Iterable[Decision]) -> Estimate:
    """Memory at the step's peak, so that the components sum to it. Bytes."""
    return max(moments(folded(facts, decisions), facts), key=lambda moment: moment.total)


def moments(step: Step, facts: Facts) -> Iterator[Estimate]:
    """Memory at every moment that may be the peak, in the order of a step."""
    layers, parts = facts.model.num_hidden_layers, layer_parts(step, facts, facts.micro_tokens)
    model, width, full = facts.model, step.hidden * facts.model.hidden_size, facts.adapter == "full"
    standing = plus(step.standing, batch=2 * model.rotary_dim * step.hidden * facts.micro_tokens)
    # While it works forward, a layer that packs has its tensors beside their copies; while it goes back, what is read is there again.
    ahead, behind = packing(step, facts, parts, forward=True), packing(step, facts, parts, forward=False)
    made = _first_made(step, facts)
    before = plus(standing, gradients=-made)
    # Autocast's copies of weights stay through the forward; those that a backward reads are among what parts save.
    copies = layers * sum(part.weights for part in parts) if step.recomputed and step.copies_stay else 0.0
    yield from _forward(plus(before, _kept(step, facts, parts, layers, True)), step, ahead, copies)
    yield from _loss(step, facts, plus(before, _kept(step, facts, parts, layers, False)), copies)
    # The lowest passes no gradient on, unless the embedding is trained: the one above it may hold more.
    for layer in (layers, min(layers, 2), 1):
        above = FP32 * _outer_params(facts) + (layers - layer) * gradients_of_layer(facts)
        # A map's, where gradients leave as they are made.
        largest = max(linear.inputs * linear.outputs for linear in model.layer_linears)
        leaving = step.leaving(largest) if full and step.gradients_stand else 0.0
        held = plus(before, _kept(step, facts, parts, layer, True), gradients=min(above, made) + leaving)
        if step.loss_tile is not None:
            held = plus(held, runtime=step.beside_head)
        if layer == 1 and not full:
            # No gradient passes the first norm where the embedding is frozen.
            behind = packing(step, facts, layer_parts(step, facts, facts.micro_tokens, lowest=True), forward=False)
            behind = (replace(behind[0], saved=0.0, whole_input=0.0), *behind[1:])
        if step.recomputed:
            again = [*behind[:-1], replace(behind[-1], forward=behind[-1].forward - behind[-1].spared)]
            arrived = _arrived(step, facts, lowest=layer == 1 and not full)
            yield from passing(plus(held, layer_workspace=arrived), again, forward=True)
        if step.inputs_at_once is not None and not behind[0].whole_input:
            # What came back for this layer has been read, and no norm keeps it.
            held = plus(held, layer_inputs=-width * facts.micro_tokens)
        yield from passing(held, behind, forward=False, makes=made > 0)
    if full and (made or step.gradients_stand):
        # The embedding's gradient is dense, and waits for nothing but itself, unless the head's is to be added to it.
        leaving = step.leaving(model.embedding_params) if step.gradients_stand else 0.0
        beside = leaving + (FP32 * model.embedding_params if model.tied else 0)
        yield plus(standing, layer_workspace=width * facts.micro_tokens + beside)
    yield replace(standing, optimizer_workspace=step.optimizer_workspace)


def _arrived(step: Step, facts: Facts, lowest: bool) -> float:
    """Gradients that wait for a layer to be computed again: its output's. A kernel of both sums, which needs nothing of the layer, has made
    one of it for each branch, and goes on with its own unless nobody asks for it."""
    model, stream = facts.model, step.hidden * facts.model.hidden_size * facts.micro_tokens
    if not _at_once(step, facts):
        return stream
    return (0.0 if lowest else stream) + 2 * step.value * model.hidden_size * facts.micro_tokens


def _at_once(step: Step, facts: Facts) -> bool:
    """Whether one kernel adds both branches of a layer to the stream, behind their dropouts."""
    return facts.model.model_type in PARALLEL_BLOCKS and facts.model.residual_dropout and not step.form.keeps_masks


def _forward(held: Estimate, step: Step, parts: tuple[Part, ...], copies: float) -> Iterator[Estimate]:
    """Moments of the last layer's forward, beside what the layers before it keep and all layers' copies of weights."""
    if not step.recomputed:
        yield from passing(held, parts, forward=True)
        return
    for index, part in enumerate(parts):
        # Where nothing stays for a backward, a part meets its input and no more, and those copies that have been made.
        made = copies - sum(later.weights for later in parts[index + 1 :]) if step.copies_stay else part.weights
        yield from passing(plus(held, trainable_copy=made), [replace(part, saved=part.saved - part.weights)], forward=True)


def _first_made(step: Step, facts: Facts) -> float:
    """Gradients that exist only once the backward has made them: in the only pass of a step."""
    return FP32 * facts.trainable_params if facts.accumulation == 1 and not step.gradients_stand else 0.0


def gradients_of_layer(facts: Facts) -> float:
    """Gradients of what is trained in one layer."""
    model = facts.model
    return FP32 * (model.layer_params if facts.adapter == "full" else facts.trainable_params / model.num_hidden_layers)


def _outer_params(facts: Facts) -> int:
    """Parameters that are trained above the layers: the final norm's, and the head's also where it is the embedding."""
    model = facts.model
    if facts.adapter != "full":
        return 0
    outer = model.total_params - model.num_hidden_layers * model.layer_params
    return outer if model.tied else outer - model.embedding_params


def _one_by_one(facts: Facts) -> int:
    """Values at once while a CPU's AdamW goes over the tensors: two of one, and the quotient's of the one before."""
    linears = facts.model.layer_linears
    if facts.adapter == "lora":
        return 3 * adapter_rank(facts) * max(max(linear.inputs, linear.outputs) for linear in linears)
    largest = max(linear.inputs * linear.outputs for linear in linears if facts.adapter == "full" or linear.trained)
    if facts.adapter == "converted":
        return 3 * largest
    return max(3 * largest, 2 * facts.model.embedding_params + (0 if facts.model.tied else largest))


def _kept(step: Step, facts: Facts, parts: tuple[Part, ...], layers: int, at_work: bool) -> Estimate:
    """What so many layers keep; the last of them at work shows its parts itself."""
    if step.recomputed:
        there = layers if step.inputs_at_once is None else min(layers, step.inputs_at_once)
        width = step.hidden if step.packed_bits is None else step.packed_bits / 8
        return Estimate(layer_inputs=there * width * facts.model.hidden_size * facts.micro_tokens)
    if step.packed_bits is not None:
        packed = [packed_bytes(part, step) for part in parts]
        # The layer at work shows its own itself.
        count = layers - (1 if at_work else 0)
        first = _unread_in_first(facts, tuple(replace(part, saved=size) for part, size in zip(parts, packed, strict=True)))
        return Estimate(saved_activations=count * sum(packed) - (first if count else 0.0))
    whole, scores = layers - (1 if at_work else 0), sum(part.scores for part in parts)
    first = _unread_in_first(facts, parts) if whole else 0.0
    return Estimate(saved_activations=whole * (sum(part.saved for part in parts) - scores) - first, attention_scores=whole * scores)


def _unread_in_first(facts: Facts, parts: tuple[Part, ...]) -> float:
    """What parts of the first layer would keep if a gradient passed them: where the embedding is frozen, none passes the first norm, nor
    a frozen MLP that reads the same norm as the attention."""
    if facts.adapter == "full":
        return 0.0
    beside = facts.adapter == "converted" and facts.model.model_type in PARALLEL_BLOCKS
    return parts[0].saved + (sum(part.saved for part in parts if part.wide) if beside else 0.0)


def _loss(step: Step, facts: Facts, held: Estimate, copies: float) -> Iterator[Estimate]:
    """Moments of the final norm, the head and the loss, beside what the layers keep.

    Args:
        copies: of weights, which autocast holds until the forward is over; a fused loss is part of it.
    """
    s, vocab, full = step.sizes(facts, facts.micro_tokens), facts.model.vocab_size, facts.adapter == "full"
    norm = step.form.norm(s)
    hidden, kept = norm.hands * s.d * s.tokens, plus(held, saved_activations=norm.saved)
    head = facts.model.embedding_params if full else 0
    # A trained head multiplies in a copy, where it is not in the compute dtype.
    copy = s.value * head if s.half else 0
    made = FP32 * head if _first_made(step, facts) else 0.0
    if step.loss_tile is None:
        read = s.value * s.d * s.tokens if full else 0
        yield plus(kept, loss_workspace=LOSS_BYTES * s.tokens * vocab + copy + read)
        yield plus(kept, gradients=made, loss_workspace=s.value * (s.tokens * vocab + head) + copy + 2 * read)
    else:
        tile = loss_tile(step, facts, s.tokens, norm.hands)
        yield plus(kept, loss_workspace=2 * hidden + tile + FP32 * head + copy, trainable_copy=copies)
        # The backward scales in place.
        yield plus(kept, loss_workspace=hidden + (step.leaving(head) if step.gradients_stand else FP32 * head))
    yield from passing(plus(held, gradients=made), [norm], forward=False)


def loss_tile(step: Step, facts: Facts, tokens: int, handed: float) -> float:
    """Scratch of a tile of tokens while head and loss are one function; a value of the hidden states takes `handed` bytes."""
    s = step.sizes(facts, tokens)
    assert step.loss_tile is not None
    tile, words = min(step.loss_tile, tokens), step.loss_words or facts.model.vocab_size
    rows = (s.value if handed != s.value else 0) * s.d * tile
    if step.loss_words is None:
        # The kernel works in place; plain torch in fp32, beside what came in another dtype.
        return tile * (s.value + (FP32 if s.half and not s.on_cuda else 0)) * words + rows + s.value * s.d * tile
    # Logits and sums. Plain torch takes the logits to fp32, and for their product the head's rows.
    sums = FP32 * s.d * tile
    beside = 0 if s.on_cuda else max(sums, FP32 * words * (tile + s.d) if s.half else 0)
    return s.value * tile * words + sums + rows + beside


def layer_moments(step: Step, facts: Facts, tokens: int) -> list[tuple[Part, Estimate]]:
    """What one layer holds while each of its parts goes back, computed again, for so many tokens, its input aside."""
    first, *others = layer_parts(step, facts, tokens)
    parts = [replace(first, saved=first.saved - first.whole_input), *others]
    if facts.adapter == "full":
        outputs = (OUTPUT_MAP, -1) if facts.model.model_type in PARALLEL_BLOCKS else (-1,)
        for index in outputs:
            parts[index] = _unread(parts[index], step.sizes(facts, tokens))
    return list(zip(parts, passing(Estimate(), parts, forward=False, makes=True), strict=True))


def _unread(part: Part, s: Sizes) -> Part:
    """A trained map whose product is left out (elite/optimizations/functions/unread.py): nothing converts its weight, and its input stays
    until the weight's gradient is converted."""
    converted = part.gradients * s.value / FP32 if s.half else 0.0
    return replace(part, saved=part.saved - part.weights, weights=0.0, work=max(part.work, part.gradients + converted))


def layer_parts(step: Step, facts: Facts, tokens: int, lowest: bool = False) -> tuple[Part, ...]:
    """The parts of one layer in the order of its forward, for so many tokens.

    Args:
        lowest: no gradient passes its norms on.
    """
    s, form, model = step.sizes(facts, tokens), step.form, facts.model
    projections, out_map, into_mlp, _ = layer_maps(facts)
    norm, parallel = form.norm(s), model.model_type in PARALLEL_BLOCKS
    maps = form.maps(s, projections, norm.hands, False)
    attention = form.attention(s, form.packed or (not form.turned_in_place and 0 < model.rotary_dim < model.head_dim))
    first = [
        norm,
        maps,
        replace(form.rotary(s), waits=s.value * s.keys * tokens),
        attention,
        form.maps(s, [out_map], s.value, attention.keeps_output),
    ]
    stream, normed, made = (width * s.d * tokens for width in (s.hidden, norm.hands, s.value))
    # A tensor that nobody saves is there until the layer's forward is over: the stream where the norm converts it, likewise the norm's.
    stream_ahead = 0.0 if norm.whole_input else stream
    normed_ahead = normed if parallel and not maps.keeps_input else 0.0
    mlp = _mlp(step, facts, tokens, norm.hands, parallel and maps.keeps_input, lowest and parallel) if into_mlp else []
    # A kernel of both sums makes all gradients at once, the stream's if it goes on; where that is of another dtype, attention's waits too.
    at_once = _at_once(step, facts)
    passed = 0.0 if at_once and lowest else stream
    if mlp:
        first = [_beside(part, passed, normed_ahead + (0.0 if step.recomputed else stream_ahead)) for part in first]
    if parallel:
        # The MLP's gradient of what it shares with the attention.
        first = [first[0], *(_beside(part, 0.0 if lowest else normed, 0.0) for part in first[1:])]
        waiting = passed + (made if at_once or s.hidden != s.value else 0.0)
        # Tiles save what the norm hands over, if nobody did before.
        mlp = [_beside(part, waiting, made + (0.0 if form.mlp_tile and len(mlp) == 1 else normed_ahead)) for part in mlp]
    else:
        again = replace(norm, whole_input=0.0)
        mlp = [_beside(part, stream, stream_ahead) for part in ([again] if mlp else []) + mlp]
        first[-1] = _meets_stream(first[-1], s)
    if mlp:
        mlp[-1] = _meets_stream(mlp[-1], s)
    if model.residual_dropout:
        first[-1] = _dropped(first[-1], s)
        mlp[-1:] = [_dropped(part, s) for part in mlp[-1:]]
        if form.keeps_masks:
            first[-1] = _masked(first[-1], s)
            mlp[-1:] = [_masked(part, s) for part in mlp[-1:]]
    return (*first, *mlp)


def _beside(part: Part, waiting: float, ahead: float) -> Part:
    """A part beside gradients that wait and, in the forward, tensors that are still there."""
    return replace(part, waits=part.waits + waiting, forward=part.forward + ahead)


def _meets_stream(part: Part, s: Sizes) -> Part:
    """A part whose output is added to the stream: the gradient of a sum is one tensor for both its terms, unless they differ in dtype."""
    return replace(part, waits=part.waits - s.hidden * s.d * s.tokens) if s.hidden == s.value else part


def _dropped(part: Part, s: Sizes) -> Part:
    """A part whose output passes a dropout before it is added: the gradient that arrives is a tensor of its own."""
    return replace(part, waits=part.waits + s.hidden * s.d * s.tokens) if s.hidden == s.value else part


def _masked(part: Part, s: Sizes) -> Part:
    """A part whose dropout is an operation by itself: its mask stays, a byte a value."""
    unit = s.d * s.tokens
    return replace(part, saved=part.saved + unit, forward=part.forward + s.value * unit)


def _mlp(step: Step, facts: Facts, tokens: int, read: float, kept: bool, ends: bool) -> list[Part]:
    """The MLP's parts; in tiles, one part.

    Args:
        ends: nobody asks for the gradient of its input.
    """
    s, form, tile = step.sizes(facts, tokens), step.form, step.form.mlp_tile
    _, _, into, out = layer_maps(facts)
    assert out is not None
    if tile is None or tile >= tokens:
        activation = form.activation(s)
        if step.recomputed or step.packed_bits is not None:
            activation = replace(activation, work=activation.work - activation.late)
        row = [form.maps(s, into, read, kept), activation, form.maps(s, [out], activation.hands, False)]
        return [replace(part, wide=True) for part in row]
    alone, rest = replace(step, form=replace(form, mlp_tile=None), recomputed=True), tokens % tile or tile
    joined = replace(facts, model=replace(facts.model, residual_dropout=False))
    inner, short = (_mlp(alone, joined, n, read, True, ends) for n in (tile, rest))
    lets_go = facts.model.residual_dropout and facts.adapter == "lora"
    whole = Whole(read * s.d * tokens, s.value * out.outputs * tokens, ends, lets_go)
    return [tiled(inner, short, step.sizes(facts, tile), tokens, whole, kept)]
