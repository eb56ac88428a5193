"""What becomes of errors of a device that has no memory left."""

import pytest
import torch

from tlscale.distributed.device import naming_memory
from tlscale.errors import DeviceMemoryError


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        # Of no class of their own: page-locked memory, libraries, the CPU.
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_without_memory_the_keys_that_save_it_are_named(error):
    with pytest.raises(DeviceMemoryError) as caught, naming_memory():
        raise error
    for key in ("compute.micro_batch_size", "compute.gradient_checkpointing", "evaluate.batch_size", "--resume"):
        assert key in str(caught.value)
    its_own = naming_memory("evaluate.batch_size", "Give a lower one than 256.")
    with pytest.raises(DeviceMemoryError, match=r"evaluate.batch_size.*Give a lower one than 256"), its_own:
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="an illegal memory access"), naming_memory():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
