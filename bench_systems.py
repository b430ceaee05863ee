"""What machines do: the verbs of bench.py that measure steps, memory, kernels and ranks."""
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# --- memory ---

class MemoryTracker(TorchDispatchMode):
    """Every storage that torch makes while this is active: where, how large, from when to when.

    blocks: [bytes, born, freed or None, phase, region, operation], times in operations since the start. The caller
    sets `phase` and `region`.
    """

    def __init__(self, phase: str = "", region: str = ""):
        super().__init__()
        self.phase, self.region, self.time, self.live, self.blocks, self.storages = phase, region, 0, 0, [], {}
        self.history = [0]                         # live bytes after each operation

    def __torch_dispatch__(self, operation, types, arguments=(), more=None):
        results = operation(*arguments, **(more or {}))
        self.time += 1
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor, str(operation))
        self.history.append(self.live)
        return results

    def watch(self, tensor, operation: str) -> None:
        """Record the storage of a tensor, unless it is known or a view of one that is."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages or not storage.nbytes():
            return
        block = [storage.nbytes(), self.time, None, self.phase, self.region, operation]
        self.storages[storage._cdata] = block
        self.blocks.append(block)
        self.live += block[0]
        weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key: int) -> None:
        block = self.storages.pop(key)
        block[2] = self.time
        self.live -= block[0]


VERBS = {}
