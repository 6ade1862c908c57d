"""HiF8 arithmetic put on a finished model from outside: its linears and its attention, chosen by name."""
