"""The recurrences that the paper compares DeltaProduct with, as pure functions of arrays.

All speak one notation: a state S [K, V] per head, zero before the first token, and per token

    gated_linear_attention   S <- diag(gate) S + k v^T               Mamba-2, GLA
    mlstm                    the same, exponential input gate         xLSTM
    diagonal_plus_low_rank   S <- (diag(gate) + b a^T) S + k v^T     RWKV-7
    channel_delta            S <- (I - beta k k^T) diag(gate) S      Kimi Delta Attention,
                                  + beta k v^T                       Erase-then-Delta
    slstm                    gates that see the last output           xLSTM

and the readout ``o = scale * S^T q`` after it. Each has a recurrent form, which is the
specification, and a form for one token; all but slstm, which is sequential by nature, have a
chunked form as well. Backward passes are JAX's own, with one state kept per chunk.
"""

from deltaproduct_jax.ops.baselines.channel_delta import channel_delta as channel_delta
from deltaproduct_jax.ops.baselines.channel_delta import channel_delta_step as channel_delta_step
from deltaproduct_jax.ops.baselines.diagonal_plus_low_rank import (
    diagonal_plus_low_rank as diagonal_plus_low_rank,
)
from deltaproduct_jax.ops.baselines.diagonal_plus_low_rank import (
    diagonal_plus_low_rank_step as diagonal_plus_low_rank_step,
)
from deltaproduct_jax.ops.baselines.gated_linear_attention import (
    gated_linear_attention as gated_linear_attention,
)
from deltaproduct_jax.ops.baselines.gated_linear_attention import (
    gated_linear_attention_step as gated_linear_attention_step,
)
from deltaproduct_jax.ops.baselines.gates import extended_gate as extended_gate
from deltaproduct_jax.ops.baselines.mlstm import MLSTMState as MLSTMState
from deltaproduct_jax.ops.baselines.mlstm import mlstm as mlstm
from deltaproduct_jax.ops.baselines.mlstm import mlstm_step as mlstm_step
from deltaproduct_jax.ops.baselines.slstm import SLSTMState as SLSTMState
from deltaproduct_jax.ops.baselines.slstm import slstm as slstm
from deltaproduct_jax.ops.baselines.slstm import slstm_step as slstm_step
