"""The streamed executor: exact gradients of a causal language model, one layer and one chunk at a time.

    attach.py        the public function                functions.py   what autograd sees
    runner.py        carries out sweeps                 sweeps.py      their order
    chunks.py        how tokens are cut                 store.py       rows that outlive a chunk
    attention.py     a chunk's exact attention          kernels.py     library kernels, chosen by choose.py
    keys_values.py   K, V and their gradients           stem.py        the model's own calls around its layers
    rows.py          memory at a place                  encoding.py    boundaries in fewer bits
    transfers.py     copies between places              weights.py     frozen weights, one layer ahead
    unread.py        what a recomputation leaves out    probe.py       a step measured by its ends

Which boundaries are kept is `elite/revolve.py`'s arithmetic, which the planner shares.
"""
