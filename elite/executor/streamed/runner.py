"""Carries out the sweeps of a step: brings chunks, calls layers on them, keeps what has to be kept, sums gradients.

The sweeps come from `sweeps.py`, copies from `transfers.py`, rows from `store.py`, the model's own calls from `stem.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from elite.chunks import Chunk
from elite.distributed.watchdog import Beat, no_beat
from elite.errors import ModelError
from elite.executor.streamed import split
from elite.executor.streamed.attention import Phase, Work
from elite.executor.streamed.divided import DividedWeights, are_divided
from elite.executor.streamed.draws import Draws
from elite.executor.streamed.journal import Journal
from elite.executor.streamed.kernels import AttentionShape, Kernel
from elite.executor.streamed.keys_values import KeyValues
from elite.executor.streamed.math_kernel import MATH
from elite.executor.streamed.rounds import Outputs, Rounds
from elite.executor.streamed.rows import Allocator, Rows
from elite.executor.streamed.stem import Stem
from elite.executor.streamed.step import GradientSum, Step, in_parts
from elite.executor.streamed.store import Boundary, Store
from elite.executor.streamed.sweeps import Sweep, backward_sweeps, forward_sweep
from elite.executor.streamed.transfers import Fields, Transfers
from elite.executor.streamed.weights import StreamedWeights, Weights
from elite.optimizations.functions.hooks import hooks_aside
from elite.optimizations.functions.unread import UnreadOutputs
from elite.streaming import Streaming, WeightPlace

FEW = 16
"""Tokens on which a layer's gradients are tried out."""

MEETING = (Phase.project, Phase.above)
"""After these, ranks that share a sequence meet."""
DESCENDING = (Phase.backward, Phase.below)
"""The last of these over a layer makes its gradients whole."""

KernelChoice = Callable[[AttentionShape], Kernel]


class Runner:
    """Everything that a streamed model keeps from step to step.

    Args:
        core: a causal language model of transformers.
        layout: how its passes are laid out.
        device: where it computes.
        choose: names the attention kernel for a shape.

    Raises:
        ModelError: its structure is not a stack of decoder layers.
        PlanError: the host has no room for streamed weights.
    """

    def __init__(self, core: PreTrainedModel, layout: Streaming, device: torch.device, choose: KernelChoice) -> None:
        self._core, self.layout, self.device = core, layout, device
        # Asked for every layer and chunk; the answer may come from a file.
        self._choose = cache(choose)
        self.stem = Stem(core)
        self.layers = self.stem.layers
        self.weights = self._new_weights()
        self.allocator = Allocator(device, Path(layout.folder) if layout.folder else None)
        self.unread = UnreadOutputs(self.layers)
        self.transfers = Transfers(device, layout.chunk, self.allocator.disk)
        self.journal: Journal | None = None
        """Keeps the progress of training steps, while one is at work that can be cut off."""
        self.beat: Beat = no_beat  # told before each chunk of each sweep
        self.current: Step | None = None
        """The step whose rows these are."""
        self.store: Store
        self.layer_parameters: list[list[nn.Parameter]]
        """What is trained in each layer."""
        self.outer_parameters: list[nn.Parameter]
        """What is trained before and after the layers."""
        self.early_parameters: list[nn.Parameter]
        """Of these, all but the head's own."""
        self._keys_values = KeyValues(layout.keys_values, 0, layout.block, self.allocator, device)
        self._rounds = self._new_rounds()
        self.draws = Draws(device)

    def find_trained(self) -> None:
        """Note which parameters are trained; adapters may come after this was made."""
        inner = {id(p) for layer in self.layers for p in layer.parameters()}
        self.layer_parameters = [[p for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        self.outer_parameters = [p for p in self._core.parameters() if p.requires_grad and id(p) not in inner]
        alone = self.stem.alone(self.stem.head)
        self.early_parameters = [p for p in self.outer_parameters if id(p) not in alone]

    def inputs(self, layers: range) -> list[Tensor]:
        """What autograd sees of what is trained in these layers."""
        return [tensor for layer in layers for tensor in self.weights.inputs(self.layer_parameters[layer])]

    def begin(self, step: Step, width: int, dtype: torch.dtype) -> None:
        """Make the rows that `step` needs; what an earlier step left in them is lost."""
        self.current = step
        # Asked now, while the device has little to do: later the answer would wait for the whole forward pass.
        _ = step.scored
        self.stem.forget()
        self.transfers.reset()
        self.transfers.settle()
        self.weights.refresh()
        longest = max((chunk.longest for chunk in step.order if chunk.shares), default=0)
        if self._keys_values.tokens != longest:
            self._keys_values = KeyValues(self.layout.keys_values, longest, self.layout.block, self.allocator, self.device)
        allocator = self.allocator if step.record is None else step.record.rows
        self.store = Store(self.layout, allocator, len(self.layers), step.ids.shape[1], width, dtype)
        if step.trains:
            self.store.prepare()
        if step.shared is not None:
            self._rounds.begin(step.shared)

    def take_up(self, step: Step, state: dict[str, Any]) -> None:
        """Go on with the rows of a step that was cut off after its embedding."""
        self.begin(step, state["width"], getattr(torch, state["dtype"]))
        self.store.restore(state)
        # What they hold is not what the step's last layer has left there.
        self._keys_values.holds = None

    def forward(self, step: Step, layers: range) -> None:
        """The first sweep of these layers."""
        sweeps = in_parts(step, [forward_sweep(self.store, layer, step.groups, step.trains) for layer in layers])
        following = layers.stop
        after = forward_sweep(self.store, following, step.groups, step.trains) if following < len(self.layers) else None
        after = None if after is None else in_parts(step, [after])[0]
        with torch.no_grad():
            self.run(step, sweeps, after, {})

    def backward(self, step: Step, segment: int) -> list[Tensor | None]:
        """Gradients of one segment's parameters; the gradient of its input replaces that of its output."""
        if segment == self.store.segments - 1 or step.record is not None:
            self.find_unread(step)
        sweeps = in_parts(step, backward_sweeps(self.store, segment, step.groups))
        if self._at_hand(sweeps[0]):
            # The forward pass has just left it there.
            sweeps = sweeps[1:]
        after = in_parts(step, backward_sweeps(self.store, segment - 1, step.groups))[0] if segment else None
        totals = {sweep.layer: GradientSum(self.layer_parameters[sweep.layer]) for sweep in sweeps}
        with torch.no_grad():
            found = self.run(step, sweeps, after, totals)
        return [gradient for layer in self.store.segment(segment) for gradient in found[layer]]

    def find_unread(self, step: Step) -> None:
        """Find out, before the first backward, what recomputing layers may leave out."""
        self.unread.find(lambda layer: self._few_gradients(step, layer), self._tried)

    def host_bytes(self) -> int:
        """Pinned host memory of rows and of streamed weights."""
        return self.allocator.host_bytes() + self.weights.host_bytes

    def forget(self) -> None:
        """Let go of the rows of the last step."""
        self.transfers.reset()
        self.current = None
        self.__dict__.pop("store", None)

    def release(self, layout: Streaming) -> None:
        """Give all rows and buffers back, those of an abandoned pass too; the next pass has this layout."""
        self.layout = layout
        self.transfers = Transfers(self.device, layout.chunk, self.allocator.disk)
        self._keys_values = KeyValues(layout.keys_values, 0, layout.block, self.allocator, self.device)
        self._rounds = self._new_rounds()
        self.stem.forget()
        self.forget()
        self.allocator.release()

    def undo(self) -> None:
        """Give all rows and buffers back, then put weights back, which may need the room."""
        self.release(self.layout)
        self.weights.undo()

    def write(self, sinks: Sequence[Boundary], chunk: Chunk, hidden: Tensor) -> None:
        """A layer's output [n, d], to where it is kept."""
        for sink in sinks:
            sink.write(self.transfers, chunk, hidden)

    @contextmanager
    def as_in(self, step: Step) -> Iterator[None]:
        """Streamed attention, and random state that is left as it was."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda, enabled=step.seed is not None), self.stem.streaming():
            yield

    def _new_rounds(self) -> Rounds:
        return Rounds(self.layout, self.allocator, self.transfers, self.device, self._choose, lambda words: self.beat(words))

    def _new_weights(self) -> Weights:
        if are_divided(self._core.parameters()):
            return DividedWeights(self._core.parameters(), self.stem, self.device)
        return StreamedWeights(self.layers, self.device) if self.layout.weights is WeightPlace.streamed else Weights()

    def run(
        self, step: Step, sweeps: Sequence[Sweep], after: Sweep | None, totals: dict[int, GradientSum]
    ) -> dict[int, list[Tensor | None]]:
        """Carry sweeps out one after another; returns what autograd hands on, by layer.

        Args:
            after: the sweep that comes next, whose first copies may begin.
            totals: where gradients of each layer's parameters are added up.
        """
        found = {}
        for sweep, following in zip(sweeps, [*sweeps[1:], after], strict=True):
            # What comes after ranks have met is not there before.
            then = (following.chunks, self._fields(following)) if following is not None and sweep.phase not in MEETING else None
            with self.as_in(step), self.weights.use(sweep.layer, following.layer if following else None):
                self._prepare_keys(sweep)
                for chunk, data in self.transfers.read(sweep.chunks, self._fields(sweep), then):
                    self.beat(f"the {sweep.phase.name} of layer {sweep.layer}")
                    self._chunk(step, sweep, chunk, data, totals)
                    if following is not None and self._takes_over(sweep, following):
                        self._keys_values.bring(chunk, self.store.keys(following.layer), self.transfers)
                if following is not None and self._takes_over(sweep, following):
                    self._keys_values.holds = following.document
                if sweep.phase is Phase.project:
                    self._rounds.attend(sweep.layer, sweep.chunks)
                elif sweep.phase is Phase.above:
                    self._rounds.descend(sweep.layer, sweep.chunks, self._outputs(sweep))
                if sweep.phase in DESCENDING and (following is None or following.layer != sweep.layer):
                    found[sweep.layer] = self.weights.take(self.layer_parameters[sweep.layer], totals[sweep.layer].result())
        return found

    def _prepare_keys(self, sweep: Sweep) -> None:
        """Have a document's keys and values at hand for its backward."""
        keys_values = self._keys_values
        if sweep.phase is not Phase.backward:
            keys_values.holds = sweep.document
        elif sweep.chunks[0].shares:
            keys_values.begin_backward()
            if keys_values.holds != sweep.document:
                for chunk in sweep.chunks:
                    keys_values.bring(chunk, self.store.keys(sweep.layer), self.transfers)
                keys_values.holds = sweep.document
            keys_values.expect(self.transfers)

    def _takes_over(self, sweep: Sweep, following: Sweep) -> bool:
        """Whether the next layer's keys and values may take the place of this one's, chunk by chunk: later chunks need them no more."""
        return self.store.keeps_keys and sweep.phase is Phase.backward and sweep.chunks[0].shares and following.chunks == sweep.chunks

    def _at_hand(self, sweep: Sweep) -> bool:
        """Whether the last pass has left what a sweep would compute again."""
        if sweep.phase is Phase.refill:
            return self._keys_values.holds == sweep.document
        return sweep.phase is Phase.project and self._rounds.holds == sweep.layer

    def _fields(self, sweep: Sweep) -> Fields:
        fields: dict[str, Rows] = {"h": sweep.source.rows}
        if sweep.phase is Phase.backward:
            fields["g"] = self.store.gradient(sweep.layer + 1).rows
            if sweep.keeps:
                fields |= self.store.outputs(sweep.layer)
        elif sweep.phase is Phase.finish:
            fields |= self._rounds.outputs.rows
        elif sweep.phase is Phase.above:
            fields |= {"g": self.store.gradient(sweep.layer + 1).rows} | self._outputs(sweep).rows
        elif sweep.phase is Phase.below:
            fields |= {"g": self.store.gradient(sweep.layer).rows} | self._rounds.gradients
        return fields

    def _outputs(self, sweep: Sweep) -> Outputs:
        """Of attention across ranks."""
        return Outputs(self.store.outputs(sweep.layer), self.store.output_of) if sweep.keeps else self._rounds.outputs

    def _chunk(self, step: Step, sweep: Sweep, chunk: Chunk, data: dict[str, Tensor], totals: dict[int, GradientSum]) -> None:
        work = Work(sweep.phase, chunk, self._keys_values, self._choose)
        hidden = sweep.source.decode(data["h"])
        if sweep.phase in (Phase.refill, Phase.project):
            if not split.project(self._called(step, sweep.layer, chunk), hidden, work):
                raise _without_attention(sweep.layer)
            if sweep.phase is Phase.project:
                self._rounds.put(chunk, work)
            return
        if sweep.phase in (Phase.above, Phase.below):
            self._descend_part(step, sweep, hidden, work, data, totals[sweep.layer])
            return
        if sweep.phase is Phase.finish:
            work.kept = self._rounds.outputs.decode(data)
        if sweep.phase in (Phase.forward, Phase.finish):
            out = self._layer(step, sweep.layer, chunk, hidden, work)
            if work.made is None:
                raise _without_attention(sweep.layer)
            self.write(sweep.sinks, chunk, out)
            if sweep.keeps:
                self.store.keep_attention(self.transfers, sweep.layer, chunk, work)
            return
        if sweep.keeps:
            work.kept = self.store.output_of(data)
        upstream = self._upstream(step, sweep.layer, data)
        parameters = self.layer_parameters[sweep.layer]
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), self.unread.left_out(sweep.layer):
            out = self._layer(step, sweep.layer, chunk, hidden, work)
        gradient, *rest = torch.autograd.grad(out, [hidden, *parameters], upstream, allow_unused=True)
        assert gradient is not None
        totals[sweep.layer].add(rest)
        self.store.gradient(sweep.layer).write(self.transfers, chunk, gradient)

    def _descend_part(self, step: Step, sweep: Sweep, hidden: Tensor, work: Work, data: dict[str, Tensor], total: GradientSum) -> None:
        """Half of the backward of a layer of a sequence that ranks share, on one chunk."""
        layer, parameters = self._called(step, sweep.layer, work.chunk), self.layer_parameters[sweep.layer]
        target = self.store.gradient(sweep.layer)
        if sweep.phase is Phase.above:
            work.kept = self._outputs(sweep).decode(data)
            with self.unread.left_out(sweep.layer):
                gradient, do, rest = split.above(layer, hidden, work, self._upstream(step, sweep.layer, data), parameters)
            self._rounds.put(work.chunk, work)
            self._rounds.put_gradient(work.chunk, do)
        else:
            gradient, rest = split.below(layer, hidden, work, self._rounds.gradients_of(data), parameters)
            gradient = target.decode(data["g"]) + gradient
        total.add(rest)
        target.write(self.transfers, work.chunk, gradient)

    def _called(self, step: Step, layer: int, chunk: Chunk) -> split.Layer:
        return lambda hidden, work: self._layer(step, layer, chunk, hidden, work)

    def _upstream(self, step: Step, layer: int, data: dict[str, Tensor]) -> Tensor:
        """The gradient [n, d] of a layer's output."""
        upstream = self.store.gradient(layer + 1).decode(data["g"])
        if layer < len(self.layers) - 1:
            return upstream
        # The head's gradients are those of a loss whose own gradient is 1.
        assert step.upstream is not None
        return upstream * step.upstream

    def _layer(self, step: Step, layer: int, chunk: Chunk, hidden: Tensor, work: Work) -> Tensor:
        """One layer on one chunk: [n, d] → [n, d]."""
        with step.autocast():
            # Before the seed: what records the arguments may draw random numbers itself.
            arguments = self.stem.calls(step.part(chunk))[layer]
            self.draws.seed(step, layer + 1, chunk)
            out: Tensor = self.layers[layer](hidden[None], **arguments, work=work)[0]
        if out.dtype is not hidden.dtype:
            raise ModelError(f"layer {layer} turns {hidden.dtype} into {out.dtype}: boundaries need one dtype", "executor=whole")
        return out

    @contextmanager
    def _tried(self, layer: int) -> Iterator[None]:
        """Within, a layer can be called on tokens. It is often the next one at work."""
        with self.weights.use(layer, following=layer), self.weights.before_layers():
            yield

    def _few_gradients(self, step: Step, layer: int) -> list[Tensor | None]:
        """Gradients of one layer on the first few tokens."""
        few = min(FEW, step.ids.shape[1])
        chunk = Chunk(-1, 0, few, 0, (few,), few, shares=False)
        work = Work(Phase.backward, chunk, self._keys_values, lambda _shape: MATH)
        parameters = [p for p in self.layers[layer].parameters() if p.requires_grad]
        with hooks_aside(parameters), torch.enable_grad(), self.as_in(step):
            hidden = self.stem.embed(step.part(chunk))[0].detach().requires_grad_()
            out = self._layer(step, layer, chunk, hidden, work)
            upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)
            return list(torch.autograd.grad(out, [hidden, *parameters], upstream, allow_unused=True))


def _without_attention(layer: int) -> ModelError:
    return ModelError(f"layer {layer} never called its attention: what lies before a chunk would be lost on it", "executor=whole")
