"""Memory for arriving rows that the layers of a rank use one after another."""

import torch
from torch import Tensor


class ReceiveRoom:
    """Buffers that grow to what is needed and are kept. Whoever takes one uses it until the next one takes it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def take(self, number: int, num_rows: int, row_size: int, dtype: torch.dtype) -> Tensor:
        """Buffer `number` as rows [num_rows, row_size], with whatever is in it."""
        num_bytes = num_rows * row_size * dtype.itemsize
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < num_bytes:
            self._buffers.pop(number, None)
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                buffer = self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return buffer[:num_bytes].view(dtype).view(num_rows, row_size)
