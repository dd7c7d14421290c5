"""What ELITE's forerunner claimed, by row of its feature table: the ablation prints it beside what was measured. None of it is ours."""

CLAIMED = {
    2: "75 % less optimizer state",
    4: "60 % fewer activations",
    6: "1.26 GB saved on Phi-2 against 8 bit",
    7: "4–8x speed",
    12: "10–20 % faster convergence",
    13: "2x faster convergence",
    16: "70 % less disk",
    35: "1.50 GB saved",
    36: "2.10 GB saved, 8x smaller K/V",
    37: "1.92 GB saved",
    38: "1.44 GB saved, 4x",
    39: "0.79 GB saved, 320x",
    40: "0.12 GB saved",
    41: "0.50 GB saved, 25 % faster",
    43: "5–6x throughput",
    44: "40 % faster",
}
