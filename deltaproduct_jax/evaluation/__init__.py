"""Our models under lm-evaluation-harness: scoring, the harness's class, the paper's tasks.

What imports the harness is in ``harness.py`` and ``command.py``, which need the extra
``evaluation``.
"""
