"""Training steps for devices that are not there: their programs, compiled and read."""
