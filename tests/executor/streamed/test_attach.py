"""Loss and every gradient of the streamed pass against the ordinary one, over models, layouts and documents."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import masking_utils

from elite.executor.streamed.attach import attach
from elite.streaming import Keep, Place, Streaming, WeightPlace
from tests.executor.streamed.exactness import Documents, assert_same, gradients, ordinary_loss, shifted, streamed, tokens, uneven

MODELS = ("phi", "llama", "qwen2", "qwen3", "mistral", "gpt_neox", "starcoder2", "phi3", "gemma", "gemma3_text")

ONE = ((47,),)
TWO_ROWS = ((47,), (47,))
PACKED = ((29, 3, 1, 20),)
"""One document longer than a chunk of 16, one token alone, another long one last."""
MIXED = ((5, 41, 4, 2), (9, 9, 33, 1))
SHORT = ((12, 11, 13, 12),)
"""Nothing is longer than a chunk: several chunks of whole documents."""
TAIL = ((36, 7),)
"""A long document, then a chunk of whole ones."""
LONG = ((300,),)
"""Chunks longer than the alignment of pieces."""


@dataclass(frozen=True)
class Case:
    """A layout and documents, and how the documents are told."""

    layout: Streaming
    documents: Documents = PACKED
    told: str = "documents"
    layers: int = 2

    def __str__(self) -> str:
        words = [f"{name}={getattr(value, 'value', value)}" for name, value in vars(self.layout).items() if value != DEFAULTS[name]]
        lengths = "|".join(".".join(map(str, row)) for row in self.documents)
        return f"{lengths}-{self.told}-{self.layers}-" + ",".join(words)


DEFAULTS = vars(Streaming())


def lay(chunk: int, block: int = 7, **changes: Any) -> Streaming:
    """A layout of small chunks."""
    return Streaming(chunk=chunk, block=block, **changes)


def arguments(case: Case, ids: torch.Tensor) -> dict[str, Any]:
    """How a caller tells of documents: their lengths, positions that begin anew, or nothing where each row is one."""
    if case.told == "documents":
        return {"documents": case.documents}
    if case.told == "positions":
        return {"position_ids": torch.stack([torch.cat([torch.arange(n) for n in row]) for row in case.documents])}
    if case.told == "mask":
        # Runs of equal values: what flash attention's packing masks hold.
        return {"attention_mask": torch.stack([torch.cat([torch.full((n,), 1 + i) for i, n in enumerate(row)]) for row in case.documents])}
    assert all(len(row) == 1 for row in case.documents)
    return {"attention_mask": torch.ones_like(ids)} if case.told == "ones" else {}


def check(kind: str, case: Case, folder: Path) -> None:
    """The comparison."""
    changes: dict[str, Any] = {"num_hidden_layers": case.layers}
    if kind == "gemma3_text":
        changes["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(case.layers)]
    model = uneven(kind, **changes)
    frozen = case.layout.weights is WeightPlace.streamed
    if frozen:
        # Matrices stay, norms and biases are trained: both kinds in every layer.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers" not in name or parameter.dim() == 1)
    ids = tokens(len(case.documents), sum(case.documents[0]))
    labels = ids.masked_fill(tokens(len(ids), ids.shape[1], seed=3) < 20, -100)
    expected_loss = ordinary_loss(model, ids, labels, case.documents)
    expected_loss.backward()
    expected = gradients(model)
    layout = replace(case.layout, folder=str(folder))
    loss, found = streamed(model, layout, {"input_ids": ids, "labels": labels, **arguments(case, ids)})
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-6, atol=0)
    assert_same(found, expected)


@pytest.mark.parametrize("documents", [ONE, PACKED, MIXED], ids=["one", "packed", "mixed"])
@pytest.mark.parametrize("keep", [Keep.layers, Keep.attention], ids=lambda keep: keep.value)
@pytest.mark.parametrize("kind", MODELS)
def test_models(kind: str, keep: Keep, documents: Documents, tmp_path: Path) -> None:
    check(kind, Case(lay(16, keep=keep), documents), tmp_path)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_makes_no_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To make one it would first look for documents in the positions, and on a GPU the host would wait for that."""

    def looked(_positions: object) -> None:
        raise AssertionError("looked for documents")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", looked)
    model, ids = uneven(kind), tokens(1, 40)
    positions = torch.arange(20).repeat(2)[None]
    with pytest.raises(AssertionError, match="looked for documents"):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    attached = attach(model, lay(16))
    model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
    assert all(gradient is not None for gradient in gradients(model).values())
    attached.undo()


# Each value of each choice meets the values of the others that could disturb it; not the full product.
LAYOUTS = [
    # How documents are told, and chunks: one, dividing, not dividing, smaller than a document, of one token.
    Case(lay(64), ONE, "nothing"),
    Case(lay(47), TWO_ROWS, "nothing"),
    Case(lay(24), ((48,), (48,)), "ones"),
    Case(lay(20), TWO_ROWS, "ones"),
    Case(lay(1, 3), ((5, 1),), "positions"),
    Case(lay(16), PACKED, "positions"),
    Case(lay(16), MIXED, "positions"),
    Case(lay(16), MIXED, "mask"),
    Case(lay(30), MIXED, "documents"),
    Case(lay(200), MIXED, "positions"),
    Case(lay(160, 100), LONG, "nothing"),
    Case(lay(160, 100, keep=Keep.attention), LONG, "nothing"),
    # Blocks: one key, a divisor, longer than everything.
    Case(lay(16, 1), ONE),
    Case(lay(16, 16), PACKED),
    Case(lay(10, 1000), MIXED),
    # What is kept, in deeper models; places of rows.
    *(
        Case(lay(16, keep=Keep.multilevel, slots=slots, boundaries=place), documents, layers=layers)
        for slots, place, documents, layers in (
            (1, Place.host, PACKED, 5),
            (1, Place.disk, SHORT, 5),
            (1, Place.device, TAIL, 5),
            (2, Place.host, SHORT, 6),
            (2, Place.disk, TAIL, 6),
            (2, Place.device, MIXED, 5),
            (3, Place.host, TAIL, 7),
            (3, Place.disk, MIXED, 7),
            (3, Place.device, SHORT, 7),
            (9, Place.host, ONE, 5),
        )
    ),
    *(
        Case(lay(16, keep=Keep.sqrt, boundaries=place), documents, layers=layers)
        for place, documents, layers in (
            (Place.host, SHORT, 5),
            (Place.host, TAIL, 10),
            (Place.disk, PACKED, 10),
            (Place.device, MIXED, 5),
        )
    ),
    *(Case(lay(16, keep=Keep.layers, boundaries=place), MIXED, layers=3) for place in Place),
    *(Case(lay(16, keep=Keep.attention, boundaries=place), documents, layers=3) for place in Place for documents in (MIXED, TAIL, SHORT)),
    # Keys and values on the host, blocks that chunks do not divide.
    Case(lay(16, 7, keys_values=Place.host), MIXED),
    Case(lay(16, 16, keys_values=Place.host), PACKED, "positions"),
    Case(lay(16, 1000, keys_values=Place.host), ONE),
    Case(lay(7, 20, keys_values=Place.host, keep=Keep.attention), MIXED),
    Case(lay(7, 20, keys_values=Place.host, keep=Keep.multilevel, slots=2, boundaries=Place.disk), PACKED, layers=5),
    Case(lay(16, 5, keys_values=Place.host, keep=Keep.attention, boundaries=Place.disk), PACKED),
    # Weights that are streamed.
    Case(lay(16, weights=WeightPlace.streamed), MIXED, layers=3),
    Case(lay(16, weights=WeightPlace.streamed, keep=Keep.attention, keys_values=Place.host), PACKED, layers=3),
    Case(lay(16, weights=WeightPlace.streamed, keep=Keep.multilevel, slots=1), TAIL, layers=5),
    Case(lay(16, weights=WeightPlace.streamed, keep=Keep.sqrt, boundaries=Place.disk), SHORT, layers=5),
    Case(lay(100, weights=WeightPlace.streamed), SHORT, layers=1),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_layouts(case: Case, tmp_path: Path) -> None:
    check("phi", case, tmp_path)


@pytest.mark.parametrize(
    "case",
    [
        Case(lay(3), ONE),
        Case(lay(20, keep=Keep.attention, boundaries=Place.disk), MIXED),
        Case(lay(7, keep=Keep.multilevel, slots=2), MIXED, layers=5),
        Case(lay(16, weights=WeightPlace.streamed, keep=Keep.sqrt), PACKED, layers=5),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_windows(kind: str, case: Case, tmp_path: Path) -> None:
    """Chunks shorter than the window, and windows across chunk borders; `gemma3_text` alternates with layers that see everything."""
    check(kind, case, tmp_path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "phi"])
def test_padding(kind: str, side: str) -> None:
    """Rows of unequal lengths, padded; the same gradients as transformers' own masks give."""
    model = uneven(kind)
    ids, mask = tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    for row, padding in enumerate((0, 7, 25)):
        mask[row, :padding] = 0
    if side == "right":
        mask = mask.flip(1)
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":
        # The last padding token would be asked for the first real one, of which nothing is known.
        labels[1, 7] = labels[2, 25] = -100
    expected_loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    expected_loss.backward()
    expected = gradients(model)
    loss, found = streamed(model, lay(16), {"input_ids": ids, "labels": labels, "attention_mask": mask})
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-6, atol=0)
    assert_same(found, expected)


def test_positions_that_do_not_begin_at_zero() -> None:
    """Documents are found by where positions break, not by zeros."""
    model = uneven("llama")
    ids, positions = tokens(1, 40), torch.cat([torch.arange(5, 30), torch.arange(100, 115)])[None]
    ordinary_loss(model, ids, ids, [[25, 15]]).backward()
    expected = gradients(model)
    _, found = streamed(model, lay(16), {"input_ids": ids, "labels": ids, "position_ids": positions})
    assert_same(found, expected)


def test_shift_labels() -> None:
    model = uneven("llama")
    ids = tokens(2, 40)
    one = streamed(model, lay(16), {"input_ids": ids, "labels": ids})
    two = streamed(model, lay(16), {"input_ids": ids, "shift_labels": shifted(ids)})
    assert torch.equal(one[0], two[0])
    assert_same(two[1], one[1], 0)
