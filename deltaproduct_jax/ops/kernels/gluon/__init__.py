"""GPU kernels in Gluon, with specialised warps, for Hopper; `passes.py` launches them."""
