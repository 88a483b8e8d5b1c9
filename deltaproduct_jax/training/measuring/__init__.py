"""What a run takes: its speed, its memory, and traces of some of its steps."""
