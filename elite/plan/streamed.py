"""Memory and work of a streamed step, and the layout that a plan chooses. Bytes, seconds, operations.

Symbols as in `memory.py`; n tokens of a chunk, b keys of a block, v bytes of a value. On the device, beside weights and what is trained:

    keys and values     S·2KD(v + 4): K and V in the compute dtype, dK and dV in fp32 (in the host: two blocks in, two out)
    staging             two buffers for each kind of row in each direction

and the largest of

    a layer             for n tokens, when its backward holds most: what autograd keeps, gradients and scratch of the part at work, the
                        layer's output, fp32 sums of gradients; if that part is the attention, b·2HDv, a kernel's gradients
                        of a block, expanded to all heads, and n·HD·4, dQ; b·2KDv, their sums over the heads that share keys, if any
                        do; b·2KD·4, where these leave for the host
    the loss            one tile of logits and the gradient of a chunk; a trained head's gradient, of several chunks twice
    the embedding       where it is trained, its gradient of a chunk beside the sum
    the update          what the optimizer needs meanwhile

Where ranks share each sequence, n and S are a rank's part, and `across.py` says what else there is. Where they divide weights, a part of
these stands there, and what is whole at once is among the workspaces of libraries (elite/optimizations/zero_3.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from elite.chunks import longest_chunk
from elite.config import ExecutorConfig
from elite.facts import GIB, Device, Facts
from elite.loss_tiles import frozen_tile, tile_tokens
from elite.optimizations.contract import Decision, Estimate
from elite.optimizations.flash_attention import fused_attention
from elite.optimizations.parts import FP32, Part, Sizes
from elite.optimizations.ring_attention import active_variant
from elite.plan import across
from elite.plan.memory import folded, gradients_of_layer, layer_moments, loss_tile
from elite.revolve import layer_forwards, slots_for
from elite.streaming import ARGUMENT_BYTES, JOURNALED, VALUE_BITS, BoundaryEncoding, Keep, Place, Streaming, WeightPlace

CHUNKS = ((32768, 16384, 8192, 4096), (2048, 1024))
"""Longest first: longer chunks run faster. Rather than go below the first few, keys and values leave the device."""
BLOCKS = (65536, 16384)
"""Longer ones cost memory and spare additions."""
OUTPUTS = 1
"""Hidden states [n, d] at once besides what a layer's parts hold: its output. Its input lies among rows or in a buffer of theirs."""
HOST_RESERVE_BYTES = 4 * GIB
"""Host memory left for libraries, the tokenised corpus and the system."""


class StreamedMemory:
    """What a streamed step takes where, for one run and any layout."""

    def __init__(self, facts: Facts, decisions: tuple[Decision, ...]) -> None:
        self._facts = facts
        self._variant = active_variant(decisions)
        """How ranks exchange keys and values; None where they share nothing."""
        step = folded(facts, decisions)
        self._step = replace(step, form=replace(step.form, attention=_attention_in_blocks))
        self._whole, self._width = step.standing, step.value
        # fp32 where embeddings are trained, and so the residual stream that begins with them.
        self._stream_width = step.hidden
        # A plan asks for thousands of layouts that differ elsewhere.
        self._peak = cache(self._highest)

    def device(self, layout: Streaming) -> Estimate:
        """Device memory at the peak, by component."""
        facts, whole, width = self._facts, self._whole, self._width
        model, tokens = facts.model, facts.micro_tokens
        alone = facts.context, facts.micro_batch
        chunk, before = longest_chunk(*(alone if self._variant is None else (tokens, 1)), layout.chunk)
        streamed = layout.weights is WeightPlace.streamed
        arguments = min(ARGUMENT_BYTES, 2 * self._stream_width * model.rotary_dim * tokens)
        kept, decoded = layout.keep is Keep.attention, layout.encoding is not BoundaryEncoding.exact
        if self._variant is None:
            work = self._peak(chunk, min(layout.block, before), layout.keys_values is Place.host, 0.0, kept, decoded)
        else:
            met = across.meeting(facts, width, layout, chunk, self._variant)
            work = self._peak(chunk, 0, False, met, kept, decoded)
        return replace(
            work,
            linear_weights=2 * whole.linear_weights / model.num_hidden_layers if streamed else whole.linear_weights,
            other_weights=whole.other_weights,
            trainable_copy=whole.trainable_copy,
            optimizer_state=whole.optimizer_state,
            layer_workspace=work.layer_workspace + arguments,
            keys_values=self._keys_values(layout, chunk),
            staging=self._staging(layout, chunk),
            batch=whole.batch,
            runtime=whole.runtime,
        )

    def _keys_values(self, layout: Streaming, chunk: int) -> float:
        """Keys, values and their gradients of the layer at work."""
        facts, keys = self._facts, self._facts.model.num_key_value_heads * self._facts.model.head_dim
        if self._variant is not None:
            # What goes round is part of a meeting.
            return facts.micro_tokens * across.keys_row(facts, self._width) if layout.keys_values is Place.device else 0.0
        at_hand = facts.context if layout.keys_values is Place.device else 4 * min(layout.block, facts.context)
        return 0.0 if facts.context <= chunk else at_hand * 2 * keys * (self._width + 4)

    def _highest(self, chunk: int, block: int, keys_leave: bool, meeting: float, kept: bool, decoded: bool) -> Estimate:
        return max(self._moments(chunk, block, keys_leave, meeting, kept, decoded), key=lambda moment: moment.total)

    def _moments(self, chunk: int, block: int, keys_leave: bool, meeting: float, kept: bool, decoded: bool) -> Iterator[Estimate]:
        """What comes and goes, at every moment that may be the peak: loss, backward of a layer's parts, of the embedding, update.

        Args:
            meeting: what a layer takes while ranks meet; 0 where they share nothing.
            kept: attention outputs lie among rows or in their buffers.
            decoded: so do inputs, but encoded.
        """
        facts, model, step = self._facts, self._facts.model, self._step
        full, every = facts.adapter == "full", self._whole.gradients
        # In the only pass of a step, gradients exist once the backward has made them.
        once = facts.accumulation == 1 and not step.gradients_stand
        hidden, embedding = self._stream_width * model.hidden_size * chunk, FP32 * model.embedding_params
        half, cuda, head = self._width < FP32, facts.device.kind == "cuda", 0.0
        if full:
            # A chunk's own and, of several, their sum; the weight in the compute dtype; on a CPU a tile's product before it is added.
            converted = self._width * model.embedding_params * (1 if cuda else 2) if half else 0
            head = (1 + (chunk < facts.micro_tokens)) * embedding + converted
        tokens, words = tile_tokens(model.vocab_size), None
        if not full:
            tokens, words = frozen_tile(chunk, model.hidden_size, model.vocab_size)
        tile = loss_tile(replace(step, loss_tile=tokens, loss_words=words), facts, chunk, step.value)
        before = every - (FP32 * facts.trainable_params if once else 0)
        yield Estimate(loss_workspace=tile + head + self._around_loss(chunk, hidden), gradients=before)
        gradients = every - (embedding if once and full and not model.tied else 0)
        if full and model.tied and step.gradients_stand:
            # The head's waits for the embedding's.
            gradients += embedding
        if meeting:
            yield Estimate(gradients=gradients, attention_workspace=meeting, layer_workspace=0.0 if once else gradients_of_layer(facts))
        copies = OUTPUTS + (1 if decoded else 0)
        # Of the layers above the lowest all gradients are there; above the last are none, but its output's is a product, not rows.
        lowest = gradients - (gradients_of_layer(facts) if once else 0.0)
        last = lowest - (gradients_of_layer(facts) * (model.num_hidden_layers - 1) if once else 0.0)
        for standing, there in ((lowest, copies), (last, copies + 1)):
            yield from self._backward(chunk, 0.0 if meeting else self._blocks(chunk, block, keys_leave), kept, standing, there * hidden)
        if full:
            # A chunk's gradient is dense; so is the sum of several, which becomes the gradient itself if there is none yet.
            dense = embedding * ((chunk < facts.micro_tokens) + (not once or model.tied))
            yield Estimate(gradients=every, layer_workspace=dense + 2 * hidden)
        yield Estimate(gradients=every, optimizer_workspace=step.optimizer_workspace)

    def _backward(self, chunk: int, blocks: float, kept: bool, gradients: float, hidden: float) -> Iterator[Estimate]:
        """A layer's parts going back, beside gradients of other layers and hidden states."""
        facts = self._facts
        # What chunks before have added up; a chunk's own gradients are there until it is done.
        sums = gradients_of_layer(facts) if chunk < facts.micro_tokens else 0.0
        step = replace(self._step, form=replace(self._step.form, attention=_kept_attention)) if kept else self._step
        for part, moment in layer_moments(step, facts, chunk):
            yield replace(
                moment,
                gradients=moment.gradients + gradients,
                layer_workspace=moment.layer_workspace + hidden + sums,
                attention_workspace=blocks if part.name == "attention" else 0.0,
            )

    def _around_loss(self, chunk: int, hidden: float) -> float:
        """What stands around the head while a chunk's logits do: what the final norm reads, keeps and gives, its gradient, and the last
        layer's output, on its way out; a conversion to the compute dtype and the product in it, where they differ."""
        s = self._step.sizes(self._facts, chunk)
        norm = self._step.form.norm(s)
        out = norm.hands * s.d * chunk
        converted = 2 * s.value * s.d * chunk if norm.hands != s.value else 0.0
        return 2 * hidden + norm.saved - norm.whole_input + 2 * out + converted

    def _blocks(self, chunk: int, block: int, keys_leave: bool) -> float:
        """What the attention's backward takes besides what it hands out."""
        model = self._facts.model
        heads, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
        shared = keys < heads
        # A chunk's own square first, then what comes before it, block by block.
        own = chunk * heads * (4 + (2 * self._width if shared else 0))
        key = 2 * (heads + (keys if shared else 0)) * self._width + (8 * keys if keys_leave else 0)
        # The sum of dQ in fp32; a block's own has the place of what is handed out in the end.
        return max(own, block * key + chunk * heads * 4 if block else 0)

    def _staging(self, layout: Streaming, chunk: int) -> float:
        """Rows that lie on the device, or buffers for those under way."""
        if self._facts.device.kind == "cpu":
            return self.host(layout)
        if layout.boundaries is Place.device:
            return self._near(layout)
        # Buffers of what comes are as long as a chunk may be.
        comes, goes = self._moved_rows(layout)
        return 2 * (layout.chunk * comes + chunk * goes)

    def host(self, layout: Streaming) -> float:
        """Pinned host memory of one rank; on a CPU all that would be."""
        facts, keys = self._facts, across.keys_row(self._facts, self._width)
        near = 0.0 if layout.boundaries is Place.device and facts.device.kind != "cpu" else self._near(layout)
        weights = self._whole.linear_weights if layout.weights is WeightPlace.streamed else 0.0
        at_hand = 0.0
        if layout.keys_values is Place.host:
            at_hand = keys * (1 + 4 / self._width) * facts.context if self._variant is None else keys * facts.micro_tokens
        return near + weights + at_hand

    def _near(self, layout: Streaming) -> float:
        """Rows where the boundaries are, or on the host if those are on disk."""
        rows = 0.0 if layout.boundaries is Place.disk else self._rows(layout)
        waiting = 0.0 if self._variant is None else across.waiting_row(self._facts, self._width) * self._facts.micro_tokens
        return rows + waiting

    def disk(self, layout: Streaming) -> float:
        """Disk space of one rank."""
        # A journal keeps what every micro-batch adds to the gradients.
        results = FP32 * self._facts.trainable_params * self._facts.accumulation if layout.journal else 0.0
        return self._rows(layout) + results if layout.boundaries is Place.disk else 0.0

    def _rows(self, layout: Streaming) -> float:
        """Everything that outlives a chunk."""
        hidden, layers = self._facts.model.hidden_size, self._facts.model.num_hidden_layers
        exact = self._stream_width * hidden
        kept = exact if layout.encoding is BoundaryEncoding.exact else VALUE_BITS[layout.encoding] / 8 * hidden
        slots = slots_for(layout.keep, layers, layout.slots)
        row = slots * kept + exact + (exact if slots < layers else 0) + (exact if layout.journal else 0)
        if layout.keep is Keep.attention:
            row += layers * (self._output_row() + self._keys_row(layout))
        return row * self._facts.micro_tokens

    def _moved_rows(self, layout: Streaming) -> tuple[float, float]:
        """Bytes a token that a layer's backward, or its forward, brings and takes: boundary and gradient; gradient; outputs both ways."""
        exact = self._stream_width * self._facts.model.hidden_size
        met = 0.0 if self._variant is None else across.staged_row(self._facts, self._width, layout)
        kept = layout.keep is Keep.attention
        outputs, keys = (self._output_row(), self._keys_row(layout)) if kept else (0.0, 0.0)
        return 2 * exact + outputs + met / 2, exact + outputs + keys + met / 2

    def _output_row(self) -> float:
        """O and its log-sum-exp, bytes a token."""
        return self._facts.model.num_attention_heads * (self._facts.model.head_dim * self._width + 4)

    def _keys_row(self, layout: Streaming) -> float:
        """Kept keys and values, bytes a token; 0 where they are computed again."""
        row = across.keys_row(self._facts, self._width)
        kept = self._variant is None and layout.keeps_keys(row, self._stream_width * self._facts.model.hidden_size)
        return row if kept else 0.0


def _attention_in_blocks(s: Sizes, copied: bool) -> Part:
    """As a fused kernel's, whose work is one block's and stands in `attention_workspace`."""
    return replace(fused_attention(s, copied), work=0.0)


def _kept_attention(s: Sizes, _copied: bool) -> Part:
    """The same whose output the forward pass has left among the rows, in the order of tokens."""
    part = _attention_in_blocks(s, False)
    return replace(part, saved=part.saved - s.value * s.queries * s.tokens)


def recomputed(facts: Facts, layout: Streaming) -> tuple[float, float]:
    """Forward passes through all layers besides the first one: of their linear maps, and of their attention."""
    layers = facts.model.num_hidden_layers
    again = layer_forwards(layers, slots_for(layout.keep, layers, layout.slots)) / layers - 1
    return again + 1, again + (0 if layout.keep is Keep.attention else 1)


def layouts(config: ExecutorConfig, tokens: int, folder: str, journal: bool = False) -> Iterator[Streaming]:
    """Layouts that the options leave open, the fastest first: least recomputation, then long chunks, then weights at hand.

    Args:
        tokens: of one sequence, on one rank.
        folder: for boundaries on disk.
        journal: whether steps can be cut off and go on.
    """
    keeps = _open(config.keep, JOURNALED if journal else Keep)
    for keep in keeps:
        if keep is Keep.attention and config.keep is None and config.encoding is not BoundaryEncoding.exact:
            continue
        for slots in [config.slots or 4] if keep is not Keep.multilevel or config.slots else [8, 6, 4, 3, 2, 1]:
            for chunk, block, keys_values, weights in _sizes(config, tokens):
                yield Streaming(
                    chunk=chunk,
                    block=block,
                    keep=keep,
                    slots=slots,
                    boundaries=config.boundaries or Place.host,
                    encoding=config.encoding,
                    keys_values=keys_values,
                    weights=weights,
                    folder=folder if config.boundaries is Place.disk else None,
                    journal=journal,
                )


def _sizes(config: ExecutorConfig, tokens: int) -> Iterator[tuple[int, int, Place, WeightPlace]]:
    """Chunk, block, place of keys and values, place of weights: what decides the device's memory, in order of speed."""
    # Copies of one chunk hide behind the computation of another, so there should be two.
    useful = [[chunk for chunk in chunks if 2 * chunk <= max(tokens, 2 * CHUNKS[-1][-1])] for chunks in CHUNKS]
    for chunks in useful if config.chunk is None else [[config.chunk]]:
        for keys_values in _open(config.keys_values, (Place.device, Place.host)):
            for chunk in chunks:
                for block in _open(config.block, BLOCKS):
                    for weights in _open(config.weights, WeightPlace):
                        yield chunk, block, keys_values, weights


def others(config: ExecutorConfig, layout: Streaming, facts: Facts) -> Iterator[Streaming]:
    """Layouts that take more of the device and may be faster: longer chunks than two to a sequence, where the host has more to do than the
    device; rows on the device, where copies hold it up, and then blocks may be shorter, which is less that is under way between ranks."""
    every = sorted(one for chunks in CHUNKS for one in chunks)
    chunks = [one for before, one in zip([0, *every], every, strict=False) if one > layout.chunk and before < facts.micro_tokens]
    places = [] if config.boundaries or layout.journal or facts.device.kind == "cpu" else [Place.device]
    blocks = [layout.block] if config.block or facts.sharing == 1 else [block for block in BLOCKS if block <= layout.block]
    for chunk in [layout.chunk, *(chunks if config.chunk is None else [])]:
        for place in [layout.boundaries, *places]:
            for block in blocks:
                other = replace(layout, chunk=chunk, boundaries=place, block=block)
                if other != layout:
                    yield other


def _open(asked: Any, choices: Iterable[Any]) -> list[Any]:
    return list(choices) if asked is None else [asked]


def host_usable(device: Device) -> float:
    """Host memory that one rank's rows may take."""
    return max(0.0, device.host_ram_bytes - HOST_RESERVE_BYTES) / device.count
