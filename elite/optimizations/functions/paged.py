"""bitsandbytes' paged optimizer, paged also after it has read a checkpoint."""

from typing import Any

import torch
from bitsandbytes.optim import PagedAdamW8bit

STATES = ("state1", "state2")


class PagedState(PagedAdamW8bit):
    """As the library has it; but what that loads it moves to the device, so here it goes back into paged memory."""

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        super().load_state_dict(state_dict, move_to_device)
        for parameter, values in self.state.items():
            for name in STATES:
                if isinstance(values.get(name), torch.Tensor):
                    # Paged if the tensor is large enough, ordinary memory otherwise.
                    buffer = self.get_state_buffer(parameter, dtype=values[name].dtype)
                    values[name] = buffer.copy_(values[name])
