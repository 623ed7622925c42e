"""Test tensors are tiny: a second thread costs more than it brings, and the cores are shared with other processes."""

import torch

torch.set_num_threads(1)
