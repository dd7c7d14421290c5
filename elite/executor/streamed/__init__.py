"""The streamed executor: exact gradients of a causal language model, one layer and one chunk at a time.

    attach.py        the public function                functions.py   what autograd sees
    runner.py        carries out sweeps                 sweeps.py      their order
    attention.py     a chunk's exact attention          store.py       rows that outlive a chunk
    keys_values.py   K, V and their gradients           kernels.py     library kernels, chosen by choose.py
    rounds.py        keys that other ranks hold         split.py       a layer's backward in two
    rows.py          memory at a place                  stem.py        the model's own calls around its layers
    transfers.py     copies between places              encoding.py    boundaries in fewer bits
    unread.py        what a recomputation leaves out    weights.py     frozen weights, one layer ahead
    ends.py          passes before and after layers     divided.py     weights that ranks divide
    probe.py         a step measured by its ends        draws.py       random state for each chunk

How tokens are cut (`elite/chunks.py`) and which boundaries are kept (`elite/revolve.py`) is arithmetic that the planner shares.
"""
