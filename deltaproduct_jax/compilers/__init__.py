"""What reads compiled programs: cost, traffic. Experiments and tests alone import it."""
