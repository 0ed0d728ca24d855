"""Sessions: states of sequences that are kept, named, forked, moved, and gone on with."""
