"""Causal depthwise convolutions over a few tokens, with what stands behind them fused in."""
