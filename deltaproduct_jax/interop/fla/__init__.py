"""flash-linear-attention's delta models, in the folder layout of Hugging Face.

``model = load(directory)`` and ``save(model, directory)``; ``interop/README.md`` has a page of
either. Needs the extra ``interop`` (safetensors). Neither torch nor pickle is touched.
"""

from deltaproduct_jax.interop.fla.loading import load as load
from deltaproduct_jax.interop.fla.saving import save as save
