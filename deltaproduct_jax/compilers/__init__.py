"""What reads compiled programs: cost, traffic, memory, collectives, and what is known of chips.

Experiments and tests alone import it.
"""
