"""Megatron-Core underneath: ranks and devices, the optimizer, one update, checkpoints.

Importing this package prepares Megatron-Core for the machine's device (see ``device``).
"""

from r4b_core.parallel import device as device
