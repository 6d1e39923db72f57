"""Out of memory: telling it from other failures, and giving back what can be given back."""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or the host had no memory left."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # torch's CPU allocator raises a bare RuntimeError: "... DefaultCPUAllocator: can't allocate memory ..."
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def release() -> None:
    """Return unused memory to the device. Call it once no exception holds the frames of the failed try."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
