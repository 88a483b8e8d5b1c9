"""GPU kernels in Gluon, with specialised warps, for Hopper; `hopper.py` launches them."""
