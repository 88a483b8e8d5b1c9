"""Into how many pieces a sequence is cut, that run side by side on a GPU."""

# Programs with more than half of the shared memory: one a multiprocessor of an H100 or H200.
PROGRAMS_AT_ONCE = 132
GROUPS_IN_A_PIECE = 4
# Of a sequence of two or three pieces, without gradients; of ungated ones twice as many.
BLOCKS_FOR_TWO = 64
MOST_PIECES = 24


def pieces_for(heads: int, groups: int, *, R: int, gated: bool, keeps: bool) -> int:
    """Into how many pieces a sequence is cut that run side by side.

    Of two the first is walked through once more, for the state that the second begins with; those
    between two others also for what they do to any state. So of three, each as many programs as fit
    on the GPU at once, nothing is won but where gates may make pieces forget. What is launched more
    takes longer than few pieces save, where a sequence is short and nothing is kept for gradients.
    """
    pieces = min(PROGRAMS_AT_ONCE // heads, groups // GROUPS_IN_A_PIECE, MOST_PIECES)
    if pieces == 3 and not gated:
        pieces = 2
    is_short = groups * R < (BLOCKS_FOR_TWO if gated else 2 * BLOCKS_FOR_TWO)
    if pieces <= 1 or (pieces < 4 and is_short and not keeps):
        return 1
    # None of them without a token.
    return -(-groups // -(-groups // pieces))
