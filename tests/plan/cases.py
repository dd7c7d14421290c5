"""Small runs whose peaks are measured and planned."""

from tests.plan.steps import Case

HALF = ("mixed_precision", "flash_attention")
CHECKPOINTED = (*HALF, "gradient_checkpointing", "fused_loss")
FLASH = ("flash_attention",)
PLAIN = [
    *(Case(kind, on) for kind in ("llama", "phi") for on in (FLASH, HALF, (*HALF, "gradient_checkpointing"))),
    Case("llama", HALF, cuda=True, vocab=4096),
    Case("phi", (*FLASH, "gradient_checkpointing", "fused_lora")),
    Case("gemma", CHECKPOINTED),
    Case("llama", CHECKPOINTED, vocab=8192),
    # Few tokens, wide models: copies of weights and gradients count.
    Case("qwen2", CHECKPOINTED, cuda=True, tokens=128, width=256, rank=64),
    Case("phi", (*CHECKPOINTED, "fused_lora"), cuda=True, tokens=128, rank=64),
    Case("llama", (*CHECKPOINTED, "fused_lora"), cuda=True),
    Case("phi", CHECKPOINTED, cuda=True),
    Case("llama", (*HALF, "fused_loss", "sequence_packing"), cuda=True, mlp=0.5),
    Case("phi", (*CHECKPOINTED, "fused_lora", "sequence_packing"), cuda=True, mlp=0.5),
    # A narrow MLP: attention, norms and recomputation hold most.
    Case("llama", (*CHECKPOINTED, "fused_lora"), cuda=True, mlp=0.5),
    Case("phi", (*CHECKPOINTED, "fused_lora"), cuda=True, mlp=0.5),
    Case("llama", (*FLASH, "gradient_checkpointing", "fused_loss"), mlp=0.5),
    Case("llama", (*CHECKPOINTED, "fused_lora", "tiled_mlp"), cuda=True),
    Case("phi", (*CHECKPOINTED, "tiled_mlp"), cuda=True),
    Case("phi", (*CHECKPOINTED, "fused_lora"), cuda=True, dropout=0.1),
    Case("phi", (*CHECKPOINTED, "fused_lora"), cuda=True, mlp=0.5, dropout=0.1),
    Case("phi", (*CHECKPOINTED, "tiled_mlp"), cuda=True, dropout=0.1),
    Case("phi", (*CHECKPOINTED, "tiled_mlp"), cuda=True, full=True, dropout=0.1),
    Case("phi", HALF, cuda=True, dropout=0.1),
    # Two tiles of the only layer, whose input needs no gradient.
    Case("phi", (*HALF, "fused_loss", "tiled_mlp"), cuda=True, tokens=104, width=256, mlp=4, layers=1),
    # Three tiles, a rest among them.
    Case("phi", (*CHECKPOINTED, "fused_lora", "tiled_mlp"), cuda=True, tokens=136, width=256, mlp=4, rank=4, dropout=0.1),
    Case("llama", (*CHECKPOINTED, "fused_lora", "tiled_mlp"), cuda=True, tokens=136, width=256, rank=4),
    # All weights: gradients grow while activations go.
    *(Case(kind, (*FLASH, "gradient_checkpointing"), full=True) for kind in ("llama", "phi")),
    Case("llama", CHECKPOINTED, cuda=True, full=True),
    Case("phi", (*HALF, "gradient_checkpointing"), cuda=True, full=True, tokens=64, width=256),
    Case("llama", (*HALF, "gradient_checkpointing"), cuda=True, full=True, tokens=256, vocab=2048),
    Case("qwen2", FLASH, full=True),
]
FUSED = [
    Case("phi", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True),
    Case("llama", (*HALF, "fused_loss", "fused_kernels", "fused_lora"), cuda=True),
    Case("llama", (*CHECKPOINTED, "fused_kernels"), cuda=True, full=True),
    # Its only layer passes no gradient on.
    Case("phi", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True, dropout=0.1, layers=1),
    # Likewise in tiles: few, of which the first goes back beside the whole output's gradient, and many, where the recomputation holds most.
    *(
        Case("phi", (*CHECKPOINTED, "fused_kernels", "fused_lora", "tiled_mlp"), True, False, 256, 4, tokens, 4, dropout=0.1, layers=1)
        for tokens in (136, 448)
    ),
    # A narrow MLP: recomputed beside the gradients of both branches.
    Case("phi", (*CHECKPOINTED, "fused_kernels"), cuda=True, mlp=0.5, dropout=0.1),
]
MORE_FUSED = [
    Case("llama", (*HALF, "fused_loss", "fused_kernels", "fused_lora", "sequence_packing"), cuda=True, mlp=1),
    Case("llama", (*CHECKPOINTED, "fused_kernels"), cuda=True, full=True, tokens=64, width=256, vocab=2048),
    Case("llama", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True),
    Case("llama", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True, mlp=0.5),
    Case("qwen2", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True, tokens=128, rank=64),
    Case("phi", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True, mlp=0.5),
    Case("phi", (*CHECKPOINTED, "fused_kernels", "fused_lora"), cuda=True, vocab=8192),
    Case("llama", (*CHECKPOINTED, "fused_kernels", "fused_lora", "tiled_mlp"), cuda=True),
]
