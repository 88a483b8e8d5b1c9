"""Models of other projects: their folders read into ours, and ours written as theirs."""
