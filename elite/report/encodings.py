"""What lossy boundaries cost in gradients: `python -m elite.report.encodings` writes `docs/measurements/encodings.json`.

SmolLM2-135M with its pretrained weights reads modules of Python's standard library, in fp32 on the CPU. The forward pass is exact. In the
backward pass a segment of 1 or 5 layers is recomputed from its decoded boundary and receives the gradient that the later, equally
recomputed segments handed down, as in the streamed executor. Gradients of all decoder weights are compared with exact ones.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elite import compose, hardware, pretrained
from elite.config import HardwareConfig, OutputConfig
from elite.errors import ModelError
from elite.executor.streamed.encoding import ENCODINGS, Encoding
from elite.report.measurement import MEASUREMENTS
from elite.runfolder import environment
from elite.streaming import BoundaryEncoding

TEXTS = ("argparse", "dataclasses", "json.decoder", "textwrap")
"""Standard library modules that are read; each gives one sequence."""
TOKENS = 768
SEGMENTS = (1, 5)
"""Layers from one kept boundary to the next."""
WIDTHS = (576, 1536, 2560, 4096)

# Prototypes, once each on the first 512 tokens: design, bits a value, text, gradient cosine with every layer and every fifth layer kept.
# All that were run are here. The design was chosen on argparse and dataclasses; the other texts took no part. Sequences differ by more than
# the Golomb–Rice variants do: the one without a list of outliers is the simplest, not the best on each.
TRIED = (
    ("NF4, groups of 64", 4.25, "argparse", 0.8966, 0.9314),
    ("16 largest in bf16, 64-wide Hadamard, NF4", 5.14, "argparse", 0.9853, 0.9878),
    ("16 largest in bf16, 64-wide Hadamard, NF4", 5.14, "dataclasses", 0.9902, 0.9922),
    ("4 largest in bf16, 362 polar points a pair", 4.5, "argparse", 0.9626, 0.9722),
    ("4 largest in bf16, 362 polar points a pair", 4.5, "dataclasses", 0.9624, 0.9748),
    ("4 largest in bf16, 362 polar points a pair, a scale for 16 values", 5.47, "argparse", 0.9875, 0.9870),
    ("4 largest in bf16, 64-wide Hadamard, 362 polar points a pair", 4.5, "argparse", 0.9872, 0.9902),
    ("4 largest in bf16, 64-wide Hadamard, 362 polar points a pair, a scale for 64 values", 4.72, "argparse", 0.9887, 0.9886),
    ("4 largest in bf16, row-wide rotation, 256 polar points a pair", 4.25, "argparse", 0.9824, 0.9858),
    ("8 largest in bf16, row-wide rotation, 256 polar points a pair", 4.47, "argparse", 0.9858, 0.9876),
    ("4 largest in bf16, row-wide rotation, 362 polar points a pair", 4.5, "argparse", 0.9862, 0.9883),
    ("4 largest in bf16, row-wide rotation, 362 polar points a pair", 4.5, "dataclasses", 0.9899, 0.9926),
    ("8 largest in bf16, row-wide rotation, 362 polar points a pair", 4.72, "argparse", 0.9898, 0.9907),
    ("16 largest in bf16, row-wide rotation, 362 polar points a pair", 5.17, "argparse", 0.9916, 0.9911),
    ("row-wide rotation, 512 polar points a pair", 4.53, "argparse", 0.9750, 0.9762),
    ("4 largest in bf16, row-wide rotation, 512 polar points a pair", 4.75, "argparse", 0.9913, 0.9927),
    ("Golomb–Rice code (chosen; there with the least-squares step besides)", 4.5, "argparse", 0.9919, 0.9925),
    ("Golomb–Rice code (chosen; there with the least-squares step besides)", 4.5, "dataclasses", 0.9914, 0.9948),
    ("2 largest apart, Golomb–Rice code", 4.5, "argparse", 0.9918, 0.9923),
    ("2 largest apart, Golomb–Rice code", 4.5, "dataclasses", 0.9930, 0.9953),
    ("4 largest apart, Golomb–Rice code", 4.5, "argparse", 0.9917, 0.9922),
    ("4 largest apart, Golomb–Rice code", 4.5, "dataclasses", 0.9944, 0.9948),
)

Coder = Callable[[Tensor], Tensor]


class Recomputed:
    """Backward passes of one sequence through the decoder layers, from boundaries that may be lossy.

    Args:
        model: a Llama-like causal language model in fp32.
        ids: tokens [1, T].
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        core = model.model
        self.layers: nn.ModuleList = core.layers
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.layers.parameters():
            parameter.requires_grad_(True)
        x = core.embed_tokens(ids)
        self._positions = torch.arange(ids.shape[1])[None]
        self._rotary = core.rotary_emb(x, self._positions)
        self.boundaries = [x]
        with torch.no_grad():
            for layer in self.layers:
                self.boundaries.append(self._forward(layer, self.boundaries[-1]))
        last = self.boundaries.pop().requires_grad_()
        loss = F.cross_entropy(model.lm_head(core.norm(last))[0, :-1], ids[0, 1:])
        (self._last_grad,) = torch.autograd.grad(loss, last)
        self.loss = loss.item()
        self.exact = self.gradients(lambda rows: rows, 1)

    def _forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = layer(x, attention_mask=None, position_ids=self._positions, position_embeddings=self._rotary, use_cache=False)
        return out

    def gradients(self, coder: Coder, segment: int) -> dict[str, Tensor]:
        """Gradients of every decoder weight; every `segment`-th boundary is kept and passes through `coder`, [T, width] → [T, width]."""
        self.layers.zero_grad()
        grad = self._last_grad
        for first in reversed(range(0, len(self.layers), segment)):
            start = coder(self.boundaries[first][0])[None].detach().requires_grad_()
            x = start
            for layer in self.layers[first : first + segment]:
                x = self._forward(layer, x)
            x.backward(grad)
            assert start.grad is not None
            grad = start.grad
        return {name: p.grad.clone() for name, p in self.layers.named_parameters() if p.grad is not None}

    def cosines(self, coder: Coder, segment: int) -> dict[str, float]:
        """Cosines to the exact gradients: of all weights as one vector, and of single linear maps."""
        lossy = self.gradients(coder, segment)
        pairs = [(lossy[name].double(), exact.double()) for name, exact in self.exact.items()]
        dot = sum(float((p * q).sum()) for p, q in pairs)
        squares = [sum(float(gradient.square().sum()) for gradient in side) for side in zip(*pairs, strict=True)]
        linear = torch.tensor([float(F.cosine_similarity(p.flatten(), q.flatten(), dim=0)) for p, q in pairs if p.dim() == 2])
        return {
            "gradient_cosine": dot / math.sqrt(math.prod(squares)),
            "linear_cosine_median": linear.median().item(),
            "linear_cosine_min": linear.min().item(),
        }

    def relative_errors(self, coder: Coder) -> list[float]:
        """Of each boundary, the RMS over tokens of |error| / |row|: a row counts the same however large it is."""
        rows = [boundary[0] for boundary in self.boundaries]
        return [((coder(x) - x).norm(dim=1) / x.norm(dim=1)).square().mean().sqrt().item() for x in rows]


def coder(encoding: Encoding) -> Coder:
    """Rows [n, width] there and back."""

    def there_and_back(x: Tensor) -> Tensor:
        rows = torch.empty(x.shape[0], encoding.row_bytes(x.shape[1], x.dtype), dtype=torch.uint8)
        encoding.encode(x, rows)
        return encoding.decode(rows, x.shape[1], x.dtype)

    return there_and_back


def summary(encoding: Encoding, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Bits a value, and the mean and the worst of the sequences' cosines by layers in a segment."""
    found: dict[str, Any] = {"steps": 0, "bits_per_value": {w: 8 * encoding.row_bytes(w, torch.bfloat16) / w for w in WIDTHS}}
    for segment in SEGMENTS:
        cosines = [line["gradient_cosine"] for line in lines if line["segment"] == segment]
        found[f"gradient_cosine_{segment}"] = {"mean": sum(cosines) / len(cosines), "worst": min(cosines)}
    errors = [error for line in lines for error in line["relative_errors"]]
    return found | {"relative_rms_error": math.sqrt(sum(error**2 for error in errors) / len(errors))}


def measure(cache: Path) -> list[dict[str, Any]]:
    """A run for every encoding, all of them on the same sequences.

    Raises:
        ModelError: the model is not on this machine.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = compose.from_overrides("model=smollm2_135m").config.model
    folder = pretrained.locate(config, cache, download=False)
    if folder is None:
        raise ModelError(f"model={config.name} is not on this machine", "`make setup` installs it")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Where this file lies says nothing to others.
    command = ["-m", "elite.report.encodings", *sys.argv[1:]]
    machine = environment() | {"command": command, "device": asdict(hardware.device(HardwareConfig(name="cpu")))}
    lines: dict[BoundaryEncoding, list[dict[str, Any]]] = {kind: [] for kind in ENCODINGS}
    for text in TEXTS:
        source = importlib.import_module(text).__file__
        assert source is not None
        sequence = Recomputed(model, tokenizer(Path(source).read_text(), return_tensors="pt").input_ids[:, :TOKENS])
        for kind, encoding in ENCODINGS.items():
            errors = sequence.relative_errors(coder(encoding))
            for segment in SEGMENTS:
                line = {"text": text, "segment": segment, "relative_errors": errors} | sequence.cosines(coder(encoding), segment)
                print(f"{kind.value:6} {text:14} {segment} {line['gradient_cosine']:.5f}", flush=True)
                lines[kind].append(line | {"exact_loss": sequence.loss})
    return [
        {
            "environment": machine,
            "config": {"model": {"name": config.name, "weights": config.weights.value}, "encoding": kind.value, "tokens": TOKENS},
            "summary": summary(encoding, lines[kind]),
            "metrics": lines[kind],
        }
        for kind, encoding in ENCODINGS.items()
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(OutputConfig().cache).expanduser())
    parser.add_argument("--target", type=Path, default=MEASUREMENTS)
    arguments = parser.parse_args()
    keys = ("design", "bits_per_value", "text", "gradient_cosine_1", "gradient_cosine_5")
    tried = [dict(zip(keys, entry, strict=True)) for entry in TRIED]
    path: Path = arguments.target / "encodings.json"
    path.write_text(json.dumps({"name": path.stem, "runs": measure(arguments.cache), "tried": tried}, indent=1) + "\n")
    print(path)
