"""Runs that differ only in numbers, trained together by one compiled program."""
