"""Prints the architecture of the first GPU as FUSED_WARMUP_CUDA_ARCHS takes it, such as 90."""

import torch

if __name__ == "__main__":
    print("{}{}".format(*torch.cuda.get_device_capability(0)))
