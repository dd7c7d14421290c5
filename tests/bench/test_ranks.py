"""What several ranks bring: the bench's own arithmetic, by real ranks."""

import json
import socket
from pathlib import Path

import pytest

from elite.bench.ranks import ZERO3, Case, member
from elite.distributed.ranks import Ranks
from tests.distributed.forked import together

TOKENS = 128
TINY = ("debug=tiny", "hardware=cpu", "tier.target_length=16", "executor.chunk=32", "executor.block=32", "executor.keys_values=device")
CASES = {
    "ring": Case("smollm2_135m", TOKENS, ("executor=streamed", "optimizations.ring_attention.enabled=true")),
    "ddp": Case("smollm2_135m", TOKENS, ("executor=whole",), passes=2),
    "together": Case("smollm2_135m", TOKENS, ("executor=whole", "training.micro_batch=3")),
    # As the bench has it, but for the machine and the model's size.
    "zero3": Case("smollm2_135m", TOKENS, ZERO3[:-2], alone=False),
}


@pytest.mark.slow
def test_ranks_that_share_a_sequence_take_one_and_others_one_each(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def launcher(rank: int) -> dict[str, str]:
        return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def work(_: Ranks, folder: Path) -> None:
        for name, case in CASES.items():
            member(case, TOKENS, (*TINY, f"output.cache={folder}"), 2, folder / f"{name}.json")

    together(tmp_path, 2, work, launcher)
    for name, sharing, sequences in (("ring", 2, 1), ("ddp", 1, 4), ("together", 1, 6), ("zero3", 1, 2)):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert ("zero_3" in found["active"]) == (name == "zero3") and found["cap_holds"] is None
        assert found["ranks"] == 2 and found["sharing"] == sharing and len(found["steps"]) == 3
        for step in found["steps"]:
            assert step["tokens_per_s"] * step["step_s"] == pytest.approx(sequences * TOKENS)
    # Keys and values of 2 heads of 16 in bf16: half the tokens, whose places gradients take, and two blocks on their way; three sums in
    # fp32. A block has 32 keys.
    expected = 2 * 2 * 16 * (2 * (TOKENS // 2 + 2 * 32) + 4 * 3 * 32)
    assert json.loads((tmp_path / "ring.json").read_text())["steps"][-1]["keys_values_bytes"] == expected
