"""Pure functions of arrays: the recurrence in every form."""
