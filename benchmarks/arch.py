"""Print the architecture of the first GPU in the form of FUSED_WARMUP_CUDA_ARCHS, such as 90."""

import torch

if __name__ == "__main__":
    major, minor = torch.cuda.get_device_capability(0)
    print(f"{major}{minor}")
