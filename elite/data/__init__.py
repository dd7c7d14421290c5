"""repository → documents → tokens → packed sequences.

`sources` reads the files that git tracks through `filters`, `records` jsonl or a data set; `harvest` drops copies and holds files out;
`tokens` turns text into a memory-mapped store, once; `packing` cuts and packs its spans; `batches` deals them to ranks as tensors;
`validation` puts a repository before its held-out files.
"""

from elite.data.batches import IGNORE, Batch, TrainStream, collate
from elite.data.documents import Document
from elite.data.harvest import Harvest, estimate, harvest
from elite.data.packing import Piece, Sequence, Span, pack, pieces, utilisation
from elite.data.sources import find_repositories
from elite.data.tokens import TokenFile, TokenStore, cached, open_store, tokenise
from elite.data.validation import Completion, completion_example, validation_batches

__all__ = [
    "IGNORE",
    "Batch",
    "Completion",
    "Document",
    "Harvest",
    "Piece",
    "Sequence",
    "Span",
    "TokenFile",
    "TokenStore",
    "TrainStream",
    "cached",
    "collate",
    "completion_example",
    "estimate",
    "find_repositories",
    "harvest",
    "open_store",
    "pack",
    "pieces",
    "tokenise",
    "utilisation",
    "validation_batches",
]
