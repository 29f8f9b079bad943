"""Learning from data that keeps arriving: tested first, then learnt from, in bounded memory."""
