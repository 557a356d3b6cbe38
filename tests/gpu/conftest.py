import torch

torch.set_num_threads(1)  # what is compared with on the CPU is small, and test processes run beside each other
